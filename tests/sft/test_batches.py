"""Which samples a process takes: exact lists, each sample once, and skipping without opening."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig

from vlmtune.collators.padded import REPEATED, PaddedCollator
from vlmtune.configs.load import load_config
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor
from vlmtune.sft.batches import (
    EpochBatches,
    EpochLoader,
    Rows,
    grouped_by_length,
    sequential,
    shuffled,
)
from vlmtune.sft.data import RunData, load_data


@pytest.mark.parametrize(
    ("samples", "world", "drop", "expected"),
    [
        pytest.param(5, 1, False, [[[0, 1], [2, 3], [4]]], id="alone"),
        pytest.param(5, 1, True, [[[0, 1], [2, 3]]], id="alone-dropped"),
        pytest.param(8, 2, False, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]], id="two-whole"),
        pytest.param(7, 2, False, [[[0, 1], [4, 5]], [[2, 3], [6]]], id="two-short"),
        pytest.param(7, 2, True, [[[0, 1]], [[2, 3]]], id="two-dropped"),
        # Rank 1 has nothing left: sample 4 again, as 5 + 4, without its loss.
        pytest.param(5, 2, False, [[[0, 1], [4]], [[2, 3], [9]]], id="two-one-left"),
        pytest.param(6, 2, False, [[[0, 1], [4, 5]], [[2, 3], [10]]], id="two-one-rank-left"),
        pytest.param(
            7, 3, False, [[[0, 1], [6]], [[2, 3], [13]], [[4, 5], [13]]], id="three-one-left"
        ),
        pytest.param(7, 3, True, [[[0, 1]], [[2, 3]], [[4, 5]]], id="three-dropped"),
        pytest.param(1, 3, False, [[[0]], [[1]], [[1]]], id="fewer-than-ranks"),
        pytest.param(1, 3, True, [[], [], []], id="fewer-than-ranks-dropped"),
    ],
)
def test_batches_of_every_rank(samples, world, drop, expected):
    found = [
        EpochBatches(sequential(samples), samples, samples, 2, rank, world, drop)
        for rank in range(world)
    ]
    assert [list(batches) for batches in found] == expected
    assert [len(batches) for batches in found] == [len(lists) for lists in expected]


def test_an_epoch_may_be_shorter_or_longer_than_the_data():
    batches = EpochBatches(lambda epoch: [7, 7, 2], 10, 3, 2, 0, 1, False)
    assert (list(batches), len(batches)) == ([[7, 7], [2]], 2)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "order",
    [
        pytest.param(shuffled(23, 5), id="shuffled"),
        pytest.param(grouped_by_length([i % 7 for i in range(23)], 12, 5), id="by-length"),
        pytest.param(sequential(23), id="sequential"),
    ],
)
def test_an_epoch_takes_every_sample_once(order, world):
    ranks = [EpochBatches(order, 23, 23, 4, rank, world, False) for rank in range(world)]
    for epoch in (0, 1):
        for batches in ranks:
            batches.set_epoch(epoch)
        taken = [i for batches in ranks for batch in batches for i in batch]
        assert sorted(i for i in taken if i < 23) == list(range(23))


@pytest.mark.parametrize("make", [shuffled, lambda n, seed: grouped_by_length([1] * n, 4, seed)])
def test_epochs_and_seeds_differ_and_come_back(make):
    order = make(50, 3)
    first, second = list(order(0)), list(order(1))
    assert first != second
    assert list(make(50, 4)(0)) != first
    assert list(make(50, 3)(1)) == second  # known without running epoch 0
    assert list(order(0)) == first


def test_two_ranks_of_half_the_batch_take_the_samples_of_one():
    alone = list(EpochBatches(shuffled(20, 1), 20, 20, 4, 0, 1, False))
    halves = [EpochBatches(shuffled(20, 1), 20, 20, 2, rank, 2, False) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone


def test_batches_are_of_similar_length():
    lengths = [1, 100] * 200
    batches = EpochBatches(grouped_by_length(lengths, 4, 0), 400, 400, 4, 0, 1, False)
    mixed = [batch for batch in batches if len({lengths[i] for i in batch}) == 2]
    # The host sorts 100 samples at a time; one batch in four such lots can hold both kinds.
    assert len(mixed) <= 4 < len(batches) == 100


def test_an_index_past_the_end_is_a_row_that_only_fills():
    rows = Rows(Dataset.from_dict({"x": [10, 11, 12]}))
    assert (len(rows), rows[2], rows[3], rows[5]) == (
        3,
        {"x": 12},
        {"x": 10, REPEATED: True},
        {"x": 12, REPEATED: True},
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers):
    rows = Rows(Dataset.from_dict({"x": list(range(13))}))
    batches = EpochBatches(shuffled(13, 2), 13, 13, 3, 0, 1, False)
    loader = EpochLoader(rows, batch_sampler=batches, num_workers=workers, collate_fn=values)
    order = list(shuffled(13, 2)(1))
    loader.set_epoch(1)
    assert list(loader) == [order[i : i + 3] for i in range(0, 13, 3)]
    loader.set_epoch(0)
    assert [i for batch in loader for i in batch] == list(shuffled(13, 2)(0))


def values(rows) -> list[int]:
    return [row["x"] for row in rows]


@pytest.fixture
def data(ovis_goldens, tmp_path, monkeypatch) -> RunData:
    """Seven samples: images `a.png` to `e.png` and two of text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmtune.data.dataset.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
    records: list[dict] = [{"id": f"text{i}", "conversations": turns} for i in range(2)]
    noise = np.random.default_rng(0)
    for name in "abcde":
        pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(f"{name}.png")
        turn = {"from": "human", "value": f"<image>\nThe {name}?"}
        records.append({"id": name, "image": f"{name}.png", "conversations": [turn, turns[1]]})
    Path("data.json").write_text(json.dumps(records), "utf-8")
    words = "--model_path none --output_dir out --data_path data.json --single_image_min_pixels 64"
    tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
    args = SFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none")
    processor = Ovis2_5Processor(Ovis2_5ImageProcessor(patch_size=4), tokenizer)
    return load_data(load_config(words.split()), args, processor)


