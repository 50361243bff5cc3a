"""Real runs on adapters: every engine learns the same, and what is left behind is the adapter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmtune.core.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE
from vlmtune.models import Ovis2_5, Ovis2_5Processor

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PREFIX = "base_model.model."
RATES = {
    "lora llm": 1e-3,
    "lora visual_tokenizer.vit": 1e-3,
    "vte": 1e-2,
    "visual_tokenizer.head": 1e-4,
    "llm.model.embed_tokens": 1e-3,
}

FILES = {
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RUN_FILE,
    "README.md",
    "chat_template.jinja",
    "log.jsonl",
    "loss.png",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
}

# What a model computes for a small image and a text, with its weights.
LOOK = """
import torch
def look(model, file):
    ids = torch.tensor([[1, 2, -301, -300, -302, 4]])
    pixels = torch.linspace(-1, 1, 4 * 192).view(4, 192)
    grid = torch.tensor([[1, 2, 2]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, pixel_values=pixels, grid_thws=grid).logits
    weights = {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}
    torch.save({"logits": logits, "weights": weights}, file)
"""

# Leaves that beside the finished adapter.
WITNESS = f"""
{LOOK}
import vlmtune.sft.train as training
save = training.save_finished
def witnessed(trainer, model, config, facts):
    save(trainer, model, config, facts)
    look(model, trainer.args.output_dir + "/witness.pt")
training.save_finished = witnessed
"""

LOAD = f"""
import sys, vlmtune.models
from peft import PeftModel
from transformers import AutoModelForImageTextToText
{LOOK}
base, adapter, file = sys.argv[1:]
look(PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter), file)
ours = [m for m in sys.modules if m.startswith("vlmtune.")]
print(sorted({{m.split(".")[1] for m in ours}}), {{"trl", "deepspeed"}} & sys.modules.keys())
"""


class Run:
    def __init__(self, done: subprocess.CompletedProcess, folder: Path):
        self.folder, self.code, self.told = folder, done.returncode, done.stderr

    def logged(self, key: str) -> list[float]:
        lines = (self.folder / "log.jsonl").read_text("utf-8").splitlines()
        return [entry[key] for line in lines if key in (entry := json.loads(line))]

    def adapter(self, checkpoint: int | None = None) -> dict[str, Tensor]:
        name = f"checkpoint-{checkpoint}" if checkpoint else "."
        return load_file(self.folder / name / ADAPTER_WEIGHTS)

    def file(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def ran(forked, mixed):
    """`ran(engine, mode, key=value)` is a finished run of three steps of four samples."""
    finished: dict[tuple, Run] = {}

    def once(engine: str = "single", mode: str = "trl", before: str = "", **keys) -> Run:
        key = (engine, mode, before, *map(str, keys.items()))
        if key not in finished:
            processes = 1 if engine == "single" else 2
            settings = {
                "data_path": mixed,
                "max_steps": 3,
                "dataloader_shuffle": "false",
                "lora_r": 8,
                "lora_parts": "llm|visual_tokenizer.vit",
                "train_modules": "vte:1e-2|visual_tokenizer.head:1e-4|llm.model.embed_tokens",
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "gradient_checkpointing": "true",
                "per_device_train_batch_size": 2 // processes,
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 1,
                "deepspeed": None if engine in ("single", "ddp") else f"configs/zero/{engine}.json",
            }
            run = Run(*forked(processes, mode, engine, before, **(settings | keys)))
            assert run.code == 0, run.told
            finished[key] = run
        return finished[key]

    return once


QLORA = {
    "load_in_4bit": "true",
    "train_modules": "vte:1e-2|visual_tokenizer.head:1e-4",
    "eval_strategy": "steps",
    "eval_steps": 1,
}


@pytest.fixture(scope="module")
def qlora(ran, mixed):
    def once(engine: str = "single", mode: str = "trl", **keys) -> Run:
        return ran(engine, mode, **(QLORA | {"eval_data_path": mixed} | keys))

    return once


def part_of(name: str) -> str:
    path = name.removeprefix(PREFIX)
    if "lora_" in path:
        return "lora llm" if path.startswith("llm.") else "lora visual_tokenizer.vit"
    return next(part for part in RATES if path.startswith(f"{part}.") or "lm_head" in path)


# -- engines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine", ["ddp", "zero2", "zero3", pytest.param("zero1", marks=pytest.mark.long)]
)
def test_every_engine_learns_the_same_adapter(ran, engine):
    run, single = ran(engine), ran(before=WITNESS)
    assert len(set(single.logged("loss"))) == 3
    assert run.logged("loss") == pytest.approx(single.logged("loss"), abs=2e-6)
    ours, theirs = run.adapter(), single.adapter()
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 2e-5, name
    assert {f.name for f in run.folder.iterdir() if f.is_file()} == FILES
    assert run.file(RUN_FILE)["base"] == single.file(RUN_FILE)["base"]


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2", "zero3"])
def test_adapters_and_full_parts_move_at_their_rates_in_one_step(ran, engine, tiny_ovis):
    # The first step of AdamW moves a weight by its rate, whatever the size of its gradient.
    before = load_file(tiny_ovis / "model.safetensors")
    run = ran(before=WITNESS) if engine == "single" else ran(engine)
    moves: dict[str, float] = dict.fromkeys(RATES, 0.0)
    for name, tensor in run.adapter(checkpoint=1).items():
        if ".lora_A." in name:
            continue
        start = 0 if ".lora_B." in name else before[_in_base(name, before)]
        part = part_of(name)
        moves[part] = max(moves[part], (tensor - start).abs().max().item())
    assert moves == pytest.approx(RATES, rel=0.01)
    assert run.logged("learning_rate/vte") == [1e-2] * 3
    assert run.logged("learning_rate/lora llm") == [1e-3] * 3
    assert run.logged("learning_rate/visual_tokenizer.head") == [1e-4] * 3


def _in_base(name: str, base: dict[str, Tensor]) -> str:
    path = name.removeprefix(PREFIX)
    return path if path in base else "llm.model.embed_tokens.weight"  # the tied head


def test_reentrant_checkpointing_reaches_adapters_in_the_vision_tower_alone(ran):
    keys = {"lora_parts": "visual_tokenizer.vit", "train_modules": "all", "save_strategy": "no"}
    one, other = (
        ran(**keys, gradient_checkpointing_kwargs=f'{{"use_reentrant": {reentrant}}}')
        for reentrant in ("true", "false")
    )
    assert one.logged("loss") == other.logged("loss")
    assert len(set(one.logged("loss"))) == 3


def test_the_frozen_base_does_not_move_by_a_bit_and_every_adapter_does(ran, tiny_ovis):
    run = ran(before=WITNESS)
    before = load_file(tiny_ovis / "model.safetensors")
    after = {
        name.removeprefix(PREFIX).replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in torch.load(run.folder / "witness.pt")["weights"].items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert after.keys() - {"llm.lm_head.weight"} == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    first, last = run.adapter(checkpoint=1), run.adapter()
    for name, tensor in last.items():
        assert not torch.equal(tensor, first[name]), name
    # 12 layers of the vision tower and 14 of the language model, and four full modules.
    assert sum(".lora_A." in name for name in last) == 26
    assert {name.removeprefix(PREFIX) for name in last if "lora_" not in name} == {
        "vte.weight",
        "visual_tokenizer.head.0.weight",
        "visual_tokenizer.head.1.weight",
        "visual_tokenizer.head.1.bias",
        "llm.model.embed_tokens.weight",
        "llm.lm_head.weight",
    }
    embedding, head = (last[f"{PREFIX}llm.{n}.weight"] for n in ("model.embed_tokens", "lm_head"))
    assert torch.equal(embedding, head)


@pytest.mark.parametrize(
    ("engine", "mode"),
    [
        ("single", "standard"),
        ("ddp", "trl"),
        pytest.param("ddp", "standard", marks=pytest.mark.long),
        pytest.param("zero2", "trl", marks=pytest.mark.long),
        pytest.param("zero2", "standard", marks=pytest.mark.long),
    ],
)
def test_every_engine_and_trainer_learns_the_same_on_4_bits_with_evaluations_between(
    qlora, engine, mode
):
    run, single = qlora(engine, mode), qlora()
    assert len(single.logged("eval_loss")) == 3
    for key in ("loss", "eval_loss"):
        assert run.logged(key) == pytest.approx(single.logged(key), abs=2e-6)
    for name, tensor in single.adapter().items():
        assert (run.adapter()[name] - tensor).abs().max() <= 2e-5, name


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_every_engine_learns_about_the_same_in_half_precision(ran, engine):
    single = ran(before=WITNESS)
    for mode in ("trl", "standard"):
        run = ran(engine, mode, bf16="true")
        assert run.logged("loss") == pytest.approx(single.logged("loss"), abs=0.02)
        assert run.adapter().keys() == single.adapter().keys()
    biased = ran(engine, bf16="true", lora_bias="all", use_dora="true")
    assert biased.logged("loss") == pytest.approx(single.logged("loss"), abs=0.1)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize(
    "keys",
    [{"use_dora": "true", "init_lora_weights": "false"}, {"lora_bias": "all"}],
    ids=lambda keys: next(iter(keys)),
)
def test_every_engine_learns_the_same_magnitudes_and_biases(ran, engine, keys, tiny_ovis):
    run, single = ran(engine, **keys), ran(**keys)
    assert run.logged("loss") == pytest.approx(single.logged("loss"), abs=5e-6)
    ours, base = run.adapter(), load_file(tiny_ovis / "model.safetensors")
    for name, tensor in single.adapter().items():
        if name in ours:
            assert (ours[name] - tensor).abs().max() <= 5e-5, name
        else:  # PEFT saves biases that nothing trains too, where they are whole
            path = name.removeprefix(PREFIX).replace(".original_module", "")
            assert engine == "zero3" and torch.equal(base[path], tensor), name


def test_evaluations_change_nothing_on_4_bits(qlora):
    without = qlora(eval_strategy="no", eval_data_path="[]")
    assert without.logged("eval_loss") == []
    assert without.logged("loss") == qlora().logged("loss")
    ours, theirs = without.adapter(), qlora().adapter()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"optim": "paged_adamw_8bit"}, marks=pytest.mark.long),
        {"load_in_4bit": None, "load_in_8bit": "true"},
        pytest.param({"bf16": "true"}, marks=pytest.mark.long),
        pytest.param({"load_in_4bit": None, "bf16": "true"}, marks=pytest.mark.long),
        pytest.param(
            {"load_in_4bit": None, "load_in_8bit": "true", "bf16": "true"}, marks=pytest.mark.long
        ),
        pytest.param({"unquantized_parts": ""}, marks=pytest.mark.long),
        pytest.param({"bnb_4bit_quant_type": "fp4", "bf16": "true"}, marks=pytest.mark.long),
    ],
    ids=lambda keys: "-".join(map(str, keys)),
)
def test_other_forms_of_the_weights_and_the_optimizer_learn_about_the_same(qlora, keys):
    run, plain = qlora(**keys), qlora()
    assert run.logged("loss") == pytest.approx(plain.logged("loss"), abs=0.1)
    assert run.logged("loss") != plain.logged("loss")
    assert run.logged("eval_loss")[-1] < run.logged("eval_loss")[0]
    assert {tensor.dtype for tensor in run.adapter().values()} == {torch.float32}


# -- what is saved ---------------------------------------------------------------------------------


def test_base_and_adapter_in_a_process_without_us_are_the_trained_model(ran, tiny_ovis, tmp_path):
    run = ran(before=WITNESS)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tiny_ovis), str(run.folder), str(tmp_path / "seen.pt")],
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['core', 'models'] set()\n"
    assert "missing" not in done.stderr and "unexpected" not in done.stderr
    trained, seen = torch.load(run.folder / "witness.pt"), torch.load(tmp_path / "seen.pt")
    assert seen["weights"].keys() == trained["weights"].keys()
    for name, tensor in trained["weights"].items():
        assert torch.equal(seen["weights"][name], tensor), name
    # The same bits; where in memory they lie may change how sums are vectorised.
    assert (seen["logits"] - trained["logits"]).abs().max() <= 2e-6
    assert trained["logits"].std() > 0.1


def test_transformers_finds_the_base_and_puts_the_adapter_on(ran):
    run = ran(before=WITNESS)
    model = AutoModelForImageTextToText.from_pretrained(run.folder)
    assert type(model) is Ovis2_5
    trained = torch.load(run.folder / "witness.pt")["weights"]
    weights = dict(model.named_parameters(remove_duplicate=False))
    assert {f"{PREFIX}{name}" for name in weights} == trained.keys()
    for name, tensor in weights.items():
        assert torch.equal(trained[f"{PREFIX}{name}"], tensor), name


def test_the_folder_is_a_plain_peft_folder_and_nothing_else(ran, tiny_ovis):
    run = ran(before=WITNESS)
    assert {f.name for f in run.folder.iterdir() if f.is_file()} == FILES | {"witness.pt"}
    checkpoint = {f.name for f in (run.folder / "checkpoint-3").iterdir()}
    assert {ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE, "optimizer.pt"} < checkpoint
    assert not any(name.startswith("model") or name == "config.json" for name in checkpoint)
    saved = run.file(ADAPTER_CONFIG)
    assert saved["base_model_name_or_path"] == str(tiny_ovis)
    assert saved["task_type"] is None
    assert saved["auto_mapping"]["base_model_class"] == "Ovis2_5"
    assert saved["inference_mode"] is True
    assert (saved["r"], saved["lora_alpha"]) == (8, 32)
    assert set(saved["modules_to_save"]) == {
        "vte",
        "visual_tokenizer.head",
        "llm.model.embed_tokens",
        "llm.lm_head",
    }
    card = (run.folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: peft\npipeline_tag: image-text-to-text\n")
    assert "tags:\n- vlmtune\n- sft\n- lora\n---" in card
    assert f"An adapter of `{tiny_ovis}`, trained with vlmtune on:" in card
    assert "`PeftModel.from_pretrained`" in card and "`vlmtune merge`" in card


def test_the_run_file_knows_the_base_and_how_it_was_quantised(ran, qlora, tiny_ovis):
    plain, packed = ran(before=WITNESS).file(RUN_FILE), qlora().file(RUN_FILE)
    assert plain["quantization"] is None
    assert plain["base"] == packed["base"]
    assert plain["base"]["model_path"] == str(tiny_ovis)
    assert re.fullmatch("sha256:[0-9a-f]{64}", plain["base"]["fingerprint"])
    modules = packed["quantization"].pop("modules")
    assert packed["quantization"] == {
        "bits": 4,
        "quant_type": "nf4",
        "double_quant": True,
        "dtype": "float32",
    }
    assert len(modules) == 14 and all(name.startswith("llm.model.layers.") for name in modules)


def test_the_processor_comes_from_the_adapter_folder_with_the_base_s_template(ran, tiny_ovis):
    folder = ran(before=WITNESS).folder
    ours, base = (AutoProcessor.from_pretrained(path) for path in (folder, tiny_ovis))
    assert type(ours) is type(base) is Ovis2_5Processor
    assert ours.image_processor.patch_size == base.image_processor.patch_size == 8
    assert ours.image_processor.hidden_stride == base.image_processor.hidden_stride
    assert ours.chat_template == base.chat_template
    assert len(ours.tokenizer) == len(base.tokenizer)


# -- as shipped ------------------------------------------------------------------------------------


def preset(name: str, folder: Path, tiny_ovis: Path, **keys) -> list[str]:
    given = {"model_path": tiny_ovis, "output_dir": folder, "report_to": "none", **keys}
    words = [w for key, value in given.items() for w in (f"--{key}", str(value))]
    return ["train", f"configs/presets/{name}.json", *words]


SHORT = {"max_steps": 6, "logging_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("name", ["quickstart_lora", "quickstart_qlora"])
def test_the_tiny_presets_train(name, ranks, tiny_ovis, tmp_path):
    folder = tmp_path / name
    run = ranks(preset(name, folder, tiny_ovis, **SHORT), folder)
    assert run.codes() == [0], run.told.read_text("utf-8")
    told = run.told.read_text("utf-8")
    packed = "qlora" in name
    kept = "4-bit nf4, the rest torch.float32" if packed else "torch.float32"
    assert f"(Ovis2_5, {kept})" in told
    assert "  llm.model.layers.0-1.mlp.up_proj  " in told
    assert ("Linear4bit  128 -> 256    32     64" in told) == packed
    assert f"Saved the adapter to {folder}" in told
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    losses = [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    assert json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))["r"] == 32


def test_the_launcher_of_adapters_is_the_launcher_with_use_lora():
    done = subprocess.run(
        ["scripts/train_launch_lora.sh", "c.json", "2", "trl", "--lora_r", "8 9"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": "echo"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "-m vlmtune.cli.launch c.json 2 trl --lora_r 8 9 --use_lora true\n"


@pytest.mark.long
def test_the_launcher_trains_rank_16_adapters_without_a_key(tiny_ovis, mixed, tmp_path):
    folder = tmp_path / "out"
    words = ["--model_path", tiny_ovis, "--output_dir", folder, "--data_path", mixed]
    words += ["--eval_data_path", "[]", "--max_steps", "1", "--report_to", "none"]
    done = subprocess.run(
        ["scripts/train_launch_lora.sh", "configs/presets/quickstart.json", "1", "trl", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["modules_to_save"]) == (16, 32, None)
    names = load_file(folder / ADAPTER_WEIGHTS).keys()
    assert len(names) == 2 * 14
    assert all(name.startswith(f"{PREFIX}llm.model.layers.") for name in names)


@pytest.mark.long
def test_qlora_on_the_quickstart_data_reads_nine_in_ten_held_out_digits(ranks, tiny_ovis, tmp_path):
    folder = tmp_path / "qlora"
    run = ranks(preset("quickstart_qlora", folder, tiny_ovis), folder)
    run.processes[0].join(600)
    assert run.codes() == [0], run.told.read_text("utf-8")
    subprocess.run(
        [sys.executable, "scripts/score_quickstart.py", "--model", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    score = json.loads((folder / "score.json").read_text("utf-8"))
    assert score["questions"] == 100
    assert score["exact_match"] >= 0.90
