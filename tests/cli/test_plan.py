"""`vlmtune plan` as it is typed: what it prints, what it refuses, and how fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.cli.main import main
from vlmtune.cli.plan import main as plan
from vlmtune.core.errors import ConfigError, DataError, ModelError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(checkpoint, tmp_path, monkeypatch) -> Path:
    """A config of four samples and a model folder without weights, in the working directory."""
    model = checkpoint()
    (model / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]
    records = [{"id": f"r{n}", "conversations": turns} for n in range(4)]
    Path("train.json").write_text(json.dumps(records), "utf-8")
    keys = {"model_path": str(model), "data_path": "train.json", "output_dir": "out"}
    keys |= {"per_device_train_batch_size": 1, "logging_steps": 1}
    file = Path("run.json")
    file.write_text(json.dumps(keys), "utf-8")
    return file


def test_plan_in_words(config, capsys):
    plan([str(config), "--gpus", "2", "--num_train_epochs=2", "--save-strategy", "no"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Plan of run.json: ") and lines[0].endswith(" on 2 GPUs of 80 GB")
    text = "\n".join(lines)
    assert "  memory   a run without DeepSpeed fits: " in text
    assert "  steps    4 in 2 epochs, 0 of them warmup; each of 2 samples = 1 per GPU x 1 " in text
    assert "  command line:\n    num_train_epochs             2" in text
    assert "\n  * none  " in text and "\n    zero3_offload_all  " in text
    assert "\n  * group_by_length     0.0%" in text
    assert lines[-1] == "Doubts: none"
    assert not any(line != line.rstrip() for line in lines)
    assert not Path("out").exists()


def test_plan_as_json_and_as_a_page(config, capsys):
    plan([str(config), "--gpus", "2", "--json", "--html", "plan.html", "--gpu-memory", "24"])
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["gpu_memory"], found["steps"]["total"]) == (2, 24 * 10**9, 6)
    assert [s["key"] for s in found["settings"]][:2] == ["model_path", "data_path"]
    assert Path("plan.html").read_text("utf-8").startswith("<!doctype html>")
    with pytest.raises(ConfigError, match=r"plan\.html:\n  exists already"):
        plan([str(config), "--html", "plan.html"])
    with pytest.raises(ConfigError, match="there is no folder nowhere"):
        plan([str(config), "--html", "nowhere/plan.html"])


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["--gpus", "0"], ConfigError, "command line, gpus:\n  is 0.\n  Fix: give 1 or more."),
        (["--mfu", "40"], ConfigError, "mfu:\n  is 40.\n  Fix: give a share, such as 0.4 for 40 %"),
        (["--gpu_memory", "nan"], ConfigError, "gpu_memory:\n  is nan."),
        (["--gpu", "8"], ConfigError, "unknown flag --gpu.\n  Fix: did you mean --gpus?"),
        (["--streaming", "--max_steps", "3"], ConfigError, "streaming:\n  is true"),
        (["--do_train", "false"], ConfigError, "do_train:\n  is false"),
        (["--data_path", "no.json"], DataError, "no.json:\n  there is no such file"),
        (["--eval_data_path", '{"a": "no.json"}'], DataError, "no.json:\n  there is no such file"),
        (["--model_path", "./no"], ModelError, "/no:\n  there is no such folder"),
        (["--model_path", "no"], ModelError, "/no:\n  there is no such folder"),
        (["--lerning_rate", "1"], ConfigError, 'unknown key "lerning_rate"'),
    ],
)
def test_what_is_refused(config, words, kind, message):
    with pytest.raises(kind) as error:
        plan([str(config), *words])
    assert message in str(error.value)


def test_model_that_is_built_when_the_run_begins(config):
    with pytest.raises(ConfigError, match="build it with vlmtune models build-ovis2_5"):
        plan(
            [
                *("--llm_name_or_path", "a", "--vit_name_or_path", "b"),
                *("--data_path", "train.json", "--output_dir", "out"),
            ]
        )


def test_later_stage_is_planned_on_the_first_ones_model(config, capsys):
    keys = json.loads(config.read_text("utf-8"))
    stages = [{"name": "one", "train_modules": "vte"}, {"name": "two"}, {"name": "three"}]
    Path("recipe.json").write_text(json.dumps({**keys, "stages": stages}), "utf-8")
    plan(["recipe.json", "--stage", "three", "--gpus", "1"])
    told = capsys.readouterr()
    assert told.out.startswith("Plan of recipe.json, three: ")
    line = f"out/two is not trained yet; its shapes are those of {keys['model_path']}"
    assert f"note: {line}" in told.err
    with pytest.raises(ConfigError, match="Fix: give one of one, two, three"):
        plan(["recipe.json", "--stage", "all"])


def test_help_and_wrong_words(capsys):
    for words, code in ((["--help"], 0), (["--gpus", "eight"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        assert ended.value.code == code
    told = capsys.readouterr()
    assert "vlmtune plan RECIPE --stage NAME" in told.out
    assert "argument --gpus: invalid int value: 'eight'" in told.err


@pytest.mark.parametrize("missing", ["data_path", "model_path"])
def test_what_is_missing_is_told_without_torch(config, missing):
    code = (
        "import sys\nfrom vlmtune.cli.main import main\n"
        f"code = main(['plan', 'run.json', '--{missing}', './nowhere.json'])\n"
        "print(code, *{'torch', 'transformers', 'datasets', 'pyarrow'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert done.stdout == "1\n"
    assert "nowhere.json:\n  there is no such f" in done.stderr
