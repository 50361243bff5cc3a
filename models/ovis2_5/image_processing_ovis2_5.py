"""Images and frames to normalised patches, with Pillow alone.

Source: AIDC-AI/Ovis 2.5.0, `preprocess` of its visual tokenizer; preprocessor_config.json of
AIDC-AI/Ovis2.5-9B.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from .vision_ovis2_5 import Grid

MAX_ASPECT = 200
PUBLISHED_SETTINGS = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "size": {"height": 512, "width": 512},
}
"""Keys of the published file that no code here reads; serving engines may."""


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width, multiples of `factor`, of about the image's aspect and within the limits.

    Equal to the reference wherever that leaves both sides positive. Thin images, which it resizes
    to nothing, keep one merge block across and as much of their length as `max_pixels` allows.
    """
    if height < factor or width < factor:
        if height < width:
            height, width = factor, round(factor / height * width)
        else:
            height, width = round(factor / width * height), factor
    elif max(height, width) > MAX_ASPECT * min(height, width):
        if height > width:
            height = MAX_ASPECT * width
        else:
            width = MAX_ASPECT * height
    resized = [round(side / factor) * factor for side in (height, width)]
    if resized[0] * resized[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        resized = [math.floor(side / shrink / factor) * factor for side in (height, width)]
    elif resized[0] * resized[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    if min(resized) == 0:
        longest = max(factor, max_pixels // factor // factor * factor)
        resized = [min(max(side, factor), longest) for side in resized]
    return resized[0], resized[1]


class Ovis2_5ImageProcessor(ImageProcessingMixin):
    """Resizes (bilinear), normalises and cuts images into patches in merge-block order.

    `patch_size`, `hidden_stride` and `temporal_patch_size` follow the model's `vit_config`; they
    are written to preprocessor_config.json only where they differ from the published ones.
    """

    model_input_names = ("pixel_values", "grid_thws")

    def __init__(
        self,
        patch_size: int = 16,
        hidden_stride: int = 2,
        temporal_patch_size: int = 1,
        resample: int = Image.Resampling.BILINEAR,
        rescale_factor: float = 1 / 255,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        processor_class: str = "SiglipProcessor",
        **kwargs,
    ):
        super().__init__(**{**PUBLISHED_SETTINGS, **kwargs})
        self.processor_class = processor_class
        self.patch_size = patch_size
        self.hidden_stride = hidden_stride
        self.temporal_patch_size = temporal_patch_size
        self.resample = resample
        self.rescale_factor = rescale_factor
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def to_dict(self) -> dict:
        output = super().to_dict()
        published = {"patch_size": 16, "hidden_stride": 2, "temporal_patch_size": 1}
        for key, value in published.items():
            if output[key] == value:
                del output[key]
        return {**output, "image_processor_type": "SiglipImageProcessor"}

    def grid(
        self, height: int, width: int, min_pixels: int, max_pixels: int, frames: int = 1
    ) -> Grid:
        """Grid of patches for an image or video of this size; needs no pixels."""
        factor = self.patch_size * self.hidden_stride
        height, width = smart_resize(height, width, factor, min_pixels, max_pixels)
        return (
            math.ceil(frames / self.temporal_patch_size),
            height // self.patch_size,
            width // self.patch_size,
        )

    def visual_tokens(self, grid: Grid) -> int:
        return math.prod(grid) // self.hidden_stride**2

    @property
    def features(self) -> int:
        """Values of a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def patches(
        self, frames: Sequence[Image.Image], min_pixels: int, max_pixels: int
    ) -> tuple[np.ndarray, Grid]:
        """One image, or the frames of one video, all resized to the size found for the first.

        Returns:
            float32 `[N, features]` and the grid.
        """
        height, width = frames[0].height, frames[0].width
        grid = self.grid(height, width, min_pixels, max_pixels, frames=len(frames))
        pixels = np.empty((math.prod(grid), self.features), np.uint8)
        self.write_patches(frames, grid, pixels)
        return self.normalise(torch.from_numpy(pixels)).numpy(), grid

    def write_patches(self, frames: Iterable[Image.Image], grid: Grid, out: np.ndarray) -> None:
        """The patches before they are normalised, as bytes.

        Args:
            frames: One image, or the frames of one video; each is written before the next is
                taken. The last one is repeated where they do not fill the grid.
            out: uint8 `[N, features]`, contiguous; a part of a larger buffer will do.
        """
        p, s, tau = self.patch_size, self.hidden_stride, self.temporal_patch_size
        t, h, w = grid
        # A patch's rows of `p` bytes are moved as one word each: [t, tau, channel, height, width].
        rows = out.view(f"V{p}").reshape(t, h // s, w // s, s, s, 3, tau, p)
        rows = rows.transpose(0, 6, 5, 1, 3, 7, 2, 4)
        written = 0
        for frame in frames:
            image = self._resized(frame, w * p, h * p)
            for channel, band in enumerate(image.split()):
                words = np.asarray(band).view(f"V{p}").reshape(h // s, s, p, w // s, s)
                rows[written // tau, written % tau, channel] = words
            written += 1
        rows[-1, (written - 1) % tau + 1 :] = rows[-1, (written - 1) % tau]

    def images_of(self, pixels: np.ndarray, grid: Grid) -> list[Image.Image]:
        """What `write_patches` wrote: the image, or the frames of a video, as resized.

        Args:
            pixels: uint8 `[N, features]`, the patches of one medium.
        """
        p, s, tau = self.patch_size, self.hidden_stride, self.temporal_patch_size
        t, h, w = grid
        blocks = pixels.reshape(t, h // s, w // s, s, s, 3, tau, p, p)
        frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(t * tau, h * p, w * p, 3)
        return [Image.fromarray(frame) for frame in frames]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes of patches, uint8 `[N, features]`, to float32, on the device they are on.

        Looked up, not computed: every device gives the bits of `patches`.
        """
        table = torch.from_numpy(self.table).to(pixels.device)
        channels = pixels.view(len(pixels), 3, self.features // 3)
        values = torch.empty(channels.shape, dtype=table.dtype, device=pixels.device)
        for channel in range(3):
            indices = channels[:, channel].flatten().int()
            values[:, channel] = table[channel].index_select(0, indices).view_as(values[:, channel])
        return values.view_as(pixels)

    @property
    def table(self) -> np.ndarray:
        """Normalised value of each byte per channel, float32 `[3, 256]`."""
        return _table(self.rescale_factor, tuple(self.image_mean), tuple(self.image_std))

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.mode != "RGB":
            image = image.convert("RGB")
        # Two passes, across first: Pillow 13 may go down first where that is cheaper, and rounds
        # differently from the Pillow 11 of the reference.
        if image.width != width:
            image = image.resize((width, image.height), resample=self.resample)
        if image.height != height:
            image = image.resize((width, height), resample=self.resample)
        return image


@cache
def _table(rescale_factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """In the reference's arithmetic: scaled in float64, then float32."""
    scaled = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    centered = scaled - np.array(mean, dtype=np.float32)[:, None]
    return centered / np.array(std, dtype=np.float32)[:, None]
