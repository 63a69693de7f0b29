"""The checks of what few calls of attention have: sinks, dropout, relative logits, documents, packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .biases.bias import Bias
from .biases.dape import DAPE


def check_relative_logits(
    relative: Tensor | None, bias: Bias | DAPE | Tensor | None, shape: tuple[int, ...], query: Tensor
) -> None:
    """shape: (B, Hq, Lq), or (Tq, Hq) of packed sequences."""
    if relative is None:
        return
    if not isinstance(relative, Tensor):
        raise TypeError(f"relative_logits must be a Tensor or None, got {checks._kind(relative)}")
    if relative.shape[:-1] != shape or relative.dim() != len(shape) + 1 or relative.shape[-1] < 1:
        expected = f"{(*shape, 'W')} with W at least 1".replace("'", "")
        raise ValueError(f"relative_logits must have the shape {expected}, got {checks._shape(relative)}")
    if relative.dtype not in checks.DTYPES or relative.layout != torch.strided:
        raise ValueError(f"relative_logits must be dense and floating-point, got {relative.dtype}")
    if relative.device != query.device:
        raise ValueError(f"relative_logits must be on query's device {query.device}, got {relative.device}")
    if bias is not None:
        raise ValueError(
            f"relative_logits and bias cannot be given together, got a bias of {checks._kind(bias)}; "
            "a bias of the offset alone can be added to relative_logits where they are made"
        )


def check_sinks(sinks: Tensor | None, query: Tensor, heads: int) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a Tensor or None, got {checks._kind(sinks)}")
    if sinks.dim() != 1 or sinks.shape[0] != heads:
        raise ValueError(
            f"sinks must have one number for each of query's {heads} heads, {(heads,)}, got {checks._shape(sinks)}"
        )
    if sinks.dtype not in checks.DTYPES:
        raise ValueError(f"sinks must be floating-point, got {sinks.dtype}")
    if sinks.device != query.device:
        raise ValueError(f"sinks must be on query's device {query.device}, got {sinks.device}")


def check_dropout(dropout_p: float, bias: Bias | DAPE | Tensor | None) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {checks._kind(dropout_p)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p!r}")
    if dropout_p > 0 and isinstance(bias, DAPE):
        raise ValueError(f"dropout_p must be 0 with a DAPE, got {dropout_p!r}")


def check_document_ids(
    ids: Tensor | None, query: Tensor, key: Tensor, query_start: int | None, key_start: int | None
) -> None:
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"document_ids must be a Tensor or None, got {checks._kind(ids)}")
    if ids.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"document_ids must be int16, int32 or int64, got {ids.dtype}")
    if query.shape[2] != key.shape[2]:
        lengths = f"{query.shape[2]} and {key.shape[2]}"
        raise ValueError(f"document_ids needs query and key of one length, got {lengths}")
    if ids.dim() != 2 or ids.shape[0] != query.shape[0] or ids.shape[1] != query.shape[2]:
        shape = (query.shape[0], query.shape[2])
        raise ValueError(f"document_ids must have the shape (batch, length) = {shape}, got {checks._shape(ids)}")
    if ids.device != query.device:
        raise ValueError(f"document_ids must be on query's device {query.device}, got {ids.device}")
    if query_start is not None or key_start is not None:
        raise ValueError(
            "query_start and key_start must be None with document_ids: positions start anew in each document"
        )


def check_packed(name: str, tensor: Tensor) -> None:
    """One of query, key, value of packed sequences."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {checks._kind(tensor)}")
    if tensor.is_nested or tensor.dim() != 3:
        came = "a nested tensor" if tensor.is_nested else checks._shape(tensor)
        raise ValueError(f"{name} must be 3-D, (tokens of all sequences, heads, head_dim), got {came}")


def check_sequences(name: str, cu_seqlens: Tensor, max_seqlen: int, tensor: Tensor) -> None:
    """cu_seqlens_q or cu_seqlens_k; name is "q" or "k". Values are looked at on a CPU only: elsewhere one waits."""
    cu, most = f"cu_seqlens_{name}", f"max_seqlen_{name}"
    total = tensor.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{cu} must be a Tensor, got {checks._kind(cu_seqlens)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        came = f"{checks._shape(cu_seqlens)} of {cu_seqlens.dtype}"
        raise ValueError(f"{cu} must be an int32 or int64 vector of one number more than sequences, got {came}")
    if cu_seqlens.device != tensor.device:
        raise ValueError(f"{cu} must be on query's device {tensor.device}, got {cu_seqlens.device}")
    if not checks._is_int(max_seqlen):
        raise TypeError(f"{most} must be an int, got {checks._kind(max_seqlen)}")
    if max_seqlen < 0:
        raise ValueError(f"{most} must be at least 0, got {max_seqlen}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last > total or (len(lengths) and int(lengths.min()) < 0):
        raise ValueError(f"{cu} must ascend from 0 to at most the {total} tokens, got {cu_seqlens.tolist()}")
    if len(lengths) and int(lengths.max()) > max_seqlen:
        raise ValueError(f"{most} must be at least the longest sequence, {int(lengths.max())}, got {max_seqlen}")


def is_fake(tensor: Tensor) -> bool:
    """Without values to look at."""
    return tensor.device.type == "meta" or type(tensor) is not Tensor


def check_skip_negligible(skip_negligible: bool | None) -> None:
    if skip_negligible is not None:
        checks._check_flag("skip_negligible", skip_negligible)
