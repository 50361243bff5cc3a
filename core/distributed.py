"""What a process knows of its launcher, and how processes wait for each other."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .errors import VLMTuneError

T = TypeVar("T")

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of CPU time, or "max", and the period they are for (cgroup v2)."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_by_torchrun() -> bool:
    return "WORLD_SIZE" in os.environ


def usable_cores() -> int:
    """Cores that this process may run on, and no more than its container's share of time fills."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1  # not on Linux
    try:
        quota, period = map(int, CPU_LIMIT.read_text().split())
    except (OSError, ValueError):  # no limit
        return cores
    return max(1, min(cores, quota // period))


def watched_by_torchrun() -> bool:
    """Whether torchrun ends this process with SIGTERM when another one fails."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def of_first_process(value: T) -> T:
    """The value that the first process has, on all."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def main_process_first(action: Callable[[], T]) -> T:
    """Run `action` on each machine's first process, then on the others, which find its cache.

    Raises:
        VLMTuneError: of the first process, there; the others exit with 1 and stay silent.
    """
    if world_size() == 1:
        return action()
    import torch.distributed as dist

    result, failure = None, None
    if local_rank() == 0:
        try:
            result = action()
        except VLMTuneError as error:
            failure = error
    failed: list[bool] = [False] * world_size()
    dist.all_gather_object(failed, failure is not None)
    if failure is not None:
        raise failure
    if any(failed):
        raise SystemExit(1)
    return action() if result is None else result
