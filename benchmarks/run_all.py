"""The CPU suite, what `make bench` calls: every script in turn, then docs/benchmarks.md.

    python benchmarks/run_all.py            run, write benchmarks/results, table and plots
    python benchmarks/run_all.py --only loss_head,packing
    python benchmarks/run_all.py --table    table and plots from the results that are there

Each script runs in a process of its own, one after another; its JSON line is stored with date and
machine. A script that fails leaves its older result as it was, the others run on, and the command
fails at the end.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, read_results, text_table, write_report

SCRIPTS = (
    "packing",
    "collation",
    "lengths",
    "start",
    "packed_training",
    "visual_head",
    "loss_head",
)
LIMIT = 240
"""Seconds that the whole suite should take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--only", default=",".join(SCRIPTS), help="some scripts, by comma")
    options = parser.parse_args()
    scripts = [] if options.table else options.only.split(",")
    if unknown := set(scripts) - set(SCRIPTS):
        parser.error(f"no such scripts: {', '.join(sorted(unknown))}")
    began, failed = time.monotonic(), []
    for name in scripts:
        started = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        result = run_script(name)
        print(f"{'failed' if result is None else 'done'}, {time.monotonic() - started:.0f} s")
        if result is None:
            failed.append(name)
        else:
            (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", "utf-8")
    results = read_results()
    write_report(results, ROOT / "docs")
    print(text_table(results))
    if scripts:
        seconds = time.monotonic() - began
        over = f", more than the {LIMIT} it should take" if seconds > LIMIT else ""
        print(f"{len(scripts)} scripts, {seconds:.0f} s{over}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run_script(name: str) -> dict[str, Any] | None:
    """Its JSON line with date and machine; None, and what it printed, where it failed."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / f"benchmarks/{name}.py")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-20:]), file=sys.stderr)
        return None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        print(f"its last line is no JSON:\n{done.stdout[-500:]}", file=sys.stderr)
        return None
    return {
        "date": datetime.date.today().isoformat(),
        **found,
        "machine": f"{cpu_model()}, {found['machine']}",
        "seconds": round(time.monotonic() - began),
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


if __name__ == "__main__":
    main()
