"""What `make quickstart` runs after the install, with its own score as the judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# 8 epochs instead of the 20 of the preset are enough for the target.
@pytest.mark.slow
@pytest.mark.parametrize("epochs", [8, pytest.param(20, marks=pytest.mark.long)])
def test_quickstart_reads_nine_in_ten_held_out_digits(epochs, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def run(*words):
        done = subprocess.run(
            [str(word) for word in words], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout
        return done.stdout

    tiny, model = tmp_path / "tiny", tmp_path / "model"
    run(sys.executable, "scripts/make_tiny_ovis2_5.py", "--output", tiny)
    preset = "configs/presets/quickstart.json"
    flags = ["--model_path", tiny, "--output_dir", model, "--num_train_epochs", epochs]
    run("scripts/train_launch.sh", preset, "1", "trl", *flags)
    printed = run(sys.executable, "scripts/score_quickstart.py", "--model", model)

    score = json.loads((model / "score.json").read_text("utf-8"))
    assert score["questions"] == 100
    assert score["exact_match"] >= 0.90
    assert f"= {score['exact_match']:.2f}" in printed
    assert str(model) in printed
    rows = json.loads((model / "predictions.json").read_text("utf-8"))
    assert sum(row["said"] == row["expected"] for row in rows) == score["exact_match"] * 100
    assert list((model / "runs").rglob("events.out.tfevents.*"))
