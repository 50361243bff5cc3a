"""Real packed runs: the losses, gradients, metrics and files of padded ones, each sample once an
epoch, on one process and two, with adapters, resumed, and refused where they would be wrong."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmtune.collators.sample
from vlmtune.cli.main import main
from vlmtune.core.checkpoints import ADAPTER_WEIGHTS
from vlmtune.sft import isolation
from vlmtune.sft.trainer import VLMTrainerMixin

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WATCHED = ("training_step", "prediction_step")
PARTS = ("llm", "visual_tokenizer.vit", "visual_tokenizer.head", "vte")

# Each sample's images and the words of its answer: 14 samples of 30 to 199 tokens.
SAMPLES = [
    *[(0, 60), (1, 1), (0, 12), (1, 3), (0, 40), (2, 7), (1, 2)],
    *[(1, 9), (1, 5), (0, 4), (1, 25), (1, 1), (1, 45), (1, 8)],
]
PACKED = {"packing": "true", "packing_length": 320, "per_device_train_batch_size": 1}
SHORT_ROWS = {**PACKED, "packing_length": 200}
ONE_ROW = {**PACKED, "packing_length": 2048}
# A whole epoch as one step of plain gradient descent: the weights move by 1024 times the
# gradient, so that their own rounding is lost in it.
EPOCH = {
    "per_device_train_batch_size": len(SAMPLES),
    "gradient_accumulation_steps": 64,
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 1024,
    "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant",
}
LORA = {
    "lora_r": 4,
    "lora_parts": "llm|visual_tokenizer.vit",
    "init_lora_weights": "false",
    "train_modules": "vte|visual_tokenizer.head",
}
QLORA = {**LORA, "load_in_4bit": "true"}


def watching(method: Callable, folder: str) -> Callable:
    """A trainer's step that also appends a line on its micro-batch to `folder/RANK.jsonl`."""

    def watched(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        line: dict[str, Any] = {"kind": method.__name__, "ids": inputs["sample_ids"]}
        line["patches"] = len(inputs.get("pixel_values", ()))

        def look(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
            bounds = given.get("cu_seq_lens_q")
            rows, positions = output.label_mask.nonzero(as_tuple=True)
            if bounds is None:
                owners, lengths = rows, given["attention_mask"].sum(dim=1)
            else:
                owners, lengths = (
                    torch.searchsorted(bounds[1:], positions, right=True),
                    bounds.diff(),
                )
            sums = torch.zeros(len(lengths), dtype=torch.float64)
            sums.index_add_(0, owners, -output.log_probs.detach().double())
            counts = torch.bincount(owners, minlength=len(lengths))
            line["packed"], line["lengths"] = bounds is not None, lengths.tolist()
            line["losses"] = (sums / counts.clamp(min=1)).tolist()

        hook = self.accelerator.unwrap_model(model).register_forward_hook(look, with_kwargs=True)
        result = method(self, model, inputs, *rest, **named)
        hook.remove()
        with (Path(folder) / f"{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    return watched


IN_A_FORK = """
import runpy
from vlmtune.sft.trainer import VLMTrainerMixin
watching = runpy.run_path({file!r})["watching"]
for name in {names}:
    setattr(VLMTrainerMixin, name, watching(getattr(VLMTrainerMixin, name), {folder!r}))
"""


@dataclass
class Run:
    folder: Path
    watched: Path

    def seen(self, rank: int = 0, kind: str = "training_step") -> list[dict]:
        """The micro-batches of a rank."""
        text = (self.watched / f"{rank}.jsonl").read_text("utf-8")
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

    def by_sample(self, key: str, kind: str = "training_step") -> dict[str, Any]:
        """Of the samples, each in one micro-batch."""
        pairs = [
            p for line in self.seen(kind=kind) for p in zip(line["ids"], line[key], strict=True)
        ]
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def logged(self, key: str) -> list[float]:
        lines = (self.folder / "log.jsonl").read_text("utf-8").splitlines()
        return [entry[key] for line in lines if key in (entry := json.loads(line))]

    def weights(self, name: str = "model.safetensors") -> dict[str, Tensor]:
        return load_file(self.folder / name)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`SAMPLES` as records, and the same in two files of seven."""
    records = []
    for i, (images, words) in enumerate(SAMPLES):
        question = "<image>\n" * images + ("Which digits?" if images else f"Count to {words}.")
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": " ".join(map(str, range(words)))},
        ]
        record: dict[str, Any] = {"id": str(i), "conversations": turns}
        files = [f"digit_{i + k:04d}.png" for k in range(images)]
        records.append(record | ({"image": files} if images else {}))
    folder = tmp_path_factory.mktemp("data")
    for name, part in {"all": records, "first": records[:7], "second": records[7:]}.items():
        (folder / f"{name}.json").write_text(json.dumps(part), "utf-8")
    return folder / "all.json"


@pytest.fixture(scope="module")
def words(tiny_ovis, data):
    """`words(folder, key=value)` of the command line of a run on the data."""

    def given(folder: Path, **keys) -> list[str]:
        settings = {
            "model_path": tiny_ovis,
            "data_path": data,
            "eval_data_path": "[]",
            "output_dir": folder,
            "warmup_steps": 0,
            "logging_steps": 1,
            "dataloader_num_workers": 0,
            "disable_tqdm": "true",
            "report_to": "none",
            "use_cpu": "true",
            **keys,
        }
        flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        return ["train", "configs/presets/quickstart.json", *flags]

    return given


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def ran(words, ranks, tmp_path_factory):
    """`ran(processes, key=value)` is a finished run that was watched, done once."""
    finished: dict[tuple, Run] = {}

    def once(processes: int = 1, **keys) -> Run:
        key = (processes, *sorted((name, str(value)) for name, value in keys.items()))
        if key not in finished:
            run = Run(tmp_path_factory.mktemp("run") / "out", tmp_path_factory.mktemp("watched"))
            given, folder = words(run.folder, **keys), str(run.watched)
            if processes > 1:
                before = IN_A_FORK.format(file=__file__, names=WATCHED, folder=folder)
                started = ranks(given, run.folder, processes, before)
                assert started.codes() == [0] * processes, started.told.read_text("utf-8")
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.chdir(ROOT)
                    for name in WATCHED:
                        method = getattr(VLMTrainerMixin, name)
                        patch.setattr(VLMTrainerMixin, name, watching(method, folder))
                    assert main(given) == 0
            finished[key] = run
        return finished[key]

    return once


@pytest.fixture
def epoch(ran, data):
    """`epoch(key=value)` is an epoch of one step, evaluated before it on the same samples."""

    def run(**keys) -> Run:
        return ran(**EPOCH | {"eval_data_path": data, "eval_on_start": "true"} | keys)

    return run


def assert_same_losses(found: Run, expected: Run, kind: str = "training_step") -> None:
    ours, theirs = (run.by_sample("losses", kind) for run in (found, expected))
    assert theirs.keys() == {str(i) for i in range(len(SAMPLES))}
    assert len(set(theirs.values())) == len(SAMPLES)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-5)


def assert_same_gradients(found: Run, expected: Run, before: dict[str, Tensor]) -> None:
    """Of each part of the model, within 1e-5 of its gradient's norm."""
    ours, theirs = found.weights(), expected.weights()
    for part in PARTS:
        names = [name for name in before if name.startswith(f"{part}.")]
        difference = torch.cat([(ours[n] - theirs[n]).flatten() for n in names])
        moved = torch.cat([(theirs[n] - before[n]).flatten() for n in names]).norm()
        assert moved > 0, part
        assert difference.norm() <= 1e-5 * moved, part


# -- one epoch, padded and packed ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["trl", "standard"])
def test_a_packed_epoch_has_the_losses_and_gradients_of_a_padded_one(epoch, mode, tiny_ovis):
    padded, packed = epoch(trainer=mode), epoch(trainer=mode, **PACKED)
    assert [line["packed"] for line in padded.seen()] == [False]
    rows = packed.seen()
    assert len(rows) > 3 and all(line["packed"] for line in rows)
    assert max(len(line["ids"]) for line in rows) > 3
    assert min(line["patches"] for line in rows) < max(line["patches"] for line in rows)
    assert packed.by_sample("lengths") == padded.by_sample("lengths")
    assert_same_losses(packed, padded)
    assert len(packed.logged("loss")) == 1
    for key in ("loss", "grad_norm"):
        assert packed.logged(key) == pytest.approx(padded.logged(key), rel=1e-5)
    assert_same_gradients(packed, padded, load_file(tiny_ovis / "model.safetensors"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_block_masks_give_the_losses_and_gradients_of_packed_attention(epoch, attention, tiny_ovis):
    masked, packed = epoch(attn_implementation=attention, **PACKED), epoch(**PACKED)
    assert all(line["packed"] for line in masked.seen())
    assert_same_losses(masked, packed)
    assert_same_gradients(masked, packed, load_file(tiny_ovis / "model.safetensors"))


def test_metrics_of_a_packed_row_are_those_of_the_padded_batch(epoch):
    padded, packed = epoch(), epoch(**ONE_ROW)
    assert len(padded.seen()) == len(packed.seen()) == 1
    for key in ("entropy", "mean_token_accuracy"):
        [expected] = padded.logged(key)
        assert expected > 0
        assert packed.logged(key) == pytest.approx([expected], rel=1e-5)
    tokens = sum(padded.by_sample("lengths").values())
    assert padded.logged("num_tokens") == packed.logged("num_tokens") == [tokens]
    assert epoch(**PACKED).logged("num_tokens") == [tokens]
    assert packed.logged("padding_share") == [0] and padded.logged("padding_share")[0] > 0.3


@pytest.mark.parametrize("mode", ["trl", "standard"])
def test_evaluation_of_a_packed_run_is_padded_and_has_the_loss_of_a_padded_run(epoch, mode):
    padded, packed = epoch(trainer=mode), epoch(trainer=mode, **PACKED)
    batches = packed.seen(kind="prediction_step")
    assert batches and not any(line["packed"] for line in batches)
    # Before the step both have the same weights.
    found, expected = (run.logged("eval_loss")[0] for run in (packed, padded))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found == pytest.approx(packed.logged("loss")[0], abs=1e-5)


# -- adapters and half precision -------------------------------------------------------------------


@pytest.mark.parametrize("keys", [LORA, QLORA], ids=["lora", "qlora"])
def test_adapters_learn_the_same_packed_and_padded(epoch, keys):
    padded, packed = epoch(**keys), epoch(**keys, **PACKED)
    assert_same_losses(packed, padded)
    for key in ("loss", "grad_norm"):
        assert packed.logged(key) == pytest.approx(padded.logged(key), rel=1e-5)
    ours, theirs = (run.weights(ADAPTER_WEIGHTS) for run in (packed, padded))
    assert sum(".lora_A." in name for name in theirs) == 26
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize(
    "keys",
    [{}, pytest.param(LORA, marks=pytest.mark.long), pytest.param(QLORA, marks=pytest.mark.long)],
    ids=["full", "lora", "qlora"],
)
def test_bf16_packed_is_near_bf16_padded_and_fp32(epoch, keys):
    # Measured between packed and padded: 0.0012 of a loss, 0.0004 of the gradient's norm.
    packed, padded = epoch(**keys, **PACKED, bf16="true"), epoch(**keys, bf16="true")
    found, expected, exact = (
        run.by_sample("losses") for run in (packed, padded, epoch(**keys, **PACKED))
    )
    assert found == pytest.approx(expected, rel=0, abs=3e-3)
    assert found == pytest.approx(exact, rel=0, abs=0.02)
    assert found != exact
    assert packed.logged("grad_norm") == pytest.approx(padded.logged("grad_norm"), rel=2e-3)


# -- two processes ---------------------------------------------------------------------------------

STEPS = {**SHORT_ROWS, "num_train_epochs": 2, "max_grad_norm": 1, "learning_rate": 1e-4}


def ids_of_an_epoch(runs: list[list[dict]], number: int) -> Counter:
    """How often each sample was in the micro-batches of an epoch of two, over all ranks."""
    halves = [lines[number * len(lines) // 2 : (number + 1) * len(lines) // 2] for lines in runs]
    return Counter(sample for lines in halves for line in lines for sample in line["ids"])


def test_every_sample_is_in_every_epoch_once(ran):
    one, two = ran(**{**STEPS, "per_device_train_batch_size": 2}), ran(2, **STEPS)
    every = Counter(str(i) for i in range(len(SAMPLES)))
    for lines in ([one.seen()], [two.seen(0), two.seen(1)]):
        assert ids_of_an_epoch(lines, 0) == ids_of_an_epoch(lines, 1) == every
    half = len(one.seen()) // 2
    epochs = one.seen()[:half], one.seen()[half:]
    assert [line["ids"] for line in epochs[0]] != [line["ids"] for line in epochs[1]]


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_two_processes_have_the_losses_of_one_with_twice_the_rows(ran, engine):
    zero = {} if engine == "ddp" else {"deepspeed": f"configs/zero/{engine}.json"}
    one, two = ran(**{**STEPS, "per_device_train_batch_size": 2}), ran(2, **STEPS, **zero)
    first, second = two.seen(0), two.seen(1)
    # In some step one process has a row of text alone, the other one with images.
    assert any(
        (a["patches"] == 0) != (b["patches"] == 0) for a, b in zip(first, second, strict=True)
    )
    together = [a["ids"] + b["ids"] for a, b in zip(first, second, strict=True)]
    assert together == [line["ids"] for line in one.seen()]
    losses = [a["losses"] + b["losses"] for a, b in zip(first, second, strict=True)]
    for found, line in zip(losses, one.seen(), strict=True):
        assert found == pytest.approx(line["losses"], rel=0, abs=1e-5)
    assert len(set(one.logged("loss"))) == len(one.seen()) >= 6
    assert two.logged("loss") == pytest.approx(one.logged("loss"), abs=1e-5)
    assert two.logged("grad_norm") == pytest.approx(one.logged("grad_norm"), rel=1e-3)


# -- resuming --------------------------------------------------------------------------------------

SAVED = {**STEPS, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_resumed_inside_either_epoch_the_run_ends_with_the_same_bits(processes, ran, monkeypatch):
    opened: list[str] = []
    open_image = vlmtune.collators.sample.open_image

    def counting(file, where):
        opened.append(Path(file).name)
        return open_image(file, where)

    monkeypatch.setattr(vlmtune.collators.sample, "open_image", counting)
    whole = ran(processes, **SAVED)
    all_opened = list(opened)
    losses, steps = whole.logged("loss"), len(whole.logged("loss"))
    per_epoch = steps // 2
    for checkpoint in (2, steps - 2):
        assert checkpoint % per_epoch
        opened.clear()
        last = {"resume_from_checkpoint": whole.folder / f"checkpoint-{checkpoint}"}
        resumed = ran(processes, **SAVED, **last)
        assert resumed.logged("loss") == losses[checkpoint:]
        for rank in range(processes):
            assert resumed.seen(rank) == whole.seen(rank)[checkpoint:]
        ours, theirs = resumed.weights(), whole.weights()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        if processes == 1:  # of forks nothing is counted here
            assert 0 < len(opened) < len(all_opened)
            assert opened == all_opened[-len(opened) :]


# -- what goes into a row --------------------------------------------------------------------------


def test_a_mix_is_packed_within_the_bound_on_patches(ran, data):
    files = f"{data.with_name('first.json')}|{data.with_name('second.json')}"
    keys = {**STEPS, "packing_max_patches": 140, "num_train_epochs": 2}
    run = ran(**keys, data_path=files, mix='{"first": 2, "second": 0.5}')
    assert max(line["patches"] for line in run.seen()) == 128  # two images
    assert all(sum(line["lengths"]) <= 200 for line in run.seen())
    drawn = []
    for number in (0, 1):
        counts = ids_of_an_epoch([run.seen()], number)
        first = {sample: n for sample, n in counts.items() if int(sample) < 7}
        assert first == {str(i): 2 for i in range(7)}
        drawn.append({sample: n for sample, n in counts.items() if int(sample) >= 7})
        assert sum(drawn[-1].values()) in (3, 4) and set(drawn[-1].values()) == {1}
    assert drawn[0] != drawn[1]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("packing_length", "{longer} samples are longer, the longest {longest} tokens"),
        ("packing_max_patches", "1 samples have more, the largest 128 patches"),
    ],
    ids=["tokens", "patches"],
)
def test_a_sample_that_fits_no_row_ends_the_run_before_the_model_is_loaded(
    key, reason, epoch, words, tiny_ovis, tmp_path, capsys
):
    lengths = epoch().by_sample("lengths").values()
    longer = sum(length > 100 for length in lengths)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_ovis, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    keys = {"model_path": broken, "packing": "true"}
    capsys.readouterr()
    assert main(words(tmp_path / "out", **keys)) == 1
    assert "the weights cannot be loaded" in capsys.readouterr().err
    assert main(words(tmp_path / "out", **keys, **{key: 100})) == 1
    told = capsys.readouterr().err
    assert f"ConfigError: {key}:\n" in told
    assert f"is 100, but {reason.format(longer=longer, longest=max(lengths))}" in told
    assert "Fix: raise it to" in told


def test_a_model_that_mixes_the_samples_of_a_row_is_refused_before_the_first_step(
    words, tmp_path, capsys
):
    def whole_row(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True)

    ALL_ATTENTION_FUNCTIONS.register("whole_row", whole_row)
    try:
        keys = {**SHORT_ROWS, "attn_implementation": "whole_row", "max_steps": 1}
        assert main(words(tmp_path / "out", **keys)) == 1
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["whole_row"]
    told = capsys.readouterr().err
    assert "ModelError: packing: true with Ovis2_5:\n" in told
    assert "does not keep two samples of one row apart" in told
    assert "attn_implementation whole_row" in told
    assert "Fix: set packing to false" in told
    assert not (tmp_path / "out" / "log.jsonl").exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_in_bf16_is_held_to_the_limits_of_rounded_arithmetic(words, tmp_path, monkeypatch):
    nothing = isolation.Limits(neighbour=-1.0, alone=-1.0)
    keys = {"packing": "true", "packing_length": 512, "max_steps": 1}
    monkeypatch.setattr(isolation, "EXACT", nothing)
    assert main(words(tmp_path / "rounded", **keys, bf16="true")) == 0
    assert main(words(tmp_path / "exact", **keys)) == 1


@pytest.mark.parametrize(
    "keys", [{"packing": "false"}, {"packing_length": 500}, {"packing_max_patches": 4096}]
)
def test_a_run_of_other_rows_does_not_resume(keys, words, tmp_path, capsys):
    folder = tmp_path / "first"
    packed = {"packing": "true", "packing_length": 512, "per_device_train_batch_size": 1}
    saved = {**packed, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    assert main(words(folder, **saved)) == 0
    other = {**packed, **keys, "resume_from_checkpoint": folder / "checkpoint-1"}
    if keys == {"packing": "false"}:
        del other["packing_length"]
    assert main(words(tmp_path / "second", **other)) == 1
    assert "checkpoint-1 was written with packing" in capsys.readouterr().err
