"""Rows of a dataset to the batches of the reference."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from vlmtune.collators.packed import PackedCollator
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
    return PaddedCollator(encoder)([encoder.row(conversation) for conversation in conversations])


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
    encoder = make_encoder(case)
    rows = [
        encoder.row(parse_conversation(given["samples"][i], "d.json", i, folder)) for i in indices
    ]
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    batch = PaddedCollator(encoder)([dataset[i] for i in range(len(rows))])
    if "pixel_values" in batch:
        assert batch["pixel_values"].dtype == torch.uint8
        images = encoder.processor.image_processor
        batch["pixel_values"] = images.normalise(batch["pixel_values"])

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
    encoder = make_encoder()
    rows = [encoder.row(parse("5")), {**encoder.row(parse("9")), REPEATED: True}]
    batch = PaddedCollator(encoder)(rows)
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


def test_batch_of_rows_that_only_fill_it_is_whole_and_counts_nothing(make_encoder):
    encoder = make_encoder()
    media = parse("<image>", image=str(IMAGES / "grad_40x70.png"))
    rows = [{**encoder.row(one), REPEATED: True} for one in (media, parse("5"))]
    batch = PaddedCollator(encoder)(rows)
    full = collate(encoder, media, parse("5"))
    assert (batch.pop("labels") == IGN).all()
    assert batch.pop("sample_ids") == []
    assert {name for name in full if name not in batch} == {"labels", "sample_ids"}
    assert all(torch.equal(value, full[name]) for name, value in batch.items())


def test_patches_of_an_image_are_its_bytes(make_encoder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    encoder = make_encoder()
    batch = collate(encoder, parse("5"), parse("<image>", image=str(tmp_path / "a.png")))
    assert batch["grid_thws"].tolist() == [[1, 4, 4]]
    assert batch["grid_thws"].dtype == torch.int64
    assert batch["pixel_values"].shape == (16, 48)
    # The third patch is the one below the first: two by two of them become one token.
    expected = pixels[4:8, :4].transpose(2, 0, 1)
    assert batch["pixel_values"][2].tolist() == expected.ravel().tolist()
    begin = len(HEAD)
    assert batch["input_ids"][1, begin : begin + 6].tolist() == [-301, *[-300] * 4, -302]


@dataclass(frozen=True)
class SharedBeforeSending:
    """A collator that adds which tensors of its batch lie in shared memory already."""

    collator: PaddedCollator | PackedCollator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        shared = {k for k, v in batch.items() if torch.is_tensor(v) and v.is_shared()}
        return {**batch, "shared": shared}


@pytest.mark.parametrize("collator", [PaddedCollator, PackedCollator])
def test_workers_give_the_same_batches_and_write_pixels_into_shared_memory(make_encoder, collator):
    encoder = make_encoder()
    one, two = str(IMAGES / "grad_40x70.png"), str(IMAGES / "rgba_33x47.png")
    conversations = [
        *(parse("<image>", image=one), parse("5")),
        *(parse("5"), parse("5:9")),
        *(parse("<image><image>", image=[two, one]), parse("<image>", image=two)),
    ]
    rows: Any = [encoder.row(conversation) for conversation in conversations]
    loaders = [
        DataLoader(
            rows,
            batch_size=2,
            collate_fn=SharedBeforeSending(collator(encoder)),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        for workers in (0, 2)
    ]
    here, there = map(list, loaders)
    assert [batch.pop("shared") for batch in here] == [set()] * 3
    assert [batch.pop("shared") for batch in there] == [{"pixel_values"}, set(), {"pixel_values"}]
    assert [set(batch) for batch in there] == [set(batch) for batch in here]
    for ours, theirs in zip(here, there, strict=True):
        for name, value in ours.items():
            if torch.is_tensor(value):
                assert torch.equal(value, theirs[name]), name
            else:
                assert value == theirs[name], name


@pytest.mark.parametrize(("key", "mark"), [("image", "<image>"), ("video_frames", "<video>")])
def test_file_removed_after_the_check_is_named_with_its_record(make_encoder, tmp_path, key, mark):
    file = tmp_path / "a.png"
    file.write_bytes((IMAGES / "grad_40x70.png").read_bytes())
    encoder = make_encoder()
    rows = [encoder.row(parse("5")), encoder.row(parse(mark, "5", **{key: [str(file)]}))]
    file.unlink()
    with pytest.raises(DataError) as error:
        PaddedCollator(encoder)(rows)
    assert error.value.where == f'train.json, record 17 (id "one"), {key}'
    assert error.value.what == f"{file} does not exist."
