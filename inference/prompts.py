"""Prompts in the training form: what precedes the answer in a training sample."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..collators.rendering import Thinking, encode, render_prompt
from ..core.errors import ConfigError, DataError
from ..data.images import PixelLimits
from ..models import Ovis2_5Processor
from ..models.ovis2_5.vision_ovis2_5 import Grid
from .media import ImageSource, frames_of, open_picture
from .request import Request

DEFAULT_LIMITS = PixelLimits(448**2, 1792**2, 448**2, 896**2, 448**2, 896**2, 8, 8)
"""Of a model without a run file; those of one image are the reference's (AIDC-AI/Ovis 2.5.0)."""


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are written for a model: as its training wrote them.

    Attributes:
        jpeg_draft: As `collators.sample.SampleEncoder` has it.
    """

    limits: PixelLimits = DEFAULT_LIMITS
    thinking: Thinking = "every_turn"
    jpeg_draft: bool = False

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> "PromptSettings":
        """Those of a run's config; for what it does not say, images of 448 x 448 to 1792 x 1792
        pixels, to 896 x 896 each where there are several, and 8 frames of a video."""
        limits = {name: run.get(name, value) for name, value in asdict(DEFAULT_LIMITS).items()}
        known = {f.name: run[f.name] for f in fields(cls) if f.name in run}
        return cls(**{**known, "limits": PixelLimits(**limits)})

    def with_pixels(self, low: int | None, high: int | None) -> "PromptSettings":
        """With these limits in place of those of every image and frame, where they are given.

        Raises:
            ConfigError: a limit is below 1, or the smallest is above the largest.
        """
        given = {"min_pixels": low, "max_pixels": high}
        for key, value in given.items():
            if value is not None and value < 1:
                raise ConfigError(key, f"{value} is below 1", f"give {448**2} (448 x 448) or so")
        limits = asdict(self.limits)
        for name in limits:
            value = given.get("_".join(name.split("_")[-2:]))
            limits[name] = limits[name] if value is None else value
        changed = PixelLimits(**limits)
        for least, most in (changed.for_images(1), changed.for_images(2), changed.for_video(1)):
            if least > most:
                key = "min_pixels" if low is not None else "max_pixels"
                what = f"images would be enlarged to {least} and reduced to {most} pixels"
                raise ConfigError(key, what, "give both min_pixels and max_pixels")
        return replace(self, limits=changed)


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    length: Tokens, those of media included.
    data: What the family's `batch` needs.
    opened: Whether it ends in `<think>`.
    """

    length: int
    data: Any = field(repr=False)
    opened: bool = False


class OvisPrompts:
    """Prompts for Ovis2.5, rendered by `collators.rendering`."""

    def __init__(self, processor: Ovis2_5Processor, settings: PromptSettings):
        self.processor, self.settings = processor, settings

    def encode(self, request: Request, enable_thinking: bool = False, begun: str = "") -> Prompt:
        """The prompt of a request, media decoded.

        Args:
            enable_thinking: Whether the model is to write a think block itself.
            begun: What of the answer there is already, tools' responses included; the images that
                they gave back are the last ones of the request.

        Raises:
            DataError: a medium cannot be read, or the marks do not match the media.
        """
        request.check(begun)
        thinking = self.settings.thinking
        try:
            segments = render_prompt(
                request.turns, self.processor, thinking, enable_thinking, begun=begun
            )
        except DataError as error:  # thoughts of the history hold an image
            raise DataError(
                f"{request.where}, {error.where}",
                error.what,
                "start a new chat, or leave the record out: this model forgets earlier thoughts, "
                "and what they show.",
            ) from None
        media = self._media(request)
        counts = [self.processor.image_processor.visual_tokens(grid) for _, grid in media]
        ids = encode(segments, self.processor, counts).ids
        return Prompt(len(ids), (ids, media))

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 `[B, T]`, padded on the left, and with media
        `pixel_values`, float32 `[N, features]`, and `grid_thws`, int64 `[media, 3]`."""
        longest = max(prompt.length for prompt in prompts)
        pad = self.processor.tokenizer.pad_token_id
        input_ids, attention_mask, media = [], [], []
        for prompt in prompts:
            ids, own = prompt.data
            padding = longest - prompt.length
            input_ids.append([pad] * padding + ids)
            attention_mask.append([0] * padding + [1] * prompt.length)
            media += own
        batch = {
            "input_ids": torch.tensor(input_ids),
            "attention_mask": torch.tensor(attention_mask),
        }
        if media:
            pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in media]))
            batch["pixel_values"] = self.processor.image_processor.normalise(pixels)
            batch["grid_thws"] = torch.tensor([grid for _, grid in media])
        return batch

    def seen_size(self, size: tuple[int, int], images: int) -> tuple[int, int]:
        """Width and height, from those of an image as given, at which the model sees it, one of so
        many."""
        width, height = size
        processor, bounds = self.processor.image_processor, self.settings.limits.for_images(images)
        _, rows, columns = processor.grid(height, width, *bounds)
        return columns * processor.patch_size, rows * processor.patch_size

    def _media(self, request: Request) -> list[tuple[np.ndarray, Grid]]:
        """Patches, uint8 `[n, features]`, and grid of each medium."""
        limits = self.settings.limits
        if request.video is not None:
            frames = frames_of(request.video, limits, f"{request.where}, video")
            return [self._patches(frames, limits.for_video(len(frames)))]
        bounds = limits.for_images(len(request.images))
        return [self._patches([placed], bounds) for placed in request.placed_images()]

    def _patches(
        self, frames: Sequence[tuple[str, ImageSource]], bounds: tuple[int, int]
    ) -> tuple[np.ndarray, Grid]:
        """Of one image, or of the frames of a video; the first says the grid."""
        images = self.processor.image_processor
        grids: list[Grid] = []

        def before(image: Image.Image) -> None:
            if not grids:
                grids.append(images.grid(image.height, image.width, *bounds, frames=len(frames)))
            if self.settings.jpeg_draft:
                _, rows, columns = grids[0]
                image.draft("RGB", (columns * images.patch_size, rows * images.patch_size))

        pictures = [open_picture(source, where, before) for where, source in frames]
        pixels = np.empty((math.prod(grids[0]), images.features), np.uint8)
        images.write_patches(pictures, grids[0], pixels)
        return pixels, grids[0]
