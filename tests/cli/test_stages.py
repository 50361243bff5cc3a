"""`--stage all` with stages that are real processes, though they train nothing."""

import json
import signal
import subprocess
import sys
import time

import pytest

from vlmtune.cli.main import main
from vlmtune.cli.stages import run_stages
from vlmtune.configs.stages import read_recipe
from vlmtune.core.errors import ConfigError

# Writes its words, then does what the file next to it says and leaves what a finished stage leaves.
STAGE = """
import json, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
name = sys.argv[sys.argv.index("--stage") + 1]
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
does = json.loads((here / "does.json").read_text()).get(name)
if does == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    (here / "ready").touch()
    time.sleep(60)
if does == "wait unready":
    (here / "ready").touch()
    time.sleep(60)
if does == "finish when stopped":
    signal.signal(signal.SIGUSR1, lambda *_: (here / "stopped").touch())
    (here / "ready").touch()
    while not (here / "stopped").exists():
        time.sleep(0.01)
if isinstance(does, int):
    sys.exit(does)
folder = here / "out" / name
folder.mkdir(parents=True, exist_ok=True)
for file in ("config.json", "vlmtune_run.json"):
    (folder / file).write_text("{}")
"""


@pytest.fixture
def room(tmp_path):
    """A recipe of stages a, b, c and the command that stands for training one of them."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "does.json").write_text("{}")
    common = {"model_path": "m", "data_path": "d", "output_dir": str(tmp_path / "out")}
    stages = [{"name": name} for name in "abc"]
    (tmp_path / "recipe.json").write_text(json.dumps({**common, "stages": stages}))
    return tmp_path


def run(room, *flags, **does):
    (room / "does.json").write_text(json.dumps(does))
    (room / "calls.jsonl").write_text("")
    recipe = read_recipe([str(room / "recipe.json"), "--stage", "all", "--seed", "3"])
    code = run_stages(recipe, [sys.executable, str(room / "stage.py")], flags)
    calls = [json.loads(line) for line in (room / "calls.jsonl").read_text().splitlines()]
    return code, calls


def words(room, stage, *more):
    return [str(room / "recipe.json"), "--stage", stage, "--seed=3", *more]


def test_each_unfinished_stage_runs_once_and_a_rerun_none(room, capfd):
    code, calls = run(room, "--debug")
    assert (code, calls) == (0, [words(room, stage, "--debug") for stage in "abc"])
    capfd.readouterr()
    assert run(room) == (0, [])
    told = capfd.readouterr().err.splitlines()
    assert told == [
        f"{stage} is finished: {room}/out/{stage}. Again: --overwrite_output_dir true"
        for stage in "abc"
    ]


def test_the_first_failure_ends_the_row_with_its_exit_code(room):
    assert run(room, b=3) == (3, [words(room, "a"), words(room, "b")])
    assert run(room) == (0, [words(room, "b"), words(room, "c")])


def test_a_stage_killed_is_told_with_its_signal(room, capfd):
    (room / "stage.py").write_text("import os; os.kill(os.getpid(), 9)")
    code, _ = run(room)
    assert code == 137
    assert "killed by signal 9:" in capfd.readouterr().err


def test_a_stage_after_one_that_was_trained_again_is_trained_again(room, capfd):
    run(room)
    (room / "out/b/config.json").unlink()
    code, calls = run(room)
    assert (code, calls) == (0, [words(room, "b"), words(room, "c", "--overwrite_output_dir=true")])
    assert "c is trained again: it is older than the model it starts from" in capfd.readouterr().err


def test_a_mistake_in_the_last_stage_is_told_before_the_first_runs(room):
    recipe = json.loads((room / "recipe.json").read_text())
    recipe["stages"][2]["learnin_rate"] = 1
    (room / "recipe.json").write_text(json.dumps(recipe))
    (room / "calls.jsonl").write_text("")
    with pytest.raises(ConfigError, match="stage c"):
        run(room)
    assert (room / "calls.jsonl").read_text() == ""


def test_all_stages_do_not_run_under_torchrun(room, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError) as caught:
        run(room)
    assert f"scripts/stage_configs.sh {room}/recipe.json all N" in caught.value.fix


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("does", ["wait", "wait unready", "finish when stopped"])
def test_a_signal_reaches_the_stage_and_ends_the_row_with_75(room, number, does):
    (room / "does.json").write_text(json.dumps({"b": does}))
    code = (
        "import sys; from vlmtune.cli.stages import run_stages; "
        "from vlmtune.configs.stages import read_recipe; "
        f"recipe = read_recipe([{str(room / 'recipe.json')!r}, '--stage', 'all']); "
        f"sys.exit(run_stages(recipe, [sys.executable, {str(room / 'stage.py')!r}], []))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    until_exists(room / "ready")
    process.send_signal(number)
    assert process.wait(timeout=30) == 75
    assert len((room / "calls.jsonl").read_text().splitlines()) == 2
    assert (room / "out/b").exists() == (does == "finish when stopped")


def until_exists(file):
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.02)


def test_train_of_a_finished_stage_is_one_line_and_exit_0_without_torch(room):
    run(room)
    code = (
        "import sys; from vlmtune.cli.main import main; "
        f"print(main(['train', {str(room / 'recipe.json')!r}, '--stage', 'b']), "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0 False\n"
    assert done.stderr == (f"b is finished: {room}/out/b. Again: --overwrite_output_dir true\n")


def test_train_without_a_stage_lists_them(room, capsys):
    assert main(["train", str(room / "recipe.json")]) == 1
    assert "Fix: add --stage a or --stage b or --stage c or --stage all." in capsys.readouterr().err


@pytest.mark.slow
def test_train_all_runs_the_real_command_for_each_stage(room, capfd):
    words = ["train", str(room / "recipe.json"), "--stage", "all", f"--data_path={room}/none.json"]
    assert main([*words, f"--model_path={room}/absent"]) == 1
    told = capfd.readouterr().err
    assert told.startswith("-- a\n")
    assert f"ModelError: model_path {room}/absent:" in told
    assert "-- b" not in told
