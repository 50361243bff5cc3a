"""`train_launch.sh [CONFIG] [N] [standard|trl] [--key value ...]`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.cli.launch import parse_launch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "processes", "train_words"),
    [
        (["c.json", "4", "trl"], 4, ["c.json", "--trainer", "trl"]),
        (["c.json", "2"], 2, ["c.json"]),
        (["c.json"], 0, ["c.json"]),
        (["c.json", "standard", "2"], 2, ["c.json", "--trainer", "standard"]),
        (["c.json", "0", "trl", "--seed", "1"], 0, ["c.json", "--trainer", "trl", "--seed", "1"]),
        (["4", "trl", "--seed", "1"], 4, ["--trainer", "trl", "--seed", "1"]),
        (["c.json", "1", "--trainer", "trl"], 1, ["c.json", "--trainer", "trl"]),
        (["--max_steps", "4"], 0, ["--max_steps", "4"]),
    ],
)
def test_words_are_sorted_into_processes_mode_and_training(words, processes, train_words):
    launch = parse_launch(words)
    assert (launch.processes, launch.train_words) == (processes, train_words)


def launch(*words, **environment):
    return subprocess.run(
        ["scripts/train_launch.sh", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_is_the_usage():
    done = launch("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("`train_launch.sh [CONFIG] [N] [standard|trl]")


def test_number_of_machines_that_is_none_is_refused():
    done = launch("configs/presets/quickstart.json", "1", "trl", NNODES="two")
    assert done.returncode == 1
    assert 'environment variable NNODES:\n  is "two".' in done.stderr


def test_config_error_is_told_once_before_processes_start():
    done = launch("configs/presets/quickstart.json", "2", "trl", "--learnin_rate", "1")
    assert done.returncode == 1
    assert done.stderr.count("ConfigError") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_config_file_count_and_gpu_one_process_trains(checkpoint, tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    words = ["--model_path", checkpoint(), "--data_path", tmp_path / "train.json", "--max_steps=1"]
    words += ["--output_dir", tmp_path / "out", "--report_to", "none", "--use_cpu"]
    done = launch("trl", *map(str, words), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "8 per device x 1 accumulation x 1 processes" in done.stderr
    assert "trainer  trl" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_data_error_under_torchrun_is_told_once_without_a_traceback(checkpoint, tmp_path):
    (tmp_path / "train.json").write_text('[{"id": 1, "conversations": []}]')
    words = ["--model_path", checkpoint(), "--data_path", tmp_path / "train.json"]
    words += ["--output_dir", tmp_path / "out"]
    done = launch("2", "trl", *map(str, words))
    assert done.returncode == 1
    assert done.stderr.count("DataError") == 1
    assert 'record 1 (id "1"), conversations:\n  is empty.' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_nodes_and_master_address_of_the_environment_are_respected(checkpoint, tmp_path):
    """Two launches on this machine, each one node with one process, meet at MASTER_PORT."""
    (tmp_path / "train.json").write_text('[{"id": 1, "conversations": []}]')
    words = ["1", "trl", "--model_path", str(checkpoint())]
    words += ["--data_path", str(tmp_path / "train.json"), "--output_dir", str(tmp_path / "out")]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29611",
    }
    nodes = [
        subprocess.Popen(
            ["scripts/train_launch.sh", *words],
            cwd=ROOT,
            env={**environment, "NODE_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1]
    # Each machine checks its own copy of the data, so each tells of the bad record.
    assert all('record 1 (id "1"), conversations' in error for error in errors)
