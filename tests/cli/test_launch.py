"""`train_launch.sh [CONFIG] [N] [standard|trl] [--key value ...]`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmtune.cli.launch import main, parse_launch

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


@pytest.mark.parametrize(("variable", "value"), [("NNODES", "two"), ("MASTER_PORT", "0")])
def test_number_of_machines_or_port_that_is_none_is_refused(variable, value):
    done = launch("configs/presets/quickstart.json", "1", "trl", **{variable: value})
    assert done.returncode == 1
    assert f'environment variable {variable}:\n  is "{value}".' in done.stderr


def test_config_error_is_told_once_before_processes_start():
    done = launch("configs/presets/quickstart.json", "2", "trl", "--learnin_rate", "1")
    assert done.returncode == 1
    assert done.stderr.count("ConfigError") == 1
    assert "Traceback" not in done.stderr


def test_recipe_without_a_stage_lists_them():
    done = launch("configs/recipes/tiny_three_stage.json", "2")
    assert done.returncode == 1
    assert "Fix: add --stage stage1 or --stage stage2 or --stage stage3" in done.stderr


def test_finished_stage_starts_no_process(tmp_path):
    (tmp_path / "stage1").mkdir()
    for name in ("config.json", "vlmtune_run.json"):
        (tmp_path / "stage1" / name).write_text("{}")
    recipe = "configs/recipes/tiny_three_stage.json"
    done = launch(recipe, "2", "--stage", "stage1", "--output_dir", str(tmp_path))
    assert done.returncode == 0
    assert done.stderr == (
        f"stage1 is finished: {tmp_path}/stage1. Again: --overwrite_output_dir true\n"
    )


WORKER = """
import os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
does = (here / "does").read_text()
def heard(number, frame):
    (here / f"heard{rank}").write_text(signal.Signals(number).name)
    while len(list(here.glob("heard*"))) < world:  # as ranks save together
        time.sleep(0.01)
    sys.exit(75)
if does == "save":
    signal.signal(signal.SIGUSR1, heard)
if does == "fail":
    sys.exit(3)
(here / f"ready{rank}").touch()
time.sleep(100)
"""


@pytest.fixture
def workers(tmp_path):
    """`workers(does)` is a launcher with two workers under torchrun, all of them ready."""
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def start(does):
        (tmp_path / "does").write_text(does)
        worker = str(tmp_path / "worker.py")
        code = (
            "import sys; from vlmtune.cli.launch import torchrun; "
            f"sys.exit(torchrun(2, 1, 29500, [{worker!r}], False))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        deadline = time.monotonic() + 60
        while does != "fail" and len(list(tmp_path.glob("ready*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_becomes_sigusr1_of_every_worker_and_exit_code_75(workers, tmp_path, number):
    process = workers("save")
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert [(tmp_path / f"heard{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2


@pytest.mark.slow
def test_workers_that_a_signal_ends_before_they_listen_can_be_resumed_too(workers):
    process = workers("sleep")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


@pytest.mark.slow
def test_a_failing_worker_is_exit_code_1(workers):
    assert workers("fail").wait(timeout=60) == 1


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_with_its_signal(workers, tmp_path):
    (tmp_path / "worker.py").write_text("import os; os.kill(os.getpid(), 9)")
    process = workers("fail")
    assert process.wait(timeout=60) == 1
    assert "was killed by signal 9" in process.stderr.read()


@pytest.mark.slow
def test_ctrl_c_ends_launcher_and_workers(workers):
    process = workers("sleep")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert "SignalException" not in process.stderr.read()


@pytest.mark.slow
def test_without_config_file_count_and_gpu_one_process_trains(
    checkpoint, tmp_path, monkeypatch, capsys
):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    words = ["--model_path", checkpoint(), "--data_path", tmp_path / "train.json", "--max_steps=1"]
    words += ["--output_dir", tmp_path / "out", "--report_to", "none", "--use_cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["trl", *map(str, words)]) == 0
    told = capsys.readouterr().err
    assert "8 per device x 1 accumulation x 1 processes" in told
    assert "trainer  trl" in told
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
@pytest.mark.long
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
