"""Batches of samples, each a row of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.conversation import Conversation
from .rendering import IGNORE_INDEX
from .sample import SampleEncoder

REPEATED = "repeated"
"""Key of a row that only fills a batch: it carries no loss."""


@dataclass(frozen=True)
class PaddedCollator:
    """Rows of a prepared dataset to a batch, padded on the right to its longest sample.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`, padded with the tokenizer's pad
        id, 0 and -100; with any image in the batch also `pixel_values` `[N, features]`, all
        patches in order, and `grid_thws` `[media, 3]`. `sample_ids`, a list of text, names the
        samples that count, for messages; it is not for the model.

    Raises:
        DataError: a file changed since it was checked.

    Example: samples of 2 and 3 tokens become
        input_ids [[7, 8, pad], [7, 8, 9]], attention_mask [[1, 1, 0], [1, 1, 1]].
    """

    encoder: SampleEncoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        samples = [self.encoder.load(Conversation.from_row(row)) for row in rows]
        encoded = [sample.encoded for sample in samples]
        longest = max(len(e.ids) for e in encoded)
        labels = [
            [IGNORE_INDEX] * len(e.ids) if row.get(REPEATED) else e.labels
            for row, e in zip(rows, encoded, strict=True)
        ]
        pad = self.encoder.processor.tokenizer.pad_token_id

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (longest - len(values))

        batch: dict[str, Any] = {
            "input_ids": torch.tensor([padded(e.ids, pad) for e in encoded]),
            "attention_mask": torch.tensor([padded([1] * len(e.ids), 0) for e in encoded]),
            "labels": torch.tensor([padded(row, IGNORE_INDEX) for row in labels]),
            "sample_ids": [row["id"] for row in rows if not row.get(REPEATED)],
        }
        patches = [p for sample in samples for p in sample.patches]
        if patches:
            batch["pixel_values"] = torch.from_numpy(np.concatenate(patches))
            batch["grid_thws"] = torch.tensor([g for sample in samples for g in sample.grids])
        return batch
