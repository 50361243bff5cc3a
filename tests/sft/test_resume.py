"""Runs that are killed, stopped or out of disk go on as if nothing had happened."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import vlmtune.collators.sample
from vlmtune.cli.main import main
from vlmtune.core.checkpoints import latest_checkpoint
from vlmtune.core.errors import ConfigError
from vlmtune.sft.callbacks import JsonLinesLog
from vlmtune.sft.output import check_output_dir

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LIMIT = 120
"""Seconds after which a run or a state to wait for counts as hung."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """90 records, some of text or two images: 6 steps of 16 an epoch, the last with 10."""
    records = json.loads((ROOT / "sample_data/train.json").read_text("utf-8"))
    file = tmp_path_factory.mktemp("data") / "train.json"
    file.write_text(json.dumps(records[:70] + records[-20:]), "utf-8")
    return file


@pytest.fixture(scope="module")
def settings(tiny_ovis, data):
    """`settings(folder, key=value)` as words of the command line: 14 steps, saved every 3."""

    def words(folder: Path, **keys) -> list[str]:
        given = {
            "model_path": tiny_ovis,
            "data_path": data,
            "eval_data_path": "[]",
            "output_dir": folder,
            "per_device_train_batch_size": 16,
            "max_steps": 14,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
            "disable_tqdm": "true",
            "report_to": "none",
            "use_cpu": "true",
            "dataloader_num_workers": 0,
            **keys,
        }
        flags = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        return ["train", "configs/presets/quickstart.json", *flags]

    return words


@pytest.fixture(scope="module")
def start(ranks, settings):
    """`start(folder, processes, key=value)` starts a run; `before` is Python run in it first."""

    def run(folder: Path, processes: int = 1, before: str = "", **keys):
        if processes > 1:
            keys = {"per_device_train_batch_size": 16 // processes, **keys}
        return ranks(settings(folder, **keys), folder, processes, before)

    return run


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """`unbroken(processes)` is the folder of an uninterrupted run without loader processes."""
    done: dict[int, Path] = {}

    def folder_of(processes: int) -> Path:
        if processes not in done:
            folder = tmp_path_factory.mktemp("unbroken") / "out"
            run = start(folder, processes)
            assert run.codes() == [0] * processes, run.told.read_text()
            done[processes] = folder
        return done[processes]

    return folder_of


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    return [(e["step"], e["loss"], e["learning_rate"]) for e in logged if "loss" in e]


def assert_same(folder: Path, whole: Path) -> None:
    """Every step logged once with the same loss, and the same bits in every weight."""
    assert [step for step, _, _ in losses(folder)] == list(range(1, 15))
    assert losses(folder) == losses(whole)
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def latest(folder: Path) -> int:
    found = latest_checkpoint(folder)
    assert found
    return int(found.name.removeprefix("checkpoint-"))


# Workers of the first run, of the second and of the last.
@pytest.mark.parametrize(
    ("processes", "workers"),
    [
        (1, (0, 2, 0)),
        (2, (2, 0, 2)),
        pytest.param(1, (2, 0, 2), marks=pytest.mark.long),
        pytest.param(2, (0, 2, 0), marks=pytest.mark.long),
    ],
)
def test_killed_in_the_first_epoch_and_in_a_later_one_the_run_ends_with_the_same_bits(
    processes, workers, start, unbroken, tmp_path
):
    folder = tmp_path / "out"
    first = start(folder, processes, dataloader_num_workers=workers[0])
    first.kill_after(4)
    assert latest(folder) in (3, 6)  # a busy machine may kill late
    resumed = {"resume_from_checkpoint": "true"}
    second = start(folder, processes, dataloader_num_workers=workers[1], **resumed)
    second.kill_after(10)
    assert latest(folder) in (9, 12)
    last = start(folder, processes, dataloader_num_workers=workers[2], **resumed)
    assert last.codes() == [0] * processes, last.told.read_text()
    assert_same(folder, unbroken(processes))


HALF_A_SAVE = """
import os, signal
save = torch.save
def stuck(value, file, *args, **kwargs):
    save(value, file, *args, **kwargs)
    if str(file).endswith("checkpoint-6/optimizer.pt"):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGSTOP)
torch.save = stuck
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_kill_during_saving_leaves_the_checkpoint_before(processes, start, unbroken, tmp_path):
    folder = tmp_path / "out"
    run = start(folder, processes, HALF_A_SAVE)
    saving = psutil.Process(run.processes[0].pid)
    run.wait_for(lambda: saving.status() == psutil.STATUS_STOPPED)
    run.signal(signal.SIGKILL)
    assert run.codes() == [-signal.SIGKILL] * processes
    half = folder / ".partial-checkpoint" / "checkpoint-6"
    assert (half / "model.safetensors").exists() and (half / "optimizer.pt").exists()
    assert [f.name for f in folder.glob("checkpoint-*")] == ["checkpoint-3"]

    again = start(folder, processes, resume_from_checkpoint="true")
    assert again.codes() == [0] * processes, again.told.read_text()
    told = "note: a checkpoint that was not written to its end is left out; resuming checkpoint-3"
    assert again.told.read_text().count(told) == 1
    assert not half.parent.exists()
    assert_same(folder, unbroken(processes))


