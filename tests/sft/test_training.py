"""Real runs of scripts/train_launch.sh, or of its command alone, on a tiny model and the sample
data."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig

from vlmtune.models import Ovis2_5, Ovis2_5Processor

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

COMPLETE = {
    "config.json",
    "model.safetensors",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    "vlmtune_run.json",
    "trainer_state.json",
    "log.jsonl",
    "loss.png",
}


@pytest.fixture(scope="module")
def one_process(launch):
    done, folder = launch(name="one", max_steps=8)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_one_process_learns_and_leaves_a_complete_folder(one_process, tiny_ovis, losses):
    done, folder = one_process
    values = losses(folder)
    assert len(values) == 8
    assert values[-1] < 0.9 * values[0]
    assert COMPLETE - {f.name for f in folder.iterdir()} == set()
    assert not (folder / ".partial").exists()
    assert "8 = 44 per epoch, 0.18 epochs" in done.stderr
    assert "16 = 16 per device x 1 accumulation x 1 processes" in done.stderr
    assert "700 train, 0 eval" in done.stderr
    before, after = (load_file(f / "model.safetensors") for f in (tiny_ovis, folder))
    assert before.keys() == after.keys()
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved == {
        f"visual_tokenizer.vit.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")
    }


def test_saved_folder_loads_offline_in_a_fresh_process_with_the_trained_weights(one_process):
    _, folder = one_process
    code = (
        "import sys, torch, vlmtune.models\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "ids = processor(text='Which digit comes after 4?')['input_ids']\n"
        "print(model(ids).logits.double().sum().item(), 'trl' in sys.modules)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd="/",
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = _logit_sum(folder)
    assert float(found[0]) == pytest.approx(expected, abs=1e-3)
    assert found[1] == "False"


def _logit_sum(folder: Path) -> float:
    """The same sum from the checkpoint's tensors put into a model made from its config alone."""
    config = AutoConfig.from_pretrained(folder)
    model = Ovis2_5(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    ids = Ovis2_5Processor.from_pretrained(folder)(text="Which digit comes after 4?")["input_ids"]
    return model(ids).logits.double().sum().item()


@pytest.mark.long
def test_two_processes_give_the_losses_of_one(one_process, launch, losses):
    done, folder = launch(2, name="two", max_steps=8, per_device_train_batch_size=8)
    assert done.returncode == 0, done.stderr
    assert "16 = 8 per device x 1 accumulation x 2 processes" in done.stderr
    assert losses(folder) == pytest.approx(losses(one_process[1]), abs=1e-4)


def test_standard_trainer_gives_the_losses_of_trl(one_process, forked, losses):
    done, folder = forked(1, "standard", name="standard", max_steps=8)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == pytest.approx(losses(one_process[1]), abs=1e-5)


def test_standard_trainer_moves_each_module_at_its_own_rate(forked, tiny_ovis):
    done, folder = forked(1, "standard", max_steps=1, train_modules="vte:1e-3|llm:1e-4", seed=3)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f / "model.safetensors") for f in (tiny_ovis, folder))
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    vte = moved.pop("vte.weight")
    llm = max(value for name, value in moved.items() if name.startswith("llm."))
    # Adam's first step moves the largest element by its rate.
    assert (vte, llm) == (pytest.approx(1e-3, rel=0.01), pytest.approx(1e-4, rel=0.01))
    assert not any(value for name, value in moved.items() if name.startswith("visual_tokenizer"))


def test_a_rank_without_images_neither_hangs_nor_changes_the_losses(forked, losses, tmp_path):
    # With TRL's trainer and under ZeRO: test_zero.py.
    records = json.loads((ROOT / "sample_data/train.json").read_text("utf-8"))
    with_image = [r for r in records if "image" in r][:8]
    text_only = [r for r in records if "image" not in r][:8]
    mixed = [r for pair in zip(with_image, text_only, strict=True) for r in pair]
    data = tmp_path / "mixed.json"
    data.write_text(json.dumps(mixed), "utf-8")
    keys = {"data_path": data, "max_steps": 6, "dataloader_shuffle": "false"}
    one, alone = forked(1, "standard", name="alone", per_device_train_batch_size=2, **keys)
    two, split = forked(2, "standard", name="split", per_device_train_batch_size=1, **keys)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    # Sequential rows alternate, so rank 0 sees images only and rank 1 text only.
    assert losses(split) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.long
