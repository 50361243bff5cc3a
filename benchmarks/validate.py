"""Time and memory of `vlmtune validate`.

    python benchmarks/validate.py

Writes records of about 1 kB, two turns each, into a temporary folder and checks them with whole
processes, as a user starts them. `small` is a file of ten records. `text` is records without
images, `images` the same with one JPEG each, read from its header, `decode` a part of those decoded
fully; with one process and with two. Seconds of the clock and of the processor, libraries included;
`idle` is the share of the machine's cores that was free in the second before. `memory` is the
highest anonymous memory of one process for few and for many records of text, with all outputs.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measuring import environment, summary
from synthetic import PHOTO_SIZES, SEED, photo, sentence, vocabulary

ROUNDS = 3
FEW, MANY, DECODED = 10_000, 200_000, 2_000
DECODE = ("--decode",)
GOALS = {"small_s": 0.3, "text_s": 10}
PHOTOS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    options = parser.parse_args()
    draw = np.random.default_rng(SEED)
    idle = 1 - psutil.cpu_percent(1) / 100
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_photos(folder / "images", draw)
        texts = [sentence(draw, vocabulary(draw), 80) for _ in range(2000)]
        sizes = {"small": 10, "text": options.records, "few": FEW, "many": MANY}
        for name, count in sizes.items():
            write_records(folder / f"{name}.json", count, texts)
        for name, count in (("images", options.records), ("decode", DECODED)):
            write_records(folder / f"{name}.json", count, texts, images=True)
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "benchmark": "validate",
            "goal": GOALS,
            "records": options.records,
            "record_bytes": (folder / "text.json").stat().st_size // options.records,
            "idle": round(idle, 2),
        }
        small = [check(folder, "small") for _ in range(ROUNDS)]
        result["small"] = {kind: summary([run[kind] for run in small]) for kind in small[0]}
        for name, words in (("text", []), ("images", ["images"]), ("decode", ["images", *DECODE])):
            jobs = {n: check(folder, name, *words, "--jobs", n) for n in ("1", "2")}
            result[name] = {f"jobs_{n}": found for n, found in jobs.items()}
        few, many = (memory(folder, name) for name in ("few", "many"))
        result["memory"] = {"few_mb": few, "many_mb": many, "few": FEW, "many": MANY}
    print(json.dumps({**result, **environment("pillow")}))


def make_photos(folder: Path, draw: np.random.Generator) -> None:
    """JPEG files of photos' sizes; few contents under many names."""
    folder.mkdir()
    contents = []
    for i, size in enumerate(PHOTO_SIZES):
        photo(draw, *size).save(folder / f"{i}.jpg", quality=90)
        contents.append((folder / f"{i}.jpg").read_bytes())
    for i in range(PHOTOS):
        (folder / f"{i}.jpg").write_bytes(contents[i % len(contents)])


def write_records(path: Path, count: int, texts: list[str], images: bool = False) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            asked, said = texts[i % len(texts)], texts[(7 * i + 1) % len(texts)]
            turns = [{"from": "human", "value": f"{i}: {asked}"}, {"from": "gpt", "value": said}]
            record: dict[str, Any] = {"id": f"record_{i}", "conversations": turns}
            if images:
                record["image"] = f"{i % PHOTOS}.jpg"
                turns[0]["value"] = f"<image>\n{asked}"
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")


def check(folder: Path, name: str, *words: str) -> dict[str, float]:
    """Seconds of `vlmtune validate` on a file, which must have no error."""
    before, began = os.times(), time.perf_counter()
    ended = start(folder, name, *words).wait()
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    assert ended == 0, f"{name} ended with {ended}"
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


def memory(folder: Path, name: str) -> float:
    """Peak in MB, polled, of one process with every output."""
    flags = ["--fix", "fixed.json", "--quarantine", "apart.json", "--report", "report.json"]
    process, peak = start(folder, name, *flags, "--jobs", "1"), 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process))
        time.sleep(0.05)
    for file in flags[1::2]:
        os.remove(folder / file)
    return round(peak / 2**20, 1)


def start(folder: Path, name: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vlmtune.cli.main", "validate", f"{name}.json", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


def anonymous_bytes(process: subprocess.Popen) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()
