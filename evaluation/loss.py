"""Teacher-forced loss: how surprised a model is by the answers that the data itself has."""

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..collators.padded import PaddedCollator
from ..collators.rendering import IGNORE_INDEX
from ..collators.sample import SampleEncoder
from ..core.distributed import rank, world_size
from ..core.errors import DataError
from ..data.conversation import Conversation
from ..data.pool import ahead
from ..inference.generation import memory_for
from ..inference.parts import Parts
from ..models.supervised_head import label_log_probs
from .samples import Sample

WINDOW = 16
"""Batches that are looked at together, so that samples of like length share one."""


@dataclass(frozen=True)
class SampleLoss:
    """Attributes:
    total: Negative log-likelihood of the trained tokens, in nats.
    tokens: How many there are; 0 for a conversation without an answer.
    cut: Tokens beyond the length limit, which are left away as in training.
    error: Why the sample could not be run.
    """

    total: float = 0.0
    tokens: int = 0
    cut: int = 0
    error: str | None = None


def loss_file(
    model: Any,
    encoder: SampleEncoder,
    samples: Sequence[Sample],
    output: Path,
    *,
    batch_size: int,
    settings: dict[str, Any],
) -> None:
    """Write the loss of each sample, a JSON line `{"record", "total", "tokens", "cut", "error"}`
    for each record. Like `inference.files.answer_file` it goes on with a run that was stopped, and
    shares the work among processes.

    Raises:
        ConfigError: the output is of other settings, or another run is writing it.
        TrainingError: the GPU is out of memory.
    """
    parts = Parts(output, settings)
    if parts.is_complete():
        return
    with parts.begun() as wait:
        done = parts.done()
        mine = [sample for sample in samples if sample.record not in done][rank() :: world_size()]
        off = rank() > 0 or not sys.stderr.isatty()
        bar = tqdm(desc="Loss", unit=" records", total=len(mine), delay=1, disable=off)
        with bar, parts.lines() as write:
            for start in range(0, len(mine), WINDOW * batch_size):
                window = mine[start : start + WINDOW * batch_size]
                where = f"loss of records {window[0].record} to {window[-1].record}"
                with memory_for(where, "lower batch_size, with which the run can be gone on with"):
                    losses = iter(sample_losses(model, encoder, _readable(window), batch_size))
                for sample in window:
                    loss = SampleLoss(error=sample.error) if sample.error else next(losses)
                    write({"record": sample.record, **asdict(loss)})
                bar.update(len(window))
            wait()
        if rank() == 0:
            parts.finish(len(samples))
        wait()


def sample_losses(
    model: Any,
    encoder: SampleEncoder,
    conversations: Sequence[Conversation],
    batch_size: int = 8,
) -> list[SampleLoss]:
    """The loss of each conversation's trained tokens, given all before them.

    Over a set, the sum of `total` / the sum of `tokens` is the `eval_loss` of a training run with
    the same limits.

    Args:
        model: An `Ovis2_5`, or a PeftModel around one, in evaluation mode.
    """
    encoder = replace(encoder, decode_files=True)
    found = [SampleLoss()] * len(conversations)
    rows: dict[int, dict[str, Any]] = {}
    for i, conversation in enumerate(conversations):
        if not any(turn.trained for turn in conversation.turns):
            continue
        try:
            rows[i] = encoder.row(conversation)
        except DataError as error:
            found[i] = SampleLoss(error=" ".join(str(error).split()))
    order = sorted(rows, key=lambda i: rows[i]["length"])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    collator = PaddedCollator(encoder)
    with ThreadPoolExecutor(1) as pool:  # decodes the next batches while the model runs
        collated = ahead(pool, 1, lambda batch: collator([rows[i] for i in batch]), batches)
        for indices, batch in zip(batches, collated, strict=True):
            for i, (total, tokens) in zip(indices, _totals(model, encoder, batch), strict=True):
                found[i] = SampleLoss(total, tokens, rows[i]["cut"])
                if not math.isfinite(total):
                    where, fix = conversations[i].where("loss"), "look for NaN in the weights"
                    found[i] = SampleLoss(error=f"{where}: is {total}. Fix: {fix}.")
    return found


@torch.no_grad()
def _totals(
    model: Any, encoder: SampleEncoder, batch: dict[str, Any]
) -> Iterator[tuple[float, int]]:
    """Negative log-likelihood and tokens of each sample, by the logits of trained tokens alone."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = base.get_input_embeddings().weight.device
    inputs = {name: v.to(device) for name, v in batch.items() if isinstance(v, Tensor)}
    if "pixel_values" in inputs:
        normalise = encoder.processor.image_processor.normalise
        inputs["pixel_values"] = normalise(inputs["pixel_values"])
    labels_BT = inputs.pop("labels")
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = (targets_BT != IGNORE_INDEX).flatten().nonzero()[:, 0]
    hidden_BTH = base.base_model(**inputs, use_cache=False).last_hidden_state
    log_probs, _, _ = label_log_probs(
        base.get_output_embeddings(),
        hidden_BTH.flatten(0, 1)[positions],
        targets_BT.flatten()[positions],
    )
    sample_of = positions // labels_BT.shape[1]
    totals = torch.zeros(len(labels_BT), dtype=torch.float64, device=device)
    totals.index_add_(0, sample_of, -log_probs.double())
    return zip(totals.tolist(), sample_of.bincount(minlength=len(totals)).tolist(), strict=True)


def _readable(samples: Sequence[Sample]) -> list[Conversation]:
    return [s.conversation for s in samples if s.conversation and not s.error]
