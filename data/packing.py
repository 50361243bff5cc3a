"""Which samples share a row, and which rows a step: planned ahead from lengths alone.

Samples are packed in windows of their shuffled order by best fit decreasing, within a bound on
tokens and, where given, on visual patches. Rows are then sorted by planned cost, so that those
which a step runs side by side cost nearly the same, and the steps are shuffled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..core.errors import ConfigError

WINDOW, MOST_WINDOWS = 16384, 10
"""Samples that are packed together, more of them in data of more than so many windows. Smaller ones
leave more rows half empty; a single one puts the same samples side by side in every epoch."""


class Groups:
    """Lists of sample indices, kept as one array: group i is `indices[starts[i]:starts[i + 1]]`.

    Attributes:
        indices: int64, the groups one after another.
        starts: int64, where each group begins; none is empty.
    """

    def __init__(self, indices: np.ndarray, starts: np.ndarray):
        self.indices, self.starts = indices, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, group: int) -> list[int]:
        if not 0 <= group < len(self):
            raise IndexError(group)
        stop = self.starts[group + 1] if group + 1 < len(self) else len(self.indices)
        return self.indices[self.starts[group] : stop].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[group] for group in range(len(self)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of each group over `values`, one for each sample of the data."""
        return np.add.reduceat(values[self.indices], self.starts)

    def sizes(self) -> np.ndarray:
        return np.diff(self.starts, append=len(self.indices))

    def in_order(self, order: np.ndarray) -> "Groups":
        """The groups `order[0]`, `order[1]` and so on."""
        sizes = self.sizes()[order]
        starts = np.cumsum(sizes) - sizes
        inside = np.arange(sizes.sum()) - np.repeat(starts, sizes)
        return Groups(self.indices[np.repeat(self.starts[order], sizes) + inside], starts)

    def joined(self, count: int) -> "Groups":
        """Every `count` neighbours as one group; the last may be of fewer."""
        return Groups(self.indices, self.starts[::count])


@dataclass(frozen=True)
class Samples:
    """What the plan knows of each sample of the data.

    Attributes:
        lengths: Tokens, int64.
        patches: Visual patches, int64.
        costs: Planned cost, float64; `models.ovis2_5.flops.training_flops` gives it.
    """

    lengths: np.ndarray
    patches: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True)
class RowBounds:
    """The most that a row may hold; patches are not bounded where None is given."""

    tokens: int
    patches: int | None = None

    def check(self, lengths: np.ndarray, patches: np.ndarray) -> None:
        """Raises ConfigError where a sample, of these tokens and patches, fits no row."""
        if (longest := int(lengths.max(initial=0))) > self.tokens:
            count = int((lengths > self.tokens).sum())
            raise ConfigError(
                "packing_length",
                f"is {self.tokens}, but {count} samples are longer, the longest {longest} tokens",
                f"raise it to {longest}, or lower multimodal_max_length and text_max_length to "
                f"{self.tokens}",
            )
        most = int(patches.max(initial=0))
        if self.patches is not None and most > self.patches:
            count = int((patches > self.patches).sum())
            raise ConfigError(
                "packing_max_patches",
                f"is {self.patches}, but {count} samples have more, the largest {most} patches",
                f"raise it to {most}, or lower the pixel limits",
            )


def window_count(samples: int) -> int:
    return min(max(1, round(samples / WINDOW)), MOST_WINDOWS)


def pack(indices: np.ndarray, samples: Samples, bounds: RowBounds) -> Groups:
    """Rows of the samples `indices`, which are in random order; each of them once.

    Windows of their order are packed one after another, each by best fit decreasing. Where
    the bound on patches can matter, samples with patches are packed first, by the larger of the
    shares of both bounds that they take; those of text fill the rows up.
    """
    parts, sizes = [], []
    for window in np.array_split(indices, window_count(len(indices))):
        row_of, order = _pack_window(samples.lengths[window], samples.patches[window], bounds)
        by_row = np.argsort(row_of, kind="stable")
        parts.append(window[order[by_row]])
        sizes.append(np.bincount(row_of))
    sizes = np.concatenate(sizes)
    return Groups(np.concatenate(parts), np.cumsum(sizes) - sizes)


