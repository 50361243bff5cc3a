"""Micro-batches of records that are read, checked and encoded while training."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import IterableDataset, get_worker_info

from ..core.errors import DataError
from .conversation import Conversation, Turn, record_id
from .dataset import FEATURES
from .preparation import NothingToLearn, ledger_entry, require_learnable
from .sources import Source

Slot = tuple[int, Source, int, Any]
"""A record in the endless order: pass, source, position and what stands there."""


@dataclass(eq=False)
class RecordStream(IterableDataset):
    """Micro-batches, lists of rows as a prepared dataset has them, without end.

    Each pass over the sources is shuffled anew through a buffer; the order depends on the seed
    alone. The records of a step lie on the ranks one micro-batch after another, and of the
    micro-batches of a rank worker k of K yields every K-th from the k-th on, so that
    `DataLoader(stream, batch_size=None, num_workers=K)` gives the same for every K. Which records
    make up a micro-batch is settled before any of them is looked at: a record that is left out
    makes its micro-batch smaller, and one of which nothing is left is a row without trained
    tokens.

    Attributes:
        row: The row of a conversation; raises DataError for a bad file.
        batch: Records of a micro-batch.
        shuffle_buffer: Records the next one is drawn from; 1 keeps the order of the sources.
        skip_bad: Leave bad records out, instead of raising the first that is met.
        ledger: File that each record left out is appended to, with its pass, as often as it is
            left out.
    """

    sources: Sequence[Source]
    row: Callable[[Conversation], dict[str, Any]]
    batch: int
    seed: int
    shuffle_buffer: int
    skip_bad: bool
    ledger: Path
    rank: int = 0
    world: int = 1
    skipped: int = 0

    def skip(self, batches: int) -> None:
        """Start behind this many micro-batches of this rank; their media are not opened."""
        self.skipped = batches

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Raises DataError for a source that cannot be read or is empty, and for a bad record."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        slots = self._slots(self.skipped * self.world * self.batch)
        mine = self.rank * self.batch
        for index in range(self.skipped, 2**63):
            together = list(islice(slots, self.world * self.batch))
            if (index - self.skipped) % workers == number:
                yield self._rows(together[mine : mine + self.batch])

    def for_host(self) -> datasets.IterableDataset:
        """What a host that asks for a dataset of `datasets` may look at: the columns and one empty
        row, for which nothing is read."""
        blank = self._blank("", "", 0)
        return datasets.IterableDataset.from_generator(lambda: iter([blank]), features=FEATURES)

    def _slots(self, start: int) -> Iterator[Slot]:
        """The endless order from its `start`-th record on. Behind the first pass, whose length
        tells where the others begin, passes before the start are not read."""
        number = position = 0
        while True:
            length = 0
            for slot in self._pass(number):
                if position + length >= start:
                    yield slot
                length += 1
            if not length:
                names = ", ".join(source.path for source in self.sources)
                raise DataError(names, "there is no record.", "add records.")
            position += length
            before_start = max(0, (start - position) // length)
            number += 1 + before_start
            position += before_start * length

    def _pass(self, number: int) -> Iterator[Slot]:
        draw = random.Random(f"{self.seed} {number}")
        buffer: list[Slot] = []
        for source in self.sources:
            for index, record in source.records():
                if len(buffer) < self.shuffle_buffer:
                    buffer.append((number, source, index, record))
                    continue
                drawn = draw.randrange(len(buffer))
                yield buffer[drawn]
                buffer[drawn] = (number, source, index, record)
        draw.shuffle(buffer)
        yield from buffer

    def _rows(self, slots: Sequence[Slot]) -> list[dict[str, Any]]:
        rows = []
        for number, source, index, record in slots:
            try:
                conversation = source.parse(index, record)
                row = self.row(conversation)
                require_learnable(conversation, row)
                rows.append(row)
            except DataError as error:
                if not self.skip_bad and not isinstance(error, NothingToLearn):
                    raise
                entry = ledger_entry(source.path, index, record_id(record, index), error)
                self._leave_out({**entry, "pass": number})
        if rows:
            return rows
        _, source, index, record = slots[0]
        return [self._blank(record_id(record, index), source.path, index)]

    def _blank(self, identity: str, source: str, record: int) -> dict[str, Any]:
        """A row that carries no loss: the tokens around an empty question."""
        return self.row(Conversation(identity, [Turn("user", "")], source=source, record=record))

    def _leave_out(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with self.ledger.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)
