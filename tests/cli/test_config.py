"""`vlmtune config` prints the schema or one key."""

import json

import pytest

from vlmtune.cli.main import main
from vlmtune.configs.explain import explain, schema


def test_schema_is_printed_as_json(capsys):
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


@pytest.mark.parametrize("key", ["lr_scheduler_type", "lr-scheduler-type"])
def test_a_key_is_explained_however_it_is_spelled(key, capsys):
    assert main(["config", "--explain", key]) == 0
    assert capsys.readouterr().out == explain("lr_scheduler_type") + "\n"


def test_an_unknown_key_is_one_error_with_the_nearest(capsys):
    assert main(["config", "--explain", "lerning_rate"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(
        'ConfigError: command line:\n  unknown key "lerning_rate".\n'
        '  Fix: did you mean "learning_rate"'
    )


@pytest.mark.parametrize("words", [[], ["--schema", "--explain", "seed"], ["--explain"]])
def test_one_of_the_two_is_asked_for(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["config", *words])
    assert stopped.value.code == 2
    assert "usage: vlmtune config" in capsys.readouterr().err
