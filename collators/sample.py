"""A conversation and its files to one training sample."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from ..models.ovis2_5.vision_ovis2_5 import Grid
from .rendering import Encoded, Thinking, encode, render, truncate

Size = tuple[int, int, int]
"""Frames, height and width of an image or video file."""


@dataclass(frozen=True)
class Sample:
    """Ids and labels `[T]`, patches `[N, features]` of each medium left, and their grids."""

    encoded: Encoded
    patches: list[np.ndarray]
    grids: list[Grid]


@dataclass(frozen=True)
class SampleEncoder:
    """How a run turns conversations into samples.

    Attributes:
        multimodal_max_length, text_max_length: Longest sample with and without media, in tokens.
    """

    processor: Ovis2_5Processor
    limits: PixelLimits
    multimodal_max_length: int
    text_max_length: int
    thinking: Thinking = "every_turn"

    def check_files(self, conversation: Conversation) -> list[Size]:
        """Sizes of the media, after reading every file once.

        Raises:
            DataError: a file is missing, unreadable, corrupt, of zero size or huge.
        """
        where = conversation.where
        images = [(1, *check_image(f, where("image"))) for f in conversation.images]
        frames = [check_image(f, where("video_frames")) for f in conversation.frames]
        if frames:
            return [(len(frames), *frames[self._indices(len(frames))[0]])]
        if conversation.video:
            size = check_video(conversation.video, where("video"))
            read_video(conversation.video, where("video"), self._indices(size[0]))
            return [size]
        return images

    def encode(self, conversation: Conversation, sizes: Sequence[Size]) -> Encoded:
        """Ids and labels, cut to the length limit; needs sizes, no pixels.

        Raises:
            DataError: `thinking` does not fit this conversation.
        """
        counts = [
            self.processor.image_processor.visual_tokens(grid)
            for grid in self._grids(conversation, sizes)
        ]
        limit = self.multimodal_max_length if counts else self.text_max_length
        try:
            segments = render(conversation.turns, self.processor, self.thinking)
        except DataError as error:
            raise DataError(conversation.where(error.where), error.what, error.fix) from None
        return truncate(encode(segments, self.processor, counts), limit)

    def measure(self, conversation: Conversation, sizes: Sequence[Size]) -> tuple[int, int]:
        """Tokens and trained tokens of the sample; raises as `encode`."""
        encoded = self.encode(conversation, sizes)
        return len(encoded.ids), encoded.trained_tokens

    def load(self, conversation: Conversation) -> Sample:
        """The sample with its pixels; media that were cut off are not decoded."""
        media, sizes = self._open(conversation)
        encoded = self.encode(conversation, sizes)
        where = conversation.where("image" if conversation.images else "video_frames")
        patches, grids = [], []
        for i, (frames, size) in enumerate(zip(media, sizes, strict=True)):
            if i >= len(encoded.media):
                for frame in frames:
                    frame.close()
                continue
            for frame in frames:
                # An image of a table has no file name.
                decode(frame, getattr(frame, "filename", "") or f"image {i + 1}", where)
            low, high = self._limits(conversation, size)
            values, grid = self.processor.image_processor.patches(frames, low, high)
            patches.append(values)
            grids.append(grid)
        return Sample(encoded, patches, grids)

    def _open(self, conversation: Conversation) -> tuple[list[list[Image.Image]], list[Size]]:
        where = conversation.where
        if conversation.video:
            size = check_video(conversation.video, where("video"))
            frames = read_video(conversation.video, where("video"), self._indices(size[0]))
            return [frames], [size]
        if conversation.frames:
            count = len(conversation.frames)
            files = [conversation.frames[i] for i in self._indices(count)]
            frames = [open_image(f, where("video_frames")) for f in files]
            return [frames], [(count, frames[0].height, frames[0].width)]
        images = [open_image(f, where("image")) for f in conversation.images]
        return [[image] for image in images], [(1, image.height, image.width) for image in images]

    def _grids(self, conversation: Conversation, sizes: Sequence[Size]) -> list[Grid]:
        return [
            self.processor.image_processor.grid(
                height,
                width,
                *self._limits(conversation, (frames, height, width)),
                frames=1 if conversation.images else len(self._indices(frames)),
            )
            for frames, height, width in sizes
        ]

    def _limits(self, conversation: Conversation, size: Size) -> tuple[int, int]:
        if conversation.images:
            return self.limits.for_images(len(conversation.images))
        return self.limits.for_video(len(self._indices(size[0])))

    def _indices(self, total: int) -> list[int]:
        return frame_indices(total, self.limits.min_frames, self.limits.max_frames)
