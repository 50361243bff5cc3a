"""`vlmtune verify` and `vlmtune merge --verify`: flags, the printed report, and how they end."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmtune.models  # noqa: F401, registers Ovis2.5 with the Auto classes
from vlmtune.cli.merge import main as merge
from vlmtune.cli.verify import main
from vlmtune.core.errors import ModelError


@pytest.fixture
def base(checkpoint, tmp_path) -> Path:
    golden, folder = checkpoint(), tmp_path / "base"
    model = AutoModelForImageTextToText.from_pretrained(golden, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(golden).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 0, **config) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = {"target_modules": ["q_proj", "fc1"], **config}
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **config))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch) -> list:
    class Right:
        def report(self):
            return "the report"

        def check(self):
            pass

    found = []

    def verify(*given, **keys):
        found.append((given, keys))
        return Right()

    monkeypatch.setattr("vlmtune.lora.verify.verify", verify)
    return found


def test_flags_reach_verify(calls, capsys):
    main(
        [
            *("--base", "b", "--adapter", "a1", "--adapter", "a2:0.5", "--merged", "m"),
            *("--data", "d.json", "--image_folder", "images", "--samples", "3"),
            *("--compute_dtype", "bfloat16", "--device", "cuda:1"),
        ]
    )
    keys = {
        "data": "d.json",
        "image_folder": "images",
        "samples": 3,
        "compute_dtype": "bfloat16",
        "device": "cuda:1",
    }
    assert calls == [(("b", [("a1", 1.0), ("a2", 0.5)], "m"), keys)]
    assert capsys.readouterr().out == "the report\n"


def test_defaults_are_eight_made_samples_in_float32(calls):
    main(["--base", "b", "--adapter", "a", "--merged", "m"])
    [(_, keys)] = calls
    assert keys == {
        "data": None,
        "image_folder": None,
        "samples": 8,
        "compute_dtype": "float32",
        "device": None,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "b", "--adapter", "a"], "the following arguments are required: --merged"),
        (["--base", "b", "--merged", "m"], "the following arguments are required: --adapter"),
        (
            ["--base", "b", "--adapter", "a", "--merged", "m", "--compute_dtype", "int8"],
            "invalid choice: 'int8'",
        ),
    ],
)
def test_wrong_words_end_with_exit_code_2(calls, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom vlmtune.cli.verify import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: vlmtune verify")
    assert done.stdout.endswith("0 False\n")


def test_a_right_merge_is_reported(base, tmp_path, capsys):
    adapter, merged = save_adapter(base, tmp_path / "a"), tmp_path / "m"
    merge(["--base", str(base), "--adapter", str(adapter), "--output", str(merged)])
    capsys.readouterr()
    words = ["--base", str(base), "--adapter", str(adapter), "--merged", str(merged)]
    main([*words, "--samples", "2", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "2 samples, 1 with images, logits at 392 positions; computed in float32, merged weights "
        "in bfloat16"
    )
    assert [line.split("  ")[1] for line in lines[2:4]] == [
        "adapter vs base",
        "merged vs base + adapter",
    ]
    assert lines[-2] == "  share of its change in the weights: 1.0000, in 8 tensors"
    assert lines[-1] == "the merged model is base + adapter"


def test_the_report_of_a_wrong_merge_comes_before_its_error(base, tmp_path, capsys):
    adapter, merged = save_adapter(base, tmp_path / "a"), shutil.copytree(base, tmp_path / "m")
    words = ["--base", str(base), "--adapter", str(adapter), "--merged", str(merged)]
    with pytest.raises(ModelError, match="the merge lost the adapter: all 8 tensors"):
        main([*words, "--samples", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "  share of the adapter's effect carried over: 0.0000\n" in out
    assert "the merged model is wrong:\n  - the merge lost the adapter: all 8 tensors" in out


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True, "r": 4},
        {"target_modules": ["q_proj"], "modules_to_save": ["vte"], "rank_pattern": {"q_proj": 2}},
    ],
    ids=["dora", "full-part"],
)
def test_merge_verifies_what_it_wrote(base, tmp_path, capsys, config):
    adapter, merged = save_adapter(base, tmp_path / "a", **config), tmp_path / "m"
    words = ["--base", str(base), "--adapter", str(adapter), "--output", str(merged)]
    merge([*words, "--verify"])
    assert "the merged model is base + adapter\n" in capsys.readouterr().out
    assert (merged / "config.json").is_file()


def test_merge_with_weights_verifies_the_sum(base, tmp_path, capsys):
    first = save_adapter(base, tmp_path / "a")
    second = save_adapter(base, tmp_path / "b", seed=1, target_modules=["v_proj", "fc1"])
    adapters = ["--adapter", f"{first}:0.5", "--adapter", f"{second}:-1"]
    merge(["--base", str(base), *adapters, "--output", str(tmp_path / "m"), "--verify"])
    assert "the merged model is base + adapter\n" in capsys.readouterr().out
    words = ["--base", str(base), *adapters[:2], "--merged", str(tmp_path / "m")]
    with pytest.raises(ModelError, match="tensors are further from base \\+ adapter"):
        main([*words, "--samples", "2", "--device", "cpu"])


def test_merge_leaves_nothing_of_a_model_that_is_wrong(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "a")
    words = ["--base", str(base), "--adapter", f"{adapter}:0", "--output", str(tmp_path / "m")]
    with pytest.raises(ModelError, match="the adapter does nothing"):
        merge([*words, "--verify"])
    assert sorted(path.name for path in tmp_path.iterdir() if "m" in path.name) == []
