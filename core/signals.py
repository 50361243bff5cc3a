"""What a process does on a signal that asks it to end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Terminated(KeyboardInterrupt):
    """SIGTERM to a command that ends by it as by Ctrl-C, with what it began cleaned up."""


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], object],
    signals: tuple[signal.Signals, ...] = STOP_SIGNALS,
) -> Iterator[None]:
    """Call `handler` on these signals inside the block; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def terminate(number: int, frame: FrameType | None) -> None:
    """Raise `Terminated`; to be handled with SIGTERM."""
    signal.signal(number, signal.SIG_IGN)  # a second one would end the clean-up
    raise Terminated


def interrupted(stop: KeyboardInterrupt) -> int:
    """Exit code, as shells have it: 143 after SIGTERM, 130 after Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
