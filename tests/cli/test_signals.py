import os
import signal
import subprocess
import sys

import pytest

from vlmtune.cli.main import main
from vlmtune.cli.signals import leave, stop_workers
from vlmtune.core.signals import handling


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_leaves_with_75_and_says_how_to_go_on(number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as caught, handling(leave):
        os.kill(os.getpid(), number)
    assert caught.value.code == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    told = capfd.readouterr().err
    assert told == "Stopped by a signal. Go on with: --resume_from_checkpoint auto\n"


def test_a_second_signal_does_not_disturb_leaving():
    with pytest.raises(SystemExit) as caught, handling(leave):
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.code == 75


def test_terminated_command_cleans_up_and_leaves_with_143(monkeypatch, capsys):
    cleaned = []

    def command(words: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # which is too late to disturb
            cleaned.append(words)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("vlmtune.cli.env.main", command)
    assert main(["env", "now"]) == 143
    assert cleaned == [["now"]]
    assert capsys.readouterr().err == "Stopped.\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_children_that_lead_a_session_are_stopped():
    assert not stop_workers()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    worker = subprocess.Popen(sleep, start_new_session=True)
    other = subprocess.Popen(sleep)
    try:
        assert stop_workers()
        assert worker.wait(timeout=30) == -signal.SIGUSR1
        assert other.poll() is None
    finally:
        worker.kill()
        other.kill()
        other.wait()
