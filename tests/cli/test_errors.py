"""Whatever is wrong with the input is one clear error before any step, exit code 1."""

import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmtune.cli.main import COMMANDS, main
from vlmtune.core.errors import DataError


@pytest.fixture
def train(checkpoint, tmp_path, monkeypatch, capsys):
    """`train(records, key=value)` runs `vlmtune train` in this process and returns exit code,
    error text; any training step would leave log.jsonl, which is asserted not to exist."""
    monkeypatch.setattr("vlmtune.data.dataset.HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "fine.png")

    def run(records, *flags, **keys):
        data = tmp_path / "train.json"
        if records is not None:
            data.write_text(records if isinstance(records, str) else json.dumps(records), "utf-8")
        settings = {
            "model_path": checkpoint(),
            "data_path": data,
            "image_folder": tmp_path,
            "output_dir": tmp_path / "out",
            "single_image_min_pixels": 256,
            "single_image_max_pixels": 1024,
            **keys,
        }
        words = [word for k, v in settings.items() for word in (f"--{k}", str(v))]
        code = main(["train", *words, *flags])
        assert not (tmp_path / "out" / "log.jsonl").exists()
        return code, capsys.readouterr().err

    return run


def record(**changes):
    return {
        "id": "a7",
        "image": "fine.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A square."},
        ],
        **changes,
    }


def turns(question="<image>\nWhat is it?", answer="A square.", asker="human"):
    return [{"from": asker, "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    ("changes", "place", "what", "fix"),
    [
        ({"conversations": turns(asker="user")}, "conversations[0].from", '"user"', '"human"'),
        ({"conversations": []}, "conversations", "is empty", "list of"),
        (
            {"conversations": turns("<image><image>")},
            "conversations[0].value",
            '2 "<image>" placeholders, but "image" lists 1 file.',
            "remove the surplus",
        ),
        ({"image": None}, "conversations[0].value", '"image" lists 0 files', "list a file"),
        ({"image": "gone.png"}, "image", "gone.png does not exist", "image_folder"),
        ({"image": "empty.png"}, "image", "empty.png is empty", "replace"),
        ({"image": "text.png"}, "image", "no image Pillow can read", "replace"),
        ({"image": "cut.png"}, "image", "is corrupt", "replace"),
        ({"image": "bomb.png"}, "image", "too many pixels", "scale it down"),
        ({"conversations": turns(answer=" \n")}, "conversations[1].value", "without text", "write"),
    ],
)
def test_bad_record(changes, place, what, fix, train, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"no picture")
    noise = Image.effect_noise((64, 64), 90)
    noise.save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
        )
    )
    code, error = train([record(), record(**changes)])
    assert code == 1
    where = f'DataError: {tmp_path}/train.json, record 2 (id "a7"), {place}:'
    assert where in error
    assert what in error
    assert fix in error.split("Fix:")[1]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('[\n{"id": 1,}\n]', "train.json, line 2, column"),
        ("", "train.json:\n  the file is empty."),
        ('{"a": 1}', "train.json:\n  holds no list of records."),
        (None, "train.json:\n  there is no such file."),
    ],
)
def test_bad_file(content, what, train):
    code, error = train(content)
    assert code == 1
    assert what in error
    assert "Fix: " in error
    assert "Traceback" not in error


def test_unknown_key_shows_the_nearest_name(train):
    code, error = train([record()], learnin_rate="1")
    assert (code, '"learning_rate"' in error.split("Fix: did you mean")[1]) == (1, True)


ZERO_3 = Path(__file__).parents[2] / "configs/zero/zero3.json"


@pytest.mark.parametrize(
    ("keys", "where", "what", "fix"),
    [
        ({"lora_target_modules": "q_prj"}, "lora_target_modules", '"q_prj"', "write q_proj"),
        ({"lora_parts": "lm"}, "lora_parts", 'no module "lm"', "did you mean llm"),
        ({"lora_target_modules": "vte"}, "lora_target_modules", "vte", '"train_modules": "vte"'),
        ({"lora_target_modules": "lm_head"}, "lora_target_modules", "TRL", '"standard"'),
        ({"lora_r": "0"}, "lora_r", "0 is below 1", "give 1 or more"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights", '"pissa"', "gaussian"),
        ({"load_in_4bit": "true", "load_in_8bit": "1"}, "load_in_8bit", "4bit", "keep one"),
        (
            {"load_in_4bit": "true", "deepspeed": ZERO_3},
            "deepspeed, zero_optimization.stage",
            "ZeRO-3 cannot split weights of 4 or 8 bits",
            "zero2.json",
        ),
        (
            {"load_in_8bit": "true", "deepspeed": ZERO_3},
            "deepspeed, zero_optimization.stage",
            "ZeRO-3 cannot split weights of 4 or 8 bits",
            "zero2.json",
        ),
        ({"lora_r": "4", "train_modules": "vtx"}, "train_modules", '"vtx"', "did you mean vte"),
        ({"modules_to_save": "nothing"}, "modules_to_save", '"nothing"', "write a module path"),
        ({"adapter_path": "/nowhere/a"}, "adapter /nowhere/a", "", ""),
        ({"use_dora": "true", "lora_bias": "true"}, "lora_bias", "", ""),
    ],
)
def test_adapters_that_cannot_be_trained(keys, where, what, fix, train):
    code, error = train([record()], **keys)
    assert code == 1
    assert re.search(rf"(Config|Model)Error: (command line, )?{re.escape(where)}:\n", error), error
    assert what in error
    assert fix in error.split("Fix:")[1]
    assert "Traceback" not in error


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"peft_type": "IA3"}', '{"peft_type": "LORA"}'])
def test_a_broken_adapter_to_continue(text, train, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(text, "utf-8")
    code, error = train([record()], adapter_path=tmp_path / "adapter")
    assert code == 1
    assert "ModelError: " in error and str(tmp_path / "adapter") in error and "Fix: " in error
    assert "Traceback" not in error


def test_output_folder_with_a_finished_adapter_is_not_replaced_unasked(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    for keys in ({}, {"lora_r": "4"}):
        code, error = train([record()], **keys)
        assert code == 1
        assert "already holds a finished model or adapter" in error
        assert "--overwrite_output_dir" in error


def test_output_folder_with_a_finished_model_is_not_replaced_unasked(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    code, error = train([record()])
    assert code == 1
    assert "already holds a finished model" in error
    assert "--overwrite_output_dir" in error


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"do_train": "false"}, "do_train:\n  is false, and there is no eval_data_path."),
        ({"resume_from_checkpoint": "true"}, "there is no complete checkpoint at"),
        ({"per_device_train_batch_size": "0"}, "per_device_train_batch_size:\n  is 0."),
        ({"dataloader_drop_last": "true"}, "drops everything: 1 samples fill no batch of 8"),
        ({"label_smoothing_factor": "0.1", "trainer": "standard"}, 'use "trainer": "trl"'),
        ({"chat_template_path": "x"}, "chat_template_path"),
    ],
)
def test_setting_that_cannot_work_is_one_error(keys, what, train):
    code, error = train([record()], **keys)
    assert code == 1
    assert what in error
    assert "Traceback" not in error


