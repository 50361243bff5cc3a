"""Adapters that are resumed, continued, killed while they are saved, and saved over a model."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmtune.core.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PREFIX = "base_model.model."


class Run:
    def __init__(self, done, folder: Path):
        self.folder, self.code, self.told = folder, done.returncode, done.stderr

    def logged(self, key: str) -> list[float]:
        lines = (self.folder / "log.jsonl").read_text("utf-8").splitlines()
        return [entry[key] for line in lines if key in (entry := json.loads(line))]

    def adapter(self) -> dict[str, Tensor]:
        return load_file(self.folder / ADAPTER_WEIGHTS)


@pytest.fixture(scope="module")
def settings(mixed):
    """Four steps of four samples in an order of their own, saved after each, with dropout."""
    return {
        "data_path": mixed,
        "eval_data_path": mixed,
        "do_eval": "false",
        "max_steps": 4,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "lora_parts": "llm|visual_tokenizer.vit",
        "train_modules": "vte:1e-3|visual_tokenizer.head",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 1,
    }


@pytest.fixture(scope="module")
def ran(forked, settings):
    """`ran(engine, key=value)` is a finished run, done once."""
    finished: dict[tuple, Run] = {}

    def once(engine: str = "single", mode: str = "trl", code: int = 0, **keys) -> Run:
        key = (engine, mode, *map(str, keys.items()))
        if key not in finished:
            processes = 1 if engine == "single" else 2
            own = {
                "per_device_train_batch_size": 4 // processes,
                "deepspeed": None if engine in ("single", "ddp") else f"configs/zero/{engine}.json",
            }
            run = Run(*forked(processes, mode, engine, **(settings | own | keys)))
            assert run.code == code, run.told
            finished[key] = run
        return finished[key]

    return once


QLORA = {"load_in_4bit": "true", "eval_strategy": "steps", "eval_steps": 1}
ALL = {"train_modules": "visual_tokenizer|vte:1e-3", "lora_parts": "llm"}
TIED = {"train_modules": "llm.model.embed_tokens|vte", "lora_bias": "all"}


def long(*values) -> object:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("engine", "keys"),
    [
        ("single", {}),
        ("single", QLORA),
        long("single", ALL),
        long("single", TIED),
        long("single", {"use_dora": "true", "modules_to_save": "vte", "train_modules": None}),
        long("single", {"load_in_8bit": "true", "optim": "paged_adamw_8bit"}),
        long("single", {"bf16": "true"}),
        long("ddp", {}),
        long("ddp", TIED),
        long("ddp", QLORA),
        long("zero2", {}),
        long("zero2", QLORA),
        long("zero3", {}),
        long("zero3", TIED),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_resumed_run_ends_with_the_same_bits(ran, engine, keys):
    whole = ran(engine, **keys)
    resumed = ran(engine, resume_from_checkpoint=whole.folder / "checkpoint-2", **keys)
    assert resumed.logged("loss") == whole.logged("loss")[2:]
    assert resumed.logged("eval_loss") == whole.logged("eval_loss")[2:]
    ours, theirs = resumed.adapter(), whole.adapter()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    early = load_file(whole.folder / "checkpoint-2" / ADAPTER_WEIGHTS)
    assert any(not torch.equal(early[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("engine", ["single", long("ddp"), long("zero2"), long("zero3")])
def test_the_best_adapter_is_loaded_at_the_end_with_its_full_parts(ran, engine):
    keys = {
        "train_modules": "visual_tokenizer.head|vte|llm.model.embed_tokens",
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": "true",
        "greater_is_better": "true",  # losses fall, so the best is the first
        "do_eval": "true",
    }
    run = ran(engine, **keys)
    evaluations = run.logged("eval_loss")
    assert evaluations == sorted(evaluations, reverse=True) and len(evaluations) == 4
    ours = run.adapter()
    best, last = (load_file(run.folder / f"checkpoint-{i}" / ADAPTER_WEIGHTS) for i in (1, 4))
    assert ours.keys() == best.keys()
    for name, tensor in ours.items():
        assert torch.equal(best[name], tensor), name
        assert not torch.equal(last[name], tensor), name
    assert f"Evaluation: eval_loss {evaluations[0]:.4f}" in run.told


@pytest.mark.parametrize(
    ("keys", "key", "before", "now"),
    [
        ({"lora_r": 8}, "lora_r", "4", "8"),
        ({"lora_parts": "llm"}, "lora_parts", '"llm|visual_tokenizer.vit"', '"llm"'),
        ({"load_in_4bit": "true"}, "load_in_4bit", "false", "true"),
        (
            {"train_modules": "vte"},
            "train_modules",
            '"vte:1e-3|visual_tokenizer.head"',
            '"vte"',
        ),
        ({"use_lora": "false"}, "use_lora", "true", "false"),
    ],
)
def test_a_run_with_other_adapters_does_not_resume(ran, in_process, keys, key, before, now):
    checkpoint = ran().folder / "checkpoint-2"
    code, told = in_process(resume_from_checkpoint=checkpoint, **keys)
    assert code == 1
    assert (
        "ConfigError: resume_from_checkpoint:\n"
        f"  checkpoint-2 was written with {key} {before}, this run has {now}.\n"
        f"  Fix: give the same {key}" in told
    )


@pytest.fixture
def in_process(settings, tiny_ovis, tmp_path, capsys, monkeypatch):
    """`vlmtune train` in this process, for runs that are refused: exit code, error text."""
    from vlmtune.cli.main import main

    monkeypatch.chdir(ROOT)

    def run(**keys) -> tuple[int, str]:
        given = settings | {
            "model_path": tiny_ovis,
            "output_dir": tmp_path / "out",
            "report_to": "none",
            "per_device_train_batch_size": 4,
            **keys,
        }
        words = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(v))]
        code = main(["train", "configs/presets/quickstart.json", *words])
        return code, capsys.readouterr().err

    return run


# -- adapter_path ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "keys"),
    [
        ("single", {}),
        long("single", TIED),
        long("single", {"load_in_4bit": "true"}),
        long("single", {"bf16": "true"}),
        long("ddp", {}),
        long("zero2", {}),
        long("zero3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_continued_adapter_begins_where_it_was_saved(ran, engine, keys):
    # Evaluated before its first step, as often as the first run after its last.
    same = {"lora_dropout": 0, "eval_strategy": "steps", "eval_steps": 1, **keys}
    first = ran(engine, **same)
    own = {"lora_r": None, "lora_dropout": None, "lora_parts": None, "lora_bias": None}
    second = ran(
        engine,
        **(same | own),
        adapter_path=first.folder,
        eval_on_start="true",
        max_steps=2,
    )
    exact = 0.03 if "bf16" in keys else 2e-6
    assert second.logged("eval_loss")[0] == pytest.approx(first.logged("eval_loss")[-1], abs=exact)
    before, after = first.adapter(), second.adapter()
    assert after.keys() == before.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    still = {f"{PREFIX}visual_tokenizer.vit.vision_model.post_layernorm.bias"}
    assert moved == before.keys() - still
    config = json.loads((second.folder / ADAPTER_CONFIG).read_text("utf-8"))
    assert config["r"] == 4 and config["inference_mode"] is True
    rate = second.logged("learning_rate/vte")
    assert rate[0] == 1e-3


@pytest.mark.long
def test_zero_3_does_not_continue_an_adapter_with_trained_biases(ran):
    own = {"lora_r": None, "lora_dropout": None, "lora_parts": None}
    first = ran(**TIED)
    keys = own | {"train_modules": TIED["train_modules"], "adapter_path": first.folder}
    run = ran("zero3", code=1, **keys)
    assert "ConfigError: adapter_path:\n  its adapter trains biases of the model" in run.told
    assert "Fix: use configs/zero/zero2.json." in run.told


def test_an_adapter_without_a_part_that_train_modules_names_is_refused(ran, in_process):
    first = ran(train_modules="vte")
    keys = {"lora_r": None, "lora_dropout": None, "lora_parts": None}
    code, told = in_process(adapter_path=first.folder, **keys)
    assert code == 1
    assert (
        "ConfigError: adapter_path:\n  its adapter does not train visual_tokenizer.head fully.\n"
        "  Fix: leave visual_tokenizer.head out; fully trained are vte.\n" in told
    )


def test_an_adapter_as_the_model_is_refused(ran, in_process):
    code, told = in_process(model_path=ran().folder)
    assert code == 1
    assert (
        f"ModelError: model_path {ran().folder}:\n  is an adapter.\n"
        "  Fix: give its base as model_path and the adapter as adapter_path to train on, or merge "
        "it first: vlmtune merge.\n" in told
    )


@pytest.mark.parametrize("broken", ["weights gone", "truncated", "rank", "other base", "a model"])
def test_an_adapter_that_does_not_fit_the_model_is_refused_before_any_step(
    ran, in_process, tiny_ovis, tmp_path, broken
):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE):
        (folder / name).write_bytes((ran().folder / name).read_bytes())
    config, weights, file = (folder / n for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE))
    reason = {
        "weights gone": f"has no {ADAPTER_WEIGHTS}",
        "truncated": "",
        "rank": "rank",
        "other base": "fingerprint",
        "a model": f"has no {ADAPTER_CONFIG}",
    }[broken]
    if broken == "weights gone":
        weights.unlink()
    elif broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif broken == "rank":
        config.write_text(config.read_text("utf-8").replace('"r": 4', '"r": 8'), "utf-8")
    elif broken == "other base":
        run = json.loads(file.read_text("utf-8"))
        run["base"]["fingerprint"] = "sha256:" + "0" * 64
        file.write_text(json.dumps(run), "utf-8")
    else:
        config.unlink()
        (folder / "config.json").write_text("{}", "utf-8")
    keys = {"lora_r": None, "lora_dropout": None, "lora_parts": None}
    code, told = in_process(adapter_path=folder, **keys)
    assert code == 1
    assert "ModelError: " in told and str(folder) in told and reason in told
    assert "Traceback" not in told
    assert not (tmp_path / "out" / "log.jsonl").exists()


# -- saving ----------------------------------------------------------------------------------------

HALF_A_SAVE = """
import os, signal
import vlmtune.sft.output as output
describe = output.describe_run
def stuck(trainer, config, facts, folder):
    describe(trainer, config, facts, folder)
    if folder.name == ".partial":
        os.kill(os.getpid(), signal.SIGSTOP)
