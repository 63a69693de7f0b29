"""A trained transformer with FLOATER: position vectors in place of the biases of its projections."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .checks import check_streams
from .encoder import FLOATER
from .frames import Stack
from .hooks import Closes, Opens, Remade
from .models import STREAMS, Attention, check_widths, find_attention, names_of, stacks_of
from .multihead import PositionedMultiheadAttention, check_served
from .sites import Handles, Site, place, restore


class Attachment(nn.ModuleDict):
    """What `attach` has added to a model: the encoders, a FLOATER by the name of its stack. It is `model.floater`.

    Copies and pickles of the model have their own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a child of its own child
        self._stacks: list[Stack] = []
        self._sites: list[Site] = []
        self._handles: Handles = []
        self._nested: list[nn.TransformerEncoder] = []  # those that would give their layers nested tensors
        self._attached = True

    @property
    def encoders(self) -> dict[str, FLOATER]:
        return {name: encoder for name, encoder in self.items() if isinstance(encoder, FLOATER)}

    @contextlib.contextmanager
    def hold(self, local: bool = False) -> Iterator[None]:
        """`FLOATER.hold` of all encoders: in this block they solve once, and have their gradients at its end."""
        with contextlib.ExitStack() as held:
            for encoder in self.encoders.values():
                held.enter_context(encoder.hold(local))
            yield

    def detach(self) -> None:
        """Undo `attach`: hooks and classes as before, and p(0) as the projections' biases.

        That is the same model while the flow is zero. Otherwise its positions are lost, and a UserWarning tells how far
        a vector was from its p(0) at most. RuntimeError the second time.
        """
        if not self._attached:
            raise RuntimeError("this attachment is detached already")
        distance = self._distance()
        for handle in self._handles:
            handle.remove()
        for site in self._sites:
            restore(site)
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        (model,) = self._model
        for module in model.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, Remade):
                module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]
        del model.floater
        self._attached = False
        if distance > 0:
            warnings.warn(
                f"the flow is not zero: the model loses vectors that are up to {distance:.3g} away from the biases "
                "it gets back",
                stacklevel=2,
            )

    @torch.no_grad()
    def _distance(self) -> float:
        """The largest change of a number along as many positions as were asked for, 64 at least."""
        largest = 0.0
        for stack in self._stacks:
            for encoder in stack.encoders.values():
                vectors = encoder(max(stack.longest, 64))
                largest = max(largest, float((vectors - vectors[:, :, :1]).abs().max()))
        return largest


