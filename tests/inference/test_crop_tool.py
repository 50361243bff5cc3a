"""Boxes to pixels, exactly; crops and drawings pixel by pixel; what is no box of the image."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from vlmtune.core.errors import ConfigError, DataError
from vlmtune.inference.crop_tool import FRAMES, Crop, crop, draw, point_to_pixel, to_pixels
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import smart_resize

SIZE = (200, 100)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Every pixel differs from its neighbours."""
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def cut(image: Image.Image, left: int, upper: int, right: int, lower: int) -> np.ndarray:
    return np.asarray(image)[upper:lower, left:right]


@pytest.mark.parametrize(
    ("box", "unit", "resized", "pixels"),
    [
        pytest.param((250, 125, 750, 875), "normalized", None, (50, 12, 150, 88), id="thousandths"),
        pytest.param((0.25, 0.125, 0.75, 0.875), "normalized", None, (50, 12, 150, 88), id="share"),
        pytest.param((0, 0, 1000, 1000), "normalized", None, (0, 0, 200, 100), id="whole"),
        pytest.param((0, 0, 1, 1), "normalized", None, (0, 0, 200, 100), id="whole-in-shares"),
        pytest.param((0, 0, 1.5, 1.5), "normalized", None, (0, 0, 1, 1), id="thousandths-below-2"),
        pytest.param((290, 290, 580, 580), "normalized", None, (58, 29, 116, 58), id="decimal"),
        pytest.param((0.07, 0.07, 0.7, 0.07001), "normalized", None, (14, 7, 140, 8), id="shares"),
        pytest.param((1, 1, 2, 2), "normalized", None, (0, 0, 1, 1), id="less-than-a-pixel"),
        pytest.param((4, 9, 6, 11), "normalized", None, (0, 0, 2, 2), id="across-a-border"),
        pytest.param((-50, -0.5, 1100, 900), "normalized", None, (0, 0, 200, 90), id="clipped"),
        pytest.param((999, 999, 1200, 1200), "normalized", None, (199, 99, 200, 100), id="corner"),
        pytest.param((10, 20, 30, 40), "pixels", None, (10, 20, 30, 40), id="pixels"),
        pytest.param((10.5, 20.5, 30.5, 40.5), "pixels", None, (10, 20, 31, 41), id="fractions"),
        pytest.param((0, 0, 1, 1), "pixels", None, (0, 0, 1, 1), id="one-pixel"),
        pytest.param((150, 50, 300, 300), "pixels", None, (150, 50, 200, 100), id="pixels-clipped"),
        pytest.param((32, 16, 64, 32), "pixels", (64, 32), (100, 50, 200, 100), id="resized"),
        pytest.param((1, 1, 2, 2), "pixels", (64, 32), (3, 3, 7, 7), id="resized-rounded"),
        pytest.param((48, 48, 96, 96), "pixels", (96, 96), (100, 50, 200, 100), id="squash"),
        pytest.param(
            (500, 500, 1000, 1000), "normalized", (64, 32), (100, 50, 200, 100), id="both"
        ),
    ],
)
def test_box_becomes_the_pixels_that_it_touches(box, unit, resized, pixels):
    assert to_pixels(box, SIZE, resized=resized, unit=unit) == pixels


def test_box_in_pixels_that_the_model_saw_is_scaled_back_through_the_resize():
    width, height = 1000, 700
    high, wide = smart_resize(height, width, 32, 64**2, 512**2)
    assert (high, wide) == (416, 608)
    half = to_pixels((0, 0, 304, 208), (width, height), resized=(wide, high), unit="pixels")
    assert half == (0, 0, 500, 350)
    box = to_pixels((100, 100, 400, 300), (width, height), resized=(wide, high), unit="pixels")
    # 100 * 1000 / 608 = 164.5, 100 * 700 / 416 = 168.3, 400 * ... = 657.9, 300 * ... = 504.8
    assert box == (164, 168, 658, 505)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    x=st.tuples(st.integers(0, 999), st.integers(1, 1000)).filter(lambda pair: pair[0] < pair[1]),
    y=st.tuples(st.integers(0, 999), st.integers(1, 1000)).filter(lambda pair: pair[0] < pair[1]),
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    divisor=st.sampled_from([1, 10]),
)
def test_pixels_hold_the_box_and_no_row_or_column_more(x, y, size, divisor):
    box = [value / divisor for value in (x[0], y[0], x[1], y[1])]
    if max(box) <= 1:
        box = [value / 1000 for value in box]
    left, upper, right, lower = to_pixels(box, size)
    for low, high, (start, stop), side in ((left, right, x, size[0]), (upper, lower, y, size[1])):
        start, stop = (Fraction(value * side, divisor * 1000) for value in (start, stop))
        assert low <= start < low + 1
        assert high - 1 < stop <= high


