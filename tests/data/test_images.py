"""Images good and bad, and the limits they are resized to."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from vlmtune.core.errors import DataError
from vlmtune.data.images import PixelLimits, check_image, decode, frame_indices, open_image

WHERE = 'train.json, record 17 (id "coco_0123"), image'


def picture(mode: str = "RGB", width: int = 33, height: int = 47) -> Image.Image:
    """Noise, which no format makes small, so that a cut falls into the pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert("L" if mode == "I;16" else "RGB").convert(mode)


def as_bytes(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def png(width: int, height: int, **chunks: bytes) -> bytes:
    """A PNG that announces RGB pixels and holds these chunks."""

    def chunk(name: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(name + data))
        return size + name + data + check

    content = b"\x89PNG\r\n\x1a\n"
    content += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return content + b"".join(chunk(name.encode(), data) for name, data in chunks.items())


@pytest.fixture
def file(tmp_path):
    def write(content: bytes, name: str = "a.png") -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def error_of(path: str, check=check_image) -> DataError:
    with pytest.raises(DataError) as error:
        check(path, WHERE)
    assert error.value.where == WHERE
    return error.value


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
        *(("RGB", form) for form in ("BMP", "GIF", "TIFF", "WEBP")),
    ],
)
def test_whole_image_of_any_mode_passes_with_height_and_width(file, mode, form):
    path = file(as_bytes(picture(mode), form))
    assert check_image(path, WHERE) == (47, 33)
    with open_image(path, WHERE) as image:
        assert (image.width, image.height) == (33, 47)
        assert len(decode(image, path, WHERE).convert("RGB").tobytes()) == 33 * 47 * 3


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (1, 90), (200, 8)])
def test_jpeg_decoded_small_keeps_its_announced_size(file, width, height):
    path = file(as_bytes(picture(width=width, height=height), "JPEG"))
    assert check_image(path, WHERE) == (height, width)


