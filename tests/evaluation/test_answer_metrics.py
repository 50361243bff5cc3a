"""Short answers: exact match, VQA accuracy, ANLS and relaxed accuracy, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.evaluation.answer_metrics import (
    anls,
    exact_match,
    normalised,
    relaxed_accuracy,
    vqa_accuracy,
)

METRICS = (exact_match, vqa_accuracy, anls, relaxed_accuracy)

texts = st.text(max_size=12) | st.sampled_from(["", "12.5%", "1,000", "1e9", "a dog", "isn't"])
references = st.lists(texts, min_size=1, max_size=10)


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("  A  red\nCAT ", ["a red cat"], 1),
        ("a red cat", ["cat", "A red cat"], 1),
        ("a red cat.", ["a red cat"], 0),
        ("STRASSE É", ["straße é"], 1),
        ("图 书", ["图\u3000书"], 1),
        ("", ["a"], 0),
        ("", [""], 1),
        (" ", ["a", ""], 1),
    ],
)
def test_exact_match_sees_neither_case_nor_white_space(prediction, references, value):
    assert exact_match(prediction, references) == value


@pytest.mark.parametrize(
    ("agreeing", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_vqa_accuracy_leaves_each_of_ten_people_out_once(agreeing, value):
    """One agrees: 9 of 10 times there is one of three left. Three: 7 x 3/3 and 3 x 2/3."""
    given_answers = ["yes"] * agreeing + [f"no {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("Yes.", given_answers) == pytest.approx(value, abs=1e-12)


def test_vqa_accuracy_of_three_references_is_the_same_formula():
    assert vqa_accuracy("yes", ["yes", "yes", "no"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    assert vqa_accuracy("yes", ["yes"] * 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("references", "value"), [(["yes"], 1), (["no", "yes"], 1), (["no"], 0), (["no", "nope"], 0)]
)
def test_with_one_or_two_references_any_is_enough(references, value):
    assert vqa_accuracy("yes", references) == value


def test_no_answer_is_not_the_choice_a():
    assert vqa_accuracy("", ["A"]) == vqa_accuracy("The", ["A"]) == 0
    assert vqa_accuracy("a", ["A"]) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Dog\n", "dog"),
        ("an apple and a pear", "apple and pear"),
        ("Two cats, none asleep", "2 cats 0 asleep"),
        ("ten-thirty", "10 thirty"),
        ("1,000 dollars!", "1000 dollars"),
        ("2.5 p.m.", "2.5 pm"),
        ("2:50 girl's", "2:50 girl's"),
        ("dont isnt", "don't isn't"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("dont\u2019t", "dont't"),
        ("don\u2019t", "don't"),
        ("well its his", "well its his"),
        ("top-left", "top left"),
        ("top-left - or right-hand", "topleft or righthand"),
        ('"yes"', "yes"),
        ("", ""),
        ("?!", "?!"),
        (" A\n", "a"),
    ],
)
def test_answers_are_normalised_as_in_vqa_v2(answer, expected):
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("Invoice  12", ["invoice 12"], 1),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("kitten", ["dog", "sitting", "mitten"], 1 - 1 / 6),
        ("abcd", ["abxy"], 0),
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("ab", ["abcd"], 0),
        ("abc", ["abcd"], 1 - 1 / 4),
        ("", ["abc"], 0),
        ("", [""], 1),
        ("🙂né", ["🙂ne"], 1 - 1 / 3),
    ],
)
def test_anls_counts_letters_and_stops_at_half_of_them(prediction, references, value):
    assert anls(prediction, references) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("1.05", "1", 1),
        ("-105", "-100", 1),
        ("\u2212105", "-100", 1),
        ("100", "-100", 0),
        ("0", "0.0", 1),
        ("0.001", "0", 0),
        ("1,234,567", "1234567", 1),
        ("12,34", "1234", 0),
        ("51%", "50 %", 1),
        ("51%", "0.5", 1),
        ("51%", "50", 0),
        ("1.02e3", "1000", 1),
        (".5", "0.5", 1),
        ("e5", "100000", 0),
        ("nan", "nan", 1),
        ("inf", "5", 0),
        ("Brazil ", "brazil", 1),
        ("Brasil", "Brazil", 0),
        ("", "5", 0),
        ("5 cats", "5", 0),
    ],
)
def test_relaxed_accuracy_takes_numbers_within_five_percent(prediction, reference, value):
    assert relaxed_accuracy(prediction, [reference]) == value
    assert relaxed_accuracy(prediction, ["something else", reference]) == value


@given(texts, references, st.randoms(use_true_random=False))
def test_values_lie_in_their_range_whatever_the_order_of_references(prediction, given, random):
    shuffled = random.sample(given, len(given))
    for metric in METRICS:
        value = metric(prediction, given)
        assert 0 <= value <= 1
        assert metric(prediction, shuffled) == value


@given(references)
def test_a_reference_itself_is_right(given):
    for metric in (exact_match, anls, relaxed_accuracy):
        assert metric(given[-1], given) == 1
    assert vqa_accuracy(given[0], given[:1] * 10) == 1