@pytest.mark.parametrize(
    ("box", "where", "what"),
    [
        (
            (500, 0, 500, 9),
            "box [500, 0, 500, 9]",
            "does not run from its upper left to its lower ",
        ),
        ((0, 9, 9, 5), "box [0, 9, 9, 5]", "does not run from its upper left to its lower right c"),
        ((1000, 0, 1100, 9), "box [1000, 0, 1100, 9]", "lies outside the image of 200 x 100 pixe"),
        ((0, -9, 9, 0), "box [0, -9, 9, 0]", "lies outside the image of 200 x 100 pixels."),
        ((1, 2, 3), "box [1, 2, 3]", "is no box."),
        ((1, 2, 3, 4, 5), "box [1, 2, 3, 4, 5]", "is no box."),
        ((), "box []", "is no box."),
        ((1, 2, 3, "4"), "box [1, 2, 3, '4']", "is no box."),
        ((0, 0, 9, True), "box [0, 0, 9, True]", "is no box."),
        ((0, 0, 9, None), "box [0, 0, 9, None]", "is no box."),
        ((0, 0, 9, float("nan")), "box [0, 0, 9, nan]", "is no box."),
        ((0, 0, float("inf"), 9), "box [0, 0, inf, 9]", "is no box."),
    ],
)
def test_what_is_no_box_of_the_image_is_refused(box, where, what):
    with pytest.raises(DataError) as error:
        to_pixels(box, SIZE)
    assert error.value.where == where
    assert error.value.what.startswith(what)


def test_messages_say_what_to_write_instead():
    def fix_of(*arguments, **settings) -> str:
        with pytest.raises(DataError) as error:
            to_pixels(*arguments, **settings)
        return error.value.fix

    assert fix_of((0, 0, 0, 0), SIZE) == "write x1, y1, x2, y2 with x1 < x2 and y1 < y2."
    assert fix_of((2000, 0, 3000, 9), SIZE) == "write thousandths of its sides."
    assert fix_of((2000, 0, 3000, 9), SIZE, unit="pixels") == "write pixels of the image."
    assert fix_of((1,), SIZE) == "write 4 numbers: x1, y1, x2, y2."


@pytest.mark.parametrize(
    ("point", "unit", "resized", "pixel"),
    [
        ((500, 500), "normalized", None, (100, 50)),
        ((0.5, 0.999), "normalized", None, (100, 99)),
        ((0, 0), "normalized", None, (0, 0)),
        ((1000, 1000), "normalized", None, (199, 99)),
        ((1, 1), "normalized", None, (199, 99)),
        ((7.9, 8), "pixels", None, (7, 8)),
        ((32, 1), "pixels", (64, 32), (100, 3)),
    ],
)
def test_point_becomes_the_pixel_it_lies_in(point, unit, resized, pixel):
    assert point_to_pixel(point, SIZE, resized=resized, unit=unit) == pixel


@pytest.mark.parametrize(
    ("point", "what"),
    [
        ((1001, 5), "lies outside the image of 200 x 100 pixels."),
        ((5, -1), "lies outside the image of 200 x 100 pixels."),
        ((1, 2, 3), "is no point."),
    ],
)
def test_what_is_no_point_of_the_image_is_refused(point, what):
    with pytest.raises(DataError) as error:
        point_to_pixel(point, SIZE)
    assert error.value.what == what


@pytest.mark.parametrize(
    ("box", "margin", "bounds"),
    [
        pytest.param((10, 20, 30, 40), 0, (10, 20, 30, 40), id="no-margin"),
        pytest.param((10, 20, 30, 40), 0.1, (8, 18, 32, 42), id="tenth"),
        pytest.param((10, 20, 40, 40), 0.1, (7, 18, 43, 42), id="of-width-and-height"),
        pytest.param((10, 20, 11, 21), 0.1, (9, 19, 12, 22), id="rounded-outwards"),
        pytest.param((0, 20, 30, 100), 0.5, (0, 0, 45, 100), id="clipped-to-the-image"),
        pytest.param((150, 5, 300, 30), 1, (100, 0, 200, 55), id="box-clipped-first"),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_crop_has_the_pixels_of_the_box_and_its_margin(box, margin, bounds, mode):
    image = picture(*SIZE, mode)
    before = image.copy()
    cropped = crop(image, box, margin)
    assert cropped.mode == mode
    assert np.array_equal(np.asarray(cropped), cut(image, *bounds))
    cropped.paste(0, (0, 0, *cropped.size))
    assert image == before


def test_crop_refuses_a_negative_margin_and_a_box_that_only_its_margin_brings_inside():
    with pytest.raises(ConfigError) as config:
        crop(picture(*SIZE), (0, 0, 9, 9), -0.1)
    assert config.value.where == "margin"
    with pytest.raises(DataError) as data:
        crop(picture(*SIZE), (205, 0, 225, 9), 1)
    assert data.value.what == "lies outside the image of 200 x 100 pixels."


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before) != np.asarray(after)).any(-1)


