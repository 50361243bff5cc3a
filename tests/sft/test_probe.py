"""`--probe`: the costliest micro-batch first, and then a run of the same bits as without it."""

import copy
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError, TrainingError
from vlmtune.data.packing import Groups
from vlmtune.models.loading import load_processor
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.batches import EpochBatches, train_batches
from vlmtune.sft.data import load_data
from vlmtune.sft.modules import apply_train_modules
from vlmtune.sft.probe import computed_tokens, costliest, states_to_come
from vlmtune.sft.train import load_model
from vlmtune.sft.trainer import make_trainer

ROOT = Path(__file__).parents[2]

MEASURED = {
    "tokens_per_second",
    "samples_per_second",
    "data_wait_share",
    "peak_memory_gib",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}
"""Keys of the log that no two runs have the same."""


def groups(*lists: list[int]) -> Groups:
    sizes = np.array([len(indices) for indices in lists])
    return Groups(np.concatenate(lists), np.cumsum(sizes) - sizes)


def test_padding_counts_as_it_is_computed():
    lengths = np.array([5, 9, 2, 2])
    batches = groups([0, 1], [2, 3], [1])
    assert computed_tokens(batches, lengths, padded=True).tolist() == [18, 4, 9]
    assert computed_tokens(batches, lengths, padded=False).tolist() == [14, 4, 9]


@pytest.mark.parametrize(
    ("rank", "done", "last", "expected"),
    [
        pytest.param(0, 0, 9, 4, id="own"),
        pytest.param(1, 0, 9, 3, id="own-of-the-other"),
        pytest.param(0, 0, 2, 0, id="steps-that-are-run"),
        pytest.param(0, 1, 2, 2, id="steps-that-are-left"),
    ],
)
def test_a_process_takes_its_own_costliest(rank, done, last, expected):
    kept = np.array([5, 1, 4, 2, 7])
    batches = EpochBatches(lambda epoch: groups(*[[i] for i in range(5)]), 5, 5, rank, 2)
    assert costliest(kept, batches, done, last) == expected


def test_a_process_without_a_batch_takes_what_fills_its_step():
    batches = EpochBatches(lambda epoch: groups([0], [1]), 2, 2, 2, 4)
    assert costliest(np.array([1, 2]), batches, 0, 9) == 1


def test_a_batch_that_is_dropped_does_not_count():
    batches = EpochBatches(lambda epoch: groups([0], [1], [2]), 3, 3, 0, 2, drop=True)
    assert costliest(np.array([1, 2, 9]), batches, 0, 9) == 0


@pytest.fixture
def words(tiny_ovis, mixed, tmp_path):
    """`words(key=value)` are those of the command line, without `vlmtune train`."""

    def settings(**keys) -> list[str]:
        given = {
            "model_path": tiny_ovis,
            "data_path": mixed,
            "image_folder": ROOT / "sample_data/images",
            "output_dir": tmp_path / "out",
            "single_image_max_pixels": 4096,
            "single_image_min_pixels": 4096,
            "per_device_train_batch_size": 3,
            "max_steps": 1,
            "use_cpu": "true",
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": "false",
            "dataloader_num_workers": 0,
            "probe": "true",
            **keys,
        }
        return [word for key, value in given.items() for word in (f"--{key}", str(value))]

    return settings


class Witness(TrainerCallback):
    """What stands before the first step."""

    def __init__(self):
        self.seen: dict[str, Any] = {}
        self.trainer: Any = None

    def on_train_begin(self, args, state, control, model, **kwargs):
        trainer, of_numpy = self.trainer, np.random.get_state(legacy=False)["state"]
        self.seen = {
            "python": random.getstate(),
            "numpy": (of_numpy["key"].tolist(), of_numpy["pos"]),
            "torch": torch.get_rng_state().tolist(),
            "cuda": [generator.tolist() for generator in torch.cuda.get_rng_state_all()],
            "modes": [module.training for module in model.modules()],
            "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
            "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
            "synchronised": trainer.accelerator.sync_gradients,
            "counted": copy.deepcopy([vars(trainer).get("_metrics"), trainer.speed]),
            "tokens": vars(trainer).get("_total_train_tokens"),
            "looked": trainer.gradients.saw_image,
            "empty": trainer._empty_batches,
        }


