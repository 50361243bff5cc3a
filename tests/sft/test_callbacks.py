"""The log file of a run, and the signals it listens to."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from vlmtune.sft.callbacks import JsonLinesLog, StopOnSignal


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")


def state(step: int, rank: int = 0) -> TrainerState:
    return TrainerState(
        global_step=step, epoch=step / 10, max_steps=10, is_world_process_zero=rank == 0
    )


def log(args, step: int, rank: int = 0, **values) -> None:
    JsonLinesLog().on_log(args, state(step, rank), TrainerControl(), logs=values)


def begin(args, step: int, rank: int = 0) -> None:
    JsonLinesLog().on_train_begin(args, state(step, rank), TrainerControl())


def entries(args) -> list[dict]:
    with open(f"{args.output_dir}/log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_every_logged_value_is_a_line_with_its_step(args):
    log(args, 1, loss=2.5, learning_rate=1e-3)
    log(args, 2, eval_loss=2.0)
    assert entries(args) == [
        {"step": 1, "loss": 2.5, "learning_rate": 1e-3},
        {"step": 2, "eval_loss": 2.0},
    ]


def test_other_ranks_write_nothing(args, tmp_path):
    log(args, 1, rank=1, loss=2.5)
    begin(args, 0, rank=1)
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(args):
    for step in range(1, 6):
        log(args, step, loss=float(step))
    log(args, 3, eval_loss=9.0)
    begin(args, 3)
    assert [entry["step"] for entry in entries(args)] == [1, 2, 3, 3]


def test_a_line_that_a_kill_cut_is_dropped(args):
    log(args, 1, loss=1.0)
    log(args, 2, loss=2.0)
    with open(f"{args.output_dir}/log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    begin(args, 2)
    log(args, 3, loss=3.0)
    assert [entry["loss"] for entry in entries(args)] == [1.0, 2.0, 3.0]


def test_a_new_run_begins_an_empty_log(args):
    log(args, 1, loss=1.0)
    begin(args, 0)
    assert entries(args) == []


@pytest.fixture
def listening(args):
    stop, control = StopOnSignal(), TrainerControl()
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    stop.on_train_begin(args, state(0), control)
    yield SimpleNamespace(
        stop=stop,
        control=control,
        step=lambda n: stop.on_step_end(args, state(n), control),
        end_epoch=lambda n: stop.on_epoch_end(args, state(n), control),
    )
    stop.release()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_after_the_current_step(listening, number):
    listening.step(3)
    control = listening.control
    assert not (control.should_save or control.should_training_stop or listening.stop.requested)
    os.kill(os.getpid(), number)
    listening.step(4)
    assert control.should_training_stop and listening.stop.requested
    listening.end_epoch(4)  # the host's loop ends the epoch when it stops
    assert control.should_save


def test_a_signal_in_the_last_step_lets_the_run_finish(listening):
    os.kill(os.getpid(), signal.SIGUSR1)
    listening.step(10)
    listening.end_epoch(10)
    assert not (listening.control.should_save or listening.stop.requested)


def test_under_torchrun_sigterm_is_not_taken_for_a_preemption(args, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSignal()
    stop.on_train_begin(args, state(0), TrainerControl())
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGUSR1) == stop._hear
    stop.release()
