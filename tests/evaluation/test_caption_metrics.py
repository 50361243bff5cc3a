"""CIDEr-D, BLEU and ROUGE-L are those of the COCO caption scores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.evaluation.caption_metrics import bleu, bleu_statistics, cider_d, rouge_l

GOLDENS = Path(__file__).parents[1] / "goldens/caption_metrics"
ITEMS = {
    item["id"]: item for item in json.loads((GOLDENS / "captions.json").read_text("utf-8"))["items"]
}
CASES = json.loads((GOLDENS / "expected.json").read_text("utf-8"))["cases"]
ORDERS = [f"BLEU-{n}" for n in (1, 2, 3, 4)]

words = st.lists(st.sampled_from(["a", "red", "cat", "dog", "sat", "on"]), max_size=7)
references_of_one = st.lists(words, min_size=1, max_size=3)
samples = st.lists(st.tuples(words, references_of_one), min_size=1, max_size=5)


def tokens_of(case: str) -> tuple[list[list[str]], list[list[list[str]]]]:
    form = "" if case == "raw_untokenised_all" else "_ptb"
    items = [ITEMS[name] for name in CASES[case]["ids"]]
    references = [[text.split() for text in item[f"references{form}"]] for item in items]
    predictions = [item[f"candidate{form}"].split() for item in items]
    if case in ("ptb_first_reference_as_candidate", "ptb_self_single_reference"):
        predictions = [of_sample[0] for of_sample in references]
    if case == "ptb_self_single_reference":
        references = [of_sample[:1] for of_sample in references]
    return predictions, references


def of_images(case: str, metric: str) -> list[float]:
    return [CASES[case]["per_image"][name][metric] for name in CASES[case]["ids"]]


@pytest.mark.parametrize("case", CASES)
def test_cider_d_is_that_of_coco_for_the_set_and_every_image(case):
    values = cider_d(*tokens_of(case))
    assert values == pytest.approx(of_images(case, "CIDEr"), abs=1e-9)
    assert np.mean(values) == pytest.approx(CASES[case]["corpus"]["CIDEr"], abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_bleu_is_that_of_coco_for_the_set(case):
    expected = [CASES[case]["corpus"][order] for order in ORDERS]
    assert bleu(bleu_statistics(*tokens_of(case)).sum(0)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_bleu_of_every_image_is_that_of_coco_but_for_its_small_constants(case):
    expected = np.array([of_images(case, order) for order in ORDERS]).T
    statistics = bleu_statistics(*tokens_of(case))
    ours = np.array([bleu(row) for row in statistics])
    with_constants = np.array([bleu_with_coco_constants(row) for row in statistics])
    np.testing.assert_allclose(with_constants, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[ours > 0], expected[ours > 0], rtol=0, atol=1e-9)
    # (1e-15)^(1/4) = 1.8e-4: what COCO gives where no n-gram of an order matches.
    assert expected[ours == 0].max(initial=0) < 1.8e-4


def bleu_with_coco_constants(row: np.ndarray) -> list[float]:
    sys_len, ref_len, correct, total = row[0], row[1], row[2:6], row[6:10]
    ratio = (sys_len + 1e-15) / (ref_len + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, values = 1.0, []
    for n in range(4):
        product *= (correct[n] + 1e-15) / (total[n] + 1e-9)
        values.append(product ** (1 / (n + 1)) * penalty)
    return values


def test_rouge_l_is_that_of_coco():
    """Expected: `Rouge` of pycocoevalcap 1.2 on the same tokens."""
    values = dict(zip(CASES["ptb_all"]["ids"], map(rouge_l, *tokens_of("ptb_all")), strict=True))
    assert sum(values.values()) / len(values) == pytest.approx(0.6738265427417331, abs=1e-12)
    some = {name: values[name] for name in ("img001", "img002", "img005", "img011", "img012")}
    assert some == pytest.approx(
        {
            "img001": 0.8498452012383902,
            "img002": 1.0,
            "img005": 0.4621212121212121,
            "img011": 0.25311203319502074,
            "img012": 0.0,
        },
        abs=1e-12,
    )


def test_rouge_l_takes_precision_and_recall_from_different_references():
    recall, precision = 1.0, 3 / 4  # of the first, of the second
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    references = [["a", "cat"], ["a", "red", "cat", "sat", "there"]]
    assert rouge_l(["a", "red", "cat", "sleeps"], references) == pytest.approx(expected)


@pytest.mark.parametrize("references", [[[]], [[], ["a"]], [["a"], []]])
def test_captions_without_tokens_score_nothing(references):
    assert rouge_l([], references) == 0
    assert bleu(bleu_statistics([[]], [references])[0]) == [0, 0, 0, 0]
    assert cider_d([[], ["b"]], [references, [["b"]]])[0] == 0


def test_bleu_of_a_perfect_match_is_one():
    assert bleu(bleu_statistics([["a"] * 5], [[["a"] * 5]])[0]) == [1, 1, 1, 1]


def test_bleu_takes_the_shorter_of_two_references_equally_close():
    (row,) = bleu_statistics([["a", "b", "c"]], [[["a"] * 4, ["a"] * 2, ["a"] * 9]])
    assert row.tolist() == [3, 2, 1, 0, 0, 0, 3, 2, 1, 0]


def test_no_predictions_give_empty_statistics():
    assert bleu_statistics([], []).shape == (0, 10)
    assert cider_d([], []) == []


@given(samples)
def test_values_lie_in_their_ranges(drawn):
    predictions, references = zip(*drawn, strict=True)
    assert all(0 <= value <= 10 + 1e-9 for value in cider_d(predictions, references))
    assert all(0 <= rouge_l(*sample) <= 1 + 1e-12 for sample in drawn)
    for row in bleu_statistics(predictions, references):
        assert all(0 <= value <= 1 for value in bleu(row))


@given(samples, st.randoms(use_true_random=False))
def test_order_of_samples_and_of_references_changes_nothing(drawn, random):
    order = random.sample(range(len(drawn)), len(drawn))
    shuffled = [(drawn[i][0], random.sample(drawn[i][1], len(drawn[i][1]))) for i in order]
    before, after = (tuple(zip(*both, strict=True)) for both in (drawn, shuffled))
    cider = cider_d(*before)
    assert cider_d(*after) == pytest.approx([cider[i] for i in order], abs=1e-9)
    assert (bleu_statistics(*after) == bleu_statistics(*before)[order]).all()
    assert [rouge_l(*s) for s in shuffled] == [rouge_l(*drawn[i]) for i in order]


@given(samples)
def test_no_prediction_beats_the_only_reference(drawn):
    predictions, references = zip(*drawn, strict=True)
    only = [of_sample[:1] for of_sample in references]
    best = cider_d([of_sample[0] for of_sample in only], only)
    for value, top in zip(cider_d(predictions, only), best, strict=True):
        assert value <= top + 1e-9
    for (reference,) in only:
        assert rouge_l(reference, [reference]) == pytest.approx(float(bool(reference)))
        values = bleu(bleu_statistics([reference], [[reference]])[0])
        assert values == pytest.approx([float(len(reference) >= n) for n in (1, 2, 3, 4)])
