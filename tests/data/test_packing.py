"""The packing plan: every sample once, within the bounds, rows of a step of nearly equal cost."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.core.errors import ConfigError
from vlmtune.data import packing
from vlmtune.data.mixing import MixSampler
from vlmtune.data.packing import (
    Groups,
    PackingPlan,
    RowBounds,
    Samples,
    imbalance,
    pack,
    side_by_side,
    split,
)


def samples_of(lengths, patches=None, costs=None) -> Samples:
    lengths = np.array(lengths)
    patches = np.zeros_like(lengths) if patches is None else np.array(patches)
    return Samples(lengths, patches, lengths * 1.0 if costs is None else np.array(costs))


def groups_of(*lists: list[int]) -> Groups:
    sizes = np.array([len(group) for group in lists])
    return Groups(np.concatenate([np.array(group) for group in lists]), np.cumsum(sizes) - sizes)


def shuffled(count: int):
    return lambda epoch: np.random.default_rng([7, epoch]).permutation(count)


def llava_like(count: int) -> Samples:
    """Lengths as of LLaVA's 665k samples, mean about 650, with images of 64 to 9,408 patches, or
    none; costs as of a 2B model: tokens, patches and squares of patches."""
    random = np.random.default_rng(0)
    visual = np.exp(random.normal(5.8, 0.65, count)).clip(16, 2352).astype(np.int64)
    text = np.exp(random.normal(5.25, 0.75, count)).clip(12, 1500).astype(np.int64)
    without = random.random(count) < 0.06
    text[without] = (3 * text[without]).clip(max=4000)
    visual[without] = 0
    lengths, patches = visual + text, 4 * visual
    return Samples(lengths, patches, 1e10 * lengths + 2.5e9 * patches + 3.7e5 * patches**2.0)


LLAVA = llava_like(100_000)


def test_the_longest_go_first_each_into_the_fullest_row_that_has_room():
    # 6 opens a row, 5 another; 4 fills the first exactly, 3 and 2 the second.
    rows = pack(np.array([3, 1, 4, 0, 2]), samples_of([6, 5, 4, 3, 2]), RowBounds(10))
    assert list(rows) == [[0, 2], [1, 3, 4]]


def test_patches_are_bounded_too_and_text_fills_the_rows():
    # Two images of 60 patches do not share a row of 100, whatever room they leave for text.
    samples = samples_of([3, 3, 6, 7], [60, 60, 0, 0])
    assert list(pack(np.arange(4), samples, RowBounds(10, 100))) == [[0, 2], [1, 3]]
    assert list(pack(np.arange(4), samples, RowBounds(10))) == [[3, 0], [2, 1]]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_each_sample_is_in_one_row_and_no_bound_is_passed(data):
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=60))
    patches = [data.draw(st.integers(0, 4 * length)) for length in lengths]
    bounds = RowBounds(50, data.draw(st.one_of(st.none(), st.integers(max(*patches, 1), 250))))
    drawn = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=80))
    samples = samples_of(lengths, patches)
    rows = pack(np.array(drawn), samples, bounds)
    assert sorted(i for row in rows for i in row) == sorted(drawn)
    assert rows.sums(samples.lengths).max() <= 50
    assert bounds.patches is None or rows.sums(samples.patches).max() <= bounds.patches


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_epoch_takes_each_sample_once_in_the_same_number_of_rows(data):
    count = data.draw(st.integers(1, 60))
    samples = samples_of(data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count)))
    batch, world = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    shared = data.draw(st.integers(1, 3))
    plan = PackingPlan(
        shuffled(count), samples, RowBounds(30), batch, world, seed=1, accumulation=shared
    )
    assert plan.rows == len(pack(shuffled(count)(0), samples, RowBounds(30)))
    assert plan.length % world == 0
    for epoch in range(3):
        groups = plan(epoch)
        assert sorted(groups.indices) == list(range(count))
        # Where the last step has fewer samples than processes, some of them get none.
        missing = plan.length - len(groups)
        assert 0 <= missing < world
        assert not missing or groups.sizes()[missing - world :].max() == 1
        assert groups.sizes().min() > 0
        assert groups.sums(samples.lengths).max() <= 30 * batch


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_follows_from_seed_and_number_alone(epoch):
    samples = samples_of(LLAVA.lengths[:3000])

    def plan(seed: int, count: int = 3000) -> PackingPlan:
        return PackingPlan(shuffled(count), samples, RowBounds(8192), 2, 2, seed)

    run, fresh = plan(3), plan(3)
    lists = [list(run(e)) for e in range(6)]
    assert list(fresh(epoch)) == lists[epoch]
    assert list(plan(4)(epoch)) != lists[epoch]
    assert all(lists[epoch] != other for e, other in enumerate(lists) if e != epoch)


def test_epochs_that_need_other_numbers_of_rows_have_the_same(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 40)
    samples = samples_of(np.random.default_rng(0).integers(1, 60, 400))
    needed = [len(pack(shuffled(400)(e), samples, RowBounds(100))) for e in range(20)]
    assert (needed[0], min(needed), max(needed)) == (131, 130, 134)
    first = {tuple(row) for row in pack(shuffled(400)(0), samples, RowBounds(100))}
    plan = PackingPlan(shuffled(400), samples, RowBounds(100), 1, 1, seed=0)
    assert plan.rows == 131 + 9  # another order moves the last row of each window but one
    # With fewer, epochs that need more take the first one's rows.
    for rows in (plan.rows, 132):
        plan.rows = plan.length = rows
        for epoch, count in enumerate(needed):
            groups = plan(epoch)
            assert len(groups) == rows
            assert sorted(groups.indices) == list(range(400))
            alike = len(first & set(map(tuple, groups)))
            assert alike > 110 if epoch == 0 or count > rows else alike < 10


def test_draws_of_a_mix_leave_room_for_longer_ones():
    sampler = MixSampler([2000, 500], [0.5, 2], seed=0)
    samples = samples_of(LLAVA.lengths[:2500])

    def indices(epoch: int) -> np.ndarray:
        sampler.set_epoch(epoch)
        return np.fromiter(sampler, np.int64)

    plan = PackingPlan(indices, samples, RowBounds(4096), 1, 1, 0, drawn_anew=True)
    for epoch in range(12):
        groups = plan(epoch)
        assert len(groups) == plan.rows
        # Twice where the mix draws a sample twice; its own draw in every epoch.
        assert sorted(groups.indices) == sorted(indices(epoch))


def test_the_dearest_rows_are_split_near_half_of_their_cost():
    rows = groups_of([0, 1, 2], [3], [4, 5])
    costs = np.array([6.0, 3.0, 3.0, 50.0, 2.0, 2.0])
    assert list(split(rows, 4, costs)) == [[0], [1, 2], [3], [4, 5]]
    assert list(split(rows, 6, costs)) == [[0], [1], [2], [3], [4], [5]]
    assert list(split(rows, 2, costs)) == list(rows)


def test_neighbours_by_cost_are_a_step_and_the_dearest_comes_first():
    rows = groups_of(*[[i] for i in range(8)])
    costs = np.array([1.0, 80, 2, 70, 3, 90, 4, 60])
    steps = list(side_by_side(rows, costs, 1, 2, np.random.default_rng(0)))
    pairs = [set(steps[i] + steps[i + 1]) for i in range(0, 8, 2)]
    assert pairs[0] == {5, 1}
    assert sorted(map(sorted, pairs)) == [[0, 2], [1, 5], [3, 7], [4, 6]]
    # Two rows each: the dearest, 90, is with 60, and 80 with 70.
    assert list(side_by_side(rows, costs, 2, 2, np.random.default_rng(0)))[:2] == [[5, 7], [1, 3]]


def test_steps_come_in_another_order_each_time_and_the_rest_last():
    rows = groups_of(*[[i] for i in range(41)])
    costs = np.arange(41.0)
    orders = [list(side_by_side(rows, costs, 1, 2, np.random.default_rng(seed))) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert all(order[:2] == [[40], [39]] and order[-1] == [0] for order in orders)


def test_imbalance_is_what_the_dearest_process_adds_to_all_steps():
    groups = groups_of([0, 1], [2], [3], [4], [5])
    # Steps of 2: max 3 and mean 2, max 5 and mean 5; the rest is no whole step.
    assert imbalance(groups, np.array([1.0, 2, 1, 5, 5, 100]), 2) == (3 + 5) / (2 + 5)


@pytest.mark.parametrize(("tokens", "waste"), [(8192, 0.005), (4096, 0.01)])
def test_little_of_the_rows_is_empty_and_the_plan_is_made_in_time(tokens, waste):
    start = time.process_time()
    plan = PackingPlan(shuffled(len(LLAVA.lengths)), LLAVA, RowBounds(tokens), 1, 1, seed=0)
    groups = plan(0)
    spent = time.process_time() - start
    assert 600 < LLAVA.lengths.mean() < 700
    assert 1 - LLAVA.lengths.sum() / (plan.rows * tokens) <= waste
    assert groups.sums(LLAVA.lengths).max() <= tokens
    # 3 s for 665k samples: about 0.2 s were measured for these.
    assert spent < 3 * len(LLAVA.lengths) / 665_000 * 3


@pytest.fixture(scope="module")
def llava_rows() -> Groups:
    return pack(shuffled(len(LLAVA.lengths))(0), LLAVA, RowBounds(8192))


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("world", [8, 16, 32, 64])
def test_ranks_have_rows_of_nearly_equal_cost(world, batch, llava_rows):
    random = np.random.default_rng(0)
    groups = side_by_side(llava_rows, LLAVA.costs, batch, world, random)
    assert imbalance(groups, LLAVA.costs, world) <= 1.02
    # Rows as they are packed would not do.
    as_packed = llava_rows.in_order(random.permutation(len(llava_rows))).joined(batch)
    assert imbalance(as_packed, LLAVA.costs, world) > 1.05


def test_a_plan_for_64_ranks_is_balanced_to_its_last_step():
    count = 30_000
    plan = PackingPlan(shuffled(count), LLAVA, RowBounds(8192), 1, 64, seed=0)
    groups = plan(1)
    assert (plan.length % 64, plan.rows % 64) == (0, 4)
    assert imbalance(groups, LLAVA.costs, 64) <= 1.05


def test_rows_within_a_bound_on_patches_are_nearly_as_few():
    bounds = RowBounds(8192, 9_408)
    rows = pack(shuffled(len(LLAVA.lengths))(0), LLAVA, bounds)
    assert rows.sums(LLAVA.patches).max() <= 9_408
    least = max(LLAVA.patches.sum() / 9_408, LLAVA.lengths.sum() / 8192)
    assert len(rows) < 1.03 * least


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        pytest.param(
            RowBounds(100),
            "packing_length:\n  is 100, but 2 samples are longer, the longest 300 tokens.\n"
            "  Fix: raise it to 300, or lower multimodal_max_length and text_max_length to 100.",
            id="tokens",
        ),
        pytest.param(
            RowBounds(300, 40),
            "packing_max_patches:\n  is 40, but 1 samples have more, the largest 80 patches.\n"
            "  Fix: raise it to 80, or lower the pixel limits.",
            id="patches",
        ),
    ],
)
def test_a_sample_above_a_bound_is_refused(bounds, message):
    samples = samples_of([100, 200, 300], [0, 80, 40])
    with pytest.raises(ConfigError) as error:
        PackingPlan(shuffled(3), samples, bounds, 1, 1, seed=0)
    assert str(error.value) == message
