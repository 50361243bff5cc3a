"""Which samples a process takes: exact lists, each sample once, and skipping without opening."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from vlmtune.data.dataset import PreparedData, Totals
from vlmtune.data.mixing import MixSampler
from vlmtune.data.packing import PackingPlan, RowBounds, Samples
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor
from vlmtune.sft.batches import (
    EpochBatches,
    EpochLoader,
    Packing,
    Rows,
    evaluation_batches,
    grouped_by_length,
    in_batches,
    permutation,
    train_batches,
)
from vlmtune.sft.data import RunData, load_data


def in_turn(samples: int):
    return lambda epoch: np.arange(samples)


def shuffled(samples: int, seed: int):
    return lambda epoch: permutation(samples, seed, epoch)


def batches_of(indices, samples: int, batch: int, rank: int, world: int, drop=False):
    length = samples // batch if drop else -(-samples // batch)
    return EpochBatches(in_batches(indices, batch), samples, length, rank, world, drop)


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
    found = [batches_of(in_turn(samples), samples, 2, rank, world, drop) for rank in range(world)]
    assert [list(batches) for batches in found] == expected
    assert [len(batches) for batches in found] == [len(lists) for lists in expected]


def test_an_epoch_may_be_shorter_or_longer_than_the_data():
    batches = EpochBatches(in_batches(lambda epoch: np.array([7, 7, 2]), 2), 10, 2, 0, 1)
    assert (list(batches), len(batches)) == ([[7, 7], [2]], 2)


def grouped(samples: int, seed: int, world: int = 1, batch: int = 4):
    lengths = np.arange(samples) * 7 % 23
    return grouped_by_length(shuffled(samples, seed), lengths, batch * world, batch, seed)


def packed(samples: int, seed: int, world: int = 1, batch: int = 1):
    lengths = np.arange(samples) * 7 % 23 + 1
    known = Samples(lengths, 0 * lengths, 1.0 * lengths)
    return PackingPlan(shuffled(samples, seed), known, RowBounds(60), batch, world, seed)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda world: in_batches(shuffled(101, 5), 4), id="shuffled"),
        pytest.param(lambda world: grouped(101, 5, world), id="by-length"),
        pytest.param(lambda world: packed(101, 5, world, batch=2), id="packed"),
        pytest.param(lambda world: in_batches(in_turn(101), 4), id="in-turn"),
    ],
)
def test_the_ranks_take_every_sample_of_an_epoch_once(make, drop, world):
    order = make(world)
    length = len(order(0)) if not drop or isinstance(order, PackingPlan) else 101 // 4
    ranks = [EpochBatches(order, 101, length, rank, world, drop) for rank in range(world)]
    for epoch in (0, 1):
        for batches in ranks:
            batches.set_epoch(epoch)
        lists = [list(batches) for batches in ranks]
        assert {len(batches) for batches in lists} == {len(ranks[0])}
        taken = [i for batches in lists for batch in batches for i in batch if i < 101]
        assert len(taken) == len(set(taken))
        if drop and not isinstance(order, PackingPlan):
            assert len(taken) == 101 // (4 * world) * 4 * world
        else:
            assert len(taken) == 101


@pytest.mark.parametrize(
    "make", [lambda n, seed: in_batches(shuffled(n, seed), 1), grouped, packed]
)
def test_epochs_and_seeds_differ_and_come_back(make):
    order = make(50, 3)
    first, second = list(order(0)), list(order(1))
    assert first != second
    assert list(make(50, 4)(0)) != first
    assert list(make(50, 3)(1)) == second  # known without running epoch 0
    assert list(order(0)) == first


def test_two_ranks_of_half_the_batch_take_the_samples_of_one():
    alone = list(batches_of(shuffled(20, 1), 20, 4, 0, 1))
    halves = [batches_of(shuffled(20, 1), 20, 2, rank, 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone


def test_two_ranks_of_half_the_batch_take_the_samples_of_one_when_grouped():
    lengths = np.random.default_rng(0).integers(1, 1000, 40)
    alone, halves = (
        list(grouped_by_length(shuffled(40, 1), lengths, 4, batch, 0)(1)) for batch in (4, 2)
    )
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == alone


def test_batches_of_a_step_are_of_similar_length_and_the_longest_comes_first():
    lengths = np.random.default_rng(0).permutation(1003) + 1
    groups = grouped_by_length(shuffled(1003, 0), lengths, 10, 5, 0)(0)
    steps = [groups[i] + groups[i + 1] for i in range(0, 200, 2)]
    assert max(lengths[groups.indices[:1000]]) in lengths[steps[0]]
    # Of 50 steps sorted together, a step spans a fiftieth of all lengths, or little more.
    spans = [int(np.ptp(lengths[step])) for step in steps]
    assert 10 < np.mean(spans) < 30
    assert max(spans) < 80
    # The steps are not in the order of their lengths.
    tops = [lengths[step].max() for step in steps]
    assert 30 < sum(a < b for a, b in pairwise(tops)) < 70
    # What fills no step is last.
    assert (len(groups), len(groups[200])) == (201, 3)


def test_what_fills_no_step_is_drawn_from_all_lengths():
    lengths = np.arange(130)
    order = grouped_by_length(shuffled(130, 0), lengths, 16, 4, 0)
    left = [sample for epoch in range(200) for sample in order(epoch).indices[128:]]
    assert len(left) == 400
    assert len(set(left)) > 100
    assert 50 < np.mean(lengths[left]) < 80


@pytest.mark.parametrize("packing", [None, Packing(RowBounds(128), np.arange(60.0))])
def test_a_step_holds_the_same_however_it_is_split(packing):
    found = set()
    for batch, accumulation, world in ((2, 1, 4), (2, 2, 2), (4, 1, 2), (1, 8, 1), (8, 1, 1)):
        args = settings_of(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="group_by_length",
            dataloader_drop_last=True,
            seed=4,
        )
        ranks = [
            train_batches(args, run_data(LENGTHS), packing, rank, world) for rank in range(world)
        ]
        taken = [list(batches) for batches in ranks]
        steps = range(0, len(taken[0]) // accumulation * accumulation, accumulation)
        found.add(
            tuple(
                frozenset(i for own in taken for part in own[s : s + accumulation] for i in part)
                for s in steps
            )
        )
    assert len(found) == 1


def test_a_grouped_batch_is_padded_little():
    lengths = np.exp(np.random.default_rng(0).normal(6.3, 0.6, 20_000)).astype(np.int64)

    def padding(groups) -> float:
        longest = np.maximum.reduceat(lengths[groups.indices], groups.starts)
        return float(1 - lengths.sum() / (longest * groups.sizes()).sum())

    indices = shuffled(20_000, 0)
    assert padding(in_batches(indices, 8)(0)) > 0.4
    assert padding(grouped_by_length(indices, lengths, 8, 8, 0)(0)) < 0.05


def test_evaluation_takes_all_by_falling_length():
    dataset = Dataset.from_dict({"length": [3, 9, 5, 9, 1]})
    ranks = [list(evaluation_batches(dataset, 2, rank, 2)) for rank in (0, 1)]
    # The fifth sample again, without its loss, where rank 1 has nothing left.
    assert ranks == [[[1, 3], [4]], [[2, 0], [5 + 4]]]


def run_data(lengths, sampler: MixSampler | None = None) -> RunData:
    """A run's data that knows counts alone: half of the samples have 8 patches."""
    lengths = np.array(lengths)
    patches = np.arange(len(lengths)) % 2 * 8
    totals = Totals([len(lengths)], int(lengths.sum()), len(lengths), int(lengths.max()))
    dataset = Dataset.from_dict({"length": lengths, "patches": patches})
    encoder: Any = None
    return RunData(encoder, PreparedData(dataset, [], totals), {}, sampler)


