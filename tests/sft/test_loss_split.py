"""The same samples give the same gradient, however they are split over rows, steps and ranks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from vlmtune.collators.padded import PaddedCollator
from vlmtune.configs.load import load_config
from vlmtune.core.errors import DataError
from vlmtune.models.loading import load_processor
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.batches import train_batches
from vlmtune.sft.data import load_data
from vlmtune.sft.modules import apply_train_modules
from vlmtune.sft.train import load_model
from vlmtune.sft.trainer import make_trainer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PARTS = ("llm", "visual_tokenizer.vit", "visual_tokenizer.head", "vte")
Gradient = dict[str, Tensor]
KEYS = {
    "image_folder": str(ROOT / "sample_data/images"),
    "dataloader_shuffle": "false",
    "max_steps": "1",
    "optim": "sgd",
    "max_grad_norm": "0",
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """Four samples with an image and four without, with answers of 1 to 12 words; samples 4 and 5
    make a micro-batch without an image."""
    words = [1, 12, 3, 7, 2, 9, 5, 4]
    records = []
    for i, length in enumerate(words):
        image = i in (0, 2, 3, 6)
        question = "<image>\nWhich digit is this?" if image else f"Count to {length}."
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": " ".join(map(str, range(length)))},
        ]
        record: dict[str, Any] = {"id": str(i), "conversations": turns}
        records.append(record | ({"image": f"digit_000{i}.png"} if image else {}))
    file = tmp_path_factory.mktemp("eight") / "eight.json"
    file.write_text(json.dumps(records), "utf-8")
    return file


@pytest.fixture
def prepared(tiny_ovis, eight, tmp_path):
    """`prepared(key=value)` is a run on the eight samples up to its trainer, as `sft.train` makes
    it, whose optimizer is stepped with the gradients in `.gradients`."""

    def make(mode: str = "trl", **keys) -> SimpleNamespace:
        given = {"model_path": tiny_ovis, "data_path": eight, "output_dir": tmp_path} | KEYS | keys
        given |= {"trainer": mode, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        given |= {"gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no"}
        given |= {"single_image_min_pixels": 4096, "single_image_max_pixels": 4096}
        config = load_config([w for k, v in given.items() for w in (f"--{k}", str(v))])
        args = training_arguments(config)
        data = load_data(config, args, load_processor(str(tiny_ovis)))
        model = load_model(config, "float32")
        modules = apply_train_modules(model, config.model, args.learning_rate)
        taken = GradientsOfSteps()
        batches = train_batches(args, data, None, rank=0, world=1)
        trainer = make_trainer(config, model, args, data, batches, modules, [taken], {})
        return SimpleNamespace(trainer=trainer, model=model, data=data, steps=taken.steps)

    return make


class GradientsOfSteps(TrainerCallback):
    def __init__(self):
        self.steps: list[Gradient] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parameters = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in parameters if p.grad is not None})


def by_hand(run: SimpleNamespace, samples: Sequence[int]) -> tuple[float, Gradient]:
    """Loss and gradient of the samples' trained tokens, one sample at a time, without a trainer."""
    collator, rows = PaddedCollator(run.data.encoder), run.data.train.dataset
    model = run.model
    model.train()
    model.zero_grad()
    total = sum(rows[i]["trained_tokens"] for i in samples)
    loss = torch.zeros(())
    for i in samples:
        batch = collator([rows[i]])
        labels = batch.pop("labels")
        batch.pop("sample_ids")
        if "pixel_values" in batch:
            normalise = run.data.encoder.processor.image_processor.normalise
            batch["pixel_values"] = normalise(batch["pixel_values"])
        logits = model(**batch).logits
        part = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / total
        part.backward()
        loss += part.detach()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradient


