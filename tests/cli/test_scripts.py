"""The shell scripts, with `srun` and `scontrol` stand-ins where there is no SLURM."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

# Runs the command once per node, as srun does with one task each, and passes signals on.
SRUN = """
words, flags = sys.argv[1:], []
while words[0].startswith("--"):
    flags.append(words.pop(0))
record("srun", flags)
nodes = []
signal.signal(signal.SIGUSR1, lambda *_: [node.send_signal(signal.SIGUSR1) for node in nodes])
for node in range(int(os.environ["SLURM_NNODES"])):
    nodes.append(subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(node)}))
sys.exit(max(node.wait() for node in nodes))
"""
SCONTROL = """
record("scontrol", sys.argv[1:])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\nsecond.node")
"""
# In place of the interpreter: what it was asked to run, and where.
PYTHON = """
names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SRUN_CPUS_PER_TASK")
record("python", sys.argv[1:], {name: os.environ.get(name) for name in names})
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""
JOB = {
    "SLURM_JOB_ID": "40123",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "4",
}


@pytest.fixture
def stubs(tmp_path):
    """A folder for PATH with the stand-ins; each call of one is a line of calls.jsonl."""
    head = (
        f"#!{sys.executable}\nimport json, os, signal, subprocess, sys\n"
        "def record(*call):\n"
        f"    with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as calls:\n"
        "        calls.write(json.dumps(call) + '\\n')\n"
    )
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in ("srun", SRUN), ("scontrol", SCONTROL), ("stub-python", PYTHON):
        (folder / name).write_text(head + body)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def script(stubs, tmp_path):
    """`script(name, *words, VARIABLE=value)` runs one with a recording interpreter; returns the
    finished process and the calls of each stand-in."""

    def run(name, *words, **environment):
        done = subprocess.run(
            [f"scripts/{name}", *words],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": f"{stubs}:{os.environ['PATH']}",
                "PYTHON": str(stubs / "stub-python"),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        file = tmp_path / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        calls: dict[str, list] = {"python": [], "srun": [], "scontrol": []}
        for stub, *call in map(json.loads, lines):
            calls[stub].append(call)
        return done, calls

    return run


def words_of(calls):
    return [words for words, _ in calls["python"]]


LAUNCH = ["-m", "vlmtune.cli.launch"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["r.json", "all"], ["r.json", "--stage", "all"]),
        (
            ["r.json", "stage2", "4", "trl", "--seed", "1", "--note=a b"],
            ["r.json", "4", "trl", "--stage", "stage2", "--seed", "1", "--note=a b"],
        ),
    ],
)
def test_stage_configs_asks_the_launcher_for_a_stage(script, words, asked):
    done, calls = script("stage_configs.sh", *words)
    assert done.returncode == 0, done.stderr
    assert words_of(calls) == [[*LAUNCH, *asked]]


def test_llm_model_and_vit_model_are_the_parts_stage_1_starts_from(script):
    _, calls = script("stage_configs.sh", "r.json", "all", "2", LLM_MODEL="l m", VIT_MODEL="v")
    parts = ["--model_path=", "--llm_name_or_path=l m", "--vit_name_or_path=v"]
    assert words_of(calls) == [[*LAUNCH, "r.json", "2", "--stage", "all", *parts]]


def test_stage_configs_without_a_stage_tells_its_usage(script):
    done, calls = script("stage_configs.sh", "r.json")
    assert done.returncode == 1
    assert done.stderr.startswith("scripts/stage_configs.sh RECIPE stage1|stage2|stage3|all [N]")
    assert calls["python"] == []


def test_the_official_recipe_runs_the_9b_preset_with_trl(script):
    _, calls = script("run_ovis2_5_sft.sh", "4", "--seed", "1")
    [[*launch, preset, mode, processes, flag, seed]] = words_of(calls)
    assert (ROOT / preset).resolve() == ROOT / "configs/presets/ovis2_5_full.json"
    assert (launch, mode, processes, flag, seed) == (LAUNCH, "trl", "4", "--seed", "1")


