"""Made data that costs what photos and talk about them cost; the same in every run.

Lengths are those of a mix like LLaVA-1.5's 665k: mostly one photo with a few questions, some large
photos and pages, some talk without a picture.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SEED = 0
ROOT = Path(__file__).parents[1]
PHOTO_SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
"""Width and height of what most photos of COCO and Visual Genome have."""
SYLLABLES = ("ka", "lo", "mi", "ter", "sun", "ri", "be", "do", "an", "el", "pho", "st")


def photo(draw: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft shapes under fine noise: as JPEG of quality 90 about 0.4 bytes a pixel."""
    shapes = np.zeros((height, width, 3), np.float32)
    for step, share in ((160, 0.55), (40, 0.3), (10, 0.15)):
        coarse = draw.integers(0, 256, (height // step + 2, width // step + 2, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        shapes += share * np.asarray(smooth, np.float32)
    noisy = shapes + draw.normal(0, 8, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def save_photos(
    folder: Path, draw: np.random.Generator, sizes: Sequence[tuple[int, int]], count: int
) -> list[str]:
    """JPEG files, the sizes in turn."""
    files = []
    for i in range(count):
        files.append(str(folder / f"{i}_{len(sizes)}.jpg"))
        photo(draw, *sizes[i % len(sizes)]).save(files[-1], quality=90)
    return files


def vocabulary(draw: np.random.Generator, words: int = 600) -> list[str]:
    return ["".join(draw.choice(SYLLABLES, draw.integers(1, 4))) for _ in range(words)]


def sentence(draw: np.random.Generator, words: list[str], count: int) -> str:
    return " ".join(draw.choice(words, count)).capitalize() + "."


def train_tokenizer(draw: np.random.Generator, words: list[str]) -> Any:
    """Byte-level BPE of 2,000 tokens with Qwen's added tokens."""
    script = runpy.run_path(str(ROOT / "scripts/make_tiny_ovis2_5.py"))
    return script["train_tokenizer"]([sentence(draw, words, 200) for _ in range(100)], 2000)


def llava_like(draw: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Columns `length`, `trained_tokens`, `patches` and `patches_squared` of `count` samples, and
    `cells`, how many tokens their image is wide and high.

    Of the samples 73 % have a photo of about 640x480 and 19 % a page or chart of 700x700 to
    1120x1120, at 32x32 pixels, or 4 patches, a token; 8 % have no image. Text is lognormal, 250
    tokens in the mean, 2.6 times as long without an image; 37 % of it is trained. In all a mean of
    640 tokens, a tenth below 370, a tenth above 1,090.
    """
    kind = draw.choice(3, count, p=(0.73, 0.19, 0.08))
    photos = np.array([(20, 15), (15, 20), (20, 13), (16, 14)])[draw.integers(0, 4, count)]
    pages = np.sqrt(draw.uniform(22**2, 35**2, count))[:, None] * np.array([(1.15, 0.87)])
    sides = np.where((kind == 0)[:, None], photos, pages).astype(np.int64)
    sides[kind == 2] = 0
    cells = sides.prod(1)
    text = np.exp(draw.normal(5.35, 0.58, count)) * np.where(kind < 2, 1, 2.6)
    text = text.clip(30, 4000).astype(np.int64)
    return {
        "length": cells + 2 * (kind < 2) + text,  # begin and end of the image
        "trained_tokens": (0.37 * text).astype(np.int64),
        "patches": 4 * cells,
        "patches_squared": (4 * cells) ** 2,
        "cells": sides,
    }