def attach(
    model: nn.Module,
    *,
    streams: Sequence[str] = STREAMS,
    dynamics: nn.Module | None = None,
    delta_t: float = 0.1,
    **options: Any,
) -> Attachment:
    r"""Add FLOATER's position vectors to the projected queries, keys and values of every attention layer of a model.

    ``q_i = W_q x_i + p_query(t_i)``, and so for keys and values, before scores are scaled (Liu et al., ICML 2020,
    equation 13). The biases of the projections become p(0), parameters of a FLOATER, and leave the model. Its flow
    starts at zero, so that outputs are what they were to rounding; training then changes it. What the model does about
    positions itself stays.

    Layers of a stack share one FLOATER and one solve a forward, by name: "layers" of a model of one stack; "encoder",
    "decoder" and "cross" of one with cross attention, where "decoder" has the stream cross_query too and "cross" has
    cross_key and cross_value at the encoder's positions. They are children of ``model.floater``, with parameters and
    entries of the state dict: a model that is built and attached in the same way loads it.

    Positions: position_ids if the model is given some, otherwise 0, 1, ... after what the cache holds, where tokens
    that an attention_mask (batch, length) of zeros and ones hides are not counted: padding on the left moves nothing,
    padding on the right has the positions it would have without a mask. That is one rule for all models, those included
    that count padding in embeddings of their own (BERT; GPT-2, whose generate gives position_ids). To see whether a
    mask hides anything on the left waits for a GPU, once a forward. Cross keys, and torch.nn.MultiheadAttention, count
    from 0. Threads may share an attached model, as they may any other.

    Args:
        model: of transformers, or any module that contains torch.nn.MultiheadAttention (add_bias_kv and add_zero_attn
            excepted), also in nn.Transformer and its layers, or is one. floater/models.py lists what is found.
        streams: one or more of "query", "key", "value". Projections of the others keep their biases.
        dynamics, delta_t, options: of `FLOATER`. A model of several FLOATERs has `dynamics` in the first and
            copies of it in the others.

    Checkpointing by a model's own activation_checkpointing_enable() works; with use_reentrant=True each layer
    solves again in backward. torch.compile breaks its graph at each projection, as vectors are made outside of graphs;
    layers of transformers, each of which knows its number, then have graphs of their own, so that
    torch._dynamo.config.recompile_limit has to be a few times the number of layers.

    Raises ValueError if no attention is found, if `model` is attached already, if projections of a stack differ in
    width (keys and values are narrower with grouped queries, where streams=("query",) is possible), and for attention
    that is known to project (length, batch, width), of Longformer, LED and FSMT, or not by calling its projections, of
    WavLM. The model's forward raises RuntimeError where positions are not known, and where a projection has the length
    of input_ids, inputs_embeds or hidden_states first, which is seen if length and batch differ.

        >>> import posattn
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2).eval()
        >>> x = torch.randn(2, 10, 32)
        >>> before = model(x)
        >>> attachment = posattn.floater.attach(model)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
        >>> attachment.encoders["layers"].initial.shape  # streams, layers, width
        torch.Size([3, 2, 32])
    """
    streams = check_streams(streams, STREAMS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, (Attachment, PositionedMultiheadAttention)) for module in model.modules()):
        raise ValueError("model is attached already, or a part of it; detach() it first")
    if hasattr(model, "floater"):
        raise ValueError(
            f"{type(model).__name__} has an attribute floater already, which attach would replace"
        )
    found = find_attention(model)
    for each in found:
        if isinstance(each.module, nn.MultiheadAttention):
            check_served(each.path, each.module)
    stacks = stacks_of(found)
    widths = {owner: check_widths(owner, layers, streams) for owner, layers in stacks.items()}

    encoders: dict[str, FLOATER] = {}
    attachment = Attachment(model)
    for owner, names in names_of(stacks).items():
        layers, own = stacks[owner], {}
        for role, name in zip(("own", "cross"), names):
            if role in widths[owner]:
                first = not encoders
                options["dynamics"] = dynamics if dynamics is None or first else copy.deepcopy(dynamics)
                own[role] = encoders[name] = _encoder(
                    layers, role, widths[owner][role], streams, delta_t, options
                )
        stack = Stack(names[0], own)
        attachment._stacks.append(stack)
        for cross in (False, True):
            for layer, each in enumerate(each for each in layers if each.cross == cross):
                sites, handles = place(stack, each, layer, streams)
                attachment._sites.extend(sites)
                attachment._handles.extend(handles)
        attachment._handles.extend(_watch(stack, model, owner, stacks))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor = (
                False  # decided when it was made: its layers' fast path, which they do not take
            )
            attachment._nested.append(module)
    attachment.update(encoders)
    model.floater = attachment
    return attachment


def _encoder(
    layers: list[Attention],
    role: str,
    width: int,
    streams: tuple[str, ...],
    delta_t: float,
    options: dict[str, Any],
) -> FLOATER:
    """The FLOATER of a stack, or of its cross keys and values, on the device and in the dtype of its projections."""
    crosses = sum(each.cross for each in layers)
    own = len(layers) - crosses
    names = tuple(
        f"cross_{stream}" for stream in streams if crosses and (stream == "query") == (role == "own")
    )
    if role == "own" and own:
        names += streams
    number = max(own, crosses) if role == "own" else crosses
    module = layers[0].module
    weight = next(module.parameters())
    there = {"device": weight.device, "dtype": weight.dtype}
    return FLOATER(width, number, names, delta_t=delta_t, **{**there, **options})


def _watch(stack: Stack, model: nn.Module, owner: str, stacks: dict[str, list[Attention]]) -> Handles:
    """Hooks on what runs the stack: its owner, and all modules around it that run no other stack."""
    paths = owner.split(".") if owner else []
    around = [".".join(paths[:i]) for i in range(len(paths) + 1)]
    handles: Handles = []
    for path in around:
        inside = [other for other in stacks if not path or other == path or other.startswith(path + ".")]
        if path == owner or inside == [owner]:
            module = model.get_submodule(path)
            opens = Opens(stack, module, path == owner)
            handles.append(module.register_forward_pre_hook(opens, with_kwargs=True))
            handles.append(module.register_forward_hook(Closes(stack), always_call=True))
    return handles