def test_steps_without_images_and_the_short_last_one_count_alike_in_one_process_and_two(
    forked, losses, tmp_path
):
    records = json.loads((ROOT / "sample_data/train.json").read_text("utf-8"))
    with_image = [r for r in records if "image" in r][:8]
    text_only = [r for r in records if "image" not in r][:8]
    # Two samples a step: images, images, text, text, ...; of the last one rank 1 gets nothing.
    steps = [r for i in range(0, 8, 2) for r in with_image[i : i + 2] + text_only[i : i + 2]][:15]
    data = tmp_path / "steps.json"
    data.write_text(json.dumps(steps), "utf-8")
    keys = {"data_path": data, "max_steps": 10, "dataloader_shuffle": "false"}
    one, alone = forked(1, name="alone", per_device_train_batch_size=2, **keys)
    two, split = forked(2, name="split", per_device_train_batch_size=1, **keys)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert "10 = 8 per epoch" in two.stderr
    assert len(losses(alone)) == 10
    assert losses(split) == pytest.approx(losses(alone), abs=1e-4)


def test_data_without_images_cannot_train_the_vision_tower(forked, tmp_path):
    records = json.loads((ROOT / "sample_data/train.json").read_text("utf-8"))
    data = tmp_path / "text.json"
    data.write_text(json.dumps([r for r in records if "image" not in r]), "utf-8")
    done, folder = forked(max_steps=2, train_modules="llm|visual_tokenizer", data_path=data)
    assert done.returncode == 1
    assert "train_modules, visual_tokenizer:" in done.stderr
    assert "the gradient is exactly zero after step 1" in done.stderr
    assert "train on data with images: this data has none" in done.stderr
    assert not (folder / "config.json").exists()
    done, _ = forked(max_steps=2, train_modules="llm", data_path=data)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_workers_accumulation_and_two_processes_give_the_losses_of_one(one_process, forked, losses):
    done, folder = forked(
        2,
        name="accumulated",
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
    )
    assert done.returncode == 0, done.stderr
    assert "16 = 4 per device x 2 accumulation x 2 processes" in done.stderr
    assert losses(folder) == pytest.approx(losses(one_process[1]), abs=1e-4)


@pytest.mark.long
def test_videos_and_frames_train_in_one_process_and_two(forked, losses, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(12):
            frame = Image.new("RGB", (64, 48), (20 * level,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    turns = [{"from": "human", "value": "<video>\nBrighter?"}, {"from": "gpt", "value": "Yes."}]
    frames = [f"digit_000{i}.png" for i in range(3)]
    records = [
        {"id": "file", "video": str(tmp_path / "clip.mp4"), "conversations": turns},
        {"id": "frames", "video_frames": frames, "conversations": turns},
    ]
    data = tmp_path / "video.json"
    data.write_text(json.dumps(records), "utf-8")
    keys = {"data_path": data, "max_steps": 3, "dataloader_shuffle": "false", "max_frames": 4}
    keys |= {"min_frames": 2, "video_min_pixels": 4096, "video_max_pixels": 4096}
    one, alone = forked(1, name="alone", per_device_train_batch_size=2, **keys)
    two, split = forked(2, name="split", per_device_train_batch_size=1, **keys)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert losses(split) == pytest.approx(losses(alone), abs=1e-4)


def test_half_precision_in_an_old_config_loses_no_update(one_process, forked, losses):
    done, folder = forked(name="half", max_steps=8, torch_dtype="bfloat16")
    assert done.returncode == 0, done.stderr
    assert "note: torch_dtype bfloat16: the model computes in it" in done.stderr
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses(folder) == pytest.approx(losses(one_process[1]), abs=0.05)


def test_frozen_parts_do_not_move(forked, tiny_ovis):
    done, folder = forked(max_steps=2, freeze_llm="true", freeze_vision_tower="true", name="frozen")
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f / "model.safetensors") for f in (tiny_ovis, folder))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        "vte.weight",
        "visual_tokenizer.head.0.weight",
        "visual_tokenizer.head.1.weight",
        "visual_tokenizer.head.1.bias",
    }


