"""Two real processes under DDP and every ZeRO stage: the same losses, gradients, rates, files and
resumed weights; rank 0 sees images only, rank 1 text only. The first run of DDP and of ZeRO 1, 2
and 3 is one of scripts/train_launch.sh, under torchrun."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmtune.models import Ovis2_5

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STAGES = ("zero0", "zero1", "zero2", "zero3")
LAUNCHED = ("ddp", "zero1", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload", "zero3_offload_all")
RATES = {"vte": 1e-3, "llm": 1e-4}


def long(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


@dataclass
class Run:
    folder: Path
    stderr: str
    losses: list[float]

    @property
    def gradients(self) -> dict[str, float]:
        """The printed table: module -> norm."""
        table = self.stderr.partition("averaged and clipped:")[2].splitlines()[2:]
        rows = [re.fullmatch(r"  (\S+) +(\d\.\d{3}e[+-]\d\d)", line) for line in table[:3]]
        return {row[1]: float(row[2]) for row in rows if row}

    def weights(self, checkpoint: int | None = None) -> dict[str, Tensor]:
        """Of a checkpoint, or as saved at the end."""
        name = f"checkpoint-{checkpoint}" if checkpoint else "."
        return load_file(self.folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def ran(launch, forked, mixed):
    """`ran(engine, key=value)` is a finished run of three steps of four samples, done once."""
    finished: dict[tuple, Run] = {}

    def once(engine: str, mode: str = "trl", **keys) -> Run:
        key = (engine, mode, *map(str, keys.items()))
        if key not in finished:
            processes = 1 if engine == "single" else 2
            settings = {
                "data_path": mixed,
                "max_steps": 3,
                "dataloader_shuffle": "false",
                "train_modules": "vte:1e-3|llm:1e-4|visual_tokenizer",
                "learning_rate": 1e-5,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": 2 // processes,
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 1,
                "deepspeed": None if engine in ("single", "ddp") else f"configs/zero/{engine}.json",
            }
            first = engine in LAUNCHED and mode == "trl" and not keys
            train = launch if first else forked
            done, folder = train(processes, mode, name=engine, **(settings | keys))
            assert done.returncode == 0, done.stderr
            finished[key] = Run(folder, done.stderr, losses_of(folder))
        return finished[key]

    return once


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]


def largest_moves(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Of each part of the model, the largest change of a weight."""
    return {
        part: max((before[n] - after[n]).abs().max().item() for n in before if n.startswith(part))
        for part in RATES
    }


@pytest.mark.parametrize("engine", ["single", *STAGES, *long(*OFFLOADED)])
def test_losses_are_those_of_ddp(ran, engine):
    found, expected = ran(engine).losses, ran("ddp").losses
    assert len(expected) == 3
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("engine", ["single", *STAGES, *long(*OFFLOADED)])
def test_gradients_of_modules_are_those_of_ddp(ran, engine):
    found, expected = ran(engine).gradients, ran("ddp").gradients
    assert expected.keys() == {"vte", "llm", "visual_tokenizer"}
    assert min(expected.values()) > 0
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("engine", ["single", "ddp", *STAGES, *long(*OFFLOADED)])
def test_modules_move_at_their_rates_in_one_step(ran, engine, tiny_ovis):
    # The first step of AdamW moves a weight by its rate, whatever the size of its gradient.
    before = load_file(tiny_ovis / "model.safetensors")
    moves = largest_moves(before, ran(engine).weights(checkpoint=1))
    assert moves == pytest.approx(RATES, rel=0.01)
    assert moves["vte"] / moves["llm"] == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("engine", [*STAGES, *long(*OFFLOADED)])
def test_one_consolidated_model_reloads_with_the_weights_of_ddp(ran, engine, tiny_ovis):
    run, expected = ran(engine), ran("ddp").weights()
    published = load_file(tiny_ovis / "model.safetensors").keys()
    assert run.weights().keys() == run.weights(checkpoint=2).keys() == published
    assert [file.name for file in run.folder.glob("*.safetensors")] == ["model.safetensors"]
    model = Ovis2_5.from_pretrained(run.folder)
    reloaded = model.state_dict()
    for name, tensor in expected.items():
        assert (reloaded[name] - tensor).abs().max() <= 1e-5, name


@pytest.mark.parametrize("engine", [*long("zero0", "zero1", "zero2"), "zero3"])
def test_resumed_run_ends_with_the_same_bits(ran, engine):
    whole = ran(engine)
    resumed = ran(engine, resume_from_checkpoint=whole.folder / "checkpoint-2")
    assert resumed.losses == whole.losses[2:]
    ours = resumed.weights()
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.long
@pytest.mark.parametrize("engine", OFFLOADED)
def test_resumed_offloaded_run_ends_with_the_same_weights(ran, engine):
    # Not the same bits: DeepSpeed's CPU Adam multiplies the bias correction on from step to step,
    # and takes a power after a resume (cpu_adam.h of 0.19.8, IncrementStep).
    whole = ran(engine)
    resumed = ran(engine, resume_from_checkpoint=whole.folder / "checkpoint-2")
    assert resumed.losses == whole.losses[2:]
    ours = resumed.weights()
    for name, tensor in whole.weights().items():
        assert (tensor - ours[name]).abs().max() <= 1e-6, name


@pytest.mark.long
@pytest.mark.parametrize("engine", STAGES)
def test_the_standard_trainer_does_the_same(ran, engine):
    found, expected = ran(engine, "standard"), ran("ddp")
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.gradients == pytest.approx(expected.gradients, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("engine", STAGES)
def test_a_frozen_vision_tower_changes_nothing_of_that(ran, engine, tiny_ovis):
    keys = {"freeze_vision_tower": "true"}
    found, expected = ran(engine, **keys), ran("ddp", **keys)
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.gradients == pytest.approx(expected.gradients, rel=1e-3)
    before, after = load_file(tiny_ovis / "model.safetensors"), found.weights()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("visual_tokenizer.vit.")}


@pytest.mark.long
@pytest.mark.parametrize("engine", STAGES)
def test_one_micro_batch_a_step(ran, engine):
    keys = {"gradient_accumulation_steps": 1}
    found, expected = ran(engine, **keys), ran("ddp", **keys)
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.gradients == pytest.approx(expected.gradients, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", *STAGES])
def test_bf16_runs_and_stays_near_the_losses_of_fp32(ran, engine):
    run, exact = ran(engine, bf16="true"), ran("ddp")
    assert run.losses == pytest.approx(exact.losses, abs=0.02)
    assert run.losses != exact.losses
    assert run.gradients == pytest.approx(exact.gradients, rel=0.02)
    # Under ZeRO the model itself is in bfloat16, and float32 only in the optimizer's state.
    saved = torch.float32 if engine == "ddp" else torch.bfloat16
    assert {tensor.dtype for tensor in run.weights().values()} == {saved}


@pytest.mark.long
@pytest.mark.parametrize("engine", STAGES)
def test_bf16_resumes_with_the_same_bits(ran, engine):
    whole = ran(engine, bf16="true")
    resumed = ran(engine, bf16="true", resume_from_checkpoint=whole.folder / "checkpoint-2")
    assert resumed.losses == whole.losses[2:]
    ours = resumed.weights()
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, ours[name]), name
