"""Padding, planning time and balance of packed rows, on lengths alone.

    python benchmarks/packing.py

665,000 samples of a mix like LLaVA's (`synthetic.llava_like`), then as many with images of
448x448 to 1792x1792. `waste` is 1 - real/allocated tokens: of random batches of 8, as TRL pads
vision data, of batches grouped by length with transformers' sampler, and of packed rows.
`plan_seconds` is process time of one epoch's plan: the costs of all samples, the rows
and their order over 8 processes. `imbalance` is the largest over the mean planned cost of the
processes of a step: over all steps together, of one step in a hundred, of the worst; `shuffled`
gives the first of these for the same rows in random order. Before a number counts, every sample
was found exactly once, every row within its bound, and the same plan made twice.
"""

import json
import time
from typing import Any

import numpy as np
import torch
from measuring import environment, summary
from synthetic import SEED, llava_like
from transformers.trainer_pt_utils import LengthGroupedSampler
from zero_memory import ovis_config

from vlmtune.data.packing import Groups, RowBounds, Samples, imbalance, pack, side_by_side
from vlmtune.models.ovis2_5.flops import training_flops

COUNT, BATCH, ROUNDS = 665_000, 8, 3
WORLDS = (8, 16, 32, 64)
GOALS = {
    "waste_8k": 0.005,
    "waste_4k": 0.01,
    "plan_seconds": 3,
    "imbalance": 1.05,
}


def main() -> None:
    torch.set_num_threads(1)
    draw = np.random.default_rng(SEED)
    columns = llava_like(draw, COUNT)
    wide = wide_images(draw, COUNT)
    lengths = columns["length"]
    grouped = np.array(list(grouped_batches(lengths)))
    plans = {"4k": measured(columns, 4096), "8k": measured(columns, 8192)}
    result = {
        "benchmark": "packing",
        "goal": GOALS,
        "samples": COUNT,
        "mean_tokens": round(float(lengths.mean()), 1),
        "trained_share": round(float(columns["trained_tokens"].sum() / lengths.sum()), 3),
        "waste": {
            "random_batches_of_8": padded_waste(lengths[draw.permutation(COUNT)]),
            "grouped_batches_of_8": padded_waste(lengths[grouped]),
            **{f"packed_{name}": waste for name, (waste, _) in plans.items()},
        },
        "plan_seconds": {name: seconds for name, (_, seconds) in plans.items()},
        "imbalance": {
            "llava_like": balance(columns, 8192),
            "images_448_to_1792": balance(wide, 8192),
        },
        "equal": True,
    }
    print(json.dumps({**result, **environment("torch", "transformers", "numpy")}))


def costs_of(columns: dict[str, np.ndarray]) -> np.ndarray:
    return training_flops(
        ovis_config("2B"),
        columns["length"],
        columns["trained_tokens"],
        columns["patches"],
        columns["patches_squared"],
    )


def packed(columns: dict[str, np.ndarray], costs: np.ndarray, tokens: int) -> Groups:
    samples = Samples(columns["length"], columns["patches"], costs)
    shuffled = np.random.default_rng(SEED).permutation(len(costs))
    return pack(shuffled, samples, RowBounds(tokens))


def measured(columns: dict[str, np.ndarray], tokens: int) -> tuple[float, dict[str, Any]]:
    """Waste and seconds of a plan, made several times."""
    seconds, plans = [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        costs = costs_of(columns)
        rows = packed(columns, costs, tokens)
        plans.append(side_by_side(rows, costs, 1, 8, np.random.default_rng(SEED)))
        seconds.append(time.process_time() - began)
    first = plans[0]
    for plan in plans:
        assert np.array_equal(plan.indices, first.indices)
        assert np.array_equal(plan.starts, first.starts)
    assert np.array_equal(np.sort(first.indices), np.arange(COUNT))
    filled = first.sums(columns["length"])
    assert filled.max() <= tokens
    return round(1 - float(filled.sum() / (len(first) * tokens)), 5), summary(seconds)


def padded_waste(lengths: np.ndarray) -> float:
    """Of neighbours in batches, each padded to its longest."""
    batches = lengths[: len(lengths) // BATCH * BATCH].reshape(-1, BATCH)
    return round(1 - float(batches.sum() / (batches.max(axis=1).sum() * BATCH)), 5)


def grouped_batches(lengths: np.ndarray) -> LengthGroupedSampler:
    generator = torch.Generator().manual_seed(SEED)
    return LengthGroupedSampler(BATCH, lengths=lengths.tolist(), generator=generator)


def wide_images(draw: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """As `llava_like`, with 448x448 to 1792x1792 pixels, uniform in area, on nine in ten."""
    columns = llava_like(draw, count)
    cells = draw.integers(14**2, 56**2, count) * (draw.random(count) < 0.9)
    text = columns["length"] - columns["patches"] // 4
    patches = 4 * cells
    return {
        **columns,
        "length": text + cells,
        "patches": patches,
        "patches_squared": patches**2,
    }


def balance(columns: dict[str, np.ndarray], tokens: int) -> dict[str, Any]:
    costs = costs_of(columns)
    rows = packed(columns, costs, tokens)
    found = {}
    for world in WORLDS:
        random = np.random.default_rng(SEED)
        at_random = of_steps(rows.in_order(random.permutation(len(rows))), costs, world)
        ordered = of_steps(side_by_side(rows, costs, 1, world, random), costs, world)
        found[str(world)] = {**ordered, "shuffled": at_random["all_steps"]}
    return found


def of_steps(rows: Groups, costs: np.ndarray, world: int) -> dict[str, float]:
    cost = rows.sums(costs)
    cost = cost[: len(cost) // world * world].reshape(-1, world)
    steps = cost.max(axis=1) / cost.mean(axis=1)
    return {
        "all_steps": round(imbalance(rows, costs, world), 4),
        "one_in_100": round(float(np.quantile(steps, 0.99)), 4),
        "worst": round(float(steps.max()), 4),
    }


if __name__ == "__main__":
    main()
