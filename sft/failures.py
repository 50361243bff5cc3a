"""Errors inside a run, told with what was being computed and what to change."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..core.distributed import rank
from ..core.errors import TrainingError

NAMED = 8
"""Samples of a batch that a message names."""
_MEMORY = ("out of memory", "can't allocate memory")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FREE_SPACE = "free space or lower save_total_limit, then go on with --resume_from_checkpoint auto"
_TORCH_SAVE = ("pytorchstreamwriter", "unexpected pos", "iostream error")
_TIMEOUT = ("timed out", "timeout", "connection closed by peer", "connection reset by peer")


def explained(error: Exception, step: int, batch: str) -> TrainingError | None:
    """What happened in words of the run, or None for an error of another kind."""
    where = f"rank {rank()}, step {step}, {batch}"
    text = str(error).lower()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(m in text for m in _MEMORY):
        return TrainingError(
            where,
            f"out of memory: {_first_line(error)}",
            "halve per_device_train_batch_size and double gradient_accumulation_steps, lower "
            "packing_length, multimodal_max_length or the pixel limits, or set recompute to full; "
            "docs/zero.md tells what ZeRO saves",
        )
    if "dataloader worker" in text:
        return TrainingError(
            where,
            f"a loader process died: {_first_line(error)}",
            "lower dataloader_num_workers or dataloader_prefetch_factor, as such processes die "
            "when memory or /dev/shm is full",
        )
    if isinstance(error, torch.distributed.DistError) or any(t in text for t in _TIMEOUT):
        return TrainingError(
            where,
            f"another process did not answer: {_first_line(error)}",
            "look for the first error of the other ranks above; if there is none, raise "
            "ddp_timeout (seconds), or lower dataloader_num_workers if a loader is stuck",
        )
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return TrainingError(where, f"the disk is full: {error}", _FREE_SPACE)
    return None


@contextmanager
def unwritable(folder: Path, what: str) -> Iterator[None]:
    """Remove what was written so far and say why, where writing into `folder` fails."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error).lower()
        of_torch = any(t in text for t in _TORCH_SAVE)
        if isinstance(error, RuntimeError) and not of_torch:
            raise
        free = shutil.disk_usage(folder.parent).free
        full = (
            free < 2**20 or "no space left" in text or getattr(error, "errno", None) in _DISK_FULL
        )
        shutil.rmtree(folder, ignore_errors=True)
        reason = "the disk is full" if full else _first_line(error)
        raise TrainingError(
            f"rank {rank()}, {what} in {folder.parent.resolve()}",
            f"cannot be written: {reason} ({free / 2**30:.2f} GiB were free); what was complete "
            "before is untouched",
            _FREE_SPACE,
        ) from error


def batch_in_words(ids: list[str], batch: dict[str, Any]) -> str:
    rows, tokens = batch["input_ids"].shape
    pixels = batch["pixel_values"].numel() // 3 if "pixel_values" in batch else 0
    named = ", ".join(ids[:NAMED]) or "none"
    if len(ids) > NAMED:
        named += f" and {len(ids) - NAMED} more"
    return f"samples {named} ({rows} x {tokens} tokens, {pixels:,} pixels)"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
