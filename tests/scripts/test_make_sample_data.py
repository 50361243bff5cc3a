"""The committed sample data: well formed, held out properly, and what the script writes."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SAMPLE_DATA = ROOT / "sample_data"
IMAGES = SAMPLE_DATA / "images"
CANONICAL = "<image>\nWhich digit is this?"

TRAIN: list[dict[str, Any]] = json.loads((SAMPLE_DATA / "train.json").read_text("utf-8"))
EVAL: list[dict[str, Any]] = json.loads((SAMPLE_DATA / "eval.json").read_text("utf-8"))


def image_names(record: dict[str, Any]) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def kind(record: dict[str, Any]) -> str:
    return record["id"].rpartition("-")[0]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [record for record in TRAIN + EVAL if kind(record) in kinds]


def values(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


DIGITS = {record["image"]: int(values(record)[1]) for record in of_kind("digit", "eval-digit")}


def test_committed_files_are_what_the_script_writes(tmp_path):
    script = ROOT / "scripts" / "make_sample_data.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)

    for name in ("train.json", "eval.json"):
        assert (tmp_path / name).read_bytes() == (SAMPLE_DATA / name).read_bytes(), name
    written = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert written == sorted(path.name for path in IMAGES.iterdir())
    for name in written:  # pixels, not bytes: another zlib may compress differently
        with Image.open(tmp_path / "images" / name) as new, Image.open(IMAGES / name) as committed:
            assert (new.mode, new.size) == (committed.mode, committed.size) == ("L", (64, 64)), name
            assert new.tobytes() == committed.tobytes(), name


def test_train_and_eval_share_no_image_id_or_text_question():
    train_names = {name for record in TRAIN for name in image_names(record)}
    eval_names = {name for record in EVAL for name in image_names(record)}
    assert (len(train_names), len(eval_names)) == (600, 100)
    assert not train_names & eval_names

    pixels = set()
    for name in train_names | eval_names:
        with Image.open(IMAGES / name) as image:
            pixels.add(image.tobytes())
    assert len(pixels) == 700  # no picture is there twice under another name

    assert len({record["id"] for record in TRAIN + EVAL}) == len(TRAIN) + len(EVAL)
    questions = [values(record)[-2] for record in of_kind("text", "eval-text")]
    assert len(set(questions)) == len(questions)


def test_every_listed_image_exists_and_every_image_is_listed():
    listed = {name for record in TRAIN + EVAL for name in image_names(record)}
    assert listed == {path.name for path in IMAGES.iterdir()}


def test_placeholders_match_images_and_stand_in_the_first_human_turn():
    for record in TRAIN + EVAL:
        images = len(image_names(record))
        assert sum(value.count("<image>") for value in values(record)) == images, record["id"]
        first_human = next(t for t in record["conversations"] if t["from"] == "human")
        assert first_human["value"].count("<image>") == images, record["id"]


def test_turns_alternate_human_gpt_after_an_optional_system_turn():
    systems = 0
    for record in TRAIN + EVAL:
        roles = [turn["from"] for turn in record["conversations"]]
        if roles[0] == "system":
            systems += 1
            roles = roles[1:]
        expected = ["human", "gpt"] * (2 if kind(record) == "turns" else 1)
        assert roles == expected, record["id"]
    assert systems == 3


def test_counts_and_balance_are_the_ones_in_the_readme():
    assert Counter(map(kind, TRAIN)) == {"digit": 600, "compare": 60, "text": 24, "turns": 16}
    assert Counter(map(kind, EVAL)) == {"eval-digit": 100, "eval-compare": 10, "eval-text": 4}
    for kind_name, per_digit in (("digit", 60), ("eval-digit", 10)):
        answers = Counter(values(record)[1] for record in of_kind(kind_name))
        assert answers == dict.fromkeys("0123456789", per_digit)
    wordings = Counter(values(record)[0] for record in of_kind("digit"))
    assert wordings[CANONICAL] == 480
    assert {values(record)[0] for record in of_kind("eval-digit")} == {CANONICAL}


def test_comparisons_and_follow_ups_agree_with_the_digits():
    verdicts = Counter()
    for record in of_kind("compare", "eval-compare"):
        first_name, second_name = image_names(record)
        assert first_name != second_name
        first, second = DIGITS[first_name], DIGITS[second_name]
        if first == second:
            verdict = "Both show the same digit."
        else:
            verdict = "The first image." if first > second else "The second image."
        verdicts[verdict] += 1
        assert values(record)[1] == (
            f"<think>\nThe first image shows {first}, the second shows {second}.\n</think>\n\n"
            f"{verdict}"
        )
    assert verdicts == {
        "The first image.": 31,
        "The second image.": 31,
        "Both show the same digit.": 8,
    }

    for record in of_kind("turns"):
        digit = DIGITS[record["image"]]
        parity = "Yes." if digit in (0, 2, 4, 6, 8) else "No."
        assert values(record) == [CANONICAL, str(digit), "Is it even?", parity]


@pytest.mark.parametrize("credit", ["Alpaydin", "Kaynak", "10.24432/C50P49", "CC BY 4.0"])
def test_readme_credits_the_source(credit):
    assert credit in (SAMPLE_DATA / "README.md").read_text("utf-8")