def settings_of(**keys) -> SFTConfig:
    words = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
    return SFTConfig(**{**words, **keys})


LENGTHS = np.random.default_rng(0).integers(1, 100, 60)


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        ("random", in_batches(shuffled(60, 4), 4)),
        ("sequential", in_batches(in_turn(60), 4)),
        ("group_by_length", grouped_by_length(shuffled(60, 4), LENGTHS, 24, 4, 4)),
    ],
)
def test_the_order_is_the_one_that_the_settings_name(strategy, order):
    args = settings_of(
        train_sampling_strategy=strategy,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        seed=4,
    )
    for rank in (0, 1):
        batches = train_batches(args, run_data(LENGTHS), None, rank, 2)
        batches.set_epoch(1)
        expected = list(order(1))[rank::2]
        # 15 micro-batches: the last step reaches rank 0 alone.
        assert len(batches) == 8
        assert list(batches)[:7] == expected[:7]


def test_a_mix_is_grouped_by_length_too():
    sampler = MixSampler([20, 40], [2, 0.5], seed=4)
    args = settings_of(
        train_sampling_strategy="group_by_length", per_device_train_batch_size=3, seed=4
    )
    batches = train_batches(args, run_data(LENGTHS, sampler), None, 0, 1)
    batches.set_epoch(1)
    taken = list(batches)
    sampler.set_epoch(1)
    assert sorted(i for batch in taken for i in batch) == sorted(sampler)
    assert sum(np.ptp(LENGTHS[batch]) for batch in taken) < 150