@pytest.fixture
def prepared(words):
    """`prepared(mode, key=value)` is a run up to its trainer, as `sft.train` makes it, with a
    witness before the probe and one behind it."""

    def make(mode: str = "trl", **keys) -> SimpleNamespace:
        config = load_config(words(trainer=mode, **keys))
        args = training_arguments(config)
        data = load_data(config, args, load_processor(config.model.model_path))
        model = load_model(config, "float32")
        modules = apply_train_modules(model, config.model, args.learning_rate)
        batches = train_batches(args, data, None, rank=0, world=1)
        before, behind = Witness(), Witness()
        trainer = make_trainer(config, model, args, data, batches, modules, [before], {})
        trainer.add_callback(behind)
        before.trainer = behind.trainer = trainer
        return SimpleNamespace(trainer=trainer, model=model, before=before, behind=behind)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["trl", "standard"])
def test_what_stands_before_the_first_step_is_as_it_was(prepared, mode, capsys):
    made = prepared(mode, gradient_accumulation_steps=2)
    drawn = []
    # As a dropout of every kind would.
    made.model.register_forward_hook(
        lambda *_: drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    )
    made.trainer.train()
    assert "Probe: step 1, " in capsys.readouterr().err
    assert len(drawn) == 2 + 2
    before, behind = made.before.seen, made.behind.seen
    assert before["synchronised"] and before["gradients"] == []
    weights = before.pop("weights"), behind.pop("weights")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert behind == before


@pytest.mark.slow
def test_the_states_to_come_are_those_that_come(prepared):
    made = prepared()
    expected = []
    made.trainer.add_callback(First(lambda: expected.append(states_to_come(made.trainer))))
    made.trainer.train()
    states = made.trainer.optimizer.state.values()
    kept = sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
    assert expected == [kept]
    assert states_to_come(made.trainer) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_states_are_held_and_all_is_given_back(prepared, capsys):
    made = prepared(use_cpu="false", attn_implementation="sdpa")
    made.model.register_forward_hook(lambda *_: torch.rand(1, device="cuda"))
    made.trainer.train()
    line = re.search(
        r"Probe: step 1, .+ s, peak (\d+\.\d\d) GiB, (\d+\.\d\d) GiB of it held for the "
        r"optimizer's states, (\d+\.\d\d) GiB reserved of (\d+\.\d\d) GiB\n",
        capsys.readouterr().err,
    )
    assert line
    peak, held, reserved, whole = map(float, line.groups())
    assert held <= peak <= reserved < whole
    before, behind = made.before.seen, made.behind.seen
    weights = before.pop("weights"), behind.pop("weights")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(before["cuda"]) == torch.cuda.device_count()
    assert behind == before


