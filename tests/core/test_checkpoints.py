"""Which checkpoint of a folder a run goes on from, and what a folder says of its run."""

import json

import pytest

from vlmtune.core.checkpoints import latest_checkpoint, run_config
from vlmtune.core.errors import ModelError


def checkpoint(folder, name, complete=True):
    (folder / name).mkdir()
    (folder / name / "model.safetensors").touch()
    if complete:
        (folder / name / "trainer_state.json").write_text("{}", "utf-8")


def test_the_highest_step_counts_not_the_text_of_its_name(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20"):
        checkpoint(tmp_path, name)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_checkpoint_without_its_state_is_not_taken(tmp_path):
    checkpoint(tmp_path, "checkpoint-3")
    checkpoint(tmp_path, "checkpoint-6", complete=False)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_other_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-best", "checkpoint-4-old", "my-checkpoint-5", ".partial-checkpoint"):
        checkpoint(tmp_path, name)
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"vlmtune_run.json": {"config": {"thinking": "as_is"}, "step": 3}}, {"thinking": "as_is"}),
        ({"vlmtune_merge.json": {"run": {"thinking": "as_is"}}}, {"thinking": "as_is"}),
        ({"vlmtune_merge.json": {"onto": "original"}}, {}),
    ],
)
def test_a_run_is_read_from_its_file_or_from_that_of_the_merge(files, expected, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), "utf-8")
    assert run_config(tmp_path) == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"config": []}'])
def test_a_broken_run_file_is_named(content, tmp_path):
    (tmp_path / "vlmtune_run.json").write_text(content, "utf-8")
    with pytest.raises(ModelError, match=r"vlmtune_run\.json:\n  is no file of a run"):
        run_config(tmp_path)