def test_sigusr1_and_sigterm_leave_a_checkpoint_of_the_step_and_exit_code_75(
    start, unbroken, tmp_path
):
    folder, resumed = tmp_path / "out", {"resume_from_checkpoint": "auto"}
    for number, step in ((signal.SIGUSR1, 4), (signal.SIGTERM, 8)):
        # The signal reaches the loader processes too, as one to a whole job does.
        run = start(folder, dataloader_num_workers=2, **resumed)
        run.wait_for(lambda run=run, step=step: run.logged() >= step)
        run.signal(number)
        assert run.codes() == [75], run.told.read_text()
        # The step that was computed when the signal came is the last one.
        stopped = latest(folder)
        assert losses(folder)[-1][0] == stopped >= step
        assert f"Stopped by a signal; checkpoint-{stopped} is complete." in run.told.read_text()
        assert not (folder / "config.json").exists()
    assert start(folder, **resumed).codes() == [0]
    assert_same(folder, unbroken(1))


def test_a_signal_to_one_rank_stops_both_at_the_same_step(start, unbroken, tmp_path):
    folder = tmp_path / "out"
    run = start(folder, 2, dataloader_num_workers=2)
    run.wait_for(lambda: run.logged() >= 4)
    run.signal(signal.SIGUSR1, ranks=[1])
    assert run.codes() == [75, 75], run.told.read_text()
    assert losses(folder)[-1][0] == latest(folder)
    assert start(folder, 2, resume_from_checkpoint="true").codes() == [0, 0]
    assert_same(folder, unbroken(2))


def test_a_signal_inside_an_epoch_does_not_evaluate_as_at_its_end(
    settings, data, tmp_path, monkeypatch
):
    keys = {"eval_data_path": data, "eval_strategy": "epoch", "save_strategy": "epoch"}
    keys |= {"max_steps": 8, "load_best_model_at_end": "true"}
    log = JsonLinesLog.on_log

    def log_and_signal(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    def evaluations(folder: Path) -> list[tuple[int, float]]:
        state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
        return [(e["step"], e["eval_loss"]) for e in state["log_history"] if "eval_loss" in e]

    assert main(settings(tmp_path / "whole", **keys)) == 0
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="75"):
        patched.setattr(JsonLinesLog, "on_log", log_and_signal)
        main(settings(tmp_path / "out", **keys))
    assert evaluations(tmp_path / "out" / "checkpoint-3") == []
    assert main(settings(tmp_path / "out", resume_from_checkpoint="true", **keys)) == 0
    assert [step for step, _ in evaluations(tmp_path / "whole")] == [6, 8]
    assert evaluations(tmp_path / "out") == evaluations(tmp_path / "whole")


@pytest.mark.long
def test_sigterm_to_the_launcher_of_two_ranks_can_be_resumed(
    start, settings, unbroken, wait_until, tmp_path
):
    folder = tmp_path / "out"
    words = [*settings(folder, per_device_train_batch_size=8)[1:], "--trainer", "trl"]
    launcher = subprocess.Popen(
        ["scripts/train_launch.sh", "2", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = folder / "log.jsonl"
        wait_until(lambda: log.exists() and log.read_text("utf-8").count("\n") >= 4, launcher)
        launcher.terminate()
        _, told = launcher.communicate(timeout=LIMIT)
    finally:
        launcher.kill()
    assert launcher.returncode == 75, told
    assert "Stopped by a signal. Go on with: scripts/train_launch.sh 2" in told
    assert start(folder, 2, resume_from_checkpoint="auto").codes() == [0, 0]
    assert_same(folder, unbroken(2))


def test_skipped_steps_decode_no_image(settings, unbroken, data, tmp_path, monkeypatch):
    opened: list[str] = []
    open_image = vlmtune.collators.sample.open_image

    def counting(file, where):
        opened.append(Path(file).name)
        return open_image(file, where)

    # Files are checked, and that is cached, before; what is counted is the loading.
    monkeypatch.setattr(vlmtune.collators.sample, "open_image", counting)

    def names_of(folder: Path, checkpoint: int | None = None) -> list[str]:
        opened.clear()
        keys = {"max_steps": 9, "save_strategy": "no"}
        if checkpoint is not None:
            keys["resume_from_checkpoint"] = unbroken(1) / f"checkpoint-{checkpoint}"
        assert main(settings(folder, **keys)) == 0
        return list(opened)

    whole = names_of(tmp_path / "whole")
    images = {}
    for record in json.loads(data.read_text("utf-8")):
        image = record.get("image", [])
        images[record["id"]] = [image] if isinstance(image, str) else image
    assert len(whole) > sum(map(len, images.values()))  # one epoch and a half
    for checkpoint in (3, 6):
        rest = names_of(tmp_path / f"from{checkpoint}", checkpoint)
        assert 0 < len(rest) < len(whole)
        assert rest == whole[-len(rest) :]


def test_a_resumed_run_that_removes_its_checkpoint_tells_what_recomputing_came_to(
    settings, unbroken, tmp_path, capsys
):
    folder = tmp_path / "out"
    shutil.copytree(unbroken(1) / "checkpoint-3", folder / "checkpoint-3")
    keys = {"resume_from_checkpoint": "true", "save_total_limit": 1, "max_steps": 6}
    assert main(settings(folder, **keys, recompute="llm:full")) == 0
    assert not (folder / "checkpoint-3").exists()
    lines = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
    speeds = [entry["tokens_per_second"] for entry in lines if "tokens_per_second" in entry]
    line = f"recompute llm full, visual_tokenizer none: {sorted(speeds)[1]:,.0f} tokens/s, peak "
    assert len(speeds) == 3
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"per_device_train_batch_size": 8}, "with a global batch of 16, this run has 8."),
        ({"train_modules": "llm"}, 'with train_modules "all", this run has "llm".'),
        ({"freeze_llm": "true"}, "with freeze_llm false, this run has true."),
    ],
)
def test_a_run_of_other_steps_or_modules_does_not_resume(
    keys, reason, unbroken, settings, tmp_path, capsys
):
    keys["resume_from_checkpoint"] = unbroken(1) / "checkpoint-3"
    assert main(settings(tmp_path / "out", **keys)) == 1
    told = capsys.readouterr().err
    assert f"ConfigError: resume_from_checkpoint:\n  checkpoint-3 was written {reason}\n" in told
    assert "or start a new run with the checkpoint as model_path" in told
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_checkpoint_without_optimizer_states_does_not_resume(settings, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}", "utf-8")
    assert main(settings(tmp_path / "out", resume_from_checkpoint=checkpoint)) == 1
    assert "checkpoint-3 holds no optimizer states without DeepSpeed" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path) -> Path:
    """With checkpoint-3, and checkpoint-6 without the file that is written last."""
    for name in ("checkpoint-3", "checkpoint-6"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}", "utf-8")
    return tmp_path


