"""How often each set is seen, and that it is the same each time."""

import tracemalloc
from collections import Counter

import pytest

from vlmtune.core.errors import ConfigError
from vlmtune.data.mixing import MixSampler, mix_weights

SIZES, WEIGHTS = [3, 10, 5, 4], [2, 0.5, 0, 1.25]
SETS = [range(0, 3), range(3, 13), range(13, 18), range(18, 22)]


def epoch(sampler: MixSampler, number: int) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 7])
def test_each_epoch_has_the_whole_passes_and_a_part_without_repetition(seed, number):
    sampler = MixSampler(SIZES, WEIGHTS, seed)
    indices = epoch(sampler, number)
    assert sampler.samples == [6, 5, 0, 5]
    assert len(sampler) == len(indices) == 16
    counts = [sorted(Counter(i for i in indices if i in part).values()) for part in SETS]
    assert counts == [[2, 2, 2], [1, 1, 1, 1, 1], [], [1, 1, 1, 2]]


def test_epochs_differ_in_what_is_drawn_and_in_order_and_repeat_with_the_seed():
    epochs = [epoch(MixSampler(SIZES, WEIGHTS, 7), number) for number in range(3)]
    assert len(set(map(tuple, epochs))) == 3
    drawn = [frozenset(i for i in indices if i in SETS[1]) for indices in epochs]
    assert len(set(drawn)) == 3
    # In any order, and after any other epoch.
    sampler = MixSampler(SIZES, WEIGHTS, 7)
    assert [epoch(sampler, number) for number in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert epoch(MixSampler(SIZES, WEIGHTS, 8), 0) != epochs[0]


def test_parts_of_all_epochs_together_draw_every_sample_about_as_often():
    sampler = MixSampler([10], [0.5], 3)
    counts = Counter(i for number in range(400) for i in epoch(sampler, number))
    assert sorted(counts) == list(range(10))
    assert sum(counts.values()) == 2000
    assert all(150 < count < 250 for count in counts.values())


def test_sets_are_shuffled_among_each_other():
    indices = epoch(MixSampler([100, 100], [1, 1], 0), 0)
    assert sorted(indices) == list(range(200))
    assert 30 < sum(i < 100 for i in indices[:100]) < 70


@pytest.mark.parametrize(
    ("size", "weight", "samples"),
    [(10, 0.99, 10), (10, 0.04, 0), (10, 0.06, 1), (7, 1 / 3, 2), (3, 2.9, 9), (0, 2, 0)],
)
def test_part_is_rounded(size, weight, samples):
    sampler = MixSampler([size, 1], [weight, 1], 0)
    assert sampler.samples == [samples, 1]
    assert len(epoch(sampler, 0)) == samples + 1


def test_memory_is_that_of_the_indices():
    sampler = MixSampler([1_000_000], [1], 0)
    next(iter(sampler))
    tracemalloc.start()
    assert sum(1 for _ in sampler) == 1_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


def test_sets_that_are_not_named_are_passed_once():
    assert mix_weights({"b": 0.5, "c": 2}, ["a", "b", "c"]) == [1.0, 0.5, 2.0]
    assert mix_weights({}, ["a", "a"]) == [1.0, 1.0]
    assert mix_weights({"b": 0}, ["a", "b", "a"]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("mix", "names", "where", "what", "fix"),
    [
        pytest.param(
            {"coko": 2},
            ["coco", "laion"],
            "mix, coko",
            'there is no set "coko"',
            'write "coco"; data_path has coco, laion',
            id="unknown",
        ),
        pytest.param(
            {"train": 2},
            ["train", "other", "train"],
            "mix, train",
            '2 sets are called "train"',
            "name the sets apart in a datainfo file",
            id="ambiguous",
        ),
        pytest.param(
            {"a": 0, "b": 0.0},
            ["a", "b"],
            "mix",
            "every weight is 0",
            "give one set a weight above 0",
            id="nothing",
        ),
    ],
)
def test_mix_that_fits_no_set_is_refused(mix, names, where, what, fix):
    with pytest.raises(ConfigError) as error:
        mix_weights(mix, names)
    assert (error.value.where, error.value.what, error.value.fix) == (where, what, fix)
