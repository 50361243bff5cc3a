"""How fast a run is, and what it waits for."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass
class Speed:
    """Sums since the last log line; evaluation and saving are left out of the time."""

    tokens: int = 0
    positions: int = 0
    samples: int = 0
    waited: float = 0.0
    _pauses: float = 0.0
    _started: float | None = None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with the time until each of them counted as waiting."""
        while True:
            started = time.perf_counter()
            if self._started is None:  # pauses before it are no part of the time
                self._started, self._pauses = started, 0.0
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - started
            yield batch

    def count(self, batch: dict[str, Any], samples: int) -> None:
        positions = batch["input_ids"].numel()
        mask = batch.get("attention_mask")  # packed rows have none, and no padding
        self.tokens += positions if mask is None else int(mask.sum())
        self.positions += positions
        self.samples += samples

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, started = self._pauses, time.perf_counter()
        try:
            yield
        finally:  # pauses inside this one are part of it
            self._pauses = before + time.perf_counter() - started

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Values of all processes since the last call, which is a collective.

        Returns:
            Tokens (without padding) and samples per second, share of padded positions, share of
            the time in which the process waited for data, and the highest peak of a process's
            memory in GiB: of its GPU, else of the process.
        """
        now = time.perf_counter()
        seconds = max(now - (self._started or now) - self._pauses, 1e-9)
        own = [self.tokens, self.positions, self.samples, self.waited / seconds, _peak_memory()]
        every = accelerator.gather(
            torch.tensor([own], dtype=torch.float32, device=accelerator.device)
        )
        assert isinstance(every, Tensor)
        tokens, positions, samples, waited, _ = every.sum(dim=0).tolist()
        self.tokens = self.positions = self.samples = 0
        self.waited = self._pauses = 0.0
        self._started = now
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 2),
            "padding_share": round(1 - tokens / max(positions, 1), 4),
            "data_wait_share": round(waited / len(every), 4),
            "peak_memory_gib": round(every[:, 4].max().item(), 3),
        }


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
