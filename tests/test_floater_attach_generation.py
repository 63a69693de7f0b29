"""Models with attached vectors that generate from a cache, padded or not, and that checkpoint their layers."""

from __future__ import annotations

import pytest
import torch
from floater_attach_cases import build, gradients, inputs, set_going

from posattn.floater import attach

transformers = pytest.importorskip("transformers")
LENGTH = 12


def going(name, **changes):
    model = build(name, transformers, **changes)
    set_going(attach(model))
    return model


def generate(model, **options):
    fixed = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 1}
    return model.generate(**fixed, **options)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "bart", "marian", "t5"])
def test_the_cache_changes_nothing(name, beams):
    model = going(name).double()
    asked = {"input_ids": torch.randint(3, 64, (2, 7)), "num_beams": beams}
    asked |= {"return_dict_in_generate": True, "output_scores": True}
    cached, uncached = (generate(model, use_cache=use_cache, **asked) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for step, other in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-10, atol=1e-10)


def test_the_flow_shows_in_what_is_generated():
    model = build("gpt2", transformers)
    tokens = torch.randint(3, 64, (2, 7))
    before = generate(model, input_ids=tokens)
    attachment = attach(model)
    assert torch.equal(generate(model, input_ids=tokens), before)
    set_going(attachment)
    assert not torch.equal(generate(model, input_ids=tokens), before)


def padded(tokens, longer):
    """(tokens, mask) with `longer` padding tokens on the left."""
    pad = torch.ones(1, longer, dtype=torch.long)
    return torch.cat([pad, tokens], dim=1), torch.cat([pad * 0, torch.ones_like(tokens)], dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom"])
def test_left_padding_changes_nothing(name, beams, use_cache):
    model = going(name)
    short, long = torch.randint(3, 64, (1, 4)), torch.randint(3, 64, (1, 9))
    tokens, mask = padded(short, 5)
    together = generate(
        model,
        input_ids=torch.cat([tokens, long]),
        attention_mask=torch.cat([mask, torch.ones_like(long)]),
        use_cache=use_cache,
        num_beams=beams,
    )
    for row, alone in zip(together, (short, long)):
        assert torch.equal(row[9:], generate(model, input_ids=alone, num_beams=beams)[0, alone.shape[1] :])


def test_padded_sources_of_a_translation_model():
    model = going("bart")
    short, long = torch.randint(3, 64, (1, 4)), torch.randint(3, 64, (1, 9))
    tokens = torch.cat([torch.cat([short, torch.ones(1, 5, dtype=torch.long)], dim=1), long])
    together = generate(model, input_ids=tokens, attention_mask=(tokens != 1).long())
    for row, alone in zip(together, (short, long)):
        assert torch.equal(row, generate(model, input_ids=alone)[0])


def counting(name):
    """A model, and a tolerance. BLOOM's softmax and Llama's angles are in fp32 whatever the dtype."""
    if name in ("bloom", "llama"):
        return going(name), {"rtol": 1e-4, "atol": 1e-4}
    return going(name).double(), {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["opt", "roberta", "bloom", "llama"])
def test_left_padding_without_positions_changes_nothing(name, kind):
    """These leave padding out themselves: by the attention mask, by the tokens, or by being relative."""
    model, tolerance = counting(name)
    short = torch.randint(3, 64, (1, 4))
    tokens, mask = padded(short, 5)
    found = model(input_ids=tokens, attention_mask=mask.to(kind)).logits[:, 5:]
    torch.testing.assert_close(found, model(input_ids=short).logits, **tolerance)


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_steps_with_a_cache_and_a_mask(name):
    """Padding on the left, on the right and in the midst, given no positions."""
    model, tolerance = counting(name)
    tokens = torch.randint(3, 64, (4, 10))
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, 7:] = mask[2, 4:6] = 0
    seen = mask.bool()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
        cache, pieces = None, []
        for end, piece in zip((4, 5, 6, 9, 10), tokens.split([4, 1, 1, 3, 1], dim=1)):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True, attention_mask=mask[:, :end])
            cache = out.past_key_values
            pieces.append(out.logits)
        for row, logits in enumerate(expected):
            alone = model(input_ids=tokens[row : row + 1, seen[row]]).logits[0]
            torch.testing.assert_close(logits[seen[row]], alone, **tolerance)
    torch.testing.assert_close(torch.cat(pieces, dim=1)[seen], expected[seen], **tolerance)


