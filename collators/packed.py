"""Batches of samples laid end to end in one row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .padded import REPEATED, counted_ids, media_batch
from .rendering import IGNORE_INDEX
from .sample import SampleEncoder


@dataclass(frozen=True)
class PackedCollator:
    """Rows of a prepared dataset to one row without padding, for attention inside each sample.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 `[1, T]`: positions start anew at each
        sample, and its first label is -100, as no sample is predicted from the one before it.
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32 `[samples + 1]`, bounds of the samples, and
        `max_length_q` and `max_length_k`, the longest of them. No attention mask. What
        `media_batch` gives, and `sample_ids` as in `PaddedCollator`.

    Raises:
        DataError: a file changed since it was checked.

    Example: samples of 2 and 3 tokens become
        input_ids [[7, 8, 7, 8, 9]], position_ids [[0, 1, 0, 1, 2]], cu_seq_lens_q [0, 2, 5].
    """

    encoder: SampleEncoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        samples = [self.encoder.ids_and_labels(row) for row in rows]
        lengths = [len(ids) for ids, _ in samples]
        bounds = np.cumsum([0, *lengths], dtype=np.int32)
        labels = np.full((1, bounds[-1]), IGNORE_INDEX, np.int64)
        for row, start, (_, row_labels) in zip(rows, bounds, samples, strict=False):
            if not row.get(REPEATED):
                labels[0, start + 1 : start + len(row_labels)] = row_labels[1:]
        positions = np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], lengths)
        cu_seq_lens, longest = torch.from_numpy(bounds), max(lengths)
        return {
            "input_ids": torch.from_numpy(np.concatenate([ids for ids, _ in samples])[None]),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions[None]),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "sample_ids": counted_ids(rows),
            **media_batch(self.encoder, rows),
        }
