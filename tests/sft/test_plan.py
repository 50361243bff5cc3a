"""The steps the banner announces are those the trainer counts, and what it says of a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl.trainer.sft_config import SFTConfig

from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError
from vlmtune.data.dataset import PreparedData, Totals
from vlmtune.data.mixing import MixSampler
from vlmtune.data.packing import RowBounds
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.batches import Packing, train_batches
from vlmtune.sft.data import RunData
from vlmtune.sft.modules import TrainedModule
from vlmtune.sft.plan import banner, schedule


@pytest.mark.parametrize(
    ("samples", "ranks", "keys", "expected"),
    [
        pytest.param(10, 1, {"per_device_train_batch_size": 4}, (3, 9), id="last-batch-short"),
        pytest.param(
            10,
            1,
            {"per_device_train_batch_size": 4, "dataloader_drop_last": True},
            (2, 6),
            id="last-batch-dropped",
        ),
        pytest.param(
            10,
            1,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            (2, 6),
            id="accumulation-rounds-up",
        ),
        pytest.param(10, 2, {"per_device_train_batch_size": 2}, (3, 9), id="two-ranks"),
        pytest.param(
            10, 1, {"per_device_train_batch_size": 4, "max_steps": 2}, (3, 2), id="max-steps"
        ),
        pytest.param(
            10,
            1,
            {"per_device_train_batch_size": 4, "num_train_epochs": 1.5},
            (3, 5),
            id="fraction-of-an-epoch",
        ),
    ],
)
def test_schedule(samples, ranks, keys, expected, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **keys)
    plan = schedule(train_batches(args, run_data(samples), None, 0, ranks), args)
    assert (plan.per_epoch, plan.total) == expected


def test_an_epoch_without_a_batch_is_refused(tmp_path):
    keys = {"per_device_train_batch_size": 4, "dataloader_drop_last": True}
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **keys)
    with pytest.raises(ConfigError) as error:
        schedule(train_batches(args, run_data(7), None, 0, 2), args)
    assert str(error.value) == (
        "dataloader_drop_last:\n"
        "  drops everything: 7 samples fill no batch of 4 on 2 processes.\n"
        "  Fix: lower per_device_train_batch_size, or leave dataloader_drop_last out."
    )


def test_trainer_counts_the_same_steps(tmp_path):
    for keys in ({"gradient_accumulation_steps": 4}, {"num_train_epochs": 1.5}, {}):
        args = SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=3,
            report_to="none",
            remove_unused_columns=False,
            **keys,
        )
        trainer = Trainer(Line(), args, train_dataset=Dataset.from_dict({"x": range(20)}))
        trainer.data_collator = _column
        trainer.train()
        batches = train_batches(args, run_data(20), None, 0, 1)
        assert trainer.state.max_steps == schedule(batches, args).total


class Line(torch.nn.Module):
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))
        self.frozen = torch.nn.Parameter(torch.ones(1999), requires_grad=False)

    def forward(self, x):
        return {"loss": (self.w * x).pow(2).mean()}


def _column(rows):
    return {"x": torch.tensor([float(row["x"]) for row in rows])}


def prepared(size: int, *left_out: dict[str, Any]) -> PreparedData:
    totals = Totals([size], tokens=20_000, trained_tokens=2_500, longest=1_234)
    columns = {"length": [10, 30] * (size // 2) + [10] * (size % 2), "patches": [0] * size}
    return PreparedData(Dataset.from_dict(columns), [*left_out], totals)


def run_data(size: int, **parts) -> RunData:
    encoder: Any = None
    return RunData(encoder, prepared(size), {}, **parts)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """`told(data, key=value)` is the banner of a run of `Line` with those keys."""
    monkeypatch.chdir(tmp_path)

    def tell(data: RunData, packing: Packing | None = None, world: int = 1, **keys) -> list[str]:
        given = {"model_path": "m", "data_path": "d", "output_dir": "out", "use_cpu": True} | keys
        config = load_config([word for k, v in given.items() for word in (f"--{k}", str(v))])
        model: Any = Line()
        modules = [TrainedModule("w", 2e-5, {"w": model.w})]
        args = training_arguments(config)
        batches = None if data.stream else train_batches(args, data, packing, 0, world)
        return banner(config, args, model, modules, data, batches).splitlines()

    return tell


def test_banner_of_a_run(told):
    encoder: Any = None
    data = RunData(encoder, prepared(1000, {}), {"a": prepared(3), "b": prepared(4, {}, {})})
    keys = {"base_learning_rate": 1e-5, "base_batch_size": 8}
    keys |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    assert told(data, **keys, num_train_epochs=1.5) == [
        "  model    m (Line, torch.float32)",
        "  trained  1 of 2,000 parameters (0.1%)",
        "  samples  1,000 train, 7 eval, 3 left out (bad_samples.jsonl)",
        "  tokens   20,000 in the data, longest sample 1,234, 12.5% trained",
        # Two batches of 8 have both lengths, 10 and 30: one step's, and what fills no step.
        "  padding  1.2% of the first epoch's batches",
        "  steps    48 = 32 per epoch, 1.50 epochs",
        "  batch    32 = 8 per device x 4 accumulation x 1 processes",
        "  trainer  trl, learning rate 2e-05 = 1e-05 x sqrt(32 / 8), fp32 on cpu",
        f"  output   {Path('out').resolve()}",
        "  module  parameters  learning rate    dtype",
        "  w                1          2e-05  float32",
    ]


def test_banner_of_a_mixed_epoch_counts_what_is_drawn(told):
    data = run_data(1000, sampler=MixSampler([200, 800], [0, 0.4], seed=0))
    lines = told(data, per_device_train_batch_size=32, learning_rate=3e-4, trainer="standard")
    assert "  samples  320 train, 0 eval" in lines
    assert "  steps    30 = 10 per epoch, 3.00 epochs" in lines
    assert "  trainer  standard, learning rate 0.0003, fp32 on cpu" in lines


def test_banner_tells_the_padding_of_the_first_epoch(told):
    keys = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    # Each batch has 10 and 30 tokens: 20 of 60 are padding.
    assert "  padding  33.3% of the first epoch's batches" in told(run_data(100), **keys)


def test_banner_of_packed_rows(told):
    packing = Packing(RowBounds(80), np.array([1.0, 3.0] * 50))
    lines = told(run_data(100), packing, per_device_train_batch_size=2)
    # 50 x 30 in rows of two with two of 10, 25 rows.
    assert "  rows     25 of 80 tokens, 100.0% filled, 4.0 samples each" in lines
    assert "  steps    39 = 13 per epoch, 3.00 epochs" in lines
    lines = told(run_data(100), packing, world=2, per_device_train_batch_size=1)
    start = "  rows     25 of 80 tokens, 100.0% filled, 4.0 samples each, processes balanced to 1."
    assert [line for line in lines if line.startswith(start)]


def test_banner_of_a_stream_knows_its_steps_alone(told):
    encoder: Any = None
    stream: Any = SimpleNamespace()
    data = RunData(encoder, None, {"": prepared(3)}, stream=stream)
    lines = told(data, max_steps=5000, streaming=True, bf16=True)
    assert lines[2:4] == ["  samples  a stream, 3 eval", "  steps    5,000"]
    assert lines[5].endswith("bf16 on cpu")