def loader_of(data: RunData, batch: int, rank: int, world: int, workers: int = 0) -> EpochLoader:
    assert data.train is not None
    batches = EpochBatches(shuffled(7, 0), 7, 7, batch, rank, world, False)
    return EpochLoader(
        Rows(data.train.dataset),
        batch_sampler=batches,
        collate_fn=PaddedCollator(data.encoder),
        num_workers=workers,
    )


def test_a_repeated_row_is_in_the_batch_and_carries_no_loss(data):
    assert data.train is not None
    rows = Rows(data.train.dataset)
    batch = PaddedCollator(data.encoder)([rows[3], rows[3 + 7]])
    assert batch["sample_ids"] == ["b"]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert len(batch["grid_thws"]) == 2
    assert (batch["labels"][0] != -100).sum() == data.train.dataset[3]["trained_tokens"] > 0
    assert (batch["labels"][1] == -100).all()


def test_the_last_step_of_an_epoch_reaches_every_rank_and_trains_each_sample_once(data):
    assert data.train is not None
    # Steps of 3 x 2: the seventh sample is alone in the last one.
    first, second = (list(loader_of(data, 3, rank, 2)) for rank in (0, 1))
    assert len(first) == len(second) == 2
    assert (len(first[1]["sample_ids"]), second[1]["sample_ids"]) == (1, [])
    assert torch.equal(first[1]["input_ids"], second[1]["input_ids"])
    trained = sum(int((b["labels"] != -100).sum()) for b in [*first, *second])
    assert trained == data.train.trained_tokens
    assert (second[1]["labels"] == -100).all()


@pytest.mark.slow
def test_skipping_gives_the_rest_of_the_epoch_and_opens_nothing_else(data, monkeypatch):
    whole = loader_of(data, 2, 0, 1)
    whole.set_epoch(1)
    expected = list(whole)[2:]
    left = [i for batch in expected for i in batch["sample_ids"]]
    opened: list[str] = []

    def counted(file, *args, real=PIL.Image.open, **kwargs):
        opened.append(Path(str(file)).stem)
        return real(file, *args, **kwargs)

    for workers in (0, 2):
        rest = skip_first_batches(loader_of(data, 2, 0, 1, workers), 2)
        rest.batch_sampler.batch_sampler.set_epoch(1)  # as the host's loop reaches it
        with monkeypatch.context() as patch:
            patch.setattr(PIL.Image, "open", counted)
            batches = list(rest)
        assert len(batches) == len(expected) == 2
        for batch, wanted in zip(batches, expected, strict=True):
            assert batch["sample_ids"] == wanted["sample_ids"]
            for name in wanted.keys() - {"sample_ids"}:
                assert torch.equal(batch[name], wanted[name]), name
    # Once each, in the loop's own process; workers open in theirs.
    assert opened == [name for name in left if len(name) == 1]
    assert 0 < len(opened) < 5
