"""Which modules of a model are attention, and where their queries, keys and values are projected.

A module is attention if it is an nn.MultiheadAttention or has children by the names of one row of the tables below.
Layers belong to one stack if they sit in the same list (nn.ModuleList, nn.Sequential), whose owner's forward runs them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

STREAMS = ("query", "key", "value")

# Children of an attention module, one projection a stream.
SEPARATE = {
    ("query", "key", "value"): "BERT, RoBERTa, ELECTRA, ALBERT, BEiT",
    ("q_proj", "k_proj", "v_proj"): "OPT, BART, Marian, Pegasus, Whisper, GPT-Neo, GPT-J, Llama, ViT, CLIP",
    ("q_lin", "k_lin", "v_lin"): "DistilBERT, XLM, Flaubert",
    ("q", "k", "v"): "T5, mT5, LongT5",
}
# One projection for all: its name, the type it must have, and how queries, keys and values lie in its output.
# "chunks": all of query, all of key, all of value. "heads": query, key and value of one head after the other.
FUSED = {
    ("c_attn", "Conv1D"): ("chunks", "GPT-2, ImageGPT, OpenAI GPT"),  # cross: key and value, beside q_attn
    ("query_key_value", "Linear"): ("heads", "GPT-NeoX, Pythia, BLOOM, Persimmon"),
}
# Parts of names, in lower case, by which cross attention goes.
CROSS = ("cross", "encoder_attn", "encdec")
# Classes, by the last part of their module's name and their own, whose projections no hook can serve.
LENGTH_FIRST = "it projects (length, batch, width)"
NOT_SERVED = {
    "modeling_longformer.LongformerSelfAttention": LENGTH_FIRST,
    "modeling_led.LEDEncoderSelfAttention": LENGTH_FIRST,
    "modeling_fsmt.Attention": LENGTH_FIRST,
    "modeling_wavlm.WavLMAttention": "it takes weights and biases of its projections and does not call them",
}


class Projection(NamedTuple):
    """One module, and which streams come out of it. layout: "whole", "chunks" or "heads"; widths: one a stream."""

    module: nn.Module
    streams: tuple[str, ...]
    layout: str
    widths: tuple[int, ...]
    head_dim: int = 0


class Attention(NamedTuple):
    """An attention module. owner: the path of the module that runs its stack. No projections: MultiheadAttention."""

    path: str
    owner: str
    module: nn.Module
    cross: bool
    projections: tuple[Projection, ...]


def find_attention(model: nn.Module) -> list[Attention]:
    """All attention of a model, in its order; a module that is shared by several layers once.

    ValueError for none, and for what is not served.
    """
    found = []
    for path, module in model.named_modules():
        why = NOT_SERVED.get(f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}")
        if why is not None:
            raise ValueError(f"{path} is a {type(module).__name__}, which is not served: {why}")
        projections = _projections(path, module)
        if projections or isinstance(module, nn.MultiheadAttention):
            owner, below = _owner(path)
            found.append(Attention(path, owner, module, _is_cross(model, path, below, module), projections))
    if not found:
        separate = [f"{', '.join(names)} ({models})" for names, models in SEPARATE.items()]
        fused = [f"{name}, a {kind} ({models})" for (name, kind), (_, models) in FUSED.items()]
        raise ValueError(
            f"no attention found in {type(model).__name__}: looked for torch.nn.MultiheadAttention and for modules "
            f"with the children {'; '.join((*separate, *fused))}"
        )
    return found


def stacks_of(found: list[Attention]) -> dict[str, list[Attention]]:
    """Attention by the path of the module that runs it."""
    owners = dict.fromkeys(each.owner for each in found)
    return {owner: [each for each in found if each.owner == owner] for owner in owners}


def names_of(stacks: dict[str, list[Attention]]) -> dict[str, tuple[str, str]]:
    """A name for each stack and one for its cross keys and values, by owner."""
    decoders = [owner for owner, layers in stacks.items() if any(each.cross for each in layers)]
    if len(stacks) > 2 or len(decoders) > 1 or (len(stacks) == 2 and not decoders):
        names = {owner: owner.replace(".", "_") or "layers" for owner in stacks}
        return {owner: (name, f"{name}_cross") for owner, name in names.items()}
    other = "encoder" if decoders else "layers"
    return {owner: ("decoder" if owner in decoders else other, "cross") for owner in stacks}


def check_widths(owner: str, layers: list[Attention], streams: tuple[str, ...]) -> dict[str, int]:
    """The width of the vectors of a stack, "own" and "cross"; ValueError if there is not one."""
    widths: dict[str, set[int]] = {"own": set(), "cross": set()}
    for each in layers:
        mine = {
            stream: width for part in each.projections for stream, width in zip(part.streams, part.widths)
        }
        if isinstance(each.module, nn.MultiheadAttention):
            mine = dict.fromkeys(STREAMS, each.module.embed_dim)
        chosen = {mine[stream] for stream in streams}
        if len(chosen) > 1:
            shown = ", ".join(f"{stream} {mine[stream]}" for stream in streams)
            raise ValueError(
                f"{each.path}: one FLOATER serves projections of one width, got {shown}. Keys and values are narrower "
                'with grouped queries: choose streams=("query",) or streams=("key", "value")'
            )
        for stream in streams:
            widths["cross" if each.cross and stream != "query" else "own"].add(mine[stream])
    for part in widths.values():
        if len(part) > 1:
            raise ValueError(
                f'layers of "{owner}" project to widths {sorted(part)}; one FLOATER serves one width'
            )
    return {name: part.pop() for name, part in widths.items() if part}


def is_conv1d(module: nn.Module) -> bool:
    """transformers.pytorch_utils.Conv1D: a linear layer with weight (in, out) that cannot do without a bias."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Module) and (isinstance(module, nn.Linear) or is_conv1d(module))


