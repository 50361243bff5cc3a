"""Boxes that a model writes, to pixels of the image as it was given; cropping, drawing, the tool.

A box in pixels is left, upper, right, lower, the last two exclusive, as Pillow's boxes are.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import cycle
from math import ceil, floor
from numbers import Real
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from ..core.errors import ConfigError, DataError
from ..data.boxes import SCALE
from ..data.turns import shown

PixelBox = tuple[int, int, int, int]
Unit = Literal["normalized", "pixels"]
FRAMES = ("#c81e1e", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#be185d")
"""Colours of frames, in turn; white letters on each have a contrast of 5 or more."""
_FORMS = {"box": ("x1", "y1", "x2", "y2"), "point": ("x", "y")}


def to_pixels(
    box: Sequence[float],
    size: tuple[int, int],
    *,
    resized: tuple[int, int] | None = None,
    unit: Unit = "normalized",
) -> PixelBox:
    """The pixels of an image that a box touches: its upper left corner is rounded down, its lower
    right one up, and what leaves the image is cut off. The arithmetic is exact, in the numbers as
    they are written: 0.7 of 10 pixels are 7.

    Args:
        box: x1, y1, x2, y2.
        size: Width and height of the image as it was given.
        resized: Width and height that the model saw, where a box in pixels means those.
        unit: `normalized`: shares of the sides where no coordinate is above 1, else thousandths.
            `pixels`: of `resized`, without it of `size`.

    Raises:
        DataError: not four numbers, a box without area or with swapped corners, or outside.
    """
    x1, y1, x2, y2 = _scaled("box", box, size, resized, unit)
    if x2 <= x1 or y2 <= y1:
        what = "does not run from its upper left to its lower right corner."
        fix = "write x1, y1, x2, y2 with x1 < x2 and y1 < y2."
        raise DataError(_shown("box", box), what, fix)
    left, upper, right, lower = _within((x1, y1, x2, y2), size)
    if left >= right or upper >= lower:
        raise _outside("box", box, size, unit)
    return left, upper, right, lower


def point_to_pixel(
    point: Sequence[float],
    size: tuple[int, int],
    *,
    resized: tuple[int, int] | None = None,
    unit: Unit = "normalized",
) -> tuple[int, int]:
    """Column and row of the pixel that a point, x, y, lies in, on the right or lower edge of the
    image of the last one; arguments as of `to_pixels`.

    Raises:
        DataError: not two numbers, or outside.
    """
    x, y = _scaled("point", point, size, resized, unit)
    if not (0 <= x <= size[0] and 0 <= y <= size[1]):
        raise _outside("point", point, size, unit)
    return min(floor(x), size[0] - 1), min(floor(y), size[1] - 1)


def crop(image: Image.Image, box: Sequence[float], margin: float = 0.0) -> Image.Image:
    """The part of an image that a box in its pixels touches, as a new image.

    Args:
        margin: Share of the box's width and height that is added on each side, as far as the
            image goes.

    Raises:
        ConfigError: the margin is below 0.
        DataError: as `to_pixels`.
    """
    if not margin >= 0:
        raise ConfigError("margin", f"is {margin}.", "give 0 or more.")
    left, upper, right, lower = to_pixels(box, image.size, unit="pixels")
    across, down = (right - left) * _exact(margin), (lower - upper) * _exact(margin)
    grown = left - across, upper - down, right + across, lower + down
    return image.crop(_within(grown, image.size))


def draw(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[str] = ()
) -> Image.Image:
    """A new RGB image with a frame along the inner edge of each box, given in its pixels.

    Args:
        labels: One for each box, or none. They are white in Pillow's own font, which has Latin
            letters, on a field of the frame's colour above the box, or inside where there is no
            room above.

    Raises:
        ConfigError: fewer or more labels than boxes.
        DataError: as `to_pixels`.
    """
    if labels and len(labels) != len(boxes):
        what = f"{len(labels)} for {len(boxes)} boxes."
        raise ConfigError("labels", what, "give one for each box, or none.")
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width = max(1, min(image.size) // 200)
    font = ImageFont.load_default(max(12, min(image.size) // 30))
    for box, label, colour in zip(boxes, labels or cycle([""]), cycle(FRAMES), strict=False):
        left, upper, right, lower = to_pixels(box, image.size, unit="pixels")
        pen.rectangle((left, upper, right - 1, lower - 1), outline=colour, width=width)
        if label:
            x1, y1, x2, y2 = pen.textbbox((0, 0), label, font)
            high, wide = ceil(y2 - y1) + 4, ceil(x2 - x1) + 4
            top = upper - high if upper >= high else upper
            side = max(0, min(left, image.width - wide))
            pen.rectangle((side, top, side + wide - 1, top + high - 1), fill=colour)
            pen.text((side + 2 - x1, top + 2 - y1), label, "white", font)
    return drawn


def Crop(
    images: Sequence[Image.Image],
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    number: int | None = None,
) -> Image.Image:
    """Crop [x1, y1, x2, y2] shows that part of the last image, in thousandths of its width and
    height; Crop [x1, y1, x2, y2, n] shows that part of the n-th image."""
    if not images:
        raise DataError("Crop", "there is no image.", "answer without it.")
    if number is not None and (not isinstance(number, int) or not 1 <= number <= len(images)):
        what = f"there is no image {number}."
        raise DataError("Crop", what, f"write a number from 1 to {len(images)}, or none.")
    image = images[-1 if number is None else number - 1]
    return crop(image, to_pixels((x1, y1, x2, y2), image.size))


def _scaled(
    name: str,
    coordinates: Sequence[float],
    size: tuple[int, int],
    resized: tuple[int, int] | None,
    unit: Unit,
) -> list[Fraction]:
    """Pixels of an image of `size`, exact; raises DataError for what is no box or point."""
    form = _FORMS[name]
    try:
        values = [_exact(value) for value in coordinates]
    except ValueError:
        values = []
    if len(values) != len(form):
        fix = f"write {len(form)} numbers: {', '.join(form)}."
        raise DataError(_shown(name, coordinates), f"is no {name}.", fix)
    full = (1, 1) if max(values) <= 1 else (SCALE, SCALE)
    if unit == "pixels":
        full = resized or size
    return [value * size[i % 2] / full[i % 2] for i, value in enumerate(values)]


def _exact(value: float) -> Fraction:
    """The decimal number that is written, not the binary one beside it; ValueError for others."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(value)
    return Fraction(str(value))


def _within(corners: Sequence[Fraction | int], size: tuple[int, int]) -> PixelBox:
    x1, y1, x2, y2 = corners
    return max(floor(x1), 0), max(floor(y1), 0), min(ceil(x2), size[0]), min(ceil(y2), size[1])


def _shown(name: str, coordinates: Sequence[float]) -> str:
    return f"{name} {shown(list(coordinates))}"


def _outside(
    name: str, coordinates: Sequence[float], size: tuple[int, int], unit: Unit
) -> DataError:
    what = f"lies outside the image of {size[0]} x {size[1]} pixels."
    fix = "write pixels of the image." if unit == "pixels" else "write thousandths of its sides."
    return DataError(_shown(name, coordinates), what, fix)
