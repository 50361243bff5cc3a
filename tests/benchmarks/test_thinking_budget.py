"""The benchmark of the thinking budget compares replies that are equal, and sees what runs."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "language": (32, 48, 2, 2),
    "key_heads": 1,
    "head": 16,
    "words": 600,
    "vision": (32, 48, 1, 2),
    "visual_words": 32,
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("thinking_budget")


def test_the_reference_sees_the_image_twice_and_ours_once_for_the_same_reply(benchmark):
    processor = benchmark.make_processor()
    model = benchmark.make_model(processor, SMALL, "cpu")
    compared = benchmark.Compared(model, processor, 64, budget=5, answer=4)
    found = compared.measure(rounds=1)
    prompt, early_stop = found["prompt_tokens"], len(processor.text_ids(benchmark.EARLY_STOP))
    assert found["ran"] == {
        "ours": {"images": 1, "tokens_read_at_once": prompt + early_stop + 1},
        "reference": {"images": 2, "tokens_read_at_once": 2 * prompt + 5 + early_stop},
    }
    assert found["equal"]
    tokens, thought, answered = compared.ours()
    assert len(tokens) == 5 + early_stop + 4
    assert thought < answered


def test_replies_that_differ_are_no_result(benchmark, monkeypatch):
    processor = benchmark.make_processor()
    model = benchmark.make_model(processor, SMALL, "cpu")
    compared = benchmark.Compared(model, processor, 64, budget=5, answer=4)
    compared.early_stop = compared.early_stop[:-1]
    with pytest.raises(AssertionError, match="the replies differ"):
        compared.measure(rounds=1)
