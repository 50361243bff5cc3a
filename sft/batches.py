"""Which samples a process takes in which micro-batch: the same for any number of workers, and
known without loading anything, so that a resumed run skips without decoding."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainingArguments

from ..collators.padded import REPEATED
from ..data.dataset import ArrowRows
from ..data.packing import Groups, PackingPlan, RowBounds, Samples
from .data import RunData, seed_of

Order = Callable[[int], Groups]
"""Epoch -> the micro-batches of all processes, those of a step one after another."""

BLOCK = 50
"""Optimizer steps whose samples are grouped by length together, as the host does."""


@dataclass(frozen=True)
class Packing:
    """How rows are packed: their bounds, and the planned cost of each sample, float64."""

    bounds: RowBounds
    costs: np.ndarray


class EpochBatches(Sampler[list[int]]):
    """This process's micro-batches of an epoch, as lists of indices.

    Process r takes the micro-batches r, r + world, ... Where those of the last step do not reach
    every process, the others take one sample again without its loss: index `samples + i` means
    sample i without loss.
    """

    def __init__(
        self, order: Order, samples: int, length: int, rank: int, world: int, drop: bool = False
    ):
        """`samples` is the size of the dataset, `length` the number of micro-batches of an epoch,
        of all processes; `drop` leaves a step out that does not reach every process."""
        self.order, self.samples, self.length = order, samples, length
        self.rank, self.world, self.drop = rank, world, drop
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.world)
        return whole + (rest > 0 and not self.drop)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.order(self.epoch)
        for first in range(0, len(self) * self.world, self.world):
            mine = first + self.rank
            if mine < len(batches):
                yield batches[mine]
            else:
                yield [self.samples + batches[min(first, len(batches) - 1)][0]]


class EpochLoader(DataLoader):
    """A loader over `EpochBatches` that the host's loop tells the epoch."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, EpochBatches):
            self.batch_sampler.set_epoch(epoch)


def outlive_the_step(worker: int) -> None:
    """Let a forked loader process end by SIGTERM of its parent alone: of one to the whole group it
    is the parent that knows what to do, which is to finish its step and save."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class Rows(TorchDataset):
    """Rows of a prepared dataset; an index past its end is a row that only fills a batch."""

    def __init__(self, dataset: Dataset):
        self.rows = ArrowRows(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self.rows)
        row = self.rows[index % size]
        return {**row, REPEATED: True} if index >= size else row


def train_batches(
    args: TrainingArguments, data: RunData, packing: Packing | None, rank: int, world: int
) -> EpochBatches:
    """The training batches of process `rank`, in the order that the settings name.

    Raises:
        ConfigError: a sample fits no row.
    """
    train, sampler, seed = data.train, data.sampler, seed_of(args)
    assert train is not None
    samples, batch = len(train.dataset), args.per_device_train_batch_size
    drop, accumulation = args.dataloader_drop_last, args.gradient_accumulation_steps

    def indices(epoch: int) -> np.ndarray:
        if sampler is None:
            return permutation(samples, seed, epoch)
        sampler.set_epoch(epoch)
        return np.fromiter(sampler, np.int64, len(sampler))

    if packing is not None:
        known = Samples(train.column("length"), train.column("patches"), packing.costs)
        anew = sampler is not None and any(
            drawn % size for drawn, size in zip(sampler.samples, sampler.sizes, strict=True) if size
        )
        plan = PackingPlan(
            indices,
            known,
            packing.bounds,
            batch,
            world,
            seed,
            accumulation=accumulation,
            drawn_anew=anew,
        )
        return EpochBatches(plan, samples, plan.length, rank, world)
    count = samples if sampler is None else len(sampler)
    match args.train_sampling_strategy:
        case "group_by_length":
            lengths = train.column("length")
            step = batch * world * accumulation
            order = grouped_by_length(indices, lengths, step, batch, seed)
        case "sequential":
            order = in_batches(lambda epoch: np.arange(samples), batch)
        case _:
            order = in_batches(indices, batch)
    length = count // batch if drop else -(-count // batch)
    return EpochBatches(order, samples, length, rank, world, drop)


def evaluation_batches(dataset: Dataset, batch: int, rank: int, world: int) -> EpochBatches:
    """The batches of process `rank` of an evaluation set, by falling length: little padding, and
    the largest batch first."""
    samples = len(dataset)
    falling = np.argsort(-dataset.data.column("length").to_numpy(), kind="stable")
    order = in_batches(lambda epoch: falling, batch)
    return EpochBatches(order, samples, -(-samples // batch), rank, world)


def in_batches(indices: Callable[[int], np.ndarray], batch: int) -> Order:
    """Samples in the order of `indices`, `batch` to a micro-batch."""

    def order(epoch: int) -> Groups:
        taken = indices(epoch)
        return Groups(taken, np.arange(0, len(taken), batch))

    return order


def grouped_by_length(
    indices: Callable[[int], np.ndarray],
    lengths: np.ndarray,
    step: int,
    batch: int,
    seed: int,
) -> Order:
    """Micro-batches of similar lengths, those of an optimizer step of `step` samples as well, the
    steps in random order.

    Blocks of `BLOCK` steps of `indices`, the last of up to twice as many, are sorted by falling
    length and cut into steps. The whole step with the longest sample is the first, so that running
    out of memory shows at once; the samples that fill none, which are random ones, come last.
    """

    def order(epoch: int) -> Groups:
        taken = indices(epoch)
        steps = len(taken) // step
        whole, rest = np.split(taken, [steps * step])
        bounds = np.arange(BLOCK, steps - BLOCK + 1, BLOCK) * step
        parts = [p[np.argsort(-lengths[p], kind="stable")] for p in np.split(whole, bounds)]
        by_step = np.concatenate(parts).reshape(steps, step)
        random = np.random.default_rng([seed, epoch, 1])
        random.shuffle(by_step)
        if steps:
            first = lengths[by_step].max(axis=1).argmax()
            by_step[[0, first]] = by_step[[first, 0]]
        rest = rest[np.argsort(-lengths[rest], kind="stable")]
        taken = np.concatenate([by_step.ravel(), rest])
        return Groups(taken, np.arange(0, len(taken), batch))

    return order


def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """All samples in the random order of an epoch."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(samples, generator=generator).numpy()
