"""The oracle against what is published: kernels by average, test vectors of Philox, chance."""

from __future__ import annotations

import numpy as np
import oracle_spe as oracle
import pytest
import torch


@pytest.mark.parametrize("has_gate", [True, False])
def test_exact_codes_give_the_kernel(has_gate):
    freqs, offsets, gains = torch.randn(3, 2, 3, 4).double().unbind()
    gate = torch.randn(2, 3) if has_gate else None
    z, e = oracle.exact_noise(2, 3, 4, has_gate)
    at = torch.arange(9)
    qbar, kbar = oracle.sine_codes(freqs, offsets, gains, gate, z, e, at, at)
    kernel = oracle.sine_kernel(freqs, offsets, gains, gate, torch.arange(-8, 9))
    matrix = kernel[:, :, at[:, None] - at[None, :] + 8] * (z.shape[3] / 3) ** 0.5  # sqrt(R / D) P
    q, k = torch.randn(2, 1, 2, 9, 3).double().unbind()
    got = oracle.encoded(q, qbar) @ oracle.encoded(k, kbar).mT
    torch.testing.assert_close(got, torch.einsum("bhmd,bhnd,hdmn->bhmn", q, k, matrix))


# Random123, kat_vectors, philox4x32 10: counter, key, words
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert oracle.philox(np.array(counter, dtype=np.uint64), tuple(key)).tolist() == words


def test_noise_of_a_part_is_a_part_of_the_noise():
    whole = oracle.conv_noise(2**40 + 3, 2, 3, 0, 20, 12)
    assert torch.equal(oracle.conv_noise(2**40 + 3, 2, 3, 7, 5, 12), whole[:, :, 7:12])
    assert torch.equal(oracle.conv_noise(2**40 + 3, 2, 3, 7, 5, 6), whole[:, :, 7:12, :6])


def test_every_query_of_a_causal_call_is_a_call_of_its_own():
    phi_q, phi_k, v = torch.rand(3, 2, 2, 6, 4).double().unbind()
    whole, kv, ksum = oracle.linear_oracle(phi_q, phi_k, v, causal=True)
    for i in range(6):
        seen = phi_q[:, :, i : i + 1], phi_k[:, :, : i + 1], v[:, :, : i + 1]
        torch.testing.assert_close(oracle.linear_oracle(*seen)[0], whole[:, :, i : i + 1])
        before = oracle.linear_oracle(phi_q, phi_k[:, :, :i], v[:, :, :i])[1:]
        rest = [t[:, :, i:] for t in (phi_q, phi_k, v)]
        out, *after = oracle.linear_oracle(*rest, causal=True, **dict(zip(("state", "sums"), before)))
        torch.testing.assert_close((out, *after), (whole[:, :, i:], kv, ksum))
