"""Masks of transformers, read as what attention takes: keys that count, documents, and nothing of size Lq x Lk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """What a mask function of transformers says. documents: (B, L) integers, of packed sequences."""

    causal: bool = False
    documents: Tensor | None = None
    window: int | None = None


class Mark(NamedTuple):
    """What a mask says beyond the keys that count: that it is causal, and that a window hides keys."""

    causal: bool = False
    windowed: bool = False


# The dtype of a mask (B, n) carries its mark: it survives slices, copies and compilation. Any other says nothing.
MARKS = {
    torch.uint8: Mark(causal=True),
    torch.int8: Mark(causal=True, windowed=True),
    torch.int16: Mark(windowed=True),
    torch.int32: Mark(causal=True),  # documents
    torch.uint32: Mark(causal=True, windowed=True),  # documents
}
DOCUMENT_TYPES = (torch.int32, torch.uint32)
HIDDEN = -9984.0  # -1e4 in bfloat16: what a float mask adds where it hides, or less


# Models that need a tensor even where nothing is hidden: their own code asks for it, or their positions follow it.
NEED_A_TENSOR = ("bloom", "mpt")
# Functions of transformers.masking_utils. A model should hand its window and its causality to attention, too.
CAUSAL = ("causal_mask_function",)
HARMLESS = ("bidirectional_mask_function",)
WINDOWS = (
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
)
DOCUMENTS = "packed_sequence_mask_function.<locals>.inner_mask"
AROUND = ("and_masks.<locals>.and_mask", "remap_positions_for_packed_sequence.<locals>.inner_mask")


def key_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    config: Any = None,
    device: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers' mask interface calls for "posattn": the mask that `attention_forward` is handed.

    (B, n), not 0 for keys that count, where keys from n on are not filled (static caches); or (B, L) int32 or uint32,
    the documents of packed sequences; or None if every key counts and there is nothing else to say. The dtype says
    whether the pattern is causal and whether its window hides keys (`MARKS`): `attention_forward` makes it causal, and
    refuses a layer that does not hand over its window. A static cache waits for the GPU once a forward, to know how
    far it is filled. transformers finds packed sequences by position_ids only where there is neither a cache
    (use_cache=False, or training) nor an attention_mask.

    Raises ValueError for masks of other patterns (chunks, blocks, functions of the user), and for a padding mask
    that is shorter than the keys.
    """
    pattern = read_pattern(mask_function, config)
    if pattern.documents is not None:
        if attention_mask is not None:
            raise ValueError("packed sequences must come without an attention_mask, got both")
        documents = pattern.documents
        one = bool((documents == documents[:, :1]).all())  # transformers 4 finds one document, too
        if not one:
            hides = pattern.window is not None and documents.shape[1] > pattern.window
            return documents.to(torch.uint32 if hides else torch.int32)
    if cache_position is not None:  # transformers 4
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    assert q_length is not None
    seen = kv_length + int(kv_offset)
    if pattern.causal:
        seen = int(q_offset) + q_length
    valid = min(seen - int(kv_offset), kv_length)
    if attention_mask is not None:
        width = attention_mask.shape[-1]
        if width >= seen:
            if width > seen and bool(attention_mask[:, seen:].any()):
                raise ValueError(
                    f"attention_mask counts keys after the {seen} so far: it has {width} columns"
                )
            attention_mask = attention_mask[:, seen - valid : seen]
        elif width != valid:  # not cut already
            raise ValueError(
                f"attention_mask must have a column for each of the {seen} keys so far, got {width}"
            )
    kind = getattr(config, "model_type", None)
    if attention_mask is not None and kind == "bloom":
        check_no_holes(attention_mask)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    dtype = _dtype(pattern.causal, pattern.window is not None and valid > pattern.window)
    if attention_mask is not None:
        return attention_mask.bool().to(dtype)
    if dtype != torch.bool or kind in NEED_A_TENSOR or valid < kv_length:
        return torch.ones((), dtype=dtype, device=device).expand(batch_size, valid)
    return None


def _dtype(causal: bool, windowed: bool) -> torch.dtype:
    if causal:
        return torch.int8 if windowed else torch.uint8
    return torch.int16 if windowed else torch.bool


def mark(mask: Any) -> Mark:
    """What the dtype of a mask (B, n) says."""
    return MARKS.get(mask.dtype, Mark()) if isinstance(mask, Tensor) and mask.dim() == 2 else Mark()


