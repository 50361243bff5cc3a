"""A tiny Ovis2.5 on disk, and runs of the real command on it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESET = "configs/presets/quickstart.json"


@pytest.fixture(scope="session")
def tiny_ovis(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "ovis2_5"
    script = runpy.run_path(str(ROOT / "scripts/make_tiny_ovis2_5.py"))
    script["build"](ROOT / "sample_data/train.json", folder)
    return folder


@pytest.fixture(scope="session")
def launch(tiny_ovis, tmp_path_factory):
    """`launch(processes, mode, name, key=value, ...)` trains through scripts/train_launch.sh on
    the sample data and returns the finished process and the output folder."""

    def run(processes: int = 1, mode: str = "trl", name: str = "out", **keys):
        folder = tmp_path_factory.mktemp("run") / name
        settings = {
            "model_path": tiny_ovis,
            "output_dir": folder,
            "eval_data_path": None,
            "report_to": "none",
            "logging_steps": 1,
            "warmup_steps": 0,
            **keys,
        }
        words = [w for k, v in settings.items() if v is not None for w in (f"--{k}", str(v))]
        if settings["eval_data_path"] is None:
            words += ["--eval_data_path", "[]"]
        done = subprocess.run(
            ["scripts/train_launch.sh", PRESET, str(processes), mode, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return done, folder

    return run


@pytest.fixture
def losses():
    def read(folder: Path) -> list[float]:
        lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
        return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]

    return read
