"""All metrics of a set at once, with their intervals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from vlmtune.configs.schema import ANSWER_METRICS
from vlmtune.core.errors import ConfigError, DataError
from vlmtune.evaluation.scores import Score, score
from vlmtune.evaluation.tokenizer import tokenize

GOLDENS = Path(__file__).parents[1] / "goldens/caption_metrics"
ITEMS = json.loads((GOLDENS / "captions.json").read_text("utf-8"))["items"]
CAPTIONS = [item["candidate"] for item in ITEMS]
REFERENCES = [item["references"] for item in ITEMS]

answers = st.lists(
    st.tuples(st.text("ab 1.", max_size=5), st.lists(st.text("ab 1.", max_size=5), min_size=1)),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    return score(CAPTIONS, REFERENCES, ANSWER_METRICS)


def test_raw_captions_have_the_values_of_coco(scores):
    expected = json.loads((GOLDENS / "expected.json").read_text("utf-8"))
    corpus = expected["cases"]["ptb_all"]["corpus"]
    assert scores["cider"].value == pytest.approx(corpus["CIDEr"], abs=1e-9)
    for n in (1, 2, 3, 4):
        assert scores[f"bleu_{n}"].value == pytest.approx(corpus[f"BLEU-{n}"], abs=1e-9)
    assert scores["rouge_l"].value == pytest.approx(0.6738265427417331, abs=1e-12)


def test_names_come_in_the_order_asked_for_with_bleu_as_four(scores):
    assert list(scores) == [
        *("exact_match", "vqa_accuracy", "anls", "relaxed_accuracy"),
        *("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"),
    ]
    assert list(score(["a"], [["a"]], ["rouge_l", "anls"])) == ["rouge_l", "anls"]


def test_the_tokenizer_stands_beside_every_caption_score_and_no_other(scores):
    named = {name for name, of in scores.items() if of.tokenizer == "ptb_python"}
    assert named == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"}
    assert {of.tokenizer for name, of in scores.items() if name not in named} == {None}


def test_values_are_means_over_the_samples_but_for_bleu(scores):
    for name, of in scores.items():
        assert of.per_sample is not None and len(of.per_sample) == len(CAPTIONS)
        if not name.startswith("bleu"):
            assert of.value == pytest.approx(np.mean(of.per_sample), abs=1e-12)
    assert scores["bleu_4"].value != pytest.approx(np.mean(scores["bleu_4"].per_sample), abs=0.01)


def test_intervals_are_percentiles_of_resampled_means(scores):
    values = np.array(scores["cider"].per_sample)
    draws = np.random.default_rng(0)
    means = [values[draws.integers(len(values), size=len(values))].mean() for _ in range(1000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (scores["cider"].low, scores["cider"].high) == pytest.approx((low, high), abs=1e-12)


def test_intervals_of_bleu_are_those_of_sacrebleu_on_resampled_captions():
    """The same resamples, put together as texts and scored by sacrebleu anew."""
    found = score(CAPTIONS, REFERENCES, ["bleu"], resamples=25, seed=5)
    ours = [" ".join(tokens) for tokens in tokenize(CAPTIONS)]
    most = max(map(len, REFERENCES))
    wanted = [[" ".join(t) for t in tokenize(texts)] for texts in REFERENCES]
    padded = [texts + [None] * (most - len(texts)) for texts in wanted]
    sacre = BLEU(tokenize="none", smooth_method="none")
    draws, again = np.random.default_rng(5), []
    for _ in range(25):
        drawn = draws.integers(len(ours), size=len(ours))
        streams = [[padded[i][k] for i in drawn] for k in range(most)]
        again.append(sacre.corpus_score([ours[i] for i in drawn], streams).score / 100)
    low, high = np.percentile(again, [2.5, 97.5])
    assert (found["bleu_4"].low, found["bleu_4"].high) == pytest.approx((low, high), abs=1e-12)


def test_intervals_depend_on_the_seed_alone(scores):
    assert score(CAPTIONS, REFERENCES, ANSWER_METRICS) == scores
    other = score(CAPTIONS, REFERENCES, ["cider"], seed=1)["cider"]
    assert other.value == scores["cider"].value
    assert other.low != scores["cider"].low


def test_one_sample_has_an_interval_of_no_width():
    for name, of in score(["a red cat sat"], [["A red cat sat."]], ANSWER_METRICS).items():
        expected = {"cider": 0, "exact_match": 0, "anls": 1 - 1 / 14, "relaxed_accuracy": 0}
        assert of.value == of.low == of.high == pytest.approx(expected.get(name, 1)), name


def test_empty_predictions_score_nothing():
    for of in score(["", " "], [["a cat"], ["a dog", "dogs"]], ANSWER_METRICS).values():
        assert (of.value, of.low, of.high, of.per_sample) == (0, 0, 0, [0, 0])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], [["a"], []], "sample 1:\n  has no references"),
        (["a"], ["a"], "sample 0:\n  is one text, not a list"),
        (["a"], [["a"], ["b"]], "1 predictions, references of 2 samples"),
        ([], [], "0 predictions"),
    ],
)
def test_samples_that_cannot_be_scored_are_named(predictions, references, message):
    with pytest.raises(DataError, match=message):
        score(predictions, references, ["exact_match"])


def test_unknown_metrics_and_tokenizers_are_errors_that_list_the_known():
    with pytest.raises(ConfigError, match=r'no metric "meteor".\n.*exact_match, .*rouge_l'):
        score(["a"], [["a"]], ["anls", "meteor"])
    with pytest.raises(ConfigError, match="ptb_python or ptb_java"):
        score(["a"], [["a"]], ["cider"], tokenizer="13a")


@given(answers, st.randoms(use_true_random=False))
def test_the_order_of_samples_changes_no_value(drawn, random):
    shuffled = random.sample(drawn, len(drawn))
    before, after = (
        score(*zip(*both, strict=True), ANSWER_METRICS, resamples=2) for both in (drawn, shuffled)
    )
    for name, of in before.items():
        assert after[name].value == pytest.approx(of.value, abs=1e-9)
        assert 0 <= of.value <= (10 if name == "cider" else 1) + 1e-9


def test_metrics_are_imported_without_torch():
    command = "import sys, vlmtune.evaluation.retrieval; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
