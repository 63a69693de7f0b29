"""Linear attention: softmax replaced by a product of features, so that time and memory are linear in the length."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import linear_checks as checks
from .biases.bias import full_precision, no_autocast
from .checks import check_key_padding_mask, check_tensor
from .dispatch import autocast, readable
from .feature_maps import FAVOR_FEATURES, Favor, favor_exponents, favor_features
from .linear_checks import LinearState as LinearState
from .linear_ops import LinearAttend, favor_projection
from .spe import ConvSPE, SineSPE
from .spe_codes import Codes


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    spe: SineSPE | ConvSPE | Codes | None = None,
    feature_map: str | Favor | Callable[[Tensor], Tensor] = "elu",
    eps: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LinearState]:
    r"""Attention by a feature map in place of softmax, with stochastic positional encoding, in O(Lq + Lk) time.

    For query i and the keys j that it sees::

        A[i, j] = phi(qhat_i) . phi(khat_j)        d_i = sum_j A[i, j]
        out[i]  = sum_j A[i, j] * value[j] / (d_i + eps)           with d_i - eps below where d_i < 0

    qhat, khat are query and key, or with ``spe`` their features, which know the relative position (`posattn.SineSPE`,
    `posattn.ConvSPE`; Liutkus et al., ICML 2021, arXiv 2105.08399). Query i sees the keys j <= i (with is_causal)
    for which ``key_padding_mask[batch, j]`` holds, and all that initial_state sums up. A query that sees no key gets
    0. Feature maps phi, and what each does about the scale:

    - "elu": elu(x) + 1 (Katharopoulos et al., ICML 2020, arXiv 2006.16236), without a scale.
    - "relu": relu(x) + 1e-3, the linear transformer of Liutkus et al., without a scale.
    - "favor": 128 positive random features (Choromanski et al., ICLR 2021, arXiv 2009.14794), which estimate the
      ``exp(qhat . khat / sqrt(R))`` of softmax attention, R the width of qhat: the head_dim, or with spe its number of
      realizations. The projection is fixed: equal calls agree, and states go on. Queries subtract the largest
      exponent of their row, which cancels but for eps; keys subtract nothing. Exponents, and the features of spe
      that they are made of, are in float32, whose limits on Triton then hold for every dtype. A `posattn.Favor` has
      a number of features and a seed of your choice.
    - any function of (B, H, L, R) -> (B, H, L, M), differentiable, called with qhat and with khat: without a scale.

    Args:
        query: (B, H, Lq, D), float16, bfloat16, float32 or float64.
        key: (B, H, Lk, D), of query's dtype and device.
        value: (B, H, Lk, Dv), of query's dtype and device.
        spe: a `posattn.SineSPE` or `posattn.ConvSPE` of H heads and head_dim D, called here; or what calling it gave,
            which several layers may share.
        feature_map: as above.
        eps: a positive number; by default 1e-6, and 1e-30 for "favor" and a `posattn.Favor`, whose features get as
            small as ``exp(-|y|^2 / 2)`` of a key y = khat / R^(1/4).
        is_causal: hide keys that stand after the query; asks for Lq = Lk.
        key_padding_mask: (B, Lk) bool, True for a key that counts.
        initial_state: a `LinearState` that an earlier call returned: attention goes on from there, at its position
            and with its noise, as if the keys of that call came before those of this one, and every query saw them.
        return_state: also return the state after the last key.
        backend: "triton" (float16, bfloat16 and float32, on a GPU with compute capability 8.0 or newer; D, Dv and
            feature widths to 256, in float32 to 128; num_sines, a gate counted as one, to 64, in float32 to 32),
            "blockwise" (plain PyTorch, every dtype and device), or None:
            "triton" where it serves, else "blockwise". An explicit backend is taken or refused, never replaced.

    Returns:
        out (B, H, Lq, Dv), of query's dtype; with return_state the pair (out, `LinearState`), differentiable as well.

    Raises:
        TypeError: an argument is not of its Python type.
        ValueError: a shape, dtype, device or number that is not accepted; the message says which.
        RuntimeError: in backward, when the gradient itself is differentiated.

    Positions count from 0, or from initial_state.position: query i and key i stand at the same one. Masked keys take
    up positions, too: pad prompts of several lengths on the left before they are continued. Sums are made in
    float32 (float64 for float64). Features that a map makes are kept for backward, O(L M) numbers; those of "elu" and
    "relu" are not. A `posattn.SineSPE` without noise (num_realizations=None) has wide features, too, except with
    "favor". Under torch.autocast query, key and value are cast to the autocast dtype. Equal inputs give bitwise equal
    gradients.

        >>> import torch, posattn
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16).unbind()
        >>> spe = posattn.SineSPE(num_heads=4, head_dim=16, num_sines=5)
        >>> out, state = posattn.linear_attention(query, key, value, spe=spe, is_causal=True, return_state=True)
        >>> out.shape, state.position
        (torch.Size([2, 4, 10, 16]), 10)
        >>> token = torch.randn(2, 4, 1, 16)  # the next one: as query, key and value
        >>> posattn.linear_attention(token, token, token, spe=spe, initial_state=state).shape
        torch.Size([2, 4, 1, 16])
    """
    check_tensor("query", query)
    check_tensor("key", key)
    check_tensor("value", value)
    query, key, value = autocast(query, key, value)
    checks.check_together(query, key, value)
    checks.check_rule(query, key, is_causal, return_state)
    check_key_padding_mask(key_padding_mask, query, key)
    checks.check_feature_map(feature_map)
    eps = checks.check_eps(eps, feature_map)
    checks.check_spe(spe, query)
    checks.check_state(initial_state, spe)

    start = 0 if initial_state is None else initial_state.position
    if spe is None or isinstance(spe, Codes):
        codes = spe
    else:
        codes = spe(None if initial_state is None else initial_state.noise)
    phi_query, phi_key, name, backend = _features(query, key, value, codes, feature_map, start, backend)
    dtype = value.dtype
    value = value.to(phi_query.dtype)
    before: tuple[Tensor | None, ...] = None, None
    if initial_state is not None:
        checks.check_sums(initial_state, phi_query, value)
        before = initial_state.kv.contiguous(), initial_state.k.contiguous()

    tensors = (readable(t) for t in (phi_query, phi_key, value))
    out, kv, k = LinearAttend.apply(  # type: ignore[no-untyped-call]
        *tensors, key_padding_mask, *before, name, eps, is_causal, return_state, backend
    )
    attended: Tensor = out.to(dtype)
    if not return_state:
        return attended
    return attended, LinearState(kv, k, start + key.shape[2], None if codes is None else codes.noise)


def _features(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Codes | None,
    feature_map: str | Favor | Callable[[Tensor], Tensor],
    start: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, str, str]:
    """What the operators take for query and key, the map that they apply to it, and the backend."""
    width = query.shape[3] if codes is None else codes.dim
    if isinstance(feature_map, Favor) or feature_map == "favor":
        return _favor(query, key, value, codes, feature_map, width, start, backend)
    chosen = checks.choose_backend(backend, query, value, width, codes)
    if codes is not None:
        query, key = codes.features(query, key, start, start, chosen)
    if isinstance(feature_map, str):
        return query, key, feature_map, chosen
    phi_query, phi_key = feature_map(query), feature_map(key)
    checks.check_features(phi_query, query)
    checks.check_features(phi_key, key, phi_query)
    return phi_query, phi_key, "identity", checks.choose_backend(backend, phi_query, value, 0, None)


def _favor(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Codes | None,
    favor: Favor | str,
    width: int,
    start: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, str, str]:
    """Positive random features. Exponents are in fp32 (fp64); so are features for fp16, whose range they may leave."""
    features = FAVOR_FEATURES if isinstance(favor, str) else favor.num_features
    exact = codes is not None and codes.exact  # its features, which are wide, are not made
    # What runs is fp32 (fp64), but for attention over the features of bf16.
    single = query if codes is None and query.dtype == torch.bfloat16 else full_precision(query)
    backend = checks.choose_backend(
        backend, single, value, features if exact else max(width, features), codes
    )
    if isinstance(favor, str):
        projection = favor_projection(query.detach(), width, features)
    else:
        checks.check_favor(favor, width, query, codes is not None)
        projection = favor.projection
    narrow = query.dtype
    with no_autocast(query.device.type):
        query, key = full_precision(query), full_precision(key)
        projection = projection.to(query.dtype)
        if codes is not None and exact:
            projected = codes.projected(query, key, projection, start, start, backend)
            squares = codes.squared_norms(query, key)
        else:
            if codes is not None:
                query, key = codes.features(query, key, start, start, backend)
            projected = query @ projection.mT, key @ projection.mT
            squares = query.square().sum(-1), key.square().sum(-1)
        exponents = (favor_exponents(*of, width) for of in zip(projected, squares))
        query, key = (favor_features(e, queries) for e, queries in zip(exponents, (True, False)))
    if narrow == torch.bfloat16:
        query, key = query.to(narrow), key.to(narrow)
    return query, key, "identity", backend
