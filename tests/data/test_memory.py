"""A set three times as large takes no more memory, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/data_memory.py"
CHILD = """
import json, pathlib, runpy, sys
from vlmtune.data import preparation
preparation.ALONE = 0  # the memory of other processes counts, in both
script = runpy.run_path(sys.argv[1])
peaks = []
for count in (20_000, 60_000):
    path = pathlib.Path(sys.argv[2]) / f"{count}.json"
    script["write_records"](path, count)
    for part in ("prepare", "read"):
        found = script["run_part"](part, str(path), "words")
        peaks.append([part, found["samples"], found["libraries_mb"] + found["above_mb"]])
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", CHILD, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    peaks = json.loads(done.stdout)
    assert [peak[:2] for peak in peaks] == [
        ["prepare", 20_000],
        ["read", 20_000],
        ["prepare", 60_000],
        ["read", 60_000],
    ]
    # 40,000 records more, held as Python objects, take more than 100 MB.
    assert peaks[3][2] - peaks[1][2] < 25
    assert peaks[2][2] - peaks[0][2] < 25
