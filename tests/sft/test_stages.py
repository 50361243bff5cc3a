"""The tiny three-stage recipe through scripts/stage_configs.sh, for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = "configs/recipes/tiny_three_stage.json"


@pytest.fixture(scope="module")
def stages(tiny_ovis, tmp_path_factory):
    """`stages(name)` runs one stage or all in one folder, which is `stages.folder`; the flags are
    `stages.words`."""
    folder = tmp_path_factory.mktemp("stages") / "out"
    keys = {"model_path": tiny_ovis, "output_dir": folder, "report_to": "none"}
    keys |= {"max_steps": 2, "save_steps": 1, "save_total_limit": 2}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]

    def run(name):
        return subprocess.run(
            ["scripts/stage_configs.sh", RECIPE, name, "1", "trl", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )

    run.folder, run.words = folder, words
    return run


def moved(before: Path, after: Path) -> set[str]:
    """The parts of the model whose weights differ."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}


@pytest.fixture(scope="module")
def early(stages):
    """The third stage, asked for before another is trained."""
    return stages("stage3")


@pytest.fixture(scope="module")
def trained(early, stages, ranks):
    """All stages are trained, each by a command of its own."""
    for name in ("stage1", "stage2", "stage3"):
        words = ["train", RECIPE, "--stage", name, "--trainer", "trl", *stages.words]
        run = ranks(words, stages.folder / name)
        assert run.codes() == [0], run.told.read_text()


def test_a_stage_asked_for_before_the_one_it_starts_from_names_it(early, stages):
    assert early.returncode == 1
    assert f"starts from stage2, and {stages.folder}/stage2 holds no finished model" in early.stderr
    assert f"Fix: train stage2 first: vlmtune train {RECIPE} --stage stage2" in early.stderr
    assert "Traceback" not in early.stderr


def test_each_stage_starts_from_the_one_before_and_moves_its_own_modules(
    trained, stages, tiny_ovis
):
    one, two, three = (stages.folder / f"stage{n}" for n in (1, 2, 3))
    assert moved(tiny_ovis, one) == {"visual_tokenizer"}
    assert moved(one, two) == {"visual_tokenizer", "vte"}
    assert moved(two, three) == {"visual_tokenizer", "vte", "llm"}
    used = json.loads((three / "vlmtune_run.json").read_text("utf-8"))["config"]
    assert used["model_path"] == str(two)
    assert (used["learning_rate"], used["train_modules"]) == (5e-4, "all")


def test_a_rerun_trains_nothing(trained, stages):
    before = {f: f.stat().st_mtime_ns for f in stages.folder.rglob("*") if f.is_file()}
    done = stages("all")
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if "is finished" in line]
    assert [line.split()[0] for line in lines] == ["stage1", "stage2", "stage3"]
    assert {f: f.stat().st_mtime_ns for f in stages.folder.rglob("*") if f.is_file()} == before


def test_a_lost_stage_is_resumed_from_its_checkpoint_and_the_next_is_trained_again(trained, stages):
    two, three = stages.folder / "stage2", stages.folder / "stage3"
    lost = load_file(two / "model.safetensors")
    for name in ("config.json", "model.safetensors"):
        (two / name).unlink()
    shutil.rmtree(two / "checkpoint-2")
    before = (three / "config.json").stat().st_mtime_ns
    done = stages("all")
    assert done.returncode == 0, done.stderr
    assert "stage1 is finished" in done.stderr
    assert f"note: stage2 resumes from {two}/checkpoint-1" in done.stderr
    assert "stage3 is trained again: it is older than the model it starts from" in done.stderr
    found = load_file(two / "model.safetensors")
    assert all(torch.equal(found[name], lost[name]) for name in lost)
    assert (three / "config.json").stat().st_mtime_ns > before
