"""Rounds, memory and processes of the benchmarks."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from synthetic import SEED


def summary(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median, lowest and highest of the rounds."""
    found = [round(float(value), digits) for value in values]
    return {"median": round(statistics.median(found), digits), "spread": [min(found), max(found)]}


def environment(*libraries: str) -> dict[str, Any]:
    return {
        "seed": SEED,
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in libraries},
    }


def start_part(script: str, part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of `script --part PART` with the same options, in a process of one thread.

    Unless its part is "time" it gives back what it frees at once: otherwise it depends on the order
    of small and large tensors by how much anonymous memory exceeds what lives.
    """
    given = {**vars(options), "part": part}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if part != "time":
        settings["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    command = [sys.executable, script, *flags]
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Peak(threading.Thread):
    """Peak of this process's anonymous memory above its start, over a `with` block."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.bytes = 0

    def __enter__(self) -> "Peak":
        self.before = anonymous_bytes()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join()

    def run(self) -> None:
        while not self.stop.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes() - self.before)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no RssAnon; this needs Linux.")