def _pack_window(
    lengths: np.ndarray, patches: np.ndarray, bounds: RowBounds
) -> tuple[np.ndarray, np.ndarray]:
    """Row of each sample, int64, and the order of samples that it follows."""
    limit = bounds.patches
    if limit is None or (patches * bounds.tokens <= limit * lengths).all():
        order = np.argsort(-lengths, kind="stable")
        rows: list[int] = []
        _best_fit(lengths[order].tolist(), bounds.tokens, [], rows)
        return np.array(rows), order
    shares = np.maximum(lengths, -(-patches * bounds.tokens // limit))
    seen, text = np.flatnonzero(patches), np.flatnonzero(patches == 0)
    seen = seen[np.argsort(-shares[seen], kind="stable")]
    text = text[np.argsort(-lengths[text], kind="stable")]
    rows = []
    _best_fit(shares[seen].tolist(), bounds.tokens, [], rows)
    room = bounds.tokens - np.bincount(rows, weights=lengths[seen]).astype(np.int64)
    _best_fit(lengths[text].tolist(), bounds.tokens, room.tolist(), rows)
    return np.array(rows), np.concatenate([seen, text])


def _best_fit(sizes: list[int], capacity: int, rooms: list[int], rows: list[int]) -> None:
    """Append to `rows` the row of each of `sizes`, which fall: the one with the least room that
    is enough. `rooms` are those of the rows that are open already."""
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms, smallest = 0, sizes[-1] if sizes else 0
    """One bit for each room that some row has: the lowest from a size upwards is the best fit."""
    for row, room in enumerate(rooms):
        by_room[room].append(row)
        open_rooms |= 1 << room
    count = len(rooms)
    for size in sizes:
        if fitting := open_rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            same = by_room[room]
            row = same.pop()
            if not same:
                open_rooms ^= 1 << room
        else:
            row, room = count, capacity
            count += 1
        rows.append(row)
        if (left := room - size) >= smallest:
            by_room[left].append(row)
            open_rooms |= 1 << left


def split(rows: Groups, count: int, costs: np.ndarray) -> Groups:
    """The same samples in `count` rows, or one for each sample: the dearest rows are cut near the
    half of their cost. Where there are `count` or more already, as they are."""
    while (missing := min(count, len(rows.indices)) - len(rows)) > 0:
        cost, sizes = rows.sums(costs), rows.sizes()
        several = np.flatnonzero(sizes > 1)
        cut = several[np.argsort(-cost[several], kind="stable")[:missing]]
        passed = np.cumsum(costs[rows.indices])
        half = passed[rows.starts[cut] + sizes[cut] - 1] - cost[cut] / 2
        first, last = rows.starts[cut] + 1, rows.starts[cut] + sizes[cut] - 1
        at = np.clip(np.searchsorted(passed, half, side="right"), first, last)
        rows = Groups(rows.indices, np.sort(np.concatenate([rows.starts, at])))
    return rows


def side_by_side(
    rows: Groups,
    costs: np.ndarray,
    batch: int,
    world: int,
    random: np.random.Generator,
    accumulation: int = 1,
) -> Groups:
    """Micro-batches of `batch` rows, those of an optimizer step of `world` processes one after
    another.

    Neighbours by cost make a step, the dearest micro-batch first. With several rows to a
    micro-batch, each takes one from every so many neighbours, the dearest beside the cheapest,
    there and back again. The dearest step is the first, so that running out of memory shows at
    once; the others follow in random order. Rows that fill no whole step, the cheapest, come last,
    in micro-batches of fewer rows for every process, split where they are too few.
    """
    together = world * accumulation
    order = np.argsort(-rows.sums(costs), kind="stable")
    whole, left = np.split(order, [len(order) // (batch * together) * batch * together])
    dealt = whole.reshape(-1, batch, together)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1]
    steps = dealt.transpose(0, 2, 1).reshape(-1, batch * together)
    random.shuffle(steps[1:])
    head = rows.in_order(steps.ravel()).joined(batch)
    if not len(left):
        return head
    count = micro_batches(len(left), batch, world)
    rest = split(rows.in_order(left), count, costs)
    firsts = [part[0] for part in np.array_split(rest.starts, min(count, len(rest)))]
    return Groups(
        np.concatenate([head.indices, rest.indices]),
        np.concatenate([head.starts, len(head.indices) + np.array(firsts)]),
    )


def micro_batches(rows: int, batch: int, world: int) -> int:
    """As few as hold the rows and as every process has as many of."""
    return -(-rows // (batch * world)) * world


def imbalance(micro_batches: Groups, costs: np.ndarray, world: int) -> float:
    """How much longer the planned steps take than if every process had the same cost.

    A step lasts as long as its dearest micro-batch: the sum over all whole steps of the largest
    cost of a process, over the sum of the mean cost. 1 is perfect balance; 1.05 means that a
    twentieth is spent waiting for others.
    """
    cost = micro_batches.sums(costs)
    cost = cost[: len(cost) // world * world].reshape(-1, world)
    return float(cost.max(axis=1).sum() / cost.mean(axis=1).sum()) if cost.size else 1.0


class PackingPlan:
    """The micro-batches of every epoch, of `batch` rows, for all of `world` processes.

    What an epoch holds follows from the arguments and its number alone, and what an optimizer step
    holds does not depend on how it is shared among rows of a micro-batch, processes and
    accumulation. Every epoch has the same number of rows: that of the first, and as many more as
    other orders may need; rows are split for it. An epoch that needs more still takes the first
    epoch's rows, in an order of its own.

    Attributes:
        rows: Rows of an epoch.
        length: Micro-batches of an epoch.
    """

    def __init__(
        self,
        indices: Callable[[int], np.ndarray],
        samples: Samples,
        bounds: RowBounds,
        batch: int,
        world: int,
        seed: int,
        *,
        accumulation: int = 1,
        drawn_anew: bool = False,
    ):
        """`indices` gives an epoch's samples in random order, as many in each; `drawn_anew` tells
        that they are not always the same ones.

        Raises:
            ConfigError: a sample fits no row.
        """
        bounds.check(samples.lengths, samples.patches)
        self.indices, self.samples, self.bounds = indices, samples, bounds
        self.batch, self.world, self.accumulation, self.seed = batch, world, accumulation, seed
        first = indices(0)
        self._packed = 0, pack(first, samples, bounds)
        rows, count = len(self._packed[1]), len(first)
        # An order moves the last row of a window; a draw, its tokens by about 1 / sqrt(count).
        more = window_count(count) - 1 + (4 * rows / count**0.5 if drawn_anew else 0)
        self.rows = min(rows + int(more), count)
        steps, left = divmod(self.rows, batch * world * accumulation)
        self.length = steps * world * accumulation + micro_batches(left, batch, world)

    def __call__(self, epoch: int) -> Groups:
        if self._packed[0] != epoch:
            self._packed = epoch, pack(self.indices(epoch), self.samples, self.bounds)
        rows = self._packed[1]
        if len(rows) > self.rows:
            rows = pack(self.indices(0), self.samples, self.bounds)
        costs = self.samples.costs
        rows = split(rows, self.rows, costs)
        # The epoch's samples were drawn from [seed, epoch].
        random = np.random.default_rng([self.seed, epoch, 1])
        return side_by_side(rows, costs, self.batch, self.world, random, self.accumulation)
