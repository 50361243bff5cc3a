"""Resizing, normalising and cutting, bit for bit as the reference."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor, smart_resize

GOLDENS = Path(__file__).parents[2] / "goldens" / "ovis2_5"
IMAGES = GOLDENS / "preprocess" / "images"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDENS / "preprocess" / "cases.json").read_text())
ROWS = json.loads((GOLDENS / "preprocess" / "smart_resize.json").read_text())["rows"]

# The reference raises on these, and takes the rows of the 3-pixel-high one for colour channels.
FAILURES = {
    "small/tall_1px_wide_50x1.png": (1, 8, 2),
    "small/wide_5x90.png": (1, 2, 8),
    "small/bad_1px_high_1x40.png": (1, 2, 8),
    "small/bad_3px_high_3x40.png": (1, 2, 8),
    "real_limits/bad_1px_high_1x40.png": (1, 6, 178),
    "real_limits/bad_3px_high_3x40.png": (1, 8, 104),
    "patch4_tps4/6frames": (2, 6, 10),
}
FRAMES = {
    "frame_0..2": ["frame_0.png", "frame_1.png", "frame_2.png"],
    "frame_0,frame_3": ["frame_0.png", "frame_3.png"],
    "frame_0..2 twice": ["frame_0.png", "frame_1.png", "frame_2.png"] * 2,
}


def open_images(names: list[str]) -> list[Image.Image]:
    return [Image.open(IMAGES / name) for name in names]


def images_of(case: str) -> list[Image.Image]:
    image = CASES[case]["image"]
    return open_images(FRAMES.get(image, [image]))


def limits_of(case: str) -> tuple[int, int]:
    return CASES[case]["min_pixels"], CASES[case]["max_pixels"]


def processor_of(case: str) -> Ovis2_5ImageProcessor:
    tag = case.partition("/")[0]
    temporal = {"patch4_tps2": 2, "patch4_tps4": 4}.get(tag, 1)
    return Ovis2_5ImageProcessor(
        patch_size=4 if tag.startswith("patch4") else 16, temporal_patch_size=temporal
    )


def picture(patches: np.ndarray, grid: tuple[int, int, int], patch: int) -> np.ndarray:
    """The first frame put together again from its patches, `[height, width, 3]`."""
    _, h, w = grid
    frame = patches[: h * w].reshape(h // 2, w // 2, 2, 2, 3, patch, patch)
    return frame.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3)


@pytest.mark.parametrize("case", [case for case in CASES if case not in FAILURES])
def test_patches_are_the_references_bit_for_bit(case):
    expected = CASES[case]
    processor = processor_of(case)
    pixels, grid = processor.patches(images_of(case), *limits_of(case))

    assert [list(grid)] == expected["grid_thw"]
    assert [side * processor.patch_size for side in grid[1:]] == expected["resized_hw"]
    assert list(pixels.shape) == expected["pixel_values_shape"]
    assert pixels.dtype == np.float32
    bytes_ = pixels.astype("<f4").tobytes()
    assert hashlib.sha256(bytes_).hexdigest() == expected["sha256_float32_le"]
    if "stored_as" in expected:
        stored = load_file(GOLDENS / "preprocess" / "pixel_values.safetensors")
        np.testing.assert_array_equal(pixels, stored[expected["stored_as"]])


@pytest.mark.parametrize("case", FAILURES)
def test_images_the_reference_fails_on_get_a_grid_within_the_limits(case):
    processor = processor_of(case)
    pixels, (t, h, w) = processor.patches(images_of(case), *limits_of(case))

    assert (t, h, w) == FAILURES[case]
    assert h % 2 == w % 2 == 0
    assert h * w * processor.patch_size**2 <= CASES[case]["max_pixels"]
    features = 3 * processor.temporal_patch_size * processor.patch_size**2
    assert pixels.shape == (t * h * w, features)
    assert np.isfinite(pixels).all()
    assert -1 <= pixels.min() < pixels.max() <= 1


@pytest.mark.parametrize("case", [case for case in FAILURES if "tps" not in case])
def test_thin_images_keep_their_picture(case):
    processor = processor_of(case)
    pixels, grid = processor.patches(images_of(case), *limits_of(case))
    size = (grid[2] * processor.patch_size, grid[1] * processor.patch_size)
    resized = images_of(case)[0].convert("RGB").resize(size, Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
        picture(pixels, grid, processor.patch_size), np.asarray(resized) / 127.5 - 1, atol=1e-6
    )


def test_a_frame_count_off_the_temporal_patch_is_filled_with_the_last_frame():
    processor = Ovis2_5ImageProcessor(patch_size=4, temporal_patch_size=4)
    six = open_images(FRAMES["frame_0..2 twice"])
    filled, grid = processor.patches(six, 256, 1024)
    explicit, same_grid = processor.patches([*six, six[-1], six[-1]], 256, 1024)
    assert grid == same_grid == (2, 6, 10)
    np.testing.assert_array_equal(filled, explicit)


@pytest.mark.parametrize("case", CASES)
def test_grid_and_token_count_need_no_pixels(case):
    processor, images = processor_of(case), images_of(case)
    pixels, grid = processor.patches(images, *limits_of(case))
    height, width = images[0].height, images[0].width
    assert processor.grid(height, width, *limits_of(case), frames=len(images)) == grid
    assert processor.visual_tokens(grid) == len(pixels) // 4


@pytest.mark.parametrize(
    ("case", "limits", "media"),
    [
        pytest.param("full_single_untied", (256, 2304), [["grad_40x70.png"]], id="one-image"),
        pytest.param(
            "window_mixed", (256, 2304), [["grad_64x64.png"], ["wide_5x90.png"]], id="two-images"
        ),
        pytest.param(
            "video_linear_norope",
            (256, 768),
            [["frame_0.png", "frame_2.png", "frame_0.png"]],
            id="three-of-four-frames",
        ),
        pytest.param("window_video_rope", (256, 2304), [FRAMES["frame_0..2"]], id="video"),
    ],
)
def test_model_inputs_are_rebuilt_from_the_files(case, limits, media):
    inputs = load_file(GOLDENS / case / "inputs.safetensors")
    processor = Ovis2_5ImageProcessor(patch_size=4)
    pieces = [processor.patches(open_images(names), *limits) for names in media]
    pixels = np.concatenate([patches for patches, _ in pieces])
    np.testing.assert_array_equal(pixels, inputs["pixel_values"][: len(pixels)])
    assert [list(grid) for _, grid in pieces] == inputs["grid_thws"][: len(pieces)].tolist()


def test_resampling_scale_mean_and_std_follow_the_settings():
    processor = Ovis2_5ImageProcessor(
        patch_size=4,
        resample=Image.Resampling.BICUBIC,
        rescale_factor=1 / 51,
        image_mean=[0, 1, 2],
        image_std=[1, 2, 4],
    )
    image = Image.open(IMAGES / "grad_40x70.png")
    pixels, grid = processor.patches([image], 256, 1024)
    resized = np.asarray(image.resize((40, 24), Image.Resampling.BICUBIC))
    expected = (resized / 51 - np.array([0, 1, 2])) / np.array([1, 2, 4])
    np.testing.assert_allclose(picture(pixels, grid, 4), expected, atol=1e-6)


def bytes_of(
    processor: Ovis2_5ImageProcessor, images: list[Image.Image], limits: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int, int]]:
    height, width = images[0].height, images[0].width
    grid = processor.grid(height, width, *limits, frames=len(images))
    out = np.full((math.prod(grid), processor.features), 77, np.uint8)
    processor.write_patches(iter(images), grid, out)
    return out, grid


@pytest.mark.parametrize("case", [case for case in CASES if case not in FAILURES])
def test_bytes_normalised_later_are_the_references_patches_bit_for_bit(case):
    processor = processor_of(case)
    written, _ = bytes_of(processor, images_of(case), limits_of(case))
    values = processor.normalise(torch.from_numpy(written))
    assert list(values.shape) == CASES[case]["pixel_values_shape"]
    assert values.dtype == torch.float32
    bytes_ = values.numpy().astype("<f4").tobytes()
    assert hashlib.sha256(bytes_).hexdigest() == CASES[case]["sha256_float32_le"]


@pytest.mark.parametrize(("temporal", "frames"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 5), (3, 4)])
@pytest.mark.parametrize("patch", [4, 14])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_byte_of_every_frame_is_written_where_its_patch_has_it(
    temporal, frames, patch, stride
):
    processor = Ovis2_5ImageProcessor(
        patch_size=patch, hidden_stride=stride, temporal_patch_size=temporal
    )
    noise = np.random.default_rng(0)
    # Sides that need no resizing: the bytes are the images' own.
    height, width = 4 * patch, 6 * patch
    images = noise.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    written, grid = bytes_of(
        processor, [Image.fromarray(image) for image in images], (1, height * width)
    )
    assert grid == (math.ceil(frames / temporal), 4, 6)
    rows = iter(written)
    for first in range(0, frames, temporal):
        stack = images[np.minimum(np.arange(first, first + temporal), frames - 1)]
        for block_top, block_left, dy, dx in np.ndindex(4 // stride, 6 // stride, stride, stride):
            top, left = (block_top * stride + dy) * patch, (block_left * stride + dx) * patch
            cut = stack[:, top : top + patch, left : left + patch]
            np.testing.assert_array_equal(next(rows), cut.transpose(3, 0, 1, 2).ravel())
    assert next(rows, None) is None


def test_a_part_of_a_larger_buffer_is_written_and_nothing_beside_it():
    processor = Ovis2_5ImageProcessor(patch_size=4)
    [image] = open_images(["grad_40x70.png"])
    alone, grid = bytes_of(processor, [image], (256, 1024))
    buffer = np.full((len(alone) + 5, processor.features), 77, np.uint8)
    processor.write_patches([image], grid, buffer[2:-3])
    np.testing.assert_array_equal(buffer[2:-3], alone)
    assert (buffer[:2] == 77).all()
    assert (buffer[-3:] == 77).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
@pytest.mark.parametrize("size", [(40, 24), (40, 31), (57, 24), (57, 31)])
def test_passes_that_would_change_nothing_are_skipped_without_a_trace(mode, size):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    processor = Ovis2_5ImageProcessor(patch_size=4)
    pixels = np.empty((60, processor.features), np.uint8)
    processor.write_patches([image], (1, 6, 10), pixels)
    across = image.convert("RGB").resize((40, size[1]), Image.Resampling.BILINEAR)
    resized = np.asarray(across.resize((40, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(picture(pixels, (1, 6, 10), 4), resized)


@pytest.mark.parametrize("temporal", [1, 2])
def test_bytes_are_normalised_by_the_mean_and_std_of_their_channel(temporal):
    mean, std = [0.48, 0.45, 0.4], [0.26, 0.27, 0.3]
    processor = Ovis2_5ImageProcessor(
        patch_size=16, temporal_patch_size=temporal, image_mean=mean, image_std=std
    )
    every_byte = np.tile(np.arange(256, dtype=np.uint8), (2, 3 * temporal))
    values = processor.normalise(torch.from_numpy(every_byte))
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    channels = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    expected = np.concatenate([np.tile(channel, temporal) for channel in channels])
    np.testing.assert_array_equal(values.numpy(), [expected, expected])
    np.testing.assert_array_equal(processor.table, channels)
    assert processor.table.dtype == np.float32


def test_table_follows_settings_changed_later_and_is_not_saved():
    processor = Ovis2_5ImageProcessor()
    before = processor.table
    assert processor.table is before
    processor.image_std = [1.0, 0.5, 0.25]
    np.testing.assert_array_equal(processor.table[1], before[1])
    np.testing.assert_array_equal(processor.table[2], before[2] * 2)
    assert set(processor.to_dict()) == set(Ovis2_5ImageProcessor().to_dict())


def test_smart_resize_equals_the_reference_wherever_both_sides_are_positive():
    rows = [row for row in ROWS if min(row[-1]) > 0]
    assert len(rows) == len(ROWS) - 28
    assert [row for row in rows if list(smart_resize(*row[:-1])) != row[-1]] == []


@pytest.mark.parametrize(
    "row", [row for row in ROWS if min(row[-1]) == 0], ids=lambda row: "x".join(map(str, row[:2]))
)
def test_smart_resize_never_loses_a_side(row):
    *arguments, _ = row
    factor, max_pixels = row[2], row[4]
    sides = smart_resize(*arguments)
    assert min(sides) >= factor
    assert all(side % factor == 0 for side in sides)
    assert math.prod(sides) <= max_pixels
