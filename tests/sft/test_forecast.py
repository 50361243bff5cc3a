"""A plan's numbers: those of hand-made data, of the host's own loop, and of a run's banner."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback
from trl.trainer.sft_config import SFTConfig

from vlmtune.configs.load import load_config
from vlmtune.data.dataset import PreparedData, Totals
from vlmtune.data.packing import RowBounds
from vlmtune.data.sources import Source
from vlmtune.models.ovis2_5.flops import forward_flops, training_flops
from vlmtune.sft.arguments import planned_arguments
from vlmtune.sft.batches import Packing, train_batches
from vlmtune.sft.cost_forecast import (
    COUNTS,
    PlannedModel,
    compute,
    configured_engine,
    costliest,
    evaluations,
    saves,
)
from vlmtune.sft.data import RunData
from vlmtune.sft.data_forecast import describe, histogram, layouts, micro_batches
from vlmtune.sft.forecast import Forecast, Histogram, Setting, Steps
from vlmtune.sft.memory import meta_model
from vlmtune.sft.run_forecast import UNCOUNTED, changed_settings, forecast, uncounted

PRESET = "configs/presets/quickstart.json"
FULL = {"llm": "full", "visual_tokenizer": "full"}

COLUMNS = {
    "length": [10, 40, 20, 30],
    "trained_tokens": [5, 10, 1, 30],
    "cut": [0, 7, 0, 3],
    "patches": [0, 16, 0, 64],
    "patches_squared": [0, 256, 0, 2048],
    "id": ["a", "b", "c", "d"],
    "source": ["x.json", "x.json", "y.json", "y.json"],
    "record": [1, 2, 1, 3],
}


@pytest.fixture
def data() -> PreparedData:
    left_out = [
        {"where": f'x.json, record {n} (id "{n}"), image', "id": f"{n}", "what": f'"{n}.jpg" is no'}
        for n in (3, 4)
    ] + [{"where": 'x.json, record 5 (id "e")', "id": "e", "what": "is no object."}]
    totals = Totals([2, 2], tokens=100, trained_tokens=46, longest=40, has_images=True)
    return PreparedData(Dataset.from_dict(COLUMNS), left_out, totals)


@pytest.fixture
def args(tmp_path) -> SFTConfig:
    """Micro-batches [0, 1] and [2, 3]."""
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=2
    )
    args.train_sampling_strategy = "sequential"
    return args


def words(model: Path, folder: Path, **keys) -> list[str]:
    given = {"model_path": str(model), "output_dir": str(folder), **keys}
    flags = [(f"--{k}", v if isinstance(v, str) else json.dumps(v)) for k, v in given.items()]
    return [PRESET, *(word for flag in flags for word in flag)]


@pytest.fixture(scope="module")
def meta(tiny_ovis, tmp_path_factory):
    """`meta(policies, key=value)` is the tiny model without weights."""

    def build(policies: dict[str, str], **keys) -> PlannedModel:
        config = load_config(words(tiny_ovis, tmp_path_factory.mktemp("out"), **keys))
        return PlannedModel(*meta_model(config, "bf16", 1e-3), policies, "bf16")

    return build


@pytest.fixture(scope="module")
def plan(tiny_ovis, tmp_path_factory) -> Forecast:
    """Of the quickstart on two GPUs."""
    folder = tmp_path_factory.mktemp("plan") / "out"
    before = dict(os.environ)
    found = forecast(load_config(words(tiny_ovis, folder)), 2, 80 * 10**9, title="quickstart")
    assert not folder.exists()
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()
    return found


def test_histogram_has_round_bins_from_zero():
    assert histogram(np.array([0, 4, 5, 99, 100])) == Histogram(
        [5.0 * i for i in range(21)], [2, 1, *[0] * 17, 2], 41.6, 5.0, 100.0
    )
    assert histogram(np.array([0.0, 0.25, 1.0]), width=0.5).counts == [2, 1]
    assert histogram(np.arange(20) / 20, width=0.05).counts == [*[1] * 18, 2]
    assert histogram(np.array([], np.int64)) == Histogram([], [], 0.0, 0.0, 0.0)


def test_histogram_keeps_every_value():
    for largest in (1, 2, 7, 20, 21, 399, 400, 401, 6000, 123_457):
        values = np.arange(largest + 1)
        found = histogram(values)
        assert sum(found.counts) == len(values)
        assert len(found.counts) <= 20
        assert found.edges[-1] >= largest


def test_data_is_described(data):
    sources = [Source("one", "x.json"), Source("two", "y.json")]
    found = describe("train", data, sources, [1.0, 2.5], [2, 5], patches_per_token=4)
    assert [asdict(source) for source in found.sources] == [
        {"name": "one", "samples": 2, "passes": 1.0, "per_epoch": 2},
        {"name": "two", "samples": 2, "passes": 2.5, "per_epoch": 5},
    ]
    assert (found.samples, found.per_epoch, found.tokens, found.trained_tokens) == (4, 7, 100, 46)
    assert (found.visual_tokens, found.with_media) == (20, 2)
    assert (found.truncated, found.cut_tokens) == (2, 10)
    assert found.left_out == {"image: … is no": 2, "is no object.": 1}
    assert [(s.index, s.id, s.tokens, s.cut) for s in found.longest] == [
        (1, "b", 40, 7),
        (3, "d", 30, 3),
        (2, "c", 20, 0),
    ]
    assert found.visual.counts[-1] == 1 and sum(found.visual.counts) == 2
    assert found.supervised.mean == pytest.approx((0.5 + 0.25 + 0.05 + 1) / 4)


def test_padding_and_waiting_are_those_of_the_micro_batches(data, args):
    packing = Packing(RowBounds(50), np.array([10.0, 40, 20, 30]))
    run: Any = RunData(encoder=None, train=data, evaluation={})
    found = layouts(args, run, packing, False, lambda _, tokens: tokens.astype(float), world=2)
    first, packed = found[0], found[-1]
    assert [layout.name for layout in found] == [
        "sequential",
        "random",
        "group_by_length",
        "packing",
    ]
    assert (first.configured, first.tokens, first.micro_batches, first.steps) == (True, 140, 2, 1)
    assert first.padding == pytest.approx(1 - 100 / 140)
    assert first.waiting == pytest.approx(80 / 70)  # 2 x 40 tokens beside 2 x 30
    assert (packed.tokens, packed.padding, packed.micro_batches) == (100, 0.0, 2)
    assert packed.waiting == 1.0


def test_packing_is_not_compared_where_a_sample_fits_no_row(data, args):
    packing = Packing(RowBounds(39), np.ones(4))
    run: Any = RunData(encoder=None, train=data, evaluation={})
    found = layouts(args, run, packing, False, lambda _, tokens: tokens.astype(float), world=1)
    assert "packing" not in [layout.name for layout in found]


def test_costliest_batch_is_among_those_the_run_reaches(data, args, meta):
    run: Any = RunData(encoder=None, train=data, evaluation={})
    args.per_device_train_batch_size = 1
    epoch = micro_batches(data, train_batches(args, run, None, 0, 2))
    worst = costliest(meta(FULL), data, epoch, Steps(1, 1, 2, 2, 2, 2, 1.0, 0))
    # In the tiny model a patch keeps three quarters of what a token keeps.
    assert [s.id for s in worst.samples] == ["d"]
    assert (worst.step, worst.process) == (2, 1)
    assert (worst.tokens, worst.patches, worst.trained_tokens, worst.padded) == (30, 64, 30, False)
    worst = costliest(meta(FULL), data, epoch, Steps(1, 1, 2, 2, 2, 1, 0.5, 0))
    assert [s.id for s in worst.samples] == ["b"]
    assert (worst.step, worst.process) == (1, 1)


def test_operations_count_padding_and_recomputation_apart(data, args, meta):
    run: Any = RunData(encoder=None, train=data, evaluation={})
    epoch = micro_batches(data, train_batches(args, run, None, 0, 1))
    planned = meta({"llm": "full", "visual_tokenizer": "none"})
    steps = Steps(2, 1, 4, 8, per_epoch=2, total=3, epochs=1.5, warmup=0)
    args.eval_strategy = "epoch"
    found = compute(args, planned, data, epoch, [data], steps, mfu=0.5, tflops=2.0)
    config = planned.base.config
    counts = [np.array(COLUMNS[name]) for name in COUNTS]
    useful = training_flops(config, *counts).sum()
    padded = [np.array([40, 40, 30, 30]), *counts[1:]]
    computed = training_flops(config, *padded).sum()
    products, attention = forward_flops(config, *padded)
    assert found.flops_per_epoch == pytest.approx(useful)
    assert found.flops == pytest.approx(1.5 * useful)
    assert found.padded == pytest.approx(1.5 * (computed - useful))
    again = products["llm"] + attention["llm"] + products["head"] + products["visual_head"]
    assert found.recomputed == pytest.approx(1.5 * again.sum())
    assert found.hours == pytest.approx(1.5 * computed / (4 * 0.5 * 2e12) / 3600)
    assert found.gpu_hours == pytest.approx(4 * found.hours)
    assert found.tokens_per_second == pytest.approx(1.5 * 100 / (found.hours * 3600))
    assert found.evaluations == 2
    forward = training_flops(config, *counts, trained=(), adapted=()).sum()
    assert found.evaluated == pytest.approx(2 * forward)


def test_frozen_towers_before_the_first_trained_part_are_not_recomputed(meta):
    counts = [np.array([100]), np.array([10]), np.array([64]), np.array([4096])]
    adapted = meta(FULL, lora_r=8)
    products, attention = forward_flops(adapted.base.config, *counts)
    again = products["llm"] + attention["llm"] + products["head"]
    assert adapted.recomputed_flops(*counts) == again
    again += products["visual_head"] + products["vit"] + attention["vit"]
    assert meta(FULL, train_modules="visual_tokenizer").recomputed_flops(*counts) == again


def test_parameters_are_counted_by_module(meta):
    found = meta(FULL, train_modules="vte:0.1|llm").parameters()
    names = {m.name: (m.parameters, m.learning_rate) for m in found.modules}
    assert names == {"vte": (256 * 128, 0.1), "llm": (found.trained - 256 * 128, 1e-3)}
    assert sum(m.share for m in found.modules) == pytest.approx(found.trained / found.total)


@pytest.mark.parametrize(
    ("keys", "steps", "epochs"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}, 10, 2.0),
        ({"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}, 10, 2.0),
        ({"eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.4}, 10, 2.0),
        ({"eval_strategy": "steps", "eval_steps": 50, "save_steps": 50}, 10, 2.0),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5}, 10, 2.0),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 11}, 10, 2.0),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, 10, 2.0),
        ({"eval_strategy": "epoch", "eval_delay": 2, "save_strategy": "epoch"}, 12, 3.0),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, 10, 2.5),
        ({"eval_strategy": "no", "save_strategy": "no"}, 10, 2.0),
        ({"save_steps": 0}, 10, 2.0),
    ],
)
def test_saves_and_evaluations_are_those_of_the_host_loop(tmp_path, keys, steps, epochs):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **keys)
    state = TrainerState(max_steps=steps)
    state.compute_steps(args, steps)
    flow, control, counted = DefaultFlowCallback(), TrainerControl(), {"save": 0, "evaluate": 0}
    per_epoch = steps / epochs

    def count() -> None:
        counted["save"] += control.should_save
        counted["evaluate"] += control.should_evaluate
        control.should_save = control.should_evaluate = False

    for step in range(1, steps + 1):
        state.global_step, state.epoch = step, step / per_epoch
        flow.on_step_end(args, state, control)
        count()
        if step % per_epoch == 0 or step == steps:
            flow.on_epoch_end(args, state, control)
            count()
    run = Steps(1, 1, 1, 1, int(per_epoch), steps, epochs, 0)
    assert {"save": saves(args, run), "evaluate": evaluations(args, run)} == counted


def test_plan_is_plain_data(plan):
    assert json.loads(json.dumps(asdict(plan)))["steps"] == asdict(plan.steps)
    assert (plan.config, plan.precision, plan.gpus) == ("quickstart", "bf16", 2)


def test_settings_are_those_that_differ_with_their_sources(tiny_ovis, tmp_path, plan):
    file = f"file {Path(PRESET).resolve()}"
    found = {s.key: s for s in plan.settings}
    assert found["seed"] == Setting("seed", 7, 42, file)
    assert found["model_path"] == Setting("model_path", str(tiny_ovis), "", "command line")
    assert found["train_sampling_strategy"] == Setting(
        "train_sampling_strategy", "group_by_length", "random", "computed"
    )
    assert not found.keys() & {"dataloader_num_workers", "report_to", "use_cpu", "thinking"}


def test_optimizer_that_is_not_known_is_told(args):
    assert uncounted(args) == list(UNCOUNTED)
    args.optim = "adafactor"
    assert uncounted(args)[2:] == [
        "what adafactor keeps in another way than adamw_torch, as which it counts"
    ]


def test_terms_of_every_engine_add_up(plan):
    for engine in plan.engines:
        assert sum(engine.terms.values()) == engine.peak
        assert engine.terms[engine.dominant] == max(engine.terms.values())
    assert [e.name for e in plan.engines if e.configured] == ["none"]
    assert [e.name for e in plan.engines] == [
        *("none", "zero0", "zero1", "zero2", "zero3"),
        *("zero2_offload", "zero3_offload", "zero3_offload_all"),
    ]


def test_own_deepspeed_file_and_what_a_run_refuses(tiny_ovis, tmp_path):
    zero = json.loads(Path("configs/zero/zero2.json").read_text("utf-8"))
    zero["zero_optimization"]["reduce_bucket_size"] = 1000
    own = tmp_path / "own.json"
    own.write_text(json.dumps(zero), "utf-8")
    keys = {"deepspeed": str(own), "load_in_4bit": True, "save_strategy": "steps"}
    keys |= {"max_steps": 7, "save_steps": 2, "save_total_limit": 1}
    found = forecast(load_config(words(tiny_ovis, tmp_path / "out", **keys)), 4, 10**6)
    by_name = {engine.name: engine for engine in found.engines}
    assert [e.name for e in found.engines if e.configured] == ["yours"]
    assert by_name["yours"].peak < by_name["zero2"].peak
    assert {e.name for e in found.engines if e.refused} == {
        "zero3",
        "zero3_offload",
        "zero3_offload_all",
    }
    assert not any(engine.fits for engine in found.engines)
    assert found.disk.saves == 4 and found.disk.kept == 1
    one = found.disk.weights + found.disk.optimizer
    assert found.disk.most == max(2 * one, one + found.disk.final)


def test_own_deepspeed_files_have_its_defaults(tiny_ovis, tmp_path):
    shipped = json.loads(Path("configs/zero/zero3.json").read_text("utf-8"))["zero_optimization"]
    own = {**shipped, "offload_optimizer": {"device": "none"}}
    assert own.pop("overlap_comm") is True
    assert own.pop("stage3_max_live_parameters") == own.pop("sub_group_size") == 10**9
    names = {"zero3": {**shipped}}
    for block, name in (
        (own, "zero3"),
        ({**own, "overlap_comm": False}, "yours"),
        ({**own, "offload_optimizer": {"device": "cpu"}}, "yours"),
    ):
        config = load_config(words(tiny_ovis, tmp_path))
        config.training["deepspeed"] = {"zero_optimization": block}
        assert configured_engine(config, names)[0] == name
    config.training["deepspeed"] = {}
    assert configured_engine(config, names) == ("none", {})


def test_arguments_are_those_of_the_gpus_and_start_nothing(tmp_path):
    flags = {"model_path": "m", "data_path": "d", "output_dir": str(tmp_path), "tf32": "true"}
    flags |= {"base_learning_rate": "1e-3", "base_batch_size": "8"}
    flags |= {"deepspeed": "configs/zero/zero3.json", "torch_dtype": "float16"}
    config = load_config([word for key, value in flags.items() for word in (f"--{key}", value)])
    before = dict(os.environ)
    args, settings = planned_arguments(config, 16)
    assert dict(os.environ) == before and not torch.distributed.is_initialized()
    assert (args.fp16, args.bf16, args.per_device_train_batch_size) == (True, False, 8)
    assert args.learning_rate == pytest.approx(4e-3)  # the root of 8 x 16 / 8
    assert (settings["tf32"], settings["deepspeed"]) == (True, "configs/zero/zero3.json")
    rates = [s for s in changed_settings(config, settings, args) if "learning_rate" in s.key]
    assert rates == [
        Setting("base_learning_rate", 1e-3, None, "command line"),
        Setting("learning_rate", args.learning_rate, 2e-5, "computed"),
    ]


def test_mix_and_packing_are_planned(tiny_ovis, tmp_path):
    keys = {"mix": {"train": 0.5}, "packing": True, "per_device_train_batch_size": 2}
    config = load_config(words(tiny_ovis, tmp_path / "out", eval_data_path="[]", **keys))
    found = forecast(config, 2, 80 * 10**9)
    [source] = found.train.sources
    assert (source.samples, source.passes, source.per_epoch) == (700, 0.5, 350)
    assert found.train.per_epoch == 350 and found.evaluation == []
    layout = found.layouts[0]
    assert (layout.name, layout.configured) == ("packing", True)
    assert 0 < layout.padding < 0.25
    assert not found.costliest.padded
    assert found.costliest.tokens <= 2 * 512
    assert found.costliest.tokens == sum(s.tokens for s in found.costliest.samples)
    assert found.steps.global_batch == 4


@pytest.mark.slow
def test_run_prints_the_steps_and_padding_that_were_planned(plan, forked):
    done, _ = forked(2, max_steps=1, save_strategy="no")
    assert done.returncode == 0, done.stderr
    layout = plan.layouts[0]
    assert f"{layout.padding:.1%} of the first epoch's batches" in done.stderr
    assert f"1 = {plan.steps.per_epoch} per epoch" in done.stderr
    assert f"{plan.parameters.trained:,} of {plan.parameters.total:,} parameters" in done.stderr
    assert f"{plan.train.tokens:,} in the data, longest sample 82" in done.stderr
    assert f"{plan.steps.global_batch} = 16 per device x 1 accumulation x 2" in done.stderr
