"""Attention inside consecutive segments of one axis: packed samples, images, frames, windows.

Shape suffixes: N positions of all segments, H heads, K head size. Importing this module registers
the attention implementation "packed" with transformers.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available

from ..core.errors import ModelError
from ..core.logging import note

PACKED = "packed"
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_HEAD_SIZE = 256
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some families add to the scores; neither the kernel nor SDPA takes it."""

# Older versions have no such argument and take fewer key heads as they are.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass
class Segments:
    """Consecutive pieces of one axis, none of which sees another.

    Attributes:
        bounds: Where each begins and the last one ends, int32 `[segments + 1]`.
        longest: Positions of the longest one.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        segments = cls(bounds, max(lengths))
        segments.lengths = list(lengths)
        return segments

    @cached_property
    def lengths(self) -> list[int]:
        return self.bounds.diff().tolist()


def attend_within(
    query_NHK: Tensor,
    key_NHK: Tensor,
    value_NHK: Tensor,
    segments: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside each of the segments, `[N, H, K]`: one call of the variable-length kernel
    where the device has it, elsewhere SDPA, neighbours of one length sharing a call.

    Args:
        key_NHK, value_NHK: May have fewer heads, each shared by a group of the query's.
        window: Positions that one sees, itself and those before it; with `causal` alone.
    """
    dtype = query_NHK.dtype
    if torch.is_autocast_enabled(query_NHK.device.type):
        dtype = torch.get_autocast_dtype(query_NHK.device.type)
    if not dropout and _has_kernel(query_NHK, value_NHK, dtype):
        query, key, value = (x.to(dtype) for x in (query_NHK, key_NHK, value_NHK))
        before = -1 if window is None else window - 1
        bounds, longest = segments.bounds, segments.longest
        seen = (before, 0) if causal else (-1, -1)
        output: Any = varlen_attn(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            scale=scale,
            window_size=seen,
            **_GROUPED,
        )
        return output
    return _attend_each(query_NHK, key_NHK, value_NHK, segments, causal, window, scale, dropout)


# Compiled, it would be compiled again for each new list of lengths.
@torch.compiler.disable()
def _attend_each(
    query_NHK: Tensor,
    key_NHK: Tensor,
    value_NHK: Tensor,
    segments: Segments,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """SDPA of one segment, or of neighbours of one length, after the other."""
    outputs, start = [], 0
    for length, run in groupby(segments.lengths):
        count = sum(1 for _ in run)
        stop = start + count * length
        q, k, v = (
            x[start:stop].unflatten(0, (count, length)).transpose(1, 2)
            for x in (query_NHK, key_NHK, value_NHK)
        )
        band = None
        if window is not None and window < length:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            band = ones.tril().triu(1 - window)
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=band,
            is_causal=causal and band is None,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)


def _has_kernel(query: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    size = query.shape[-1]
    return (
        dtype in KERNEL_DTYPES
        and size % 8 == 0
        and size <= KERNEL_HEAD_SIZE
        and value.shape[-1] == size
        and _device_has_kernel(query.device)
    )


@torch.compiler.assume_constant_result
def _device_has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass
class DeferredMask:
    """A mask that a packed batch never needs: `[T, T]`, made when it is first asked for."""

    arguments: dict[str, Any]

    @cached_property
    def mask(self) -> Tensor | None:
        return sdpa_mask(**self.arguments)

    @property
    def window(self) -> int | None:
        return self.arguments.get("local_size")


def packed_mask(**arguments: Any) -> Tensor | DeferredMask | None:
    """transformers' mask for "packed": that of sdpa, deferred where nothing is padded, since only
    the attention sees whether the batch has `cu_seq_lens_q`."""
    whole = arguments["q_length"] == arguments["kv_length"]
    if arguments.get("attention_mask") is None and whole:
        return DeferredMask(arguments)
    return sdpa_mask(**arguments)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention for "packed": inside the segments that `cu_seq_lens_q` bounds, and
    without it sdpa.

    Args:
        query, key, value: `[B, H, T, K]`; with `cu_seq_lens_q` the rows count as one axis.

    Returns:
        `[B, T, H, K]`.

    Raises:
        ModelError: the model's attention is more than causal attention with a window.
    """
    mask: Any = attention_mask
    deferred = mask if isinstance(mask, DeferredMask) else None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    odd = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if cu_seq_lens_q is not None and isinstance(mask, Tensor):
        odd.append("a mask of its own")
    if cu_seq_lens_q is not None and deferred and deferred.window != sliding_window:
        odd.append("a local mask")
    if cu_seq_lens_q is not None and sliding_window and not causal:
        odd.append("a window in both directions")
    if odd:
        raise ModelError(
            f"packing: true with {type(module).__name__}",
            f"its attention has {', '.join(odd)}, which packed attention does not apply",
            "set attn_implementation to eager or flash_attention_2, or packing to false",
        )
    if cu_seq_lens_q is None:
        mask = deferred.mask if deferred else mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, **kwargs
        )
    segments = Segments(cu_seq_lens_q, max_length_q or query.shape[2])
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = attend_within(
        q, k, v, segments, causal=causal, window=sliding_window, scale=scaling, dropout=dropout
    )
    return output.unflatten(0, (len(query), -1)), None


def packing_attention(requested: str | None) -> str:
    """The attention implementation to load a model with whose batches are packed."""
    if requested == "flash_attention_2" and not is_flash_attn_2_available():
        note("attn_implementation is packed: flash-attn 2 is not installed, or there is no GPU")
        return PACKED
    return requested or PACKED


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, packed_mask)
