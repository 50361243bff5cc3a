"""Speeds of a run, from batches and a clock that the test sets, and in the logs of a run."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from vlmtune.cli.main import main
from vlmtune.sft.speed import Speed

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("vlmtune.sft.speed.time.perf_counter", clock)
    return clock


@pytest.fixture
def take():
    accelerator = Accelerator(cpu=True)
    return lambda speed: speed.take(accelerator)


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    rows = [[1] * n + [0] * (max(lengths) - n) for n in lengths]
    return {"input_ids": torch.ones_like(torch.tensor(rows)), "attention_mask": torch.tensor(rows)}


def test_values_count_tokens_without_padding_over_the_time_since_the_last(clock, take):
    speed = Speed(_started=clock.now)
    speed.count(batch(3, 5), 2)
    speed.count(batch(8), 1)
    clock.now += 4.0
    values = take(speed)
    assert values["tokens_per_second"] == 4.0  # 16 tokens in 4 s
    assert values["samples_per_second"] == 0.75
    assert values["padding_share"] == pytest.approx(1 - 16 / 18, abs=1e-4)
    assert values["data_wait_share"] == 0.0
    assert values["peak_memory_gib"] > 0

    speed.count(batch(2, 2), 2)
    clock.now += 1.0
    values = take(speed)
    assert (values["tokens_per_second"], values["samples_per_second"]) == (4.0, 2.0)
    assert values["padding_share"] == 0.0


def test_waiting_for_batches_is_a_share_of_the_time(clock, take):
    def slow():
        for i in range(2):
            clock.now += 1.5
            yield i

    speed = Speed(_started=clock.now)
    for _ in speed.timed(slow()):
        clock.now += 0.5
    assert take(speed)["data_wait_share"] == 0.75
    clock.now += 1.0
    assert take(speed)["data_wait_share"] == 0.0


def test_evaluation_and_saving_are_not_in_the_time(clock, take):
    speed = Speed(_started=clock.now)
    speed.count(batch(6), 1)
    clock.now += 2.0
    with speed.paused():
        clock.now += 50.0
    with pytest.raises(OSError), speed.paused():
        clock.now += 50.0
        raise OSError
    clock.now += 1.0
    assert take(speed)["tokens_per_second"] == 2.0
    speed.count(batch(6), 1)
    clock.now += 1.0
    assert take(speed)["tokens_per_second"] == 6.0


@pytest.fixture
def train(tiny_ovis, tmp_path, monkeypatch):
    """`train(key=value)` runs `vlmtune train` on four texts of different lengths, two a step."""
    monkeypatch.chdir(ROOT)
    texts = ["One.", "One, two, three and four.", "Yes.", "No, it is not the larger one of both."]
    turns = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": text}] for text in texts]
    records = [{"id": str(i), "conversations": turn} for i, turn in enumerate(turns)]
    data = tmp_path / "train.json"
    data.write_text(json.dumps(records), "utf-8")

    def run(**keys) -> int:
        settings = {
            "model_path": tiny_ovis,
            "data_path": data,
            "eval_data_path": data,
            "output_dir": tmp_path / "out",
            "train_modules": "llm.model.layers.1:4e-3|llm:1e-4",
            "dataloader_shuffle": "false",
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": "true",
            **keys,
        }
        flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        return main(["train", "configs/presets/quickstart.json", *flags])

    return run


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_a_run_logs_speed_padding_waiting_memory_and_the_rate_of_each_module(
    train, tmp_path, tiny_ovis
):
    assert train(report_to="tensorboard") == 0
    steps = [entry for entry in logged(tmp_path / "out") if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    # Question, empty thoughts and answer differ by the answer alone.
    tokenizer = AutoTokenizer.from_pretrained(tiny_ovis)
    records = json.loads((tmp_path / "train.json").read_text("utf-8"))
    answers = [len(tokenizer(r["conversations"][1]["value"])["input_ids"]) for r in records]
    frame = (
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_end|>"
    )
    lengths = [len(tokenizer(frame)["input_ids"]) + answer for answer in answers]
    pairs = [lengths[:2], lengths[2:]] * 2
    for entry, pair in zip(steps, pairs, strict=True):
        padding = 1 - sum(pair) / (2 * max(pair))
        assert entry["padding_share"] == pytest.approx(padding, abs=1e-4)
        rounded = {"abs": 0.01, "rel": 0.01}
        ratio = entry["tokens_per_second"] / entry["samples_per_second"]
        assert ratio == pytest.approx(sum(pair) / 2, **rounded)
        assert 0 <= entry["data_wait_share"] <= 1
        assert 0 < entry["peak_memory_gib"] < 64
    for entry in steps:
        share = (1 + math.cos(math.pi * (entry["step"] - 1) / 4)) / 2
        assert entry["learning_rate/llm.model.layers.1"] == pytest.approx(4e-3 * share, rel=1e-6)
        assert entry["learning_rate/llm"] == pytest.approx(1e-4 * share, rel=1e-6)

    [events] = (tmp_path / "out").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    # The epoch is on the lines of evaluations too.
    tags = {key for entry in steps for key in entry} - {"step", "epoch"}
    scalars = set(board.Tags()["scalars"])
    assert {f"train/{tag}" for tag in tags} | {"eval/loss"} <= scalars
    for tag in tags:
        ours = [entry[tag] for entry in steps]
        theirs = [(event.step, event.value) for event in board.Scalars(f"train/{tag}")]
        assert [step for step, _ in theirs] == [1, 2, 3, 4]
        assert [value for _, value in theirs] == pytest.approx(ours, rel=1e-6)


@pytest.mark.slow
def test_a_run_leaves_its_curve_settings_and_versions(train, tmp_path):
    assert train() == 0
    with Image.open(tmp_path / "out" / "loss.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 540))
    run = json.loads((tmp_path / "out" / "vlmtune_run.json").read_text("utf-8"))
    assert run["config"]["train_modules"] == "llm.model.layers.1:4e-3|llm:1e-4"
    assert run["step"] == 4 and run["global_batch"] == 2
    assert run["versions"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_a_config_error(train, capsys, tmp_path):
    assert train(report_to="wandb") == 1
    told = capsys.readouterr().err
    assert "ConfigError: " in told and "wandb" in told and "Fix: " in told
    assert not (tmp_path / "out" / "log.jsonl").exists()
