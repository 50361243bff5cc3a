"""Write the sample data: 700 small pictures of digits and the conversations about them.

    python scripts/make_sample_data.py --output sample_data

Writes ``images/digit_0000.png`` …, ``train.json`` and ``eval.json``; the README beside them is kept
by hand. The seed is fixed, so a second run writes the same bytes.

Source: scikit-learn's ``load_digits``, the test half of "Optical Recognition of Handwritten Digits"
by E. Alpaydin and C. Kaynak (UCI, DOI 10.24432/C50P49, CC BY 4.0).
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

SEED = 20250731
TRAIN_PER_DIGIT = 60
EVAL_PER_DIGIT = 10
IMAGE_SIZE = 64

QUESTION = "Which digit is this?"
OTHER_QUESTIONS = ("What digit is shown here?", "Read this digit.", "Name the handwritten digit.")
LARGER_QUESTION = "Which image shows the larger digit?"
SYSTEM_PROMPT = "You are a helpful assistant."

Turn = tuple[str, str]  # (from, value)


def choose_rows(targets: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Pick the source rows of the train and the eval pictures, balanced over the ten digits.

    Returns:
        Two shuffled lists without a common row, ``10 * TRAIN_PER_DIGIT`` and
        ``10 * EVAL_PER_DIGIT`` long.
    """
    train: list[int] = []
    held_out: list[int] = []
    for digit in range(10):
        rows = [row for row, target in enumerate(targets) if target == digit]
        chosen = rng.sample(rows, TRAIN_PER_DIGIT + EVAL_PER_DIGIT)
        train += chosen[:TRAIN_PER_DIGIT]
        held_out += chosen[TRAIN_PER_DIGIT:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def draw_digit(ink: np.ndarray) -> Image.Image:
    """Turn ink amounts 0..16, ``[8, 8]``, into a dark digit on white, mode "L", 64x64.

    In the source the strokes reach the edge; one white source pixel all around gives them room.
    Bilinear reads better than nearest at this size. Rounding back to 16 greys
    (multiples of 17) halves the files.
    """
    small = Image.fromarray((255 - ink.astype(np.int64) * 255 // 16).astype(np.uint8))
    large = ImageOps.expand(small, border=1, fill=255).resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR
    )
    return large.point([round(grey / 17) * 17 for grey in range(256)])


def make_record(
    record_id: str, turns: Sequence[Turn], image: str | list[str] | None = None
) -> dict[str, Any]:
    """Build one LLaVA record; a text-only one has no "image" key."""
    record: dict[str, Any] = {"id": record_id}
    if image is not None:
        record["image"] = image
    record["conversations"] = [{"from": sender, "value": value} for sender, value in turns]
    return record


def digit_records(
    digits: dict[str, int], prefix: str, questions: Sequence[str]
) -> list[dict[str, Any]]:
    """Ask for the digit of every picture in ``digits`` (file name → digit).

    ``questions`` are used in rotation; repeat one to give it a larger share. The id carries the
    number of the picture.
    """
    records = []
    for index, (name, digit) in enumerate(digits.items()):
        question = questions[index % len(questions)]
        turns = [("human", f"<image>\n{question}"), ("gpt", str(digit))]
        number = Path(name).stem.removeprefix("digit_")
        records.append(make_record(f"{prefix}-{number}", turns, name))
    return records


def compare_answer(first: int, second: int) -> str:
    """Say which of two digits is larger, after a ``<think>`` block that names both."""
    if first == second:
        verdict = "Both show the same digit."
    else:
        verdict = "The first image." if first > second else "The second image."
    seen = f"The first image shows {first}, the second shows {second}."
    return f"<think>\n{seen}\n</think>\n\n{verdict}"


def comparison_records(
    digits: dict[str, int], prefix: str, *, unequal: int, equal: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Compare two different pictures; the larger digit is first in half of ``unequal``."""
    pairs: list[tuple[int, int]] = []
    for index in range(unequal):
        low, high = sorted(rng.sample(range(10), 2))
        pairs.append((high, low) if index % 2 == 0 else (low, high))
    pairs += [(digit, digit) for digit in rng.sample(range(10), equal)]
    rng.shuffle(pairs)

    names = {digit: [n for n, shown in digits.items() if shown == digit] for digit in range(10)}
    records = []
    for number, (first, second) in enumerate(pairs, start=1):
        first_name = rng.choice(names[first])
        second_name = rng.choice([name for name in names[second] if name != first_name])
        turns = [
            ("human", f"<image>\n<image>\n{LARGER_QUESTION}"),
            ("gpt", compare_answer(first, second)),
        ]
        records.append(make_record(f"{prefix}-{number:04d}", turns, [first_name, second_name]))
    return records


def text_questions() -> list[tuple[str, str]]:
    """List all 28 text-only questions with their answers."""
    after = [(f"Which digit comes after {n}?", str(n + 1)) for n in range(9)]
    before = [(f"Which digit comes before {n}?", str(n - 1)) for n in range(1, 10)]
    parity = [(f"Is {n} even or odd?", "Odd." if n % 2 else "Even.") for n in range(10)]
    return after + before + parity


def text_records(questions: Sequence[tuple[str, str]], prefix: str) -> list[dict[str, Any]]:
    """Build text-only records; every twelfth, from the first on, opens with a system turn."""
    records = []
    for index, (question, answer) in enumerate(questions):
        turns = [("human", question), ("gpt", answer)]
        if index % 12 == 0:
            turns.insert(0, ("system", SYSTEM_PROMPT))
        records.append(make_record(f"{prefix}-{index + 1:04d}", turns))
    return records


def two_turn_records(
    digits: dict[str, int], prefix: str, rng: random.Random
) -> list[dict[str, Any]]:
    """Build 16 two-turn records, eight on even and eight on odd digits."""
    records = []
    for number, digit in enumerate((*range(10), *range(1, 7)), start=1):
        name = rng.choice([name for name, shown in digits.items() if shown == digit])
        turns = [
            ("human", f"<image>\n{QUESTION}"),
            ("gpt", str(digit)),
            ("human", "Is it even?"),
            ("gpt", "No." if digit % 2 else "Yes."),
        ]
        records.append(make_record(f"{prefix}-{number:04d}", turns, name))
    return records


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def write_sample_data(output: Path) -> None:
    """Write the pictures and both JSON files under ``output``, over any that are there."""
    rng = random.Random(SEED)
    inks, targets = load_digits(return_X_y=True)  # [1797, 64], [1797]
    labels = [int(target) for target in targets]
    train_rows, eval_rows = choose_rows(labels, rng)

    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    digits: dict[str, int] = {}  # file name → digit; the train pictures come first
    for number, row in enumerate(train_rows + eval_rows):
        name = f"digit_{number:04d}.png"
        draw_digit(np.asarray(inks[row]).reshape(8, 8)).save(images / name, optimize=True)
        digits[name] = labels[row]
    train_digits = dict(list(digits.items())[: len(train_rows)])
    eval_digits = dict(list(digits.items())[len(train_rows) :])

    questions = text_questions()
    rng.shuffle(questions)
    train = [
        # 12 of every 15 questions, 80 %, use the one wording that eval uses.
        *digit_records(train_digits, "digit", (QUESTION,) * 12 + OTHER_QUESTIONS),
        *comparison_records(train_digits, "compare", unequal=54, equal=6, rng=rng),
        *text_records(questions[:24], "text"),
        *two_turn_records(train_digits, "turns", rng),
    ]
    held_out = [
        *digit_records(eval_digits, "eval-digit", (QUESTION,)),
        *comparison_records(eval_digits, "eval-compare", unequal=8, equal=2, rng=rng),
        *text_records(questions[24:], "eval-text"),
    ]
    rng.shuffle(train)
    rng.shuffle(held_out)
    write_json(output / "train.json", train)
    write_json(output / "eval.json", held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample data.")
    parser.add_argument("--output", type=Path, default=Path("sample_data"), help="folder to fill")
    write_sample_data(parser.parse_args().output)


if __name__ == "__main__":
    main()