def test_output_dir_that_is_a_file_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    code, error = train([record()], output_dir=tmp_path / "file")
    assert (code, "is a file." in error) == (1, True)


def test_tensor_missing_from_the_checkpoint_is_never_trained_from_random(train, checkpoint):
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    del weights["vte.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, error = train([record()], model_path=folder)
    assert code == 1
    assert "1 tensors are missing, the first is vte.weight." in error


def test_error_of_a_loader_worker_keeps_its_message():
    original = DataError('a.json, record 1 (id "x"), image', "a.png does not exist.", "look.")
    text = f"Caught DataError in worker.\nTraceback ...\nvlmtune.core.errors.DataError: {original}"
    assert str(DataError(text)) == str(original)


def test_evaluation_without_data_is_refused(train):
    code, error = train([record()], eval_strategy="epoch")
    assert (code, "there is no eval_data_path" in error) == (1, True)


def test_missing_model_folder_is_named(train, tmp_path):
    code, error = train([record()], model_path=tmp_path / "absent")
    assert code == 1
    assert f"model_path {tmp_path / 'absent'}:\n  there is no such folder." in error


def test_model_of_another_family_is_refused(train, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    code, error = train([record()], model_path=tmp_path / "bert")
    assert (code, 'has model_type "bert"' in error) == (1, True)


def test_value_the_host_refuses_is_one_error(train):
    code, error = train([record()], lr_scheduler_type="zigzag")
    assert code == 1
    assert "zigzag" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_broken_weights_are_named(damage, train, checkpoint):
    folder = checkpoint()
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    code, error = train([record()], model_path=folder)
    assert code == 1
    assert f"model_path {folder}:\n  the weights cannot be loaded" in error
    assert "Traceback" not in error


def test_samples_that_lose_all_supervision_end_the_run_when_none_is_left(train):
    code, error = train([record()], multimodal_max_length=4)
    assert code == 1
    assert "no sample is left to learn from" in error


def test_debug_shows_the_traceback(tmp_path):
    words = ["train", "--model_path", "x", "--data_path", "y", "--output_dir", "z", "--sed", "1"]
    for extra, expected in ([], False), (["--debug"], True):
        done = subprocess.run(
            [sys.executable, "-m", "vlmtune.cli.main", *words, *extra],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == expected
        assert 'did you mean "seed"?' in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "-h"], []])
def test_help_answers_without_torch(words):
    code = (
        "import sys\nfrom vlmtune.cli.main import main\n"
        f"code = main({words})\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("usage: vlmtune train")
    assert done.stdout.splitlines()[-1] == "0 False False"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_answers_at_once_without_torch(command):
    code = (
        "import sys, time\nfrom vlmtune.cli.main import main\n"
        f"try:\n    main({[*command.split(), '--help']})\n"
        "except SystemExit as stopped:\n"
        "    heavy = [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]\n"
        "    print(stopped.code, heavy, time.process_time() < 0.3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: vlmtune {command} "), done.stderr
    assert done.stdout.splitlines()[-1] == "0 [] True"


def test_output_cut_off_by_its_reader_leaves_no_traceback():
    command = f"{sys.executable} -m vlmtune.cli.main config --schema | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.parametrize(
    ("words", "command"),
    [(["trian"], "trian"), (["models", "build"], "models build"), (["models"], "models")],
)
def test_unknown_command_is_refused(words, command, capsys):
    assert main(words) == 1
    assert f'unknown command "{command}"' in capsys.readouterr().err


def test_readme_and_launcher_exist_where_help_says():
    root = Path(__file__).parents[2]
    assert (root / "scripts/train_launch.sh").stat().st_mode & 0o111
