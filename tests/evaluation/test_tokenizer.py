"""Captions are split as the Java tokenizer of the COCO caption scores splits them."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.core.errors import ConfigError
from vlmtune.evaluation.tokenizer import tokenize

GOLDENS = Path(__file__).parents[1] / "goldens/caption_metrics"
COCO = importlib.util.find_spec("pycocoevalcap") is not None


def pairs(name: str) -> tuple[list[str], list[list[str]]]:
    read = json.loads((GOLDENS / name).read_text("utf-8"))["pairs"]
    return [pair["text"] for pair in read], [pair["tokens"].split() for pair in read]


@pytest.mark.parametrize("name", ["ptb_tokenizer.json", "ptb_java.json"])
def test_texts_split_as_java_splits_them(name):
    texts, expected = pairs(name)
    assert len(texts) >= 25
    for text, ours, java in zip(texts, tokenize(texts), expected, strict=True):
        assert ours == java, text


def test_all_captions_of_the_golden_set_split_as_java_splits_them():
    items = json.loads((GOLDENS / "captions.json").read_text("utf-8"))["items"]
    captions = [text for item in items for text in (item["candidate"], *item["references"])]
    split = [text for item in items for text in (item["candidate_ptb"], *item["references_ptb"])]
    assert [" ".join(tokens) for tokens in tokenize(captions)] == split


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        (" \n\t ", []),
        (". , ; : ! ? - \" '", []),
        ("😀👍🏽", []),
        ("a\ud83db", ["a", "b"]),
        ("two\nlines", ["two", "lines"]),
        ("cafe\u0301 हिन्दी", ["cafe\u0301", "हिन्दी"]),
    ],
)
def test_texts_without_words_and_with_other_scripts(text, tokens):
    assert tokenize([text]) == [tokens]


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Z"]), max_size=40))
def test_tokens_hold_no_space_and_no_dropped_mark(text):
    (tokens,) = tokenize([text])
    assert all(token and token == "".join(token.split()) for token in tokens)
    assert not set(tokens) & set("'`.?!,:;-")


@pytest.mark.parametrize("piece", ["a", "a.", "a-", "a'", "1,", "<a ", "<!a", "www.", "A.a-", "(1"])
def test_long_runs_take_no_long_time(piece):
    start = time.process_time()
    tokenize([piece * 3000])
    assert time.process_time() - start < 2


def test_an_unknown_tokenizer_is_an_error_that_lists_them():
    with pytest.raises(ConfigError, match="ptb_python or ptb_java"):
        tokenize(["a"], "13a")


@pytest.mark.skipif(COCO, reason="pycocoevalcap is installed")
def test_java_is_never_replaced_in_silence():
    with pytest.raises(ConfigError, match="needs the package pycocoevalcap, which is not"):
        tokenize(["a"], "ptb_java")


@pytest.mark.skipif(not COCO, reason="pycocoevalcap is not installed")
def test_without_java_the_error_names_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="needs Java, which is not installed"):
        tokenize(["a"], "ptb_java")


@pytest.mark.skipif(not (COCO and shutil.which("java")), reason="pycocoevalcap or Java is missing")
def test_java_splits_the_golden_texts():
    texts, expected = pairs("ptb_tokenizer.json")
    assert tokenize(texts, "ptb_java") == expected
    assert tokenize([], "ptb_java") == []
