"""How batches reach a run where nothing is said about it: in loader processes, the same for any
number of them, of like length, and drawing nothing from the run's random numbers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmtune.cli.main import main
from vlmtune.configs.load import load_config
from vlmtune.core.distributed import usable_cores
from vlmtune.models.loading import load_processor
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.batches import train_batches
from vlmtune.sft.data import load_data
from vlmtune.sft.modules import apply_train_modules
from vlmtune.sft.rows import plan_rows
from vlmtune.sft.train import load_model
from vlmtune.sft.trainer import VLMTrainerMixin, make_trainer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PACKED = {"packing": "true", "packing_length": 256, "per_device_train_batch_size": 1}
COUNT = 64


@pytest.fixture(scope="module")
def skewed(tmp_path_factory) -> Path:
    """64 samples, every eighth with an image, with answers of 1 to 64 words, most of them short."""
    records = []
    for i in range(COUNT):
        image = i % 8 == 0
        words = (1, 2, 1, 4, 8, 64, 2, 3)[(i * 5) % 8]
        turns = [
            {"from": "human", "value": "<image>\nRead." if image else f"Count {i}."},
            {"from": "gpt", "value": " ".join(map(str, range(words)))},
        ]
        record: dict[str, Any] = {"id": str(i), "conversations": turns}
        records.append(record | ({"image": f"digit_{i:04d}.png"} if image else {}))
    file = tmp_path_factory.mktemp("skewed") / "skewed.json"
    file.write_text(json.dumps(records), "utf-8")
    return file


@pytest.fixture
def words(tiny_ovis, skewed, tmp_path, monkeypatch):
    """`words(key=value)` of the command line of an epoch on the skewed data."""
    monkeypatch.chdir(ROOT)

    def given(**keys) -> list[str]:
        settings = {
            "model_path": tiny_ovis,
            "data_path": skewed,
            "eval_data_path": skewed,
            "output_dir": tmp_path / "out",
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "disable_tqdm": "true",
            "report_to": "none",
            "use_cpu": "true",
            **keys,
        }
        return [word for key, value in settings.items() for word in (f"--{key}", str(value))]

    return given


@pytest.fixture
def trainer(words):
    """`trainer(key=value)` is the trainer of a run, as `sft.train` makes it."""

    def make(**keys) -> VLMTrainerMixin:
        config = load_config(["configs/presets/quickstart.json", *words(**keys)])
        args = training_arguments(config)
        assert config.model.model_path
        data = load_data(config, args, load_processor(config.model.model_path))
        model = load_model(config, "float32")
        modules = apply_train_modules(model, config.model, args.learning_rate)
        rows = plan_rows(config, model, data) if config.data.packing else None
        batches = train_batches(args, data, rows, rank=0, world=1)
        return make_trainer(config, model, args, data, batches, modules, [], {})

    return make


def test_loader_processes_are_started_once_and_seeded_where_nothing_is_said(trainer):
    run = trainer()
    loader, evaluation = run.get_train_dataloader(), run.get_eval_dataloader()
    assert loader.num_workers == evaluation.num_workers == max(1, min(4, usable_cores() - 1))
    assert loader.persistent_workers and not evaluation.persistent_workers
    assert loader.generator.initial_seed() == evaluation.generator.initial_seed() == 7
    assert trainer(dataloader_num_workers=0).get_train_dataloader().num_workers == 0


def test_memory_is_pinned_for_a_gpu_alone(trainer, monkeypatch):
    run, without = trainer(), trainer()
    assert run.args.dataloader_pin_memory is False  # so the host sets it on a CPU
    run.args.dataloader_pin_memory = True
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert run.get_train_dataloader().pin_memory is cuda
        assert run.get_eval_dataloader().pin_memory is cuda
        assert without.get_train_dataloader().pin_memory is False


def two_epochs(run: VLMTrainerMixin) -> list[dict[str, Any]]:
    loader, batches = run.get_train_dataloader(), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize("keys", [{}, PACKED], ids=["padded", "packed"])
def test_any_number_of_loader_processes_gives_the_same_batches(trainer, keys):
    expected = two_epochs(trainer(**keys, dataloader_num_workers=0))
    ids = [sample for batch in expected for sample in batch["sample_ids"]]
    assert ids[:COUNT] != ids[COUNT:]
    assert sorted(ids[:COUNT]) == sorted(ids[COUNT:]) == sorted(map(str, range(COUNT)))
    assert any("pixel_values" in batch for batch in expected)
    for workers in (1, 2):
        before = torch.get_rng_state()
        found = two_epochs(trainer(**keys, dataloader_num_workers=workers))
        assert torch.equal(torch.get_rng_state(), before)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                tensor = isinstance(value, Tensor)
                assert torch.equal(ours[name], value) if tensor else ours[name] == value, name


def test_an_evaluation_takes_every_sample_by_falling_length(trainer):
    batches = list(trainer(per_device_eval_batch_size=4).get_eval_dataloader())
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(dim=1).tolist()]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 3 * lengths[-1]
    ids = [sample for batch in batches for sample in batch["sample_ids"]]
    assert sorted(ids) == sorted(map(str, range(COUNT)))


def test_batches_are_of_like_length_where_nothing_is_said(words, tmp_path, capsys):
    shares = {}
    for name, keys in {
        "grouped": {},
        "random": {"train_sampling_strategy": "random"},
        "packed": PACKED,
    }.items():
        folder = tmp_path / name
        # One line of the log, for the whole epoch.
        settings = {"eval_data_path": "[]", "logging_steps": 1000, "output_dir": folder, **keys}
        settings["logging_strategy"] = "epoch"
        assert main(["train", "configs/presets/quickstart.json", *words(**settings)]) == 0
        lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
        [shares[name]] = [e["padding_share"] for e in map(json.loads, lines) if "loss" in e]
        planned = re.search(r"  padding  (\S+)% of the first", capsys.readouterr().err)
        assert bool(planned) == (name != "packed")
        if planned:
            assert float(planned[1]) == pytest.approx(100 * shares[name], abs=0.06)
    assert shares["random"] > 0.4
    assert shares["grouped"] < 0.1
    assert shares["packed"] == 0