def test_slurm_runs_one_launcher_on_each_node(script):
    done, calls = script("slurm_train.sh", "c.json", "8", "trl", "--seed", "1", **JOB)
    assert done.returncode == 0, done.stderr
    asked = [*LAUNCH, "c.json", "8", "trl", "--seed", "1"]
    node = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "20123",
        "SRUN_CPUS_PER_TASK": "4",
    }
    calls["python"].sort(key=lambda call: call[1]["NODE_RANK"])
    assert calls["python"] == [[asked, {**node, "NODE_RANK": rank}] for rank in "01"]
    assert calls["srun"] == [[["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300"]]]
    assert calls["scontrol"] == [[["show", "hostnames", "node[1-2]"]]]


@pytest.mark.parametrize(("code", "requeued"), [("75", True), ("1", False), ("0", False)])
@pytest.mark.parametrize("name", ["slurm_train.sh", "slurm_stages.sh"])
def test_a_job_that_was_stopped_goes_back_into_the_queue(script, name, code, requeued):
    done, calls = script(name, "r.json", "all", ENDS_WITH=code, **JOB)
    assert done.returncode == int(code)
    assert ([["requeue", "40123"]] in calls["scontrol"]) == requeued


def test_a_job_back_from_the_queue_resumes(script):
    _, calls = script("slurm_train.sh", "c.json", "--seed", "1", SLURM_RESTART_COUNT="2", **JOB)
    resumed = [*LAUNCH, "c.json", "--seed", "1", "--resume_from_checkpoint", "auto"]
    assert words_of(calls) == [resumed, resumed]


def test_stages_resume_by_themselves(script):
    _, calls = script("slurm_stages.sh", "r.json", "all", "8", SLURM_RESTART_COUNT="2", **JOB)
    assert words_of(calls) == [[*LAUNCH, "r.json", "8", "--stage", "all"]] * 2


@pytest.mark.parametrize("flag", ["--overwrite_output_dir", "--overwrite-output-dir=true"])
@pytest.mark.parametrize("words", [("slurm_stages.sh", "r.json", "all"), ("slurm_train.sh", "c")])
def test_jobs_that_would_begin_anew_after_each_stop_are_refused(script, words, flag):
    done, calls = script(*words, flag, **JOB)
    assert done.returncode == 1
    assert "Fix: remove the old folders instead." in done.stderr
    assert calls["srun"] == []


@pytest.mark.parametrize("name", ["slurm_train.sh", "slurm_stages.sh"])
def test_slurm_is_asked_to_warn_before_the_end_and_to_allow_requeueing(name):
    asked = [
        line.removeprefix("#SBATCH ")
        for line in (ROOT / "scripts" / name).read_text("utf-8").splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert {"--requeue", "--signal=USR1@300", "--open-mode=append", "--ntasks-per-node=1"} <= {
        *asked
    }


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_every_script_can_be_run(path):
    assert path.stat().st_mode & 0o111


@pytest.mark.slow
def test_two_nodes_meet_are_stopped_and_go_on_to_the_saved_model(stubs, tmp_path, checkpoint):
    """Two launchers with a process each train one model: stopped by a signal, the job is put back
    in the queue, and its second start resumes."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    records = [{"id": i, "conversations": turns} for i in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    start, out = checkpoint(), tmp_path / "out"
    keys = {"model_path": start, "data_path": tmp_path / "train.json", "output_dir": out}
    keys |= {"per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none"}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    environment = {
        **os.environ,
        **JOB,
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
    }

    def job(*more, **changes):
        return subprocess.Popen(
            ["scripts/slurm_train.sh", "1", "trl", *words, *more],
            cwd=ROOT,
            env={**environment, **changes},
            stderr=subprocess.PIPE,
            text=True,
        )

    first = job("--max_steps", "3000")
    while not (out / "log.jsonl").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.1)
    srun = next(pid for pid in children(first.pid) if "srun" in command(pid))
    os.kill(srun, signal.SIGUSR1)
    told = first.communicate(timeout=120)[1]
    assert first.returncode == 75, told
    assert "2 per device x 1 accumulation x 2 processes" in told
    [saved] = out.glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    calls = (tmp_path / "calls.jsonl").read_text().splitlines()
    assert json.loads(calls[-1]) == ["scontrol", ["requeue", "40123"]]

    second = job("--max_steps", str(step + 2), SLURM_RESTART_COUNT="1")
    told = second.communicate(timeout=120)[1]
    assert second.returncode == 0, told
    assert f"resumes from {saved}" in told
    state = json.loads((out / "trainer_state.json").read_text("utf-8"))
    assert state["global_step"] == step + 2
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