@pytest.mark.parametrize("mixed", [False, True])
def test_packed_batches_follow_the_plan(mixed):
    sampler = MixSampler([20, 40], [2, 0.5], seed=4) if mixed else None
    args = settings_of(per_device_train_batch_size=2, seed=4, dataloader_drop_last=True)
    packing = Packing(RowBounds(128, 40), LENGTHS * 1.0)
    ranks = [train_batches(args, run_data(LENGTHS, sampler), packing, r, 2) for r in (0, 1)]
    patches = np.arange(60) % 2 * 8
    for epoch in range(3):
        taken = []
        for batches in ranks:
            batches.set_epoch(epoch)
            # An index above 59 only fills a step that has too few samples for two processes.
            lists = [[i for i in batch if i < 60] for batch in batches]
            assert len(lists) == len(batches) == len(ranks[0])
            assert sum(not batch for batch in lists) <= 1
            assert max(LENGTHS[batch].sum() for batch in lists) <= 2 * 128
            assert max(patches[batch].sum() for batch in lists) <= 2 * 40
            taken += [i for batch in lists for i in batch]
        if sampler:
            sampler.set_epoch(epoch)
        assert sorted(taken) == sorted(sampler or range(60))


def test_a_resumed_epoch_is_the_tail_of_the_plan():
    args = settings_of(per_device_train_batch_size=2)
    packing = Packing(RowBounds(128), LENGTHS * 1.0)
    whole, resumed = (train_batches(args, run_data(LENGTHS), packing, 1, 2) for _ in range(2))
    whole.set_epoch(1)
    rows = Rows(Dataset.from_dict({"x": list(range(60))}))
    loader = EpochLoader(rows, batch_sampler=resumed, collate_fn=values)
    rest = skip_first_batches(loader, 3)
    rest.batch_sampler.batch_sampler.set_epoch(1)
    assert list(rest) == list(whole)[3:]
    assert len(whole) == 6


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
    batches = batches_of(shuffled(13, 2), 13, 3, 0, 1)
    loader = EpochLoader(rows, batch_sampler=batches, num_workers=workers, collate_fn=values)
    order = shuffled(13, 2)(1).tolist()
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
    batches = batches_of(shuffled(7, 0), 7, batch, rank, world)
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
