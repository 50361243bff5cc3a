"""Which samples a process takes in which micro-batch: the same for any number of workers, and
known without loading anything, so that a resumed run skips without decoding."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..collators.padded import REPEATED

Order = Callable[[int], Iterable[int]]
"""Epoch -> sample indices."""


class EpochBatches(Sampler[list[int]]):
    """This process's micro-batches of an epoch, as lists of indices.

    The samples of a step lie on the processes one micro-batch after another. Where the last ones
    do not reach every process, the others take one sample again without its loss: index
    `samples + i` means sample i without loss.
    """

    def __init__(
        self, order: Order, samples: int, length: int, batch: int, rank: int, world: int, drop: bool
    ):
        """`samples` is the size of the dataset, `length` the number of indices of an epoch."""
        self.order, self.samples, self.length = order, samples, length
        self.batch, self.rank, self.world, self.drop = batch, rank, world, drop
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch * self.world)
        return whole + (rest > 0 and not self.drop)

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.order(self.epoch))
        size = self.batch * self.world
        while together := list(islice(indices, size)):
            if self.drop and len(together) < size:
                return
            mine = together[self.rank * self.batch : (self.rank + 1) * self.batch]
            yield mine or [self.samples + together[0]]


class EpochLoader(DataLoader):
    """A loader over `EpochBatches` that the host's loop tells the epoch."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, EpochBatches):
            self.batch_sampler.set_epoch(epoch)


class Rows(TorchDataset):
    """Rows of a prepared dataset; an index past its end is a row that only fills a batch."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self.dataset)
        row = self.dataset[index % size]
        return {**row, REPEATED: True} if index >= size else row


def sequential(samples: int) -> Order:
    return lambda epoch: range(samples)


def shuffled(samples: int, seed: int) -> Order:
    def order(epoch: int) -> Iterator[int]:
        permutation = torch.randperm(samples, generator=generator(seed, epoch))
        for chunk in permutation.split(4096):
            yield from chunk.tolist()

    return order


def grouped_by_length(lengths: list[int], group: int, seed: int) -> Order:
    """Batches of similar lengths in random order, `group` samples to a step."""
    return lambda epoch: iter(
        LengthGroupedSampler(group, lengths=lengths, generator=generator(seed, epoch))
    )


def generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + epoch)
