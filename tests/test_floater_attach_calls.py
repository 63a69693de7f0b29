"""How attached models are called: by threads, interrupted, within themselves, compiled, and with lengths first."""

from __future__ import annotations

import copy
import logging
import sys
import threading

import pytest
import torch
from floater_attach_cases import SIZE, WORDS, build, set_going
from torch import nn
from torch.utils.checkpoint import checkpoint

from posattn.floater import attach
from posattn.floater.frames import Stack


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def gpt2(transformers):
    model = build("gpt2", transformers, n_positions=128)
    set_going(attach(model))
    return model


def frames_of(model):
    return [frame for stack in model.floater._stacks for frame in stack.frames]


TOKENS = torch.arange(3, 23).view(2, 10)
LATE = torch.arange(60, 70)[None]


def test_threads_have_positions_of_their_own(gpt2):
    calls = [{"input_ids": TOKENS}, {"input_ids": TOKENS, "position_ids": LATE}]
    with torch.no_grad():
        expected = [gpt2(**call).logits for call in calls]
    assert not torch.equal(*expected)
    wrong, start = [], threading.Barrier(2)

    def work(which):
        start.wait()
        for _ in range(30):
            try:
                with torch.no_grad():
                    right = torch.equal(gpt2(**calls[which]).logits, expected[which])
            except RuntimeError as error:
                right = error
            if right is not True:
                wrong.append((which, right))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    assert not frames_of(gpt2)
    assert gpt2.floater._stacks[0].longest == 70


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_forward_leaves_nothing(gpt2, error):
    expected = gpt2(TOKENS).logits
    late = gpt2(TOKENS, position_ids=LATE).logits

    def interrupt(*_):
        handle.remove()
        raise error("now")

    for again in ({}, {"position_ids": LATE}):
        handle = gpt2.transformer.h[1].register_forward_pre_hook(interrupt)
        with pytest.raises(error, match="now"):
            gpt2(TOKENS, position_ids=LATE)
        assert torch.equal(gpt2(TOKENS, **again).logits, late if again else expected)
        assert not frames_of(gpt2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_a_forward_within_a_forward(gpt2, error):
    """The inner one stands where it would alone, and however it ends the outer one goes on where it was."""
    expected = gpt2(TOKENS).logits
    late = gpt2(TOKENS, position_ids=LATE).logits
    inner = []

    def interrupt(*_):
        if len(inner) == 1:
            raise error("now")

    def nested(*_):
        if not inner:
            inner.append(None)
            try:
                inner.append(gpt2(TOKENS).logits)
            except (KeyboardInterrupt, RuntimeError) as raised:
                inner.append(raised)

    gpt2.transformer.h[1].register_forward_pre_hook(nested)
    if error is not None:
        gpt2.transformer.h[2].register_forward_pre_hook(interrupt)
    assert torch.equal(gpt2(TOKENS, position_ids=LATE).logits, late)
    assert isinstance(inner[1], error) if error else torch.equal(inner[1], expected)
    assert not frames_of(gpt2)


def test_a_layer_alone_after_an_interruption():
    """It has the vectors of the parameters of now, not those of the forward that was left."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    set_going(attach(model))
    x = torch.randn(2, 5, 16)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    set_going(model.floater)
    fresh = copy.deepcopy(model)
    assert torch.equal(model.layers[0](x), fresh.layers[0](x))


class Checkpointed(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, used):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) if used else layer(x)
        return x


def test_a_forward_without_gradients_before_the_backward_of_a_checkpoint():
    """What a re-entrant checkpoint is to differentiate is known from its own second forward."""
    make = lambda: nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = Checkpointed(make() for _ in range(2))
    attachment = set_going(attach(model))
    x, found = torch.randn(2, 5, 16, requires_grad=True), []
    for used in (False, True):
        loss = model(x, used).square().sum()
        with torch.no_grad():
            model(x, False)
        loss.backward()
        found.append([p.grad.clone() for p in attachment.parameters()])
        model.zero_grad()
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + (q @ k.transpose(-2, -1)).softmax(-1) @ v


class LengthFirst(nn.Module):
    """Given (batch, length), padded to a multiple of `window`, and transposed if asked."""

    def __init__(self, window=1, transposed=True):
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 8), nn.ModuleList([Layer()])
        self.window, self.transposed = window, transposed

    def forward(self, input_ids):
        x = nn.functional.pad(self.embed(input_ids), (0, 0, 0, -input_ids.shape[1] % self.window))
        for layer in self.layers:
            x = layer(x.transpose(0, 1)).transpose(0, 1) if self.transposed else layer(x)
        return x


@pytest.mark.parametrize(("batch", "length", "window"), [(2, 6, 1), (1, 6, 1), (6, 2, 1), (2, 6, 8)])
def test_lengths_first_are_refused(batch, length, window):
    tokens = torch.ones(batch, length, dtype=torch.long)
    shape = rf"projection gave \({-(-length // window) * window}, {batch}, 8\)"
    model = LengthFirst(window)
    model(tokens)
    attach(model)
    match = rf'"layers" was given {batch} sequences of length {length}.*{shape}.*\(batch, length, width\) are'
    with pytest.raises(RuntimeError, match=match):
        model(tokens)
    model = LengthFirst(window, transposed=False)
    attach(model)
    model(tokens)


def test_models_that_are_not_served(transformers):
    config = transformers.LongformerConfig(**SIZE, **WORDS, attention_window=4)
    with pytest.raises(ValueError, match=r"LongformerSelfAttention, which is not served: .*\(length, batch"):
        attach(transformers.LongformerModel(config))
    size = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embedding_groups": 2}
    model = transformers.WavLMModel(transformers.WavLMConfig(**SIZE, **size))
    with pytest.raises(ValueError, match="WavLMAttention, which is not served: it takes weights"):
        attach(model)


def test_choices_are_flattened_before_the_stack(transformers):
    config = transformers.BertConfig(**SIZE, **WORDS)
    model = transformers.BertForMultipleChoice(config).eval()
    tokens = torch.randint(3, 64, (2, 3, 6))
    before = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    attach(model)
    after = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "gpt2", "bert"])
def test_compiled(name, request):
    """Values are equal; vectors are made outside of graphs, one break a projection; lengths recompile nothing else."""
    import torch._dynamo as dynamo

    if name == "torch":
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        model, given = nn.TransformerEncoder(layer, 2), lambda n: torch.randn(2, n, 16)
    else:
        model = build(name, request.getfixturevalue("transformers"))
        given = lambda n: torch.randint(3, 64, (2, n))
    model = model.eval()
    set_going(attach(model))
    dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    records, logger = Records(), logging.getLogger("torch._dynamo")
    logger.addHandler(records)
    try:
        for n in (5, 7, 9, 6):
            x = given(n)
            # Transformers' layers are told apart by their number, each in a graph of its own: no room for two modes.
            for mode in (torch.enable_grad, torch.no_grad) if name == "torch" else (torch.no_grad,):
                with mode():
                    found, expected = compiled(x), model(x)
                if name != "torch":
                    found, expected = found[0], expected[0]
                torch.testing.assert_close(found, expected)
        assert not frames_of(model)
        if name == "torch":
            counted = dynamo.explain(model)(given(8))
            assert counted.graph_break_count <= 2 + 2, counted.break_reasons  # open and close; one a layer
    finally:
        logger.removeHandler(records)
        dynamo.reset()
    assert not [text for text in records.messages if "recompile_limit" in text]


@pytest.mark.slow
def test_an_interrupted_compiled_forward(monkeypatch):
    import torch._dynamo as dynamo

    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    set_going(attach(model))
    dynamo.reset()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 5, 16)
    (stack,) = model.floater._stacks
    with torch.no_grad():
        expected = compiled(x)
        plain, calls = Stack.vectors, []

        def interrupted(*args, **options):
            calls.append(None)
            if len(calls) == 4:  # in the second layer
                raise KeyboardInterrupt
            return plain(*args, **options)

        monkeypatch.setattr(Stack, "vectors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(x)
        monkeypatch.undo()
        assert stack.current() is None
        assert torch.equal(compiled(x), expected)
    assert not stack.frames
    dynamo.reset()