def test_existing_script_config_trains_evaluates_and_saves(forked, tiny_ovis, losses, tmp_path):
    done, folder = forked(
        name="legacy",
        model_path=None,
        ovis_pretrained_path=tiny_ovis,
        visual_vocab_size=65536,
        data_name="digits",
        data_type="conversation",
        eval_data_path="sample_data/eval.json",
        max_seq_length=512,
        torch_dtype="float32",
        attn_implementation="flash_attention_2",
        stage=3,
        do_train="true",
        do_eval="true",
        evaluation_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.5,
        dataloader_shuffle="true",
        max_steps=4,
        multimodal_max_length=512,
        text_max_length=512,
        gradient_checkpointing="true",
        tf32="true",
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "note: visual_vocab_size has no effect",
        "note: data_name has no effect",
        "note: stage has no effect",
        "note: evaluation_strategy is read as eval_strategy",
        "note: attn_implementation is sdpa",
        "note: tf32 has no effect on CPU",
    ):
        assert line in done.stderr
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "eval_loss" in e] == [2, 4]
    assert sorted(f.name for f in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert json.loads((folder / "config.json").read_text("utf-8"))["use_cache"] is True
    run = json.loads((folder / "vlmtune_run.json").read_text("utf-8"))
    assert run["training_arguments"]["learning_rate"] == 0.001
    assert run["processes"] == 1
    assert run["config"]["eval_steps"] == 0.5
    assert run["versions"]["transformers"]


@pytest.mark.long
def test_two_processes_evaluate_and_keep_the_best_model(forked):
    done, folder = forked(
        2,
        name="best",
        max_steps=4,
        per_device_train_batch_size=8,
        eval_data_path="sample_data/eval.json",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end="true",
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    assert state["best_global_step"] == 4
    best, saved = (load_file(f / "model.safetensors") for f in (folder / "checkpoint-4", folder))
    assert all(torch.equal(best[name], saved[name]) for name in saved)


def test_evaluation_alone_trains_and_writes_no_model(forked):
    done, folder = forked(name="judged", do_train="false", eval_data_path="sample_data/eval.json")
    assert done.returncode == 0, done.stderr
    assert "Evaluation: eval_loss 5." in done.stderr
    assert not (folder / "config.json").exists()


def test_bad_samples_are_skipped_and_listed_with_their_reason(forked, tmp_path):
    records = json.loads((ROOT / "sample_data/train.json").read_text("utf-8"))[:40]
    with_image = [r for r in records if isinstance(r.get("image"), str)]
    with_image[0]["image"] = "absent.png"
    with_image[1]["conversations"][1]["value"] = " "
    data = tmp_path / "bad.json"
    data.write_text(json.dumps(records), "utf-8")
    done, folder = forked(max_steps=1, data_path=data, on_bad_sample="skip")
    assert done.returncode == 0, done.stderr
    assert "38 train, 0 eval, 2 left out (bad_samples.jsonl)" in done.stderr
    ledger = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {(e["id"], e["what"]) for e in ledger} == {
        (with_image[0]["id"], "sample_data/images/absent.png does not exist."),
        (with_image[1]["id"], "answer without text."),
    }
    assert all(e["file"] == str(data) and e["record"] and e["fix"] for e in ledger)


DIES_WHILE_SAVING = """
import os, signal
from pathlib import Path
replace, moved = Path.replace, []
def dying(self, target):
    moved.append(target)
    if len(moved) == 4: os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
"""


def test_a_save_killed_on_the_way_leaves_no_folder_that_looks_finished(forked):
    done, folder = forked(before=DIES_WHILE_SAVING, name="killed", max_steps=1)
    assert done.returncode == -signal.SIGKILL
    assert (folder / ".partial").exists()
    assert not (folder / "config.json").exists()


def test_zero_2_runs_in_one_process_without_torchrun(one_process, forked, losses):
    done, folder = forked(1, name="alone", max_steps=8, deepspeed="configs/zero/zero2.json")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == pytest.approx(losses(one_process[1]), abs=1e-4)