def all_count(mask: Tensor) -> bool:
    """Whether this is the mask of ones that `key_mask` makes: one number, expanded."""
    return mask.numel() > 0 and mask.stride() == (0, 0)


def read_pattern(function: Callable[..., Any] | None, config: Any = None) -> Pattern:
    """A mask function of transformers, taken apart; ValueError for one that is not known."""
    causal, documents, window = False, None, None
    for part in _parts(function):
        name = _name(part)
        if name in CAUSAL:
            causal = True
        elif name == DOCUMENTS:
            documents = _closure(part)["packed_sequence_mask"]
        elif name in WINDOWS:
            window = int(_closure(part)["sliding_window"])
        elif name not in HARMLESS:
            kind = getattr(config, "model_type", "this model")
            raise ValueError(
                f'attn_implementation="posattn" serves causal, bidirectional, sliding and packed masks with padding; '
                f'{kind} asks for a mask by {name}. Use attn_implementation="eager" or "sdpa" for it'
            )
    return Pattern(causal, documents, window)


def _parts(function: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    if function is None:  # transformers' default
        from transformers.masking_utils import causal_mask_function

        function = causal_mask_function
    assert function is not None
    if _name(function) not in AROUND:
        yield function
        return
    inside = _closure(function)
    for part in inside.get("mask_functions", (inside.get("mask_function"),)):
        yield from _parts(part)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or f"an object of {type(function).__name__}"
    return name if getattr(function, "__module__", "") == "transformers.masking_utils" else f"{name}, its own"


def _closure(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))


def check_no_holes(mask: Tensor) -> None:
    """BLOOM counts positions over tokens that are not padding: the offset of two is that of their indices only
    without padding in between."""
    mask = mask.to(torch.int8)
    starts = mask[:, 0] + ((mask[:, 1:] - mask[:, :-1]) > 0).sum(1)
    if bool((starts > 1).any()):
        raise ValueError(
            "attention_mask of BLOOM must not hide tokens between others, only before or after them"
        )


def as_key_mask(
    mask: Tensor, causal: bool, query_length: int, key_length: int, used: int | None = None
) -> Tensor | None:
    """A dense mask (B, 1, Lq or 1, Lk), True or 0.0 where it lets through, as the keys that count: (B, n).

    The last query stands on key ``used - 1`` (the last by default); n = used, or None stands for all of Lk. ValueError
    unless the mask is padding, and causal with `causal`; rows of queries that are padding themselves do not matter.
    A float mask hides by -1e4 or less; any value between is one that a bias would have, and a ValueError.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, query_length):
        raise ValueError(
            f"attention_mask must be (batch, key_length), got shape {tuple(mask.shape)}; for a mask of queries by keys "
            'use attn_implementation="eager"'
        )
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.is_floating_point():
        seen = mask == 0
        if not bool((seen | (mask <= HIDDEN)).all()):
            raise ValueError(
                "attention_mask of floats must be 0 where it lets through, and -1e4 or less where it hides; it has "
                'other values, which are added to scores: use attn_implementation="eager", or attach a bias'
            )
    else:
        raise ValueError(
            f"attention_mask of queries by keys must be bool, or of floats that are added to scores, got {mask.dtype}"
        )
    if seen.shape[3] < key_length:
        raise ValueError(f"attention_mask must have {key_length} columns, got shape {tuple(mask.shape)}")
    seen = seen[:, 0, :, :key_length]  # (B, Lq or 1, Lk)
    keys = seen[:, -1]
    if used is None:
        used = key_length
        if causal and query_length < key_length and not bool(keys[:, -1].any()):
            raise ValueError(
                "attention_mask hides the last key of every sequence, which does not tell where the query stands; "
                "pass a mask of shape (batch, key_length)"
            )
    keys = keys[:, :used]
    if seen.shape[1] > 1:
        expected = keys[:, None].expand(-1, query_length, -1)
        alive = torch.ones_like(expected[..., :1])
        if causal:
            places = torch.arange(used, device=keys.device)
            expected = expected & (places <= places[used - query_length :, None])
            alive = keys[:, used - query_length :, None]
        wrong = (expected != seen[..., :used]).any(-1, keepdim=True) | seen[..., used:].any(-1, keepdim=True)
        if bool((wrong & alive).any()):
            raise ValueError(
                "attention_mask must hide padding, and what comes after a query in a causal model, and nothing else; "
                'for any other mask of queries by keys use attn_implementation="eager"'
            )
    return None if used == key_length and bool(keys.all()) else keys
