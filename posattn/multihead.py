"""torch.nn.MultiheadAttention with a bias by position: the same module, one more argument."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .biases.bias import Bias
from .biases.dape import DAPE
from .floater.multihead import check_inputs
from .masked import attend_masked


class MultiheadAttention(nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` whose scores get a bias by position, in O(L) memory.

    ``out = out_proj(posattn.attention(heads of query, key, value, bias_term))``. Everything else is torch's: the
    arguments of the constructor and of forward, shapes, masks (True hides), dropout, the names in the state_dict, to
    which only ``bias_term.*`` is added. With bias_term=None it is `torch.nn.MultiheadAttention` with its fast path.

    Query i stands at ``i + Lk - Lq``, the last query on the last key, as in `posattn.attention`; with is_causal at i,
    the first query on the first key, which is where torch's causal mask puts it.

    What costs how much, forward and backward, with a bias:

    - O(L) memory: need_weights=False and no attn_mask, or one with is_causal=True (which is then not read: as torch,
      it is believed to be the causal mask; only for Lq != Lk with padding it is read), with or without a
      key_padding_mask. Of one of floating point, which `torch.nn.TransformerEncoder` makes of bool ones, the values
      are looked at, which waits for a GPU: if all are 0 and -inf it costs what a bool one does. Else, and under
      torch.compile, which cannot look, it is added by one more dimension of heads (below 256; with a DAPE by the
      formula).
    - O(L^2) memory, by the formula, to equal numbers: any other attn_mask, which is a tensor of that size itself, and
      need_weights=True, torch's default, whose result is one.

    Beyond torch: is_causal=True needs no attn_mask; a query that sees no key gives 0 (before out_proj), where torch
    gives NaN; `torch.nn.TransformerEncoderLayer`, with this module as its self_attn, does not take the fast path
    of evaluation, which would pass the bias by. That path's nested tensors are served for self-attention.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `torch.nn.MultiheadAttention`. With a bias_term add_bias_kv and add_zero_attn are refused: the keys that
            they add stand at no position. dropout is refused with a DAPE.
        bias_term: a `posattn.Bias` or `posattn.DAPE` with num_heads heads, learned with the module (device and dtype
            are not its: move it with ``.to``), or None.

    Raises:
        TypeError: bias_term is of another type.
        ValueError: bias_term has another number of heads, or one of the options above is not served with it.
        RuntimeError: in forward, shapes that do not go together.

        >>> import torch, posattn
        >>> module = posattn.MultiheadAttention(32, 4, batch_first=True, bias_term=posattn.TISA(4))
        >>> x = torch.randn(2, 10, 32)
        >>> module(x, x, x, is_causal=True, need_weights=False)[0].shape
        torch.Size([2, 10, 32])
        >>> module.load_state_dict(torch.nn.MultiheadAttention(32, 4).state_dict(), strict=False).missing_keys
        ['bias_term.amplitudes', 'bias_term.sharpness', 'bias_term.offsets']
    """

    bias_term: Bias | DAPE | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bias_term: Bias | DAPE | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        if bias_term is None:
            self.bias_term = None
            return
        if not isinstance(bias_term, (Bias, DAPE)):
            kind = type(bias_term).__name__
            raise TypeError(f"bias_term must be a posattn.Bias, a posattn.DAPE or None, got {kind}")
        if bias_term.num_heads != num_heads:
            came = f"{type(bias_term).__name__} with {bias_term.num_heads}"
            raise ValueError(f"bias_term must have num_heads = {num_heads} heads, got {came}")
        for option, there in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if there:
                raise ValueError(
                    f"{option} must be False with a bias_term: a key that no token has stands at no position"
                )
        if dropout and isinstance(bias_term, DAPE):
            raise ValueError(f"dropout must be 0 with a DAPE, got {dropout!r}")
        self.bias_term = bias_term

    # torch.nn.TransformerEncoderLayer asks this before it takes the module's weights past the module's forward.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        same: bool = self.__dict__["_qkv_same_embed_dim"]
        return same and self._modules.get("bias_term") is None

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = same

    def _reset_parameters(self) -> None:
        # Everything but the bias_term, which has a reset_parameters of its own.
        bias_term, self._modules["bias_term"] = self._modules.get("bias_term"), None
        super()._reset_parameters()
        self._modules["bias_term"] = bias_term

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in `torch.nn.MultiheadAttention`, is_causal without an attn_mask being plain causal attention."""
        extra_keys = self.bias_k is not None or self.add_zero_attn
        if self.bias_term is None and (attn_mask is not None or extra_keys or not is_causal):
            return super().forward(  # type: ignore[no-any-return]
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        batched = check_inputs(query, key, value, key_padding_mask, attn_mask, self)
        q, k, v = self._project(query, key, value, batched)
        out, weights = self._attend(q, k, v, key_padding_mask, need_weights, attn_mask, is_causal)
        out = out.permute(0, 2, 1, 3) if self.batch_first or not batched else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of the three, (batch, heads, length, head_dim), of inputs in the module's own layout."""
        weight, bias, d = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if bias is None else bias.split(d)
            outs = list(map(F.linear, (query, key, value), weights, biases))
        elif query is key and key is value:  # one product for inputs that are the same
            outs = list(F.linear(query, weight, bias).split(d, dim=-1))
        elif key is value:
            q_bias, kv_bias = (None, None) if bias is None else bias.split((d, 2 * d))
            q_weight, kv_weight = weight.split((d, 2 * d))
            outs = [F.linear(query, q_weight, q_bias), *F.linear(key, kv_weight, kv_bias).split(d, dim=-1)]
        else:
            biases = (None,) * 3 if bias is None else bias.split(d)
            outs = list(map(F.linear, (query, key, value), weight.split(d), biases))
        order = (1, 2, 0, 3) if batched and not self.batch_first else (0, 2, 1, 3)
        heads = [x.unflatten(-1, (self.num_heads, self.head_dim)) for x in outs]
        q, k, v = ((x if batched else x[None]).permute(order) for x in heads)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What the arguments ask for, of heads: out (B, H, Lq, D), and the weights (B, H, Lq, Lk)."""
        if key_padding_mask is not None:
            key_padding_mask = _counting(key_padding_mask, "key_padding_mask").view(-1, k.shape[2])
        # A mask that comes with is_causal is the causal one, as torch has it, which yet reads it in these cases.
        hinted = q.shape[2] == k.shape[2] or key_padding_mask is None
        mask = None
        if attn_mask is not None and (need_weights or not (is_causal and hinted)):
            mask = _counting(attn_mask, "attn_mask")
            mask = mask.view(*q.shape[:2], *mask.shape[1:]) if mask.dim() == 3 else mask
        out, weights = attend_masked(
            q,
            k,
            v,
            self.bias_term,
            key_mask=key_padding_mask,
            mask=mask,
            is_causal=is_causal and mask is None,
            scale=self.head_dim**-0.5,
            dropout_p=self.dropout if self.training else 0.0,
            query_start=0 if is_causal else k.shape[2] - q.shape[2],
            need_weights=need_weights,
        )
        return out, weights if need_weights else None

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, None]:
        """Self-attention of a nested tensor of the strided layout, padded and nested again."""
        masked = key_padding_mask is not None or attn_mask is not None
        if query is not key or key is not value or masked or need_weights or query.layout != torch.strided:
            raise RuntimeError(
                "a nested tensor is served as query, key and value at once, of the strided layout, without masks and "
                "with need_weights=False; pass padded tensors with a key_padding_mask otherwise"
            )
        lengths = query._nested_tensor_size()[:, 0].to(query.device)
        padded = query.to_padded_tensor(0.0)
        if not self.batch_first:
            raise RuntimeError("a nested tensor needs batch_first=True")
        hidden = torch.arange(padded.shape[1], device=query.device) >= lengths[:, None]
        out, _ = self.forward(padded, padded, padded, hidden, False, is_causal=is_causal)
        return torch._nested_tensor_from_mask(out, ~hidden), None


def _counting(mask: Tensor, name: str) -> Tensor:
    """A mask in torch.nn.MultiheadAttention's sense, True hiding, in that of scores: True for what counts."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(f"{name} must be bool or floating point, got {mask.dtype}")
    return ~mask if mask.dtype == torch.bool else mask
