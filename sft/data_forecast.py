"""What a run's data is, and how full its batches are, from columns of counts alone."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from trl.trainer.sft_config import SFTConfig

from ..core.errors import ConfigError
from ..data.dataset import PreparedData
from ..data.packing import Groups, PackingPlan
from ..data.sources import Source
from .batches import EpochBatches, Packing, train_batches
from .data import RunData
from .forecast import DataForecast, Histogram, Layout, SampleRef, SourceCount
from .probe import computed_tokens

BINS = 20
"""At most, of a histogram."""

LONGEST = 3
"""Samples that are named."""

Flops = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Operations of a step, float64, on samples of these indices, each computed at so many tokens."""


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of all processes in the first epoch; every array has one entry for each.

    Attributes:
        groups: Their samples.
        tokens: Computed at once, padding included.
        widest: Tokens that a sample of it is computed at; with packing 0, as each has its own.
    """

    groups: Groups
    tokens: np.ndarray
    widest: np.ndarray
    patches: np.ndarray
    trained_tokens: np.ndarray


def describe(
    name: str,
    data: PreparedData,
    sources: Sequence[Source],
    passes: Sequence[float],
    per_epoch: Sequence[int],
    patches_per_token: int,
) -> DataForecast:
    """Counts and distributions of prepared samples; `passes` and `per_epoch` are of each source."""
    lengths, trained = data.column("length"), data.column("trained_tokens")
    visual, cut = data.column("patches") // patches_per_token, data.column("cut")
    names = [source.name for source in sources]
    counts = zip(names, data.sizes, passes, per_epoch, strict=True)
    longest = np.argsort(-(lengths + cut), kind="stable")[:LONGEST]
    return DataForecast(
        name=name,
        sources=[SourceCount(*of_source) for of_source in counts],
        samples=len(lengths),
        per_epoch=sum(per_epoch),
        left_out=dict(Counter(map(_reason, data.left_out)).most_common()),
        tokens=data.tokens,
        trained_tokens=data.trained_tokens,
        visual_tokens=int(visual.sum()),
        with_media=int((visual > 0).sum()),
        truncated=int((cut > 0).sum()),
        cut_tokens=int(cut.sum()),
        longest=[sample_ref(data, int(i)) for i in longest],
        lengths=histogram(lengths),
        visual=histogram(visual[visual > 0]),
        supervised=histogram(trained / lengths, width=1 / BINS),
    )


def sample_ref(data: PreparedData, index: int) -> SampleRef:
    row = data.dataset[index]
    names = ("source", "record", "id", "length", "patches", "cut")
    return SampleRef(index, *(row[name] for name in names))


def histogram(values: np.ndarray, width: float | None = None) -> Histogram:
    """Bins from 0 on, of `width` or else of a round one that gives at most `BINS` of them."""
    if not len(values):
        return Histogram([], [], 0.0, 0.0, 0.0)
    largest = float(values.max())
    width = width or _round_up(largest / BINS)
    # Rounded before they are counted by: 3 * 0.05 is more than 0.15.
    edges = (np.arange(max(1, math.ceil(largest / width - 1e-9)) + 1) * width).round(9)
    counts, _ = np.histogram(values, edges)
    middle = float(np.median(values))
    return Histogram(edges.tolist(), counts.tolist(), float(values.mean()), middle, largest)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(max(value, 1.0)))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value * (1 - 1e-9))


def _reason(entry: dict[str, Any]) -> str:
    """Field and fault of a sample that was left out, without what differs from sample to sample."""
    field = entry["where"].partition(f' (id "{entry["id"]}"), ')[2]
    what = f"{field}: {entry['what']}" if field else entry["what"]
    return re.sub(r'"[^"]*"|\S*/\S+|\d[\d,]*', "…", what)


def micro_batches(data: PreparedData, batches: EpochBatches) -> MicroBatches:
    """Those that the processes compute in the first epoch."""
    groups = batches.order(0)
    computed = len(batches) * batches.world
    if computed < len(groups):  # of the last step, which dataloader_drop_last leaves out
        groups = Groups(groups.indices[: groups.starts[computed]], groups.starts[:computed])
    padded = not isinstance(batches.order, PackingPlan)
    tokens = computed_tokens(groups, data.column("length"), padded)
    widest = tokens // groups.sizes() if padded else np.zeros_like(tokens)
    patches, trained = (groups.sums(data.column(c)) for c in ("patches", "trained_tokens"))
    return MicroBatches(groups, tokens, widest, patches, trained)


def layouts(
    args: SFTConfig, data: RunData, packing: Packing, packed: bool, flops: Flops, world: int
) -> list[Layout]:
    """The configured order of batches first, then others; one of a single row per process for
    packing, where it is not configured and every sample fits.

    Args:
        packing: How rows are packed, or would be; `packed` tells which.
    """
    configured = "packing" if packed else str(args.train_sampling_strategy)
    names = dict.fromkeys([configured, "random", "group_by_length", "packing"])
    found = []
    for name in names:
        changed = copy(args)
        changed.train_sampling_strategy = "random" if name == "packing" else name
        if name == "packing" and not packed:
            changed.per_device_train_batch_size = 1
        try:
            plan = packing if name == "packing" else None
            batches = train_batches(changed, data, plan, rank=0, world=world)
        except ConfigError:  # a sample is longer than a row
            continue
        found.append(_layout(name, data, batches, args, flops, name == configured))
    return found


def _layout(
    name: str,
    data: RunData,
    batches: EpochBatches,
    args: SFTConfig,
    flops: Flops,
    configured: bool,
) -> Layout:
    assert data.train is not None
    planned = micro_batches(data.train, batches)
    groups, computed = planned.groups, int(planned.tokens.sum())
    lengths = data.train.column("length")
    own = int(lengths[groups.indices].sum())
    padding = 1 - own / computed
    if isinstance(batches.order, PackingPlan):
        padding = 1 - own / (batches.order.rows * batches.order.bounds.tokens)
    cost = np.add.reduceat(flops(groups.indices, computed_at(planned, lengths)), groups.starts)
    return Layout(
        name=name,
        padding=padding,
        tokens=computed,
        micro_batches=len(groups),
        steps=math.ceil(len(batches) / args.gradient_accumulation_steps),
        waiting=_waiting(cost, batches.world),
        configured=configured,
    )


def computed_at(planned: MicroBatches, lengths: np.ndarray) -> np.ndarray:
    """Tokens that each sample of the micro-batches is computed at, in their order."""
    widest = np.repeat(planned.widest, planned.groups.sizes())
    return np.maximum(widest, lengths[planned.groups.indices])


def _waiting(cost: np.ndarray, world: int) -> float:
    """As `data.packing.imbalance`, of costs of micro-batches."""
    cost = cost[: len(cost) // world * world].reshape(-1, world)
    return float(cost.max(axis=1).sum() / cost.mean(axis=1).sum()) if cost.size else 1.0