def test_true_takes_the_last_complete_checkpoint_and_a_path_that_one(folder, capsys):
    complete = str(folder / "checkpoint-3")
    assert check_output_dir(folder, False, True) == complete
    assert check_output_dir(folder, False, complete) == complete
    assert capsys.readouterr().err == ""
    (folder / ".partial-checkpoint").mkdir()
    assert check_output_dir(folder, False, True) == complete
    assert capsys.readouterr().err.endswith("resuming checkpoint-3\n")


@pytest.mark.parametrize("name", ["checkpoint-6", "checkpoint-9"])
def test_a_named_checkpoint_without_its_state_is_refused(name, folder):
    with pytest.raises(ConfigError, match=f"no complete checkpoint at {folder / name}"):
        check_output_dir(folder, False, str(folder / name))


def test_nothing_to_resume_from_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        check_output_dir(tmp_path, False, True)


def assert_told_where_and_what_to_do(told: str, folder: Path, reason: str) -> None:
    assert f"TrainingError: rank 0, checkpoint in {folder}:" in told
    assert f"cannot be written: {reason}" in told
    assert "go on with --resume_from_checkpoint auto" in told
    assert "Traceback" not in told


# At 1 MiB the weights do not fit, at 4 MiB the optimizer.
@pytest.mark.parametrize("size", [2**20, 2**22])
def test_a_failed_save_ends_the_run_and_keeps_the_last_checkpoint(size, start, unbroken, tmp_path):
    folder = tmp_path / "out"
    run = start(folder, before="import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)")
    run.wait_for(lambda: run.logged() >= 4)
    resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE, (size, size))
    assert run.codes() == [1], run.told.read_text()
    assert_told_where_and_what_to_do(run.told.read_text(), folder, "")
    assert latest(folder) == 3
    assert not (folder / ".partial-checkpoint").exists()
    assert start(folder, resume_from_checkpoint="true").codes() == [0]
    assert_same(folder, unbroken(1))


# Room for one checkpoint of 7.8 MB, and for none or for the weights of a second one.
@pytest.mark.parametrize("megabytes", [9, pytest.param(12, marks=pytest.mark.long)])
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    megabytes, start, settings, unbroken, tmp_path
):
    namespace = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("this user may not mount a file system of its own")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    script = (
        'mount -t tmpfs -o size=$1m disk "$2" || exit 99; disk=$2 kept=$3; shift 3\n'
        '"$@"; code=$?; cp -r "$disk/out" "$kept"; exit $code'
    )
    command = [sys.executable, "-m", "vlmtune.cli.main", *settings(disk / "out")]
    done = subprocess.run(
        [*namespace, "sh", "-c", script, "sh", str(megabytes), disk, kept, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 1, done.stderr
    assert_told_where_and_what_to_do(done.stderr, disk / "out", "the disk is full")
    assert latest(kept) == 3
    assert not (kept / ".partial-checkpoint").exists()
    assert start(kept, resume_from_checkpoint="true").codes() == [0]
    assert_same(kept, unbroken(1))