def _width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1] if is_conv1d(module) else weight.shape[0])


def _projections(path: str, module: nn.Module) -> tuple[Projection, ...]:
    for names in SEPARATE:
        children = [getattr(module, name, None) for name in names]
        if all(map(_is_linear, children)):
            return tuple(
                Projection(child, (stream,), "whole", (_width(child),))
                for stream, child in zip(STREAMS, children)
                if isinstance(child, nn.Module)
            )
    for (name, kind), (layout, _) in FUSED.items():
        child = getattr(module, name, None)
        if isinstance(child, nn.Module) and _is_linear(child) and is_conv1d(child) == (kind == "Conv1D"):
            return _fused(path, module, child, layout)
    return ()


def _fused(path: str, module: nn.Module, child: nn.Module, layout: str) -> tuple[Projection, ...]:
    total = _width(child)
    query = getattr(module, "q_attn", None)
    if layout == "chunks" and query is not None:  # GPT-2's cross attention
        return (
            Projection(query, STREAMS[:1], "whole", (_width(query),)),
            Projection(child, STREAMS[1:], "chunks", (total // 2,) * 2),
        )
    head_dim = 0
    if layout == "heads":
        head_dim = int(getattr(module, "head_dim", 0) or getattr(module, "head_size", 0))
        heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        if not head_dim or (heads is not None and 3 * heads * head_dim != total):
            raise ValueError(
                f"the fused projection of {path} is {total} wide, not 3 times heads x head_dim: queries, keys and "
                "values of different widths (grouped or multi-query attention) in one projection are not served"
            )
    return (Projection(child, STREAMS, layout, (total // 3,) * 3, head_dim),)


def _owner(path: str) -> tuple[str, list[str]]:
    """The path of the module whose forward runs the list that a path is in, and the names from that list on."""
    parts = path.split(".") if path else []
    for i, part in enumerate(parts):
        if part.isdigit():
            start = max(i - 1, 0)  # the list's own name; a model that is a list has none
            return ".".join(parts[:start]), parts[start:]
    return ".".join(parts[:-1]), parts[-1:]


def _is_cross(model: nn.Module, path: str, below: list[str], module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False) is True:
        return True
    if any(word in part.lower() for part in below for word in CROSS):
        return True
    if below and below[-1] == "multihead_attn":  # of nn.TransformerDecoderLayer
        return hasattr(model.get_submodule(path.rpartition(".")[0]), "self_attn")
    return False