def test_opening_leaves_the_pixels_undecoded(file):
    whole = as_bytes(picture(), "PNG")
    path = file(whole[: len(whole) // 2])
    with open_image(path, WHERE) as image:
        assert image.size == (33, 47)
        with pytest.raises(DataError, match="is corrupt: "):
            decode(image, path, WHERE)


@pytest.mark.parametrize("left", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_truncated_image_is_refused(file, form, left):
    whole = as_bytes(picture(), form)
    path = file(whole[: int(len(whole) * left)])
    error = error_of(path)
    assert error.what.startswith(f"{path} ")
    assert error.fix == "replace or remove it."


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
def test_image_cut_anywhere_is_refused(file, form):
    whole = as_bytes(picture(), form)
    # All pixels of a PNG are there before its last checksums.
    for left in [*range(1, len(whole) - 20, 97), len(whole) - (21 if form == "PNG" else 1)]:
        assert error_of(file(whole[:left])).fix == "replace or remove it."


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_image_whose_end_was_never_written_is_refused(file, form, progressive):
    """Space was given to the file, and zeros stand there. Pillow reads them as grey in a JPEG."""
    buffer = io.BytesIO()
    picture().save(buffer, form, progressive=progressive)
    whole = buffer.getvalue()
    for left in [*range(1, len(whole) - 20, 97), len(whole) - (21 if form == "PNG" else 1)]:
        path = file(whole[:left].ljust(len(whole), b"\0"))
        assert error_of(path).fix == "replace or remove it."


@pytest.mark.parametrize("form", ["JPEG", "PNG", "MPO"])
def test_whole_image_is_not_decoded(file, form, monkeypatch):
    monkeypatch.setattr("vlmtune.data.images.decode", None)
    assert check_image(file(as_bytes(picture(), form)), WHERE) == (47, 33)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
def test_whole_image_that_is_decoded_too_passes(file, form):
    path = file(as_bytes(picture(), form) + b"\0\0more\0\0")
    assert check_image(path, WHERE, decode_whole=True) == (47, 33)


def test_webp_broken_inside_is_refused(file):
    content = bytearray(as_bytes(picture().resize((330, 470)), "WEBP"))
    content[10_000:10_032] = bytes(32)
    path = file(bytes(content))
    assert error_of(path).what.startswith(f"{path} is corrupt: ")


def test_jpeg_broken_inside_is_found_by_decoding_it(file):
    content = bytearray(as_bytes(picture(), "JPEG"))
    content[1000:1002] = b"\xff\xc4"  # a table of codes among the pixels
    path = file(bytes(content))
    assert check_image(path, WHERE) == (47, 33)
    error = error_of(path, lambda path, where: check_image(path, where, decode_whole=True))
    assert error.what.startswith(f"{path} is corrupt: broken data stream")
    with open_image(path, WHERE) as image, pytest.raises(DataError, match="is corrupt: "):
        decode(image, path, WHERE)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_bytes_after_the_end_are_no_fault(file, form):
    assert check_image(file(as_bytes(picture(), form) + b"\0\0more\0\0"), WHERE) == (47, 33)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncated_image_with_a_good_header_is_called_corrupt(file, form):
    whole = as_bytes(picture(), form)
    path = file(whole[: len(whole) * 3 // 4])
    assert error_of(path).what.startswith(f"{path} is corrupt: ")


@pytest.mark.parametrize(
    ("form", "place", "what"),
    [
        pytest.param("PNG", 11, "cannot be opened: ", id="size-of-the-png-header"),
        pytest.param("PNG", 2000, "is corrupt: ", id="png-pixels"),
        pytest.param("BMP", 30, "is corrupt: ", id="bmp-compression"),
    ],
)
def test_image_with_one_wrong_byte_is_refused(file, form, place, what):
    content = bytearray(as_bytes(picture(), form))
    content[place] ^= 1
    path = file(bytes(content))
    assert error_of(path).what.startswith(f"{path} {what}")


def test_missing_image_is_refused(tmp_path):
    path = str(tmp_path / "a.png")
    error = error_of(path)
    assert error.what == f"{path} does not exist."
    assert error.fix == "check the path, and image_folder where it is relative."


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"<html>404</html>", id="web-page"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="signature-alone"),
        pytest.param(png(0, 5, IDAT=b""), id="no-width"),
        pytest.param(png(5, 0, IDAT=b""), id="no-height"),
    ],
)
def test_what_is_no_image_is_refused(file, content):
    path = file(content)
    error = error_of(path)
    assert error.what == f"{path} is no image Pillow can read."
    assert error.fix == "replace or remove it."


def test_empty_image_is_refused(file):
    path = file(b"")
    assert error_of(path).what == f"{path} is empty."


def test_png_whose_pixels_end_in_another_chunk_is_called_corrupt(file):
    pixels = zlib.compress(bytes(5 * (1 + 3 * 7)), level=0)
    assert check_image(file(png(7, 5, IDAT=pixels)), WHERE) == (5, 7)
    path = file(png(7, 5, **{"IDAT": pixels[:50], "-+-+": pixels[50:]}))
    assert error_of(path).what.startswith(f"{path} is corrupt: broken PNG file")


def test_path_no_system_knows_is_refused():
    assert error_of("a\0.png").what == "a\0.png cannot be opened: embedded null byte."


def test_folder_is_refused(tmp_path):
    assert error_of(str(tmp_path)).what.startswith(f"{tmp_path} cannot be opened: ")


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded(file):
    path = file(png(20000, 20000, IDAT=b""))
    error = error_of(path, open_image)
    assert error.what == f"{path} has too many pixels to be an honest image."
    assert error.fix == "scale it down."


def test_large_honest_image_is_opened_without_a_warning(file):
    assert (Image.MAX_IMAGE_PIXELS or 0) < 12000 * 12000  # where Pillow starts to warn
    path = file(png(12000, 12000, IDAT=b""))
    code = (
        f"from vlmtune.data.images import open_image\nprint(open_image({str(path)!r}, 'here').size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(12000, 12000)\n", "")


@pytest.mark.parametrize("form", ["AVIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_image_with_any_wrong_byte_is_read_or_refused(file, form):
    whole = as_bytes(picture(width=9, height=7), form)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        try:
            check_image(file(bytes(content)), WHERE)
        except DataError as error:
            assert error.where == WHERE


LIMITS = PixelLimits(
    single_image_min_pixels=100,
    single_image_max_pixels=1000,
    multiple_image_min_pixels=20,
    multiple_image_max_pixels=400,
    video_min_pixels=10,
    video_max_pixels=300,
    min_frames=2,
    max_frames=8,
)


@pytest.mark.parametrize(("count", "expected"), [(1, (100, 1000)), (2, (20, 400)), (9, (20, 400))])
def test_several_images_have_limits_of_their_own(count, expected):
    assert LIMITS.for_images(count) == expected


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_limits_of_a_video_do_not_depend_on_its_frames(frames):
    assert LIMITS.for_video(frames) == (10, 300)


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        pytest.param(-1, 400, 3, (100, 400), id="minimum-of-a-single-image"),
        pytest.param(20, -1, 3, (20, 333), id="maximum-shared"),
        pytest.param(-1, -1, 4, (100, 250), id="both"),
        pytest.param(-1, -1, 20, (100, 100), id="share-not-below-the-derived-minimum"),
        pytest.param(70, -1, 20, (70, 70), id="share-not-below-the-given-minimum"),
        pytest.param(0, -1, 3, (0, 333), id="zero-is-a-value"),
        pytest.param(-1, 0, 3, (100, 0), id="zero-maximum-is-a-value"),
    ],
)
def test_negative_limits_are_derived_from_the_single_image(low, high, count, expected):
    given = vars(LIMITS)
    images = {"multiple_image_min_pixels": low, "multiple_image_max_pixels": high}
    assert PixelLimits(**{**given, **images}).for_images(count) == expected
    video = {"video_min_pixels": low, "video_max_pixels": high}
    assert PixelLimits(**{**given, **video}).for_video(count) == expected


def test_one_frame_of_a_video_may_take_the_whole_shared_maximum():
    derived = PixelLimits(**{**vars(LIMITS), "video_min_pixels": -1, "video_max_pixels": -1})
    assert derived.for_video(1) == (100, 1000)


@pytest.mark.parametrize(
    ("total", "low", "high", "expected"),
    [
        pytest.param(5, 2, 8, [0, 1, 2, 3, 4], id="all-within"),
        pytest.param(2, 2, 8, [0, 1], id="all-at-the-minimum"),
        pytest.param(8, 2, 8, [0, 1, 2, 3, 4, 5, 6, 7], id="all-at-the-maximum"),
        # round(4/3 i) = 0 1 3 4
        pytest.param(4, 2, 3, [0, 2, 3], id="4-to-3"),
        # round(2.5 i) = 0 2 5 8 10, halves to even
        pytest.param(10, 2, 4, [1, 3, 6, 9], id="10-to-4"),
        # round(12.5 i) = 0 12 25 38 50 62 75 88 100
        pytest.param(100, 2, 8, [6, 18, 31, 44, 56, 68, 81, 94], id="100-to-8"),
        pytest.param(7, 1, 1, [3], id="the-middle-one"),
        # round(0.6 i) = 0 1 1 2 2 3
        pytest.param(3, 5, 8, [0, 1, 1, 2, 2], id="3-to-5"),
        # round(0.5 i) = 0 0 1
        pytest.param(1, 2, 8, [0, 0], id="1-to-2"),
        # round(i / 3) = 0 0 1 1, whose last middle lies behind the end
        pytest.param(1, 3, 8, [0, 0, 0], id="1-to-3"),
    ],
)
def test_frames_are_all_or_the_middles_of_even_stretches(total, low, high, expected):
    assert frame_indices(total, low, high) == expected
