"""Images and frames to normalised patches, with Pillow alone.

Source: AIDC-AI/Ovis 2.5.0, `preprocess` of its visual tokenizer; preprocessor_config.json of
AIDC-AI/Ovis2.5-9B.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
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

    def patches(
        self, frames: Sequence[Image.Image], min_pixels: int, max_pixels: int
    ) -> tuple[np.ndarray, Grid]:
        """One image, or the frames of one video, all resized to the size found for the first.

        Returns:
            float32 `[N, 3 * temporal_patch_size * patch_size ** 2]` and the grid.
        """
        p, s, tau = self.patch_size, self.hidden_stride, self.temporal_patch_size
        t, h, w = self.grid(
            frames[0].height, frames[0].width, min_pixels, max_pixels, frames=len(frames)
        )
        images = [self._resized(frame.convert("RGB"), w * p, h * p) for frame in frames]
        images += [images[-1]] * (t * tau - len(images))
        pixels = np.stack([np.asarray(image) for image in images])
        pixels = pixels.reshape(t, tau, h // s, s, p, w // s, s, p, 3)
        pixels = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, tau * p * p)
        return self._normalised()[np.arange(3)[:, None], pixels].reshape(t * h * w, -1), (t, h, w)

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        # Two passes, across first: Pillow 13 may go down first where that is cheaper, and rounds
        # differently from the Pillow 11 of the reference.
        across = image.resize((width, image.height), resample=self.resample)
        return across.resize((width, height), resample=self.resample)

    def _normalised(self) -> np.ndarray:
        """Normalised value of each byte per channel, `[3, 256]`, in the reference's arithmetic:
        scaled in float64, then float32."""
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.array(self.image_mean, dtype=np.float32)[:, None]
        std = np.array(self.image_std, dtype=np.float32)[:, None]
        return (scaled - mean) / std
