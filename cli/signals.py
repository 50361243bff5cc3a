"""Stopping a run so that it can be resumed: SIGTERM and SIGUSR1, as batch systems send them."""

import os
import signal
from contextlib import suppress
from types import FrameType

from ..core.checkpoints import RESUMABLE
from ..core.distributed import watched_by_torchrun
from ..core.signals import STOP_SIGNALS


def leave(number: int, frame: FrameType | None) -> None:
    """End a process that has nothing to save: before its first step."""
    for again in STOP_SIGNALS:
        signal.signal(again, signal.SIG_IGN)
    if not watched_by_torchrun():
        os.write(2, b"Stopped by a signal. Go on with: --resume_from_checkpoint auto\n")
    raise SystemExit(RESUMABLE)


def stop_workers() -> bool:
    """Ask torchrun's workers of this process to save and leave; False when there are none yet.

    Each worker leads a session (torch 2.13 starts it so); no other child of a launcher does. Only
    the worker itself is asked, since its data loaders have nothing to save.
    """
    import psutil

    found = False
    for child in psutil.Process().children():
        with suppress(ProcessLookupError):
            if os.getsid(child.pid) == child.pid:
                os.kill(child.pid, signal.SIGUSR1)
                found = True
    return found
