"""A conversation and its files to a row of ids, and the row to ids, labels and pixels."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..core.errors import DataError
from ..data.conversation import Conversation
from ..data.images import (
    PixelLimits,
    check_image,
    check_video,
    decode,
    frame_indices,
    open_image,
    read_video,
)
from ..models import Ovis2_5Processor
from ..models.ovis2_5.configuration_ovis2_5 import VISUAL_ATOM_ID
from ..models.ovis2_5.vision_ovis2_5 import Grid
from .rendering import IGNORE_INDEX, Encoded, Thinking, encode, render, truncate

Size = tuple[int, int, int]
"""Frames, height and width of an image or video file."""


@dataclass(frozen=True)
class SampleEncoder:
    """How a run turns conversations into rows (`data.dataset.FEATURES`), and rows into samples.

    Attributes:
        multimodal_max_length, text_max_length: Longest sample with and without media, in tokens.
        jpeg_draft: Decode a JPEG at the smallest scale of an eighth, a quarter, a half or one that
            is not below the size needed; its pixels are then not those of the reference.
        decode_files: Decode every file when it is checked, so that a broken one is found then.
    """

    processor: Ovis2_5Processor
    limits: PixelLimits
    multimodal_max_length: int
    text_max_length: int
    thinking: Thinking = "every_turn"
    jpeg_draft: bool = False
    decode_files: bool = False

    def check_files(self, conversation: Conversation) -> list[Size]:
        """Sizes of the media, after a look whether every file is whole; videos are decoded.

        Raises:
            DataError: a file is missing, unreadable, corrupt, of zero size or huge.
        """
        where = conversation.where
        check = partial(check_image, decode_whole=self.decode_files)
        images = [(1, *check(f, where("image"))) for f in conversation.images]
        frames = [check(f, where("video_frames")) for f in conversation.frames]
        if frames:
            return self.media_sizes(conversation, [(1, *size) for size in frames])
        if conversation.video:
            size = check_video(conversation.video, where("video"))
            frames = read_video(conversation.video, where("video"), self.taken(size[0]))
            deque(frames, maxlen=0)
            return [size]
        return images

    def media_sizes(self, conversation: Conversation, files: Sequence[Size]) -> list[Size]:
        """Sizes of the media from those of their files, in the order of `media_files`: the first
        frame that is taken stands for all."""
        if conversation.frames:
            return [(len(files), *files[self.taken(len(files))[0]][1:])]
        return list(files)

    def encode(self, conversation: Conversation, sizes: Sequence[Size]) -> Encoded:
        """Ids and labels, cut to the length limit; raises as `expand`."""
        return truncate(self.expand(conversation, sizes), self.max_length(conversation))

    def expand(self, conversation: Conversation, sizes: Sequence[Size]) -> Encoded:
        """Ids and labels of the whole sample; needs sizes, no pixels.

        Raises:
            DataError: `thinking` does not fit this conversation.
        """
        counts = [
            self.processor.image_processor.visual_tokens(grid)
            for grid in self._grids(conversation, sizes)
        ]
        try:
            segments = render(conversation.turns, self.processor, self.thinking)
        except DataError as error:
            where = conversation.where(error.where)
            raise DataError(where, error.what, error.fix, "thinking-history") from None
        return encode(segments, self.processor, counts)

    def max_length(self, conversation: Conversation) -> int:
        """Tokens that the sample may have."""
        return self.multimodal_max_length if conversation.media_files else self.text_max_length

    def columns(self, conversation: Conversation, sizes: Sequence[Size]) -> dict[str, Any]:
        """Columns `ids` to `patches_squared` of the row, lists as int32 `[n]`; raises as
        `expand`."""
        whole = self.expand(conversation, sizes)
        encoded = truncate(whole, self.max_length(conversation))
        grids = self._grids(conversation, sizes)[: len(encoded.media)]
        kept = np.ones(len(encoded.ids), bool)
        for begin, end in encoded.media:
            kept[begin + 2 : end - 1] = False
        trained = np.array(encoded.labels) != IGNORE_INDEX
        return {
            "ids": np.array(encoded.ids, np.int32)[kept],
            "trained": np.flatnonzero(np.diff(trained, prepend=False, append=False)).astype("i4"),
            "grids": np.array(grids, np.int32).ravel(),
            "length": len(encoded.ids),
            "trained_tokens": int(trained.sum()),
            "cut": len(whole.ids) - len(encoded.ids),
            "patches": sum(t * h * w for t, h, w in grids),
            "patches_squared": sum(t * (h * w) ** 2 for t, h, w in grids),
        }

    def row(self, conversation: Conversation) -> dict[str, Any]:
        """The row; raises as `check_files` and `expand`."""
        sizes = self.check_files(conversation)
        return {**conversation.to_row(), **self.columns(conversation, sizes)}

    def ids_and_labels(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and unshifted labels of a row, int64 `[T]`, with every visual token.

        Example: ids [7, -301, -300, -302, 8], a grid of (1, 4, 4) and trained [7, 8] become
            [7, -301, -300, -300, -300, -300, -302, 8] and -100 but for the last, which is 8.
        """
        ids = np.asarray(row["ids"], np.int64)
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == VISUAL_ATOM_ID] = [
            self.processor.image_processor.visual_tokens(grid) for grid in grids_of(row)
        ]
        ids = np.repeat(ids, repeats)
        labels = np.full(len(ids), IGNORE_INDEX)
        for start, stop in np.asarray(row["trained"]).reshape(-1, 2):
            labels[start:stop] = ids[start:stop]
        return ids, labels

    def taken(self, total: int) -> list[int]:
        """Which of a video's `total` frames the model sees."""
        return frame_indices(total, self.limits.min_frames, self.limits.max_frames)

    def write_pixels(self, row: dict[str, Any], out: np.ndarray) -> None:
        """Decode the media that the cut has left, one image or frame at a time.

        Args:
            out: uint8 `[row["patches"], features]`; the patches are written there in order.

        Raises:
            DataError: a file is gone, corrupt, or not of the size it had when it was checked.
        """
        where = f'{row["source"]}, record {row["record"]} (id "{row["id"]}"), '
        start = 0
        for i, grid in enumerate(grids_of(row)):
            stop = start + grid[0] * grid[1] * grid[2]
            if row["image_files"]:
                limits = self.limits.for_images(len(row["image_files"]))
                frames = self._images([row["image_files"][i]], f"{where}image", grid, limits)
            elif row["frame_files"]:
                indices = self.taken(len(row["frame_files"]))
                files = [row["frame_files"][i] for i in indices]
                limits = self.limits.for_video(len(files))
                frames = self._images(files, f"{where}video_frames", grid, limits)
            else:
                frames = self._frames(row["video_file"], f"{where}video", grid)
            self.processor.image_processor.write_patches(frames, grid, out[start:stop])
            start = stop

    def _images(
        self, files: Sequence[str], where: str, grid: Grid, limits: tuple[int, int]
    ) -> Iterator[Image.Image]:
        """Decoded images, each closed when the next one is asked for."""
        patch = self.processor.image_processor.patch_size
        for i, file in enumerate(files):
            with closing(open_image(file, where)) as image:
                if i == 0:
                    size = (len(files), image.height, image.width)
                    self._check_grid(file, where, grid, size, limits)
                if self.jpeg_draft:
                    image.draft("RGB", (grid[2] * patch, grid[1] * patch))
                yield decode(image, file, where)

    def _frames(self, file: str, where: str, grid: Grid) -> Iterator[Image.Image]:
        total, height, width = check_video(file, where)
        indices = self.taken(total)
        size = (len(indices), height, width)
        self._check_grid(file, where, grid, size, self.limits.for_video(len(indices)))
        return read_video(file, where, indices)

    def _check_grid(
        self, file: str, where: str, grid: Grid, size: Size, limits: tuple[int, int]
    ) -> None:
        frames, height, width = size
        found = self.processor.image_processor.grid(height, width, *limits, frames=frames)
        if found != grid:
            raise DataError(
                where,
                f"{file} has changed since it was checked: {width} x {height} pixels now.",
                "start the run again; the data will be checked again.",
            )

    def _grids(self, conversation: Conversation, sizes: Sequence[Size]) -> list[Grid]:
        return [
            self.processor.image_processor.grid(
                height,
                width,
                *self._limits(conversation, (frames, height, width)),
                frames=1 if conversation.images else len(self.taken(frames)),
            )
            for frames, height, width in sizes
        ]

    def _limits(self, conversation: Conversation, size: Size) -> tuple[int, int]:
        if conversation.images:
            return self.limits.for_images(len(conversation.images))
        return self.limits.for_video(len(self.taken(size[0])))


def grids_of(row: dict[str, Any]) -> list[Grid]:
    """Frames, rows and columns of each medium of a row."""
    flat = [int(n) for n in row["grids"]]
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
