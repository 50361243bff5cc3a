"""Which checkpoint of a folder a run goes on from."""

from vlmtune.core.checkpoints import latest_checkpoint


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
