"""`vlmtune models build-ovis2_5`: its flags, and errors before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.cli.build import main
from vlmtune.core.errors import ModelError


@pytest.fixture
def calls(monkeypatch) -> list:
    found = []
    monkeypatch.setattr(
        "vlmtune.models.ovis2_5.build.build_ovis2_5",
        lambda *given, **keys: found.append((given, keys)),
    )
    return found


def test_flags_reach_the_builder(calls, capsys):
    main(
        [
            *("--llm", "microsoft/DialoGPT-medium", "--output", "out", "--vit", "tower"),
            *("--chat_template", "chat.jinja", "--visual_vocab_size", "1024", "--seed", "7"),
        ]
    )
    keys = {"chat_template": "chat.jinja", "visual_vocab_size": 1024, "seed": 7}
    assert calls == [(("microsoft/DialoGPT-medium", "tower", Path("out")), keys)]
    assert capsys.readouterr().out == (
        "out: an untrained Ovis2.5 of microsoft/DialoGPT-medium and tower\n"
    )


def test_defaults_are_the_published_sizes(calls):
    main(["--llm", "a", "--vit", "b", "--output", "c"])
    [(_, keys)] = calls
    assert keys == {"chat_template": None, "visual_vocab_size": 65536, "seed": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--llm", "a", "--output", "c"], "the following arguments are required: --vit"),
        (
            ["--llm", "a", "--vit", "b", "--output", "c", "--lm", "d"],
            "unrecognized arguments: --lm",
        ),
        (["--llm", "a", "--vit", "b", "--output", "c", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_words_end_with_exit_code_2(calls, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(["--llm", "a", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_missing_source_is_a_model_error(tmp_path):
    words = ["--llm", str(tmp_path / "gone"), "--vit", "b", "--output", str(tmp_path / "out")]
    with pytest.raises(ModelError, match=r"language model .*gone:\n  cannot be read"):
        main(words)
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom vlmtune.cli.build import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: vlmtune models build-ovis2_5")
    assert done.stdout.endswith("0 False\n")
