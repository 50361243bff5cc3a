"""Short answers against reference answers: each metric of one sample, in [0, 1].

Every function takes one prediction and at least one reference.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = Decimal("0.05")

_REQUIRED_TO_AGREE = 3
_NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_NUMBER_WORDS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Those that are no other word without their apostrophe.
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd
    it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"""
_WITH_APOSTROPHE = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTIONS.split()
    for mark in re.finditer("'", word)
}

_NUMBER = re.compile(
    r"([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?)\s?(%?)"
)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference is the same but for case and white space."""
    return float(_plain(prediction) in map(_plain, references))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The accuracy of VQA v2: `min(n / 3, 1)` for `n` people who gave the answer.

    Each person is left out once, and the mean taken. With one or two references, no three can
    agree: there the answer of any of them is worth 1.

    Source: visualqa.org/evaluation, GT-Vision-Lab/VQA (vqaEval.py). Unlike there, references are
    normalised as the prediction is, also where all are the same.
    """
    answer = normalised(prediction)
    given = [normalised(reference) for reference in references]
    agreeing = given.count(answer)
    if len(given) < _REQUIRED_TO_AGREE:
        return float(agreeing > 0)
    others = len(given) - agreeing
    without_one = agreeing * _agreement(agreeing - 1) + others * _agreement(agreeing)
    return without_one / len(given)


def _agreement(people: int) -> float:
    return min(people / _REQUIRED_TO_AGREE, 1.0)


def normalised(answer: str) -> str:
    """An answer of VQA v2 without case, articles, punctuation and number words; one of nothing
    else, such as "A" among choices, keeps them.

    As there, a mark goes without a space wherever it is if it stands beside a space once or if the
    answer has a number like 1,000; else a space takes its place. Apostrophes and colons stay.
    """
    answer = " ".join(answer.lower().replace("\u2019", "'").split())
    thousands = re.search(r"\d,\d", answer)
    text = answer
    for mark in _PUNCTUATION:
        beside = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside or thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    left = (_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)
    return " ".join(left) or answer


def anls(prediction: str, references: Sequence[str]) -> float:
    """1 less the share of letters to change, of the closest reference; 0 from half of them on.

    Source: average normalised Levenshtein similarity (arXiv:1907.00490), threshold 0.5, without
    regard to case and white space.
    """
    return max(_similarity(_plain(prediction), _plain(reference)) for reference in references)


def _similarity(one: str, other: str) -> float:
    if one == other:
        return 1.0
    one, other = sorted((one, other), key=len)
    if len(other) - len(one) >= ANLS_THRESHOLD * len(other):
        return 0.0
    share = _edit_distance(one, other) / len(other)
    return 1 - share if share < ANLS_THRESHOLD else 0.0


def _edit_distance(one: str, other: str) -> int:
    """Letters to insert, delete or replace."""
    letters = np.frombuffer(other.encode("utf-32-le", "surrogatepass"), np.uint32)
    places = np.arange(len(other) + 1)
    row = places
    for done, letter in enumerate(one, 1):
        below = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        # What is inserted after a place costs 1 each.
        row = np.minimum.accumulate(np.concatenate(([done], below)) - places) + places
    return int(row[-1])


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference is a number and the prediction within 5 % of it, or if they match exactly.

    A percent sign makes hundredths, commas may part thousands.

    Source: ChartQA (arXiv:2203.10244).
    """
    if exact_match(prediction, references):
        return 1.0
    value = _number(prediction)
    targets = [_number(reference) for reference in references]
    return float(
        value is not None
        and any(t is not None and abs(value - t) <= RELAXED_TOLERANCE * abs(t) for t in targets)
    )


def _number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-"))
    return match and Decimal(match[1].replace(",", "")) / (100 if match[2] else 1)
