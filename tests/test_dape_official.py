"""DAPE with the parameters of the authors' code, against their formulas, stated here again."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import alibi_slopes

from posattn import DAPE, attention


def official_parameters(base: str, heads: int, hidden: int, kernel_size: int) -> dict[str, torch.Tensor]:
    """Names and shapes as the authors' modules have them."""
    rand = torch.randn
    tail = (1, kernel_size) if kernel_size > 1 else ()
    channels = heads if base == "nope" else 2 * heads
    parameters = {
        "mlp2.0.weight": rand(hidden, channels, *tail) / 3,
        "mlp2.0.bias": rand(hidden),
        "mlp2.2.weight": rand(heads, hidden, *tail) / 3,
        "mlp2.2.bias": rand(heads),
    }
    if base == "alibi":
        parameters["slopes"] = torch.tensor(alibi_slopes(heads))
    if base == "kerple":
        parameters["bias_p"] = 2 * torch.rand(heads, 1, 1) - 0.2
        parameters["bias_a"] = torch.rand(heads, 1, 1) - 0.1
    if base == "fire":
        parameters |= {
            "mlp.0.weight": rand(6, 1),
            "mlp.0.bias": rand(6),
            "mlp.2.weight": rand(heads, 6),
            "mlp.2.bias": rand(heads),
            "c": torch.tensor(0.13),
            "init_L": torch.tensor(12.0),
            "L_multiplier": torch.tensor(0.8),
        }
    return parameters


def official_scores(base: str, parameters: dict[str, torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    """S before the causal mask, (B, H, n, n), of the authors' formulas for square causal attention."""
    p = {name: value.double() for name, value in parameters.items()}
    n = scores.shape[-1]
    position = torch.arange(n, dtype=torch.float64)
    distance = (position[:, None] - position).clamp(min=0)
    bias = None
    if base == "alibi":
        bias = -p["slopes"][:, None, None] * distance
    if base == "kerple":
        bias = -p["bias_p"].clamp(min=0.01) * torch.log(1 + p["bias_a"].clamp(min=0.01) * distance)
    if base == "fire":
        limit = torch.maximum(position, (p["L_multiplier"] * p["init_L"]).abs())[:, None]
        x = torch.log((p["c"] * distance).abs() + 1) / (torch.log((p["c"] * limit).abs() + 1) + 1e-6)
        hidden = F.leaky_relu(x[..., None] @ p["mlp.0.weight"].T + p["mlp.0.bias"])
        bias = (hidden @ p["mlp.2.weight"].T + p["mlp.2.bias"]).permute(2, 0, 1)
    both = scores if bias is None else torch.cat([scores, bias.expand_as(scores)], 1)
    total = scores if bias is None else scores + bias
    w1, b1, w2, b2 = (p[f"mlp2.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    if w1.dim() == 2:
        hidden = F.leaky_relu(both.permute(0, 2, 3, 1) @ w1.T + b1)
        return total + (hidden @ w2.T + b2).permute(0, 3, 1, 2)
    pad = (0, w1.shape[-1] // 2)
    return total + F.conv2d(F.leaky_relu(F.conv2d(both.tril(), w1, b1, padding=pad)), w2, b2, padding=pad)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("base", ["nope", "alibi", "kerple", "fire"])
def test_from_official(base, kernel_size):
    heads, length = 6, 23
    parameters = official_parameters(base, heads, 8, kernel_size)
    module = DAPE.from_official(parameters)
    assert module.kernel_size == kernel_size
    assert module.prefix_consistent == (kernel_size == 1)
    query, key, value = torch.randn(3, 2, heads, length, 4, dtype=torch.float64)
    scores = official_scores(base, parameters, query @ key.mT / math.sqrt(4))
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    out, lse = attention(query, key, value, module.double(), is_causal=True, return_lse=True)
    torch.testing.assert_close(out, scores.softmax(-1) @ value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_from_official_with_other_parameters():
    good = official_parameters("kerple", 6, 8, 1)
    assert DAPE.from_official(good, prefix_consistent=False).prefix_consistent is False
    for change, match in (
        (
            {"mlp2.0.weight": torch.zeros(8, 11)},
            r"DAPE.first_weight the shape \(8, 12, 1\), got \(8, 11, 1\)",
        ),
        ({"mlp2.0.weight": torch.zeros(8, 12, 3, 3)}, "two Linear or two 1 x k Conv2d layers"),
        ({"mlp2.0.weight": torch.zeros(8, 12, 1, 3)}, "two Linear or two 1 x k Conv2d layers"),
        ({"bias_a": torch.zeros(5, 1, 1)}, "KERPLE.a the shape"),
        ({"slopes": torch.ones(6)}, "slopes must be ALiBi's of 6 heads"),
    ):
        with pytest.raises(ValueError, match=match):
            DAPE.from_official({**good, **change})
    for name in good:
        if name != "bias_p":
            with pytest.raises(ValueError, match=rf"state_dict lacks {name}"):
                DAPE.from_official({key: value for key, value in good.items() if key != name})
