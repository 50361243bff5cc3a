"""`vlmtune validate`: with a config, and as a command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.cli.main import main


def record(identity: str, question: str, answer: str, **rest) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "conversations": turns, **rest}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def to_file(name: str, content: Any) -> str:
        Path(name).write_text(json.dumps(content), "utf-8")
        return name

    return to_file


@pytest.fixture
def config(write, checkpoint):
    """`config(key=value)` names a config file for three files of records."""
    Path("pictures").mkdir()
    Image.new("RGB", (64, 48)).save("pictures/a.png")
    long = "word " * 300
    write("train.json", [
        record("fits", "<image>What?", "A cat.", image="a.png"),
        record("cut", "Why?", long),
        record("lost", long, "Yes."),
        record("held", "Who?", "I."),
        record("bad", long, ""),
    ])  # fmt: skip
    write("eval.json", [record("other", "Who?", "I.")])
    settings = {
        "model_path": str(checkpoint()),
        "data_path": "train.json",
        "image_folder": "pictures",
        "output_dir": "out",
        "text_max_length": 64,
    }

    def make(**changes: Any) -> str:
        return write("config.json", {**settings, **changes})

    return make


def findings(words: list[str]) -> tuple[int, list[tuple[str, str, str]]]:
    """Exit code, and code, file and id of every finding."""
    Path("report.json").unlink(missing_ok=True)
    code = main(["validate", *words, "--report", "report.json"])
    report = json.loads(Path("report.json").read_text("utf-8"))
    return code, [(f["code"], f["file"], f["id"]) for f in report["findings"]]


OF_LENGTH = [("too-long", "train.json", "cut"), ("no-supervision", "train.json", "lost")]
IN_EVAL = ("sample-in-eval", "train.json", "held")
BAD = ("answer-empty", "train.json", "bad")


def test_config_names_the_data_and_the_limits(config, capsys):
    path = config(eval_data_path="eval.json")
    assert findings(["--config", path]) == (1, [*OF_LENGTH, IN_EVAL, BAD])
    path = config(eval_data_path={"mine": "eval.json"}, text_max_length=4096)
    assert findings(["--config", path]) == (1, [IN_EVAL, BAD])


def test_flags_win_over_the_config(config, write, capsys):
    path = config(eval_data_path="eval.json")
    write("mine.json", [record("a", "<image>What?", "A cat.", image="a.png")])
    assert findings(["mine.json", "--config", path]) == (0, [])
    Path("empty").mkdir()
    missing = ("image-missing", "mine.json", "a")
    assert findings(["mine.json", "empty", "--config", path]) == (1, [missing])
    words = ["--config", path, "--eval_data_path", "mine.json"]
    shared = ("sample-in-eval", "train.json", "fits")
    assert findings(words) == (1, [shared, *OF_LENGTH, BAD])


def test_stage_of_a_recipe_is_checked_by_name(config, write, checkpoint, capsys):
    recipe = {
        "model_path": str(checkpoint()),
        "output_dir": "out",
        "image_folder": "pictures",
        "stages": [
            {"name": "one", "data_path": "eval.json"},
            {"name": "two", "data_path": "train.json"},  # with the model that "one" starts from
        ],
    }
    config()
    path = write("recipe.json", recipe)
    assert findings(["--config", path, "--stage", "one"]) == (0, [])
    assert findings(["--config", path, "--stage", "two"]) == (1, [BAD])
    for words in ([], ["--stage", "all"], ["--stage", "three"]):
        assert main(["validate", "--config", path, *words]) == 2
        assert "ConfigError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_path": "/none/here"}, "there is no such folder"),
        ({"data_path": "none.json"}, "there is no such file"),
        ({"image_foldr": "x"}, "unknown key"),
        (
            {"model_path": None, "llm_name_or_path": "a", "vit_name_or_path": "b"},
            "the model is built when the run starts",
        ),
    ],
)
def test_config_that_cannot_be_used_ends_in_two(config, capsys, changes, what):
    assert main(["validate", "--config", config(**changes)]) == 2
    assert what in capsys.readouterr().err


def test_command_gives_its_exit_code_and_never_imports_torch(write):
    write("good.json", [record("a", "Hi", "Yes.")])
    write("bad.json", [record("a", "Hi", "")])
    code = (
        "import sys\nfrom vlmtune.cli.main import main\n"
        "codes = [main(['validate', *words]) for words in\n"
        " (['good.json'], ['bad.json'], ['no.json'], ['good.json', '--config', 'no.json'])]\n"
        "print(codes, sorted({'torch', 'numpy', 'PIL', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 1, 2, 2] []", done.stderr
