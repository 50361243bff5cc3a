"""Images that find their texts, and texts their images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.core.errors import DataError, ModelError
from vlmtune.evaluation.retrieval import retrieval

GOLDENS = Path(__file__).parents[1] / "goldens/contrastive/single_process.json"
CASES = json.loads(GOLDENS.read_text("utf-8"))["cases"]


def values(similarity, owner) -> dict[str, float]:
    scores = retrieval(similarity, owner).scores(resamples=2)
    return {name: score.value for name, score in scores.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_accuracies_are_those_of_the_contrastive_goldens(case):
    image, text = (
        torch.nn.functional.normalize(torch.tensor(case[key], dtype=torch.float64), dim=-1)
        for key in ("image", "text")
    )
    found = values(image @ text.T, range(len(text)))
    assert found["image_to_text_accuracy"] == pytest.approx(case["acc_i2t"], abs=1e-12)
    assert found["text_to_image_accuracy"] == pytest.approx(case["acc_t2i"], abs=1e-12)
    assert found["contrastive_accuracy"] == pytest.approx(case["acc_mean"], abs=1e-12)
    assert found["image_to_text_recall@5"] == pytest.approx(case["recall5_i2t"], abs=1e-12)
    assert found["text_to_image_recall@5"] == pytest.approx(case["recall5_t2i"], abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_vectors_all_the_same_are_right_once_in_n(n):
    found = values(np.ones((n, n)), range(n))
    for way in ("image_to_text", "text_to_image"):
        assert found[f"{way}_accuracy"] == 1 / n
        assert found[f"{way}_recall@5"] == min(5, n) / n
        assert found[f"{way}_recall@10"] == min(10, n) / n
    assert found["contrastive_accuracy"] == 1 / n


def test_an_image_with_several_texts_is_right_with_any_of_them():
    similarity = np.array(
        [  # texts 0 and 2 are of image 0, 1 and 3 of image 1
            [0.1, 0.8, 0.9, 0.2],
            [0.7, 0.3, 0.6, 0.5],
        ]
    )
    found = retrieval(similarity, [0, 1, 0, 1])
    assert (found.images, found.texts) == (2, 4)
    assert found.image_ranks.tolist() == [0, 2]
    assert found.text_ranks.tolist() == [1, 1, 0, 0]
    scores = found.scores(resamples=5)
    assert scores["image_to_text_accuracy"].value == 1 / 2
    assert scores["image_to_text_accuracy"].per_sample == [1, 0]
    assert scores["text_to_image_accuracy"].value == 2 / 4
    assert scores["text_to_image_accuracy"].per_sample == [0, 0, 1, 1]
    assert scores["contrastive_accuracy"].value == 1 / 2
    assert scores["contrastive_accuracy"].per_sample is None
    assert scores["image_to_text_recall@5"].value == 1


def test_intervals_hold_the_values_and_come_from_the_seed():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(200), 2)
    similarity = rng.standard_normal((200, 400))
    similarity[owner, np.arange(400)] += 2
    found = retrieval(similarity, owner)
    scores = found.scores(seed=3)
    for score in scores.values():
        assert 0 < score.low < score.value < score.high < 1
    assert scores == found.scores(seed=3) != found.scores(seed=4)


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ([0, 0], "image 1 has no text"),
        ([0, 2], "a text is of image 2, of 2"),
        ([0, -1], "a text is of image -1, of 2"),
        ([0], "2 texts, 1 images named"),
    ],
)
def test_texts_and_images_that_do_not_fit_are_errors(owner, message):
    with pytest.raises(DataError, match=message):
        retrieval(np.eye(2), owner)


def test_an_empty_pool_is_an_error():
    with pytest.raises(DataError, match="0 texts"):
        retrieval(np.zeros((0, 0)), [])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_similarity_that_is_no_number_never_counts_as_right(value):
    similarity = np.eye(3)
    similarity[2, 1] = value
    with pytest.raises(ModelError, match="image 2 and text 1"):
        retrieval(similarity, range(3))


@given(st.integers(1, 8), st.integers(0, 99))
def test_ranks_are_those_of_a_stable_sort(images, seed):
    rng = np.random.default_rng(seed)
    owner = rng.permutation([*range(images), *rng.integers(images, size=4)])
    similarity = rng.integers(0, 3, (images, len(owner)))
    found = retrieval(similarity, owner)
    for image, row in enumerate(similarity):
        best_first = owner[np.argsort(-row, kind="stable")]
        assert found.image_ranks[image] == best_first.tolist().index(image)
    for text, column in enumerate(similarity.T):
        best_first = np.argsort(-column, kind="stable")
        assert found.text_ranks[text] == best_first.tolist().index(owner[text])
