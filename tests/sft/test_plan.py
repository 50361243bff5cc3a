"""The steps the banner announces are those the trainer counts."""

import pytest
from trl.trainer.sft_config import SFTConfig

from vlmtune.sft.plan import schedule


@pytest.mark.parametrize(
    ("samples", "ranks", "keys", "expected"),
    [
        pytest.param(10, 1, {"per_device_train_batch_size": 4}, (4, 3, 9), id="last-batch-short"),
        pytest.param(
            10,
            1,
            {"per_device_train_batch_size": 4, "dataloader_drop_last": True},
            (4, 2, 6),
            id="last-batch-dropped",
        ),
        pytest.param(
            10,
            1,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            (8, 2, 6),
            id="accumulation-rounds-up",
        ),
        pytest.param(10, 2, {"per_device_train_batch_size": 2}, (4, 3, 9), id="two-ranks"),
        pytest.param(
            10, 1, {"per_device_train_batch_size": 4, "max_steps": 2}, (4, 3, 2), id="max-steps"
        ),
        pytest.param(
            10,
            1,
            {"per_device_train_batch_size": 4, "num_train_epochs": 1.5},
            (4, 3, 5),
            id="fraction-of-an-epoch",
        ),
    ],
)
def test_schedule(samples, ranks, keys, expected, monkeypatch, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **keys)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    plan = schedule(samples, args)
    assert (plan.batch, plan.per_epoch, plan.total) == expected


def test_trainer_counts_the_same_steps(tmp_path):
    from datasets import Dataset
    from transformers import Trainer

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
        trainer = Trainer(_linear(), args, train_dataset=Dataset.from_dict({"x": range(20)}))
        trainer.data_collator = _column
        trainer.train()
        assert trainer.state.max_steps == schedule(20, args).total


def _linear():
    import torch

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return {"loss": (self.w * x).pow(2).mean()}

    return Line()


def _column(rows):
    import torch

    return {"x": torch.tensor([float(row["x"]) for row in rows])}