output.describe_run = stuck
"""


def test_a_kill_inside_the_save_leaves_no_adapter(ranks, settings, tiny_ovis, tmp_path):
    folder = tmp_path / "out"
    given = settings | {"model_path": tiny_ovis, "output_dir": folder, "report_to": "none"}
    given |= {"max_steps": 1, "save_strategy": "no", "eval_data_path": "[]"}
    words = [w for key, value in given.items() for w in (f"--{key}", str(value))]
    run = ranks(["train", "configs/presets/quickstart.json", *words], folder, 1, HALF_A_SAVE)
    saving = psutil.Process(run.processes[0].pid)
    run.wait_for(lambda: saving.status() == psutil.STATUS_STOPPED)
    run.signal(signal.SIGKILL)
    assert run.codes() == [-signal.SIGKILL]
    assert (folder / ".partial" / ADAPTER_CONFIG).exists()
    assert not {ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE} & {f.name for f in folder.iterdir()}


def test_an_adapter_and_a_model_take_each_other_s_place_whole(ranks, settings, tiny_ovis, tmp_path):
    folder = tmp_path / "out"

    def train(**keys) -> tuple[int, str]:
        given = settings | {"model_path": tiny_ovis, "output_dir": folder, "report_to": "none"}
        given |= {"max_steps": 1, "save_strategy": "no", "eval_data_path": "[]", **keys}
        words = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(v))]
        run = ranks(["train", "configs/presets/quickstart.json", *words], folder)
        [code] = run.codes()
        return code, run.told.read_text("utf-8")

    model = {"lora_r": None, "lora_dropout": None, "lora_parts": None, "train_modules": "vte"}
    weights = {"model.safetensors", "config.json"}
    adapter = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}

    def found() -> set[str]:
        return {f.name for f in folder.iterdir()} & (weights | adapter)

    assert train()[0] == 0 and found() == adapter
    code, told = train(overwrite_output_dir="false", **model)
    assert code == 1 and "already holds a finished model or adapter" in told
    assert found() == adapter
    assert train(overwrite_output_dir="true", **model)[0] == 0
    assert found() == weights
    code, told = train(overwrite_output_dir="false")
    assert code == 1 and "already holds a finished model or adapter" in told
    assert train(overwrite_output_dir="true")[0] == 0
    assert found() == adapter


def test_a_continued_adapter_is_resumed_to_the_same_bits(ran):
    own = {"lora_r": None, "lora_dropout": None, "lora_parts": None}
    keys = own | {"adapter_path": ran("single").folder, "learning_rate": 2e-3}
    whole = ran("single", **keys)
    resumed = ran("single", resume_from_checkpoint=whole.folder / "checkpoint-2", **keys)
    ours, theirs = resumed.adapter(), whole.adapter()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_biases_are_not_trained_on_over_quantised_layers(ran):
    own = {"lora_r": None, "lora_dropout": None, "lora_parts": None}
    keys = {"train_modules": TIED["train_modules"], "adapter_path": ran(**TIED).folder}
    run = ran(code=1, load_in_4bit="true", **(own | keys))
    assert "its adapter trains biases of the model, which bitsandbytes rounds" in run.told