def test_padding_on_the_right_is_where_it_would_be_without_a_mask():
    """One solve for all sequences in order, no gather; and BERT's own positions count padding on the left."""
    model = going("bert").double()
    encoder, tokens = model.floater["layers"], torch.randint(3, 64, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    asked = {"input_ids": tokens, "attention_mask": mask}
    found = model(**asked).logits
    asked["position_ids"] = torch.arange(9)[None]
    assert torch.equal(found, model(**asked).logits)
    left = mask.flip(1)
    at = []
    handle = encoder.register_forward_hook(lambda _, args, out: at.append(args[0]))
    model(input_ids=tokens, attention_mask=left)
    handle.remove()
    assert at == [9]


def test_steps_with_a_cache_give_the_logits_of_one_forward():
    model = going("gpt2").double()
    tokens = torch.randint(3, 64, (2, 10))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        cache, pieces = None, []
        for piece in tokens.split([4, 1, 1, 3, 1], dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-11, atol=1e-11)


def test_a_model_that_generates_within_a_forward():
    """Another forward in the midst of one has positions of its own, and leaves those of the first alone."""
    model = going("gpt2").double()
    tokens = torch.randint(3, 64, (2, 10))
    expected = model(input_ids=tokens).logits
    inner = []

    def nested(module, args, kwargs):
        if not inner:
            inner.append(None)
            inner[0] = model.generate(
                input_ids=tokens[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=1
            )

    model.transformer.h[1].register_forward_pre_hook(nested, with_kwargs=True)
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert torch.equal(
        inner[0], model.generate(input_ids=tokens[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=1)
    )


def test_after_an_error_within_a_forward():
    model = going("gpt2")
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 64))
    with pytest.raises(RuntimeError, match="called outside of a forward"):
        model.transformer.h[0].attn.c_attn(torch.randn(1, 4, 32))


def enable_checkpointing(model, **options):
    """By its newer name where transformers has it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


def loss_of(model, batches):
    """Two forwards before one backward, of different lengths and positions."""
    return sum(model(**given)[0].pow(2).mean() for given in batches)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "distilbert", "bart", "gpt2-cross"])
def test_checkpointing_gives_equal_gradients(name, reentrant):
    model = going(name).double().train()
    batches = [inputs(model), inputs(model, 7)]
    if name != "bart":
        # Without a mask transformers takes positions that are not in order for several texts in one sequence.
        for given in batches:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        batches[0]["position_ids"] = torch.stack([torch.randperm(20)[:9] for _ in range(2)])
        batches[1]["position_ids"] = torch.arange(7)[None] + 3
    loss_of(model, batches).backward()
    expected = gradients(model)
    assert all(name in expected for name, _ in model.named_parameters() if name.startswith("floater"))
    model.zero_grad()
    enable_checkpointing(model, use_reentrant=reentrant)
    loss_of(model, batches).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        # The same sums in another order, and some are of terms that cancel: relative to the tensor's largest.
        tolerance = 1e-10 * expected[key].abs().max().item()
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=tolerance, msg=key)


def test_checkpointed_models_solve_once_and_detach():
    model = going("gpt2").train()
    enable_checkpointing(model)
    lengths = []
    model.floater["layers"].register_forward_hook(lambda _, args, out: lengths.append(args[0]))
    loss_of(model, [inputs(model)]).backward()
    assert lengths == [9]
    with pytest.warns(UserWarning, match="flow is not zero"):
        model.floater.detach()
    loss_of(model, [inputs(model)]).backward()
