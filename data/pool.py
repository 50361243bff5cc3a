"""Forked processes that share the work on a stream of items."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import DataError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future
    from multiprocessing.connection import Connection

T = TypeVar("T")
R = TypeVar("R")

ALONE = 1.0
"""Seconds that one process works before it starts others: a little work is sooner done so."""


def shared(
    call: Callable[[T], R], items: Iterable[T], workers: int, alone: float, names: str
) -> Generator[R, None, None]:
    """`call` of each item, in order: here for `alone` seconds, then in `workers` processes.

    To be closed (`contextlib.closing`) where it may not be read to its end.

    Args:
        names: Of the data, for the error.

    Raises:
        DataError: one of the processes was killed.
    """
    items, start = iter(items), time.monotonic()
    while time.monotonic() - start < alone:
        for item in items:
            yield call(item)
            break
        else:
            return
    with _processes(call, workers, names) as pool:
        for item, future in _submitted(pool, workers, _perform, items):
            try:
                result = future.result()
            except RecursionError:  # nested too deeply to be sent, not to be worked on
                result = call(item)
            yield result


def ahead(
    pool: "Executor", workers: int, call: Callable[[T], R], items: Iterable[T]
) -> Iterator[R]:
    """`call` of each item, in order, a bounded number of them computed ahead."""
    for _, future in _submitted(pool, workers, call, items):
        yield future.result()


def _submitted(
    pool: "Executor", workers: int, call: Callable[[T], R], items: Iterable[T]
) -> "Iterator[tuple[T, Future[R]]]":
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(call, item)))
        if len(waiting) > 2 * workers:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


_call: Callable[[Any], Any]
"""In a process started by `_processes`, what it does with an item."""


@contextmanager
def _processes(call: Callable[[Any], Any], workers: int, names: str) -> "Iterator[Executor]":
    """Forked at the first item, so that nothing of `call` need be pickled."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("fork")
    lasting, parent = context.Pipe(duplex=False)
    # Its other end is closed with this block even if a signal comes while processes are started,
    # when the pool does not know of them yet.
    with parent, lasting:
        pool = ProcessPoolExecutor(workers, context, _begin, (call, lasting, parent))
        try:
            yield pool
        except BrokenProcessPool:
            raise DataError(
                names,
                "a process that checked the data was killed.",
                "see whether the machine ran out of memory, and start again.",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(call: Callable[[Any], Any], lasting: "Connection", parent: "Connection") -> None:
    global _call
    _call = call
    parent.close()
    # The parent is told too, and then hands out nothing more; when one of these was killed, it
    # ends the others with SIGTERM.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(lasting,), daemon=True).start()


def _end_with(lasting: "Connection") -> None:
    lasting.poll(None)  # until the other end is closed
    os._exit(1)


def _perform(item: Any) -> Any:
    return _call(item)