class First(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self.action()


@pytest.mark.slow
def test_out_of_memory_names_the_batch_and_what_to_lower(prepared):
    made = prepared(train_sampling_strategy="sequential", max_steps=6)
    made.model.register_forward_hook(lambda *_: torch.empty(2**58))
    with pytest.raises(TrainingError) as caught:
        made.trainer.train()
    assert re.fullmatch(
        r"probe before the first step, rank 0, step [1-6], samples digit-\S+, \S+, \S+ "
        r"\(3 x \d+ tokens, (8,192|4,096) pixels\)",
        caught.value.where,
    )
    assert caught.value.what.startswith("out of memory: ")
    assert caught.value.fix.startswith("halve per_device_train_batch_size and double gradient_acc")


def test_a_stream_is_refused(words):
    with pytest.raises(ConfigError) as caught:
        load_config(words(streaming="true"))
    assert caught.value.where == "command line, probe"


def logged(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in entries]


def assert_same_weights(probed: Path, whole: Path) -> None:
    name = next(whole.glob("*.safetensors")).name
    ours, theirs = load_file(probed / name), load_file(whole / name)
    assert ours.keys() == theirs.keys()
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []


PACKED = {"packing": "true", "packing_length": 200, "per_device_train_batch_size": 1}
LORA = {"lora_r": 4, "lora_dropout": 0.5, "lora_parts": "llm|visual_tokenizer.vit"}
TWICE = {"gradient_accumulation_steps": 2}
HALF = {"bf16": "true"}
STAGES = ("zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload", "zero3_offload_all")


@pytest.fixture(scope="module")
def ran(forked, mixed, tmp_path_factory):
    """`ran(processes, mode, key=value)` runs three steps and is the folder and what was told;
    `deepspeed` names a shipped file, with "+fp32" for gradients that are added up in float32, for
    which DeepSpeed has buffers of their own."""
    room = tmp_path_factory.mktemp("zero")

    def once(processes: int, mode: str, **keys) -> tuple[Path, str]:
        settings = {
            "data_path": mixed,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 2,
            **keys,
        }
        if "deepspeed" in keys:
            name, _, dtype = keys["deepspeed"].partition("+")
            zero = json.loads((ROOT / f"configs/zero/{name}.json").read_text("utf-8"))
            zero |= {"data_types": {"grad_accum_dtype": dtype}} if dtype else {}
            settings["deepspeed"] = room / f"{keys['deepspeed']}.json"
            settings["deepspeed"].write_text(json.dumps(zero), "utf-8")
        done, folder = forked(processes, mode, **settings)
        assert done.returncode == 0, done.stderr
        return folder, done.stderr

    return once


def long(*values, id: str):
    return pytest.param(*values, id=id, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mode", "keys"),
    [
        pytest.param(1, "trl", LORA | PACKED | TWICE, id="lora-packed"),
        pytest.param(2, "standard", TWICE, id="ddp"),
        pytest.param(2, "trl", TWICE | HALF | {"deepspeed": "zero2+fp32"}, id="zero2-bf16-fp32"),
        pytest.param(2, "trl", {"deepspeed": "zero3"}, id="zero3"),
        long(1, "trl", PACKED, id="packed"),
        long(2, "trl", LORA, id="ddp-lora"),
        *[long(2, "trl", {"deepspeed": z}, id=f"{z}-once") for z in STAGES[:3]],
        long(2, "trl", TWICE | HALF | {"deepspeed": "zero1+fp32"}, id="zero1-bf16-fp32"),
        *[long(2, "standard", TWICE | {"deepspeed": z}, id=f"{z}-standard") for z in STAGES],
        *[long(2, "trl", TWICE | HALF | {"deepspeed": z}, id=f"{z}-bf16") for z in STAGES],
        *[long(2, "trl", LORA | PACKED | {"deepspeed": z}, id=f"{z}-lora") for z in STAGES],
        *[long(2, "trl", TWICE | {"deepspeed": z}, id=z) for z in OFFLOADED],
        *[long(2, "trl", {"deepspeed": z}, id=f"{z}-once") for z in OFFLOADED],
    ],
)
def test_the_run_is_bit_for_bit_the_one_without(ran, processes, mode, keys):
    whole, plain = ran(processes, mode, **keys)
    probed, told = ran(processes, mode, probe="true", **keys)
    assert "Probe: " not in plain
    lines = [line for line in told.splitlines() if line.startswith("Probe: ")]
    of_rank = r"rank [01], " if processes > 1 else ""
    tokens, gib = r"\(\d+ x \d+ tokens, [\d,]+ pixels\)", r"\d+\.\d\d GiB"
    assert len(lines) == 1
    assert re.fullmatch(
        rf"Probe: {of_rank}step [1-3], samples .+ {tokens}, [\d,]+ patches: \d+\.\d\d s, "
        rf"highest RAM {gib}, {gib} above that before; the optimizer's states will add {gib}",
        lines[0],
    )
    assert logged(probed) == logged(whole)
    assert [entry["step"] for entry in logged(whole) if "loss" in entry] == [1, 2, 3]
    assert_same_weights(probed, whole)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["single", "ddp", *STAGES])
def test_a_resumed_run_may_probe(ran, losses, engine):
    keys: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, **LORA, **TWICE}
    if engine.startswith("zero"):
        keys["deepspeed"] = engine
    processes = 1 if engine == "single" else 2
    whole, _ = ran(processes, "trl", **keys)
    checkpoint = whole / "checkpoint-2"
    probed, told = ran(processes, "trl", probe="true", resume_from_checkpoint=checkpoint, **keys)
    assert "\nProbe: " in told
    assert losses(probed) == losses(whole)[2:]
    assert_same_weights(probed, whole)
