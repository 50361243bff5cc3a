"""Samples cut to their longest length."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.collators.rendering import IGNORE_INDEX, Encoded, truncate
from vlmtune.collators.sample import grids_of
from vlmtune.data.conversation import parse_conversation

GOLDENS = Path(__file__).parents[1] / "goldens" / "ovis2_5"
TABLES: dict[str, Any] = json.loads(
    (GOLDENS / "full_multi_tied" / "truncation.json").read_text("utf-8")
)
SAID = {
    "separated": (
        "<image>\n<image>\nWhich image is larger?",
        "<think>\nCompare the two.\n</think>\n\nThe first image.",
    ),
    "adjacent": ("<image><image>\nCompare.", "ok"),
}
Row = tuple[int, int, int, list | None, int]


def our_rows(make_encoder, name: str) -> list[Row]:
    """Length limit, tokens, patches, grids and trained tokens left, for every limit."""
    question, answer = SAID[name]
    record = {
        "image": ["grad_40x70.png", "gray_29x31.png"],
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    folder = str(GOLDENS / "preprocess" / "images")
    conversation = parse_conversation(record, "train.json", 1, folder)
    rows = []
    for limit in range(1, len(TABLES[name]["rows"]) + 1):
        encoder = make_encoder(multimodal_max_length=limit, text_max_length=1)
        row = encoder.row(conversation)
        ids, labels = encoder.ids_and_labels(row)
        assert ids.tolist() == TABLES[name]["input_ids"][: row["length"]]
        assert labels.tolist() == TABLES[name]["labels"][: row["length"]]
        grids = [list(grid) for grid in grids_of(row)] or None
        rows.append((limit, row["length"], row["patches"], grids, row["trained_tokens"]))
    return rows


def their_rows(name: str) -> list[Row]:
    keys = ("max_length", "kept_ids", "n_patches", "grid_thws", "n_label_tokens")
    return [tuple(row[key] for key in keys) for row in TABLES[name]["rows"]]


def test_separated_images_are_cut_as_in_the_reference_at_every_length(make_encoder):
    theirs = their_rows("separated")
    assert [row[0] for row in theirs] == list(range(1, 83))  # the sample has 81 tokens
    assert our_rows(make_encoder, "separated") == theirs


def test_adjacent_images_are_cut_one_by_one_unlike_in_the_reference(make_encoder):
    theirs = their_rows("adjacent")
    assert [row[0] for row in theirs] == list(range(1, 59))
    # Tokens 3 to 19 are the first image, 20 to 37 the second: the reference drops both.
    assert {row[1:] for row in theirs if 20 < row[0] < 38} == {(3, 0, None, 0)}
    assert our_rows(make_encoder, "adjacent") == [
        (row[0], 20, 60, [[1, 6, 10]], 0) if 20 < row[0] < 38 else row for row in theirs
    ]


@pytest.mark.parametrize(
    ("limit", "kept", "media"),
    [
        (0, 0, []),
        (1, 1, []),
        (2, 1, []),
        (3, 1, []),
        (4, 4, [(1, 4)]),
        (5, 4, [(1, 4)]),
        (6, 6, [(1, 4), (4, 6)]),
        (7, 7, [(1, 4), (4, 6)]),
        (8, 7, [(1, 4), (4, 6)]),
        (9, 9, [(1, 4), (4, 6), (7, 9)]),
        (10, 10, [(1, 4), (4, 6), (7, 9)]),
        (99, 10, [(1, 4), (4, 6), (7, 9)]),
    ],
)
def test_no_image_is_cut_in_two(limit, kept, media):
    ids = [5, -301, -300, -302, -301, -302, 6, -301, -302, 7]
    labels = [-100, -100, -100, -100, -100, -100, 6, -100, -100, 7]
    sample = Encoded(ids, labels, [(1, 4), (4, 6), (7, 9)])
    assert truncate(sample, limit) == Encoded(ids[:kept], labels[:kept], media)
    assert sample == Encoded(ids, labels, [(1, 4), (4, 6), (7, 9)])


@st.composite
def samples(draw) -> Encoded:
    """Runs of text and media, each token its own position, every second one trained."""
    media, length = [], 0
    for is_medium, size in draw(st.lists(st.tuples(st.booleans(), st.integers(2, 7)), max_size=8)):
        if is_medium:
            media.append((length, length + size))
        length += size
    ids = list(range(length))
    return Encoded(ids, [i if i % 2 else IGNORE_INDEX for i in ids], media)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sample=samples())
def test_cut_is_the_longest_prefix_of_whole_media_at_every_length(sample: Encoded):
    allowed = [
        n
        for n in range(len(sample.ids) + 1)
        if not any(begin < n < end for begin, end in sample.media)
    ]
    for limit in range(len(sample.ids) + 2):
        longest = max(n for n in allowed if n <= limit)
        assert truncate(sample, limit) == Encoded(
            sample.ids[:longest],
            sample.labels[:longest],
            [(begin, end) for begin, end in sample.media if end <= longest],
        )