def assert_same(found: Gradient, expected: Gradient) -> None:
    """Of each part of the model, within 1e-5 of its gradient's norm."""
    for part in PARTS:
        names = [name for name in expected if name.startswith(f"{part}.")]
        difference = torch.cat([(found[n] - expected[n]).flatten() for n in names])
        norm = torch.cat([expected[n].flatten() for n in names]).norm()
        assert norm > 0, part
        assert difference.norm() <= 1e-5 * norm, part


def losses_of(run: SimpleNamespace) -> list[float]:
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("mode", ["trl", "standard"])
def test_rows_and_accumulation_give_one_gradient(prepared, mode):
    expected = None
    for batch, steps in ((8, 1), (1, 8), (4, 2), (2, 4)):
        run = prepared(mode, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        expected = expected or by_hand(run, range(8))
        run.trainer.train()
        assert len(set(run.data.train.dataset["trained_tokens"])) > 5
        [gradient] = run.steps
        assert_same(gradient, expected[1])
        assert losses_of(run) == [pytest.approx(expected[0], rel=1e-5)]


def without_labels(run: SimpleNamespace, emptied: Callable[[str], bool]) -> None:
    """Take the labels of the samples for which `emptied(id)` holds."""
    collator = run.trainer.data_collator

    def collate(rows):
        batch = collator(rows)
        for row, labels in zip(rows, batch["labels"], strict=True):
            if emptied(row["id"]):
                labels.fill_(-100)
        return batch

    run.trainer.data_collator = collate


@pytest.mark.parametrize("mode", ["trl", "standard"])
@pytest.mark.parametrize(("batch", "steps"), [(1, 8), (2, 4)])
def test_a_micro_batch_without_trained_tokens_contributes_zero(prepared, mode, batch, steps):
    run = prepared(mode, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    without_labels(run, lambda sample: sample in "045")  # 4 and 5 are one micro-batch of two
    expected = by_hand(run, [1, 2, 3, 6, 7])
    run.trainer.train()
    [gradient] = run.steps
    assert_same(gradient, expected[1])
    assert losses_of(run) == [pytest.approx(expected[0], rel=1e-5)]


@pytest.mark.parametrize("mode", ["trl", "standard"])
def test_a_whole_step_without_trained_tokens_is_zero_and_not_nan(prepared, mode):
    run = prepared(mode, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    without_labels(run, lambda sample: True)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.trainer.train()
    [gradient] = run.steps
    assert gradient.keys() >= {"vte.weight", "llm.model.norm.weight"}
    assert all((g == 0).all() for g in gradient.values())
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())
    assert losses_of(run) == [0.0]


def test_empty_micro_batches_in_a_row_stop_the_run_and_are_named(prepared):
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run = prepared(**keys, max_empty_batches=2)
    without_labels(run, lambda sample: sample in "2345")
    with pytest.raises(DataError) as error:
        run.trainer.train()
    assert error.value.where == "rank 0, step 1, samples 4, 5"
    assert error.value.what == "2 micro-batches in a row have no token to learn from"
    assert run.steps == []


def test_empty_micro_batches_between_others_do_not_stop_the_run(prepared):
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run = prepared(**keys, max_empty_batches=2)
    without_labels(run, lambda sample: sample in "2367")
    run.trainer.train()
    assert len(run.steps) == 1


@pytest.mark.parametrize(
    ("mode", "batch", "steps"),
    [("trl", 4, 1), pytest.param("standard", 2, 2, marks=pytest.mark.long)],
)
def test_two_ranks_give_the_gradient_of_one(prepared, forked, tiny_ovis, eight, mode, batch, steps):
    # Plain gradient descent at this rate: the weights move by 1024 times the gradient, so that
    # their own rounding is lost in it.
    done, folder = forked(
        2,
        mode,
        **KEYS,
        data_path=eight,
        learning_rate=1024,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
    )
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f / "model.safetensors") for f in (tiny_ovis, folder))
    _, expected = by_hand(prepared(), range(8))
    assert_same({name: (before[name] - after[name]) / 1024 for name in before}, expected)
