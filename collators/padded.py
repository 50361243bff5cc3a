"""Batches of samples, each a row of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .rendering import IGNORE_INDEX
from .sample import SampleEncoder

REPEATED = "repeated"
"""Key of a row that only fills a batch: it carries no loss."""


@dataclass(frozen=True)
class PaddedCollator:
    """Rows of a prepared dataset to a batch, padded on the right to its longest sample.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`, padded with the tokenizer's pad
        id, 0 and -100, and what `media_batch` gives. `sample_ids`, a list of text, names the
        samples that count, for messages; it is not for the model.

    Raises:
        DataError: a file changed since it was checked.

    Example: samples of 2 and 3 tokens become
        input_ids [[7, 8, pad], [7, 8, 9]], attention_mask [[1, 1, 0], [1, 1, 1]].
    """

    encoder: SampleEncoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        samples = [self.encoder.ids_and_labels(row) for row in rows]
        shape = len(rows), max(len(ids) for ids, _ in samples)
        input_ids = np.full(shape, self.encoder.processor.tokenizer.pad_token_id, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        for i, (row, (ids, row_labels)) in enumerate(zip(rows, samples, strict=True)):
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
            if not row.get(REPEATED):
                labels[i, : len(ids)] = row_labels
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "sample_ids": counted_ids(rows),
            **media_batch(self.encoder, rows),
        }


def counted_ids(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ids of the samples that count."""
    return [row["id"] for row in rows if not row.get(REPEATED)]


def media_batch(encoder: SampleEncoder, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """`pixel_values`, uint8 `[N, features]`, the patches of all rows in order, which
    `Ovis2_5ImageProcessor.normalise` makes the model's; and `grid_thws`, int64 `[media, 3]`.
    Nothing where no row has media.

    The patches are written once, in a worker of a DataLoader into the memory it shares with the
    main process.

    Raises:
        DataError: a file changed since it was checked.
    """
    bounds = np.cumsum([0, *(row["patches"] for row in rows)]).tolist()
    if not bounds[-1]:
        return {}
    shape = bounds[-1], encoder.processor.image_processor.features
    if get_worker_info():
        storage = torch.UntypedStorage._new_shared(shape[0] * shape[1])
        pixels = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    else:
        pixels = torch.empty(shape, dtype=torch.uint8)
    out = pixels.numpy()
    for row, start, stop in zip(rows, bounds, bounds[1:], strict=False):
        if stop > start:
            encoder.write_pixels(row, out[start:stop])
    grids = np.concatenate([np.asarray(row["grids"], np.int64) for row in rows])
    return {"pixel_values": pixels, "grid_thws": torch.from_numpy(grids.reshape(-1, 3))}