@pytest.mark.parametrize(("side", "width"), [(100, 1), (399, 1), (400, 2), (1000, 5)])
def test_frame_colours_the_inner_edge_of_its_box_and_nothing_else(side, width):
    image = Image.new("RGB", (side, side), "white")
    drawn = draw(image, [(10, 20, 60, 50)])
    frame = np.zeros((side, side), bool)
    frame[20:50, 10:60] = True
    frame[20 + width : 50 - width, 10 + width : 60 - width] = False
    assert np.array_equal(changed(image, drawn), frame)
    assert {tuple(pixel) for pixel in np.asarray(drawn)[frame]} == {(0xC8, 0x1E, 0x1E)}
    assert image == Image.new("RGB", (side, side), "white")


def test_boxes_take_colours_in_turn_and_stay_within_the_image():
    image = Image.new("L", (90, 90))
    boxes = [(i * 10, i * 10, i * 10 + 5, i * 10 + 5) for i in range(7)]
    drawn = draw(image, [*boxes, (80, 80, 500, 500)])
    assert drawn.mode == "RGB"
    corners = ["#{:02x}{:02x}{:02x}".format(*drawn.getpixel(box[:2])) for box in boxes]
    assert corners == [*FRAMES, FRAMES[0]]
    assert drawn.getpixel((89, 89)) == drawn.getpixel((80, 80)) == drawn.getpixel((10, 10))


def luminance(colour: tuple[int, ...]) -> float:
    linear = [v / 3294.6 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("box", "field"),
    [
        pytest.param((20, 50, 90, 90), (20, 37, 42, 50), id="above-the-box"),
        pytest.param((20, 4, 90, 90), (20, 4, 42, 17), id="inside-where-no-room-is-above"),
        pytest.param((110, 50, 120, 90), (98, 37, 120, 50), id="whole-at-the-right-edge"),
    ],
)
def test_label_is_written_whole_in_white_on_a_field_of_the_frames_colour(box, field):
    image = Image.new("RGB", (120, 100), "black")
    drawn = draw(image, [box], ["cat"])
    alone = Image.new("RGB", (22, 13), FRAMES[0])
    font = ImageFont.load_default(12)
    left, upper, right, lower = font.getbbox("cat")
    assert (right - left, lower - upper) == (18, 9)
    ImageDraw.Draw(alone).text((2 - left, 2 - upper), "cat", "white", font)
    assert np.array_equal(cut(drawn, *field), np.asarray(alone))
    assert np.asarray(alone).min(axis=-1).max() == 255

    expected = draw(image, [box])
    expected.paste(alone, field)
    assert drawn == expected


@pytest.mark.parametrize("colour", FRAMES)
def test_white_letters_are_readable_on_every_frame_colour(colour):
    code = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    assert 1.05 / (luminance(code) + 0.05) >= 5


def test_each_box_has_its_own_label_or_none_has():
    image = Image.new("RGB", (120, 100), "black")
    with pytest.raises(ConfigError) as error:
        draw(image, [(0, 0, 9, 9), (0, 0, 9, 9)], ["cat"])
    assert error.value.what == "1 for 2 boxes."
    assert draw(image, []) == image


def test_crop_tool_takes_thousandths_of_the_last_image_or_of_the_one_with_that_number():
    images = [picture(200, 100), picture(64, 64), picture(1000, 10)]
    last = Crop(images, 100, 0, 200, 1000)
    assert np.array_equal(np.asarray(last), cut(images[2], 100, 0, 200, 10))
    first = Crop(images, 0.25, 0.5, 0.5, 1, 1)
    assert np.array_equal(np.asarray(first), cut(images[0], 50, 50, 100, 100))
    second = Crop(images, 250, 125, 750, 875, 2)
    assert np.array_equal(np.asarray(second), cut(images[1], 16, 8, 48, 56))


@pytest.mark.parametrize(
    ("images", "arguments", "where", "what", "fix"),
    [
        (0, (0, 0, 1, 1), "Crop", "there is no image.", "answer without it."),
        *(
            (2, (0, 0, 1, 1, n), "Crop", f"there is no image {n}.", "write a number from 1 to 2, o")
            for n in (0, 3, -1, 1.0, "1")
        ),
        (
            1,
            (5, 5, 4, 9),
            "box [5, 5, 4, 9]",
            "does not run from its upper left to its lo",
            "write",
        ),
    ],
)
def test_crop_tool_says_what_is_wrong(images, arguments, where, what, fix):
    with pytest.raises(DataError) as error:
        Crop([picture(8, 8)] * images, *arguments)
    assert error.value.where == where
    assert error.value.what.startswith(what)
    assert error.value.fix.startswith(fix)


def test_crop_tool_is_described_with_its_arguments():
    assert (inspect.getdoc(Crop) or "").startswith("Crop [x1, y1, x2, y2] shows that part of the ")
