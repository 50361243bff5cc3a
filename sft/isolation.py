"""Before a packed run: does the model keep two samples of one row apart?"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ModelError
from ..lora.samples import Sample, made_samples

TAIL = 8
"""Tokens at the end of a probe's answer that are reversed to change what it says."""


@dataclass(frozen=True)
class Limits:
    """What may change a sample's logits, relative to their spread.

    Attributes:
        neighbour: Another sample before it in the row: nothing, since the same kernels run on the
            same shapes. Measured 0 on tiny models that isolate; a leak through convolutions of
            width 3 alone, the smallest seen, was 1.2e-3 in float32 and 5e-3 in bfloat16.
        alone: A row of its own: other kernels round differently. Measured 3e-7 in float32 and 0.05
            in bfloat16 (28 layers); all of the other sample in sight of the attention was 1.1.
    """

    neighbour: float
    alone: float


EXACT, ROUNDED = Limits(1e-4, 1e-4), Limits(1e-3, 0.25)


def probe_samples(processor: Any, images: bool) -> list[Sample]:
    """Two short conversations, with small images where `images` is set."""
    return made_samples(processor, 4)[0 if images else 1 :: 2]


def packed_row(samples: Sequence[Sample]) -> dict[str, Any]:
    """The samples as one row of a packed batch."""
    device = samples[0]["input_ids"].device
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    row: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    for key, first in samples[0].items():
        along_tokens = first.shape[:2] == samples[0]["input_ids"].shape
        row[key] = torch.cat([sample[key] for sample in samples], dim=int(along_tokens))
    return row


def changed(sample: Sample) -> Sample:
    """Other content of the same shape: the end of the text reversed, the images' patches too."""
    ids = sample["input_ids"].clone()
    ids[:, -TAIL:] = ids[:, -TAIL:].flip(1)
    pixels = {key: x.flip(0) for key, x in sample.items() if x.is_floating_point()}
    return {**sample, **pixels, "input_ids": ids}


def check_isolation(
    model: nn.Module,
    samples: Sequence[Sample],
    autocast: AbstractContextManager[Any] | None = None,
) -> None:
    """Run two samples alone and as one packed row, in evaluation mode, and compare their logits.

    Every rank must call it. Leaves the modes of the modules and the random numbers as they were.

    Args:
        samples: With the same keys; an `attention_mask` is left out, as of a packed batch.
        autocast: What the training forward runs in.

    Raises:
        ModelError: a sample's logits depend on the other sample.
    """
    device = next(model.parameters()).device
    first, second = (
        {key: value.to(device) for key, value in sample.items() if key != "attention_mask"}
        for sample in samples
    )
    modes = {module: module.training for module in model.modules()}
    generators = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(generators), autocast or nullcontext():
            limits = ROUNDED if computes_rounded(model, device) else EXACT
            alone, row, beside_another = (
                torch.cat([model(**inputs, use_cache=False).logits[0] for inputs in forwards])
                for forwards in (
                    (first, second),
                    (packed_row([first, second]),),
                    (packed_row([changed(first), second]),),
                )
            )
    finally:
        for module, training in modes.items():
            module.training = training
    whole: Any = getattr(model, "get_base_model", lambda: model)()
    if not alone.isfinite().all():
        raise ModelError(
            f"{type(whole).__name__}",
            "gives logits that are not finite for two short conversations",
            "use bf16 or float32, or see whether its weights are whole",
        )
    start = first["input_ids"].shape[1]
    leak = relative_difference(beside_another[start:], row[start:])
    difference = relative_difference(row, alone)
    if leak <= limits.neighbour and difference <= limits.alone:
        return
    raise ModelError(
        f"packing: true with {type(whole).__name__}",
        "does not keep two samples of one row apart: with another first sample the second one's "
        f"logits change by {leak:.2g} of their spread (limit {limits.neighbour:g}), against "
        f"samples alone by {difference:.2g} (limit {limits.alone:g}), with attn_implementation "
        f"{whole.config._attn_implementation}",
        "set packing to false, or try another attn_implementation",
    )


def computes_rounded(model: nn.Module, device: torch.device) -> bool:
    """Whether anything is computed in less than float32."""
    return (
        torch.is_autocast_enabled(device.type)
        or any(p.dtype != torch.float32 for p in model.parameters())
        or (device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32")
    )


def relative_difference(logits_TV: Tensor, expected_TV: Tensor) -> float:
    """The largest difference of a position, as root mean square over the vocabulary, by the spread
    of all expected logits: rounding grows with their scale, which is each model's own."""
    difference = (logits_TV.float() - expected_TV.float()).square().mean(dim=-1).sqrt().max()
    return (difference / expected_TV.float().std()).item()
