"""A tiny Ovis2.5 on disk, and runs of the real command on it: `launch` through the launcher,
`forked` and `ranks` in forks of a process that has imported the libraries: seconds less each."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESET = "configs/presets/quickstart.json"
LIMIT = 240
"""Seconds after which a run or a state to wait for counts as hung."""
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# The forked process: of its own session, so that a signal reaches its loader processes too.
CHILD = """
import multiprocessing, os, sys
multiprocessing.set_start_method("fork", force=True)
os.setsid()
os.chdir(root)
os.environ.update(environment)
output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
for stream in (sys.stdout, sys.stderr):
    # Whole lines of several ranks, also with PYTHONUNBUFFERED.
    stream.reconfigure(line_buffering=True, write_through=False)
import torch
torch.set_num_threads(1)
exec(code)
"""
COMMAND = """
from vlmtune.cli.main import main
sys.exit(main(words))
"""


def flags(model: Path, folder: Path, keys: dict) -> list[str]:
    settings = {
        "model_path": model,
        "output_dir": folder,
        "eval_data_path": "[]",
        "report_to": "none",
        "logging_steps": 1,
        "warmup_steps": 0,
        # A process of its own costs more than these small samples.
        "dataloader_num_workers": 0,
        **keys,
    }
    return [w for k, v in settings.items() if v is not None for w in (f"--{k}", str(v))]


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """Sixteen samples, image and text in turn: rank 0 of two has the images, rank 1 the text."""
    records = json.loads((ROOT / "sample_data/train.json").read_text("utf-8"))
    images = [r for r in records if "image" in r][:8]
    text = [r for r in records if "image" not in r][:8]
    file = tmp_path_factory.mktemp("mixed") / "mixed.json"
    pairs = zip(images, text, strict=True)
    file.write_text(json.dumps([r for pair in pairs for r in pair]), "utf-8")
    return file


@pytest.fixture(scope="session")
def launch(tiny_ovis, tmp_path_factory):
    """`launch(processes, mode, name, key=value, ...)` trains through scripts/train_launch.sh on
    the sample data and returns the finished process and the output folder."""

    def run(processes: int = 1, mode: str = "trl", name: str = "out", **keys):
        folder = tmp_path_factory.mktemp("run") / name
        words = [PRESET, str(processes), mode, *flags(tiny_ovis, folder, keys)]
        done = subprocess.run(
            ["scripts/train_launch.sh", *words],
            cwd=ROOT,
            env={**os.environ, **ON_CPU, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        return done, folder

    return run


@pytest.fixture(scope="session")
def fork():
    """`fork(code, told, environment, name=value)` starts Python code with those names in a fork;
    what it prints is appended to the file `told`."""
    context = multiprocessing.get_context("forkserver")
    # Without deepspeed: with it, runs of two ranks hung at their end now and then. In torch 2.13
    # DDP's destructor waits, with the GIL, for a thread of gloo that may need it.
    context.set_forkserver_preload(["vlmtune.sft.train"])
    # Now, while no test has changed the environment; CUDA cannot be used in a fork.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_CPU.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    started = []

    def run(code: str, told: Path, environment: dict[str, str] | None = None, **names):
        given = {"code": code, "told": str(told), "environment": environment or {}, **names}
        told.touch()
        child = context.Process(target=exec, args=(CHILD, {"root": str(ROOT), **given}))
        child.start()
        started.append(child)
        return child

    yield run
    for child in started:
        if child.is_alive():
            child.kill()


class Run:
    """A run of `vlmtune train` on one or more processes."""

    def __init__(self, folder: Path, told: Path, processes: list):
        self.folder, self.told, self.processes = folder, told, processes

    def logged(self) -> int:
        log = self.folder / "log.jsonl"
        lines = log.read_text("utf-8").splitlines(keepends=True) if log.exists() else []
        return max((json.loads(li)["step"] for li in lines if li.endswith("\n")), default=0)

    def wait_for(self, state: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT
        while not state():
            assert time.monotonic() < limit, self.told.read_text()
            assert all(p.is_alive() for p in self.processes), self.told.read_text()
            time.sleep(0.002)

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for i, process in enumerate(self.processes):
            if ranks is None or i in ranks:
                os.killpg(process.pid, number)

    def codes(self) -> list[int]:
        for process in self.processes:
            process.join(LIMIT)
        return [process.exitcode for process in self.processes]

    def kill_after(self, step: int) -> None:
        """SIGKILL for every process and loader of the run, once `step` is logged."""
        self.wait_for(lambda: self.logged() >= step)
        self.signal(signal.SIGKILL)
        assert self.codes() == [-signal.SIGKILL] * len(self.processes)


@pytest.fixture(scope="session")
def ranks(fork, tmp_path_factory):
    """`ranks(words, folder, processes)` starts `vlmtune` with these words as a `Run` with that
    output folder, with the environment of torchrun; `before` is Python run in each first."""

    def start(words: list[str], folder: Path, processes: int = 1, before: str = "") -> Run:
        told = tmp_path_factory.mktemp("told") / "told.txt"
        known = {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                known = {"MASTER_PORT": str(free.getsockname()[1]), "MASTER_ADDR": "127.0.0.1"}
            known |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        children = []
        for i in range(processes):
            own = {"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {}
            children.append(fork(before + COMMAND, told, {**known, **own}, words=words))
        return Run(folder, told, children)

    return start


@pytest.fixture(scope="session")
def forked(tiny_ovis, ranks, tmp_path_factory):
    """`launch` without the launcher, with one text for all that the ranks print; `before` is Python
    run in each first."""

    def run(
        processes: int = 1, mode: str = "trl", name: str = "out", before: str = "", **keys
    ) -> tuple[subprocess.CompletedProcess, Path]:
        folder = tmp_path_factory.mktemp("run") / name
        words = ["train", PRESET, "--trainer", mode, *flags(tiny_ovis, folder, keys)]
        run = ranks(words, folder, processes, before)
        code = next((code for code in run.codes() if code != 0), 0)
        return subprocess.CompletedProcess(words, code, "", run.told.read_text()), folder

    return run


@pytest.fixture(scope="session")
def wait_until():
    """`wait_until(state, process)` returns once `state()` holds, while the process runs."""

    def wait(state: Callable[[], bool], process: subprocess.Popen) -> None:
        limit = time.monotonic() + LIMIT
        while not state():
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.01)

    return wait


@pytest.fixture
def losses():
    def read(folder: Path) -> list[float]:
        lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
        return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]

    return read
