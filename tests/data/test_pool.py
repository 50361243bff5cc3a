"""Work shared with other processes."""

import multiprocessing
import os
from typing import Any

import pytest

from vlmtune.data.pool import shared


def test_processes_end_where_a_signal_stops_their_start(monkeypatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    # Made when the processes are started, before the pool can end them.
    monkeypatch.setattr("concurrent.futures.process._ExecutorManagerThread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(shared(abs, [1, 2], 2, 0, "x"))
    started = multiprocessing.active_children()
    for process in started:
        process.join(20)
    assert [process.exitcode for process in started] == [1, 1]


def test_what_is_too_deep_to_be_sent_is_worked_on_here():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    results = list(shared(lambda item: (len(item), os.getpid()), [[1, 2], deep, [3]], 2, 0, "x"))
    assert [length for length, _ in results] == [2, 1, 1]
    assert results[1][1] == os.getpid()
    assert os.getpid() not in (results[0][1], results[2][1])
    while deep:  # piece by piece: to free it at once is as deep
        [deep] = deep
