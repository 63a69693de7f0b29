"""posattn.MultiheadAttention as the attention of torch's transformer layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from posattn import TISA, ALiBi, MultiheadAttention

DIM, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 7, 5
CLOSE = dict(rtol=1e-9, atol=1e-10)


def layer_masks():
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1, -3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    return {
        "none": {},
        "padding": dict(src_key_padding_mask=padding),
        "mask": dict(src_mask=causal),
        "causal": dict(src_mask=causal, is_causal=True),
        "all": dict(src_mask=causal, is_causal=True, src_key_padding_mask=padding.float() * -1e9),
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("kind", ["none", "padding", "mask", "causal", "all"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_in_an_encoder_layer_and_not_on_its_fast_path(kind, norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first).eval()
    bias = TISA(4)
    torch.nn.init.normal_(bias.amplitudes)
    ours = copy.deepcopy(layer)
    ours.self_attn = MultiheadAttention(16, 4, batch_first=True, bias_term=bias).eval()
    ours.self_attn.load_state_dict(layer.self_attn.state_dict(), strict=False)
    x, mask = torch.randn(BATCH, QUERIES, 16), layer_masks()[kind]
    given = bias.dense(QUERIES, QUERIES).repeat(BATCH, 1, 1).detach() + mask.get("src_mask", 0.0)
    expected = layer(x, given, mask.get("src_key_padding_mask"))
    plain = layer(x, mask.get("src_mask"), mask.get("src_key_padding_mask"))
    assert (plain - expected).abs().max() > 1e-2
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(ours(x, **mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("replaced", [True, False])
def test_in_an_encoder_with_nested_tensors(replaced):
    """An encoder made before its self_attn was replaced nests padded inputs, in eval mode without gradients."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    attentions = [MultiheadAttention(16, 4, batch_first=True, bias_term=TISA(4)) for _ in range(2)]
    if not replaced:
        layer.self_attn = attentions[0]
        with pytest.warns(UserWarning, match="use_nested_tensor is False"):
            encoder = nn.TransformerEncoder(layer, 2).eval()
    else:
        encoder = nn.TransformerEncoder(layer, 2)
        for each, attention in zip(encoder.layers, attentions):
            each.self_attn = attention
        encoder.eval()
    assert encoder.use_nested_tensor == replaced
    x, padding = torch.randn(BATCH, QUERIES, 16), layer_masks()["padding"]["src_key_padding_mask"]
    expected = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
    assert len({id(module.self_attn.bias_term) for module in encoder.layers}) == 2


def test_in_a_decoder_layer():
    layer = nn.TransformerDecoderLayer(DIM, HEADS, 24, dropout=0.0, batch_first=True).double()
    ours = copy.deepcopy(layer)
    biases = TISA(HEADS).double(), ALiBi(HEADS).double()
    for name, bias in zip(("self_attn", "multihead_attn"), biases):
        attention = MultiheadAttention(DIM, HEADS, batch_first=True, bias_term=bias).double()
        attention.load_state_dict(getattr(layer, name).state_dict(), strict=False)
        setattr(ours, name, attention)
    target, memory = torch.randn(BATCH, QUERIES, DIM).double(), torch.randn(BATCH, KEYS, DIM).double()
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES).double()
    dense = [bias.dense(QUERIES, keys).repeat(BATCH, 1, 1) for bias, keys in zip(biases, (QUERIES, KEYS))]
    expected = layer(target, memory, dense[0] + causal, dense[1])
    for options in (dict(tgt_mask=causal), dict(tgt_mask=causal, tgt_is_causal=True)):
        torch.testing.assert_close(ours(target, memory, **options), expected, **CLOSE)
