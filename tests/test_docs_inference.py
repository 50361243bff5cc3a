"""docs/inference.md and docs/evaluation.md: their Python runs, their commands are understood."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from vlmtune.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
TALKING, SCORING, README = (
    (ROOT / page).read_text("utf-8")
    for page in ("docs/inference.md", "docs/evaluation.md", "README.md")
)
LINES = re.findall(
    r"^(?:\$ |    )(?:torchrun .* )?vlmtune (infer|chat|serve-ui|evaluate) (.*)$",
    f"{TALKING}\n{SCORING}\n{README}".replace("\\\n", " "),
    re.MULTILINE,
)


def python_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("command", "words"), LINES)
def test_every_command_of_the_pages_is_understood(command, words):
    module, _ = COMMANDS[command]
    import_module(f"vlmtune.cli.{module}")._parser().parse_args(shlex.split(words, comments=True))


def test_the_pages_have_commands_of_every_kind():
    assert {command for command, _ in LINES} == {"infer", "chat", "serve-ui", "evaluate"}


def test_python_of_the_evaluation_page_prints_what_it_says(capsys):
    [example] = python_of(SCORING)
    exec(example, {})
    assert capsys.readouterr().out.startswith("0.5 4.109\n[4.46")


def test_python_of_the_inference_page_runs(fluent_ovis, capsys):
    talking, loading, tools = python_of(TALKING)
    compile(loading, "docs/inference.md", "exec")  # its models are not here
    for written, here in (
        ("outputs/quickstart/model", fluent_ovis),
        ("sample_data/images", fluent_ovis / "images"),
    ):
        assert written in talking
        talking = talking.replace(written, str(here))
    exec(talking + tools, {})
    printed = capsys.readouterr().out
    assert printed.startswith("It is a four.\nThe first shows 6, the second shows 5.\n")
    assert "['stop', 'error', 'stop']\n2 stop 4\n0 []\n" in printed
