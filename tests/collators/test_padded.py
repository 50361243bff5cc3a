"""Rows of a dataset to the batches of the reference."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from vlmtune.collators.padded import REPEATED, PaddedCollator
from vlmtune.collators.sample import SampleEncoder
from vlmtune.core.errors import DataError
from vlmtune.data.conversation import Conversation, parse_conversation
from vlmtune.data.dataset import FEATURES

GOLDENS = Path(__file__).parents[1] / "goldens" / "ovis2_5"
IMAGES = GOLDENS / "preprocess" / "images"
PAD, IGN = 320, -100
# Ids of a question of 5 and its answer without thoughts; 5 is 20, 9 is 24 and the colon 25.
HEAD, TAIL = [321, 314, 198], [322, 198, 321, 295, 198, 344, 260, 345, 260]


def parse(question: str, answer: str = "5", **media) -> Conversation:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return parse_conversation({"id": "one", **media, "conversations": turns}, "train.json", 17)


def collate(encoder: SampleEncoder, *conversations: Conversation) -> dict[str, torch.Tensor]:
    return PaddedCollator(encoder)([conversation.to_row() for conversation in conversations])


def without_extra_column(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reference appends one column of padding to a batch that needs none."""
    lengths = batch["attention_mask"].sum(1)
    longest, rows = int(lengths.max()), len(lengths)
    fillers = {"input_ids": PAD, "attention_mask": 0, "labels": IGN}
    if (lengths == longest).all():
        for name, filler in fillers.items():
            assert batch[name][:, longest:].tolist() == [[filler]] * rows
    return {k: value[:, :longest] if k in fillers else value for k, value in batch.items()}


@pytest.mark.parametrize(
    ("case", "inputs", "indices"),
    [
        ("full_single_untied", "inputs", [0]),
        ("full_single_untied", "inputs_text_only_train", [1]),
        ("full_single_untied", "inputs_text_only_eval", [1]),
        ("full_multi_tied", "inputs", [0, 1, 2]),
        ("window_mixed", "inputs", [0, 1]),
        ("video_linear_norope", "inputs", [0]),
        ("window_video_rope", "inputs", [0]),
    ],
)
def test_batch_equals_that_of_the_reference(make_encoder, case, inputs, indices):
    given = json.loads((GOLDENS / case / "samples.json").read_text("utf-8"))
    folder = str(GOLDENS / case / given["image_dir"])
    measured = {"length": 1, "trained_tokens": 1}  # columns that the collator ignores
    rows = [
        {**parse_conversation(given["samples"][i], "d.json", i, folder).to_row(), **measured}
        for i in indices
    ]
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    batch = PaddedCollator(make_encoder(case))([dataset[i] for i in range(len(rows))])

    expected = without_extra_column(load_file(GOLDENS / case / f"{inputs}.safetensors"))
    assert batch.pop("sample_ids") == [row["id"] for row in rows]
    assert set(batch) == set(expected)
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype, name
        assert torch.equal(batch[name], value), name


def test_rows_are_padded_on_the_right_to_the_longest(make_encoder):
    batch = collate(make_encoder(), parse("5"), parse("5:9"))
    assert batch["input_ids"].tolist() == [
        [*HEAD, 20, *TAIL, 20, 322, PAD, PAD],
        [*HEAD, 20, 25, 24, *TAIL, 20, 322],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 15 + [0] * 2, [1] * 17]
    assert batch["labels"].tolist() == [
        [IGN] * 13 + [20, 322] + [IGN] * 2,
        [IGN] * 15 + [20, 322],
    ]


def test_batch_that_needs_no_padding_gets_none_unlike_in_the_reference(make_encoder):
    batch = collate(make_encoder(), parse("5"), parse("9"))
    assert batch["input_ids"].tolist() == [
        [*HEAD, 20, *TAIL, 20, 322],
        [*HEAD, 24, *TAIL, 20, 322],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 15] * 2
    assert batch["labels"].tolist() == [[IGN] * 13 + [20, 322]] * 2


def test_text_alone_has_no_pixels(make_encoder):
    assert set(collate(make_encoder(), parse("5"), parse("9"))) == {
        "input_ids",
        "attention_mask",
        "labels",
        "sample_ids",
    }


def test_row_that_only_fills_a_batch_carries_no_loss_and_is_not_named(make_encoder):
    rows = [parse("5").to_row(), {**parse("9").to_row(), REPEATED: True}]
    batch = PaddedCollator(make_encoder())(rows)
    assert batch["labels"].tolist() == [[IGN] * 13 + [20, 322], [IGN] * 15]
    assert batch["input_ids"].tolist()[1] == [*HEAD, 24, *TAIL, 20, 322]
    assert batch["sample_ids"] == ["one"]


def test_pixels_and_grids_follow_the_order_of_the_rows_and_skip_text(make_encoder):
    names = ["grad_40x70.png", "rgba_33x47.png", "grad_64x64.png"]
    one, two, three = (str(IMAGES / name) for name in names)
    rows = [parse("<image><image>", image=[two, one]), parse("5"), parse("<image>", image=three)]
    encoder = make_encoder()
    batch = collate(encoder, *rows)
    alone = [collate(encoder, rows[0]), collate(encoder, rows[2])]
    assert len(set(map(tuple, batch["grid_thws"].tolist()))) == 3
    for name in ("pixel_values", "grid_thws"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in alone]))


@pytest.mark.parametrize(("key", "mark"), [("image", "<image>"), ("video_frames", "<video>")])
def test_file_removed_after_the_check_is_named_with_its_record(make_encoder, tmp_path, key, mark):
    file = tmp_path / "a.png"
    file.write_bytes((IMAGES / "grad_40x70.png").read_bytes())
    conversation, encoder = parse(mark, **{key: [str(file)]}), make_encoder()
    assert encoder.check_files(conversation) == [(1, 40, 70)]
    file.unlink()
    with pytest.raises(DataError) as error:
        collate(encoder, parse("5"), conversation)
    assert error.value.where == f'train.json, record 17 (id "one"), {key}'
    assert error.value.what == f"{file} does not exist."
