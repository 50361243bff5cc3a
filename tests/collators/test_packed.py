"""Rows of a dataset to one row of samples laid end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmtune.collators.packed import PackedCollator
from vlmtune.collators.padded import REPEATED, PaddedCollator
from vlmtune.collators.sample import SampleEncoder
from vlmtune.data.conversation import Conversation, Turn, parse_conversation

IMAGES = Path(__file__).parents[1] / "goldens" / "ovis2_5" / "preprocess" / "images"
IGN = -100
# Ids of a question of 5 and its answer without thoughts; 5 is 20, 9 is 24 and the colon 25.
HEAD, TAIL = [321, 314, 198], [322, 198, 321, 295, 198, 344, 260, 345, 260]


def parse(question: str, identity: str = "one", **media) -> Conversation:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "5"}]
    return parse_conversation({"id": identity, **media, "conversations": turns}, "train.json", 17)


def images_and_text() -> list[Conversation]:
    one, two = str(IMAGES / "grad_40x70.png"), str(IMAGES / "rgba_33x47.png")
    frames = [str(IMAGES / f"frame_{i}.png") for i in range(3)]
    return [
        parse("<image>5<image>", "images", image=[two, one]),
        parse("5:9", "text"),
        parse("<video>", "video", video_frames=frames),
        parse("<image>", "image", image=one),
    ]


def rows_of(encoder: SampleEncoder, *conversations: Conversation) -> list[dict[str, Any]]:
    return [encoder.row(conversation) for conversation in conversations]


def test_samples_stand_end_to_end_and_positions_start_anew(make_encoder):
    encoder = make_encoder()
    batch = PackedCollator(encoder)(rows_of(encoder, parse("5", "a"), parse("5:9", "b")))
    assert {k: v.tolist() if torch.is_tensor(v) else v for k, v in batch.items()} == {
        "input_ids": [[*HEAD, 20, *TAIL, 20, 322, *HEAD, 20, 25, 24, *TAIL, 20, 322]],
        "labels": [[IGN] * 13 + [20, 322] + [IGN] * 15 + [20, 322]],
        "position_ids": [[*range(15), *range(17)]],
        "cu_seq_lens_q": [0, 15, 32],
        "cu_seq_lens_k": [0, 15, 32],
        "max_length_q": 17,
        "max_length_k": 17,
        "sample_ids": ["a", "b"],
    }
    dtypes = {k: v.dtype for k, v in batch.items() if torch.is_tensor(v)}
    assert dtypes == {
        **dict.fromkeys(("input_ids", "labels", "position_ids"), torch.int64),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.int32),
    }
    assert [type(batch[key]) for key in ("max_length_q", "max_length_k")] == [int, int]


def test_first_label_of_a_sample_is_left_out_as_nothing_before_it_is_its_own(make_encoder):
    encoder = make_encoder()
    caption = Conversation("a", [Turn("plain", "59", trained=True)])
    rows = rows_of(encoder, caption, caption)
    assert encoder.ids_and_labels(rows[0])[1].tolist() == [20, 24, 322]
    batch = PackedCollator(encoder)(rows)
    assert batch["input_ids"].tolist() == [[20, 24, 322] * 2]
    assert batch["labels"].tolist() == [[IGN, 24, 322] * 2]


def test_row_that_only_fills_a_batch_carries_no_loss_and_is_not_named(make_encoder):
    encoder = make_encoder()
    rows = rows_of(encoder, parse("5", "a"), parse("9", "b"))
    batch = PackedCollator(encoder)([rows[0], {**rows[1], REPEATED: True}])
    assert batch["labels"].tolist() == [[IGN] * 13 + [20, 322] + [IGN] * 15]
    assert batch["input_ids"].tolist() == [[*HEAD, 20, *TAIL, 20, 322, *HEAD, 24, *TAIL, 20, 322]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 15, 30]
    assert batch["sample_ids"] == ["a"]


def test_batch_of_rows_that_only_fill_it_is_whole_and_counts_nothing(make_encoder):
    encoder = make_encoder()
    rows = rows_of(encoder, *images_and_text())
    full = PackedCollator(encoder)(rows)
    batch = PackedCollator(encoder)([{**row, REPEATED: True} for row in rows])
    assert (full["labels"] != IGN).sum() == 8
    assert batch["labels"].tolist() == [[IGN] * full["labels"].shape[1]]
    assert batch["sample_ids"] == []
    for name in set(full) - {"labels", "sample_ids"}:
        if torch.is_tensor(full[name]):
            assert torch.equal(batch[name], full[name]), name
        else:
            assert batch[name] == full[name], name


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2], [1]])
def test_every_sample_has_the_content_it_has_alone_and_padded(make_encoder, order):
    encoder = make_encoder(max_frames=3)
    rows = rows_of(encoder, *images_and_text())
    rows = [rows[i] for i in order]
    packed, padded = PackedCollator(encoder)(rows), PaddedCollator(encoder)(rows)
    assert set(padded) - set(packed) == {"attention_mask"}
    for name in {"pixel_values", "grid_thws"} & set(padded):
        assert torch.equal(packed[name], padded[name])
    assert packed["sample_ids"] == padded["sample_ids"]
    lengths = [row["length"] for row in rows]
    assert packed["cu_seq_lens_q"].diff().tolist() == lengths
    assert packed["max_length_q"] == max(lengths)
    pixels, grids = (packed.get(key, torch.empty(0)) for key in ("pixel_values", "grid_thws"))
    bounds = packed["cu_seq_lens_q"].tolist()
    for i, (row, start, stop) in enumerate(zip(rows, bounds, bounds[1:], strict=False)):
        alone = PaddedCollator(encoder)([row])
        for name in ("input_ids", "labels"):
            cut: Tensor = packed[name][0, start:stop]
            assert torch.equal(cut, padded[name][i, : stop - start]), name
            assert torch.equal(cut, alone[name][0]), name
        assert packed["position_ids"][0, start:stop].tolist() == list(range(stop - start))
        media, patches = len(row["grids"]) // 3, row["patches"]
        assert torch.equal(grids[:media], alone.get("grid_thws", grids[:0]))
        assert torch.equal(pixels[:patches], alone.get("pixel_values", pixels[:0]))
        grids, pixels = grids[media:], pixels[patches:]
    assert len(grids) == len(pixels) == 0


def test_pixels_are_bytes_in_the_order_of_the_rows(make_encoder):
    encoder = make_encoder(max_frames=3)
    rows = rows_of(encoder, *images_and_text())
    batch = PackedCollator(encoder)(rows)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (48 + 60 + 96 + 112, 48)
    assert batch["grid_thws"].tolist() == [[1, 6, 8], [1, 6, 10], [3, 4, 8], [1, 8, 14]]
    assert batch["grid_thws"].dtype == torch.int64
    assert (batch["input_ids"] == -300).sum() * 4 == len(batch["pixel_values"])


def test_text_alone_has_no_pixels(make_encoder):
    encoder = make_encoder()
    batch = PackedCollator(encoder)(rows_of(encoder, parse("5"), parse("9")))
    assert not {"pixel_values", "grid_thws"} & set(batch)
