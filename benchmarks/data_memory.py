"""Memory of preparing and of reading a large set of text records.

    python benchmarks/data_memory.py --records 1000000 > benchmarks/results/data_memory.json

Writes that many records as one JSON array into a temporary folder and starts a process for each
part: `prepare` (the first process of a machine: parse, tokenize, write), `start` (any other
process: find the result) and `read` (training's side: every sample once, in random order, in
batches of 8 through the collator). Prints one JSON line. `above_mb` is the peak of anonymous memory
of the process and those it started, polled, over its value when the libraries were imported; a page
that several share counts once, and mapped Arrow pages, which the system may drop at any time, do
not. `--measure words` leaves tokenizer and collator out.
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("prepare", "start", "read")
WORDS = ["what", "is", "the", "colour", "of", "this", "small", "house", "near", "a", "river", "and"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--measure", choices=("tokens", "words"), default="tokens")
    parser.add_argument("--part", choices=PARTS, help="run one part, on --data")
    parser.add_argument("--data")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_part(options.part, options.data, options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        write_records(path, options.records)
        result = {
            "date": datetime.date.today().isoformat(),
            "records": options.records,
            "measure": options.measure,
            "file_mb": round(path.stat().st_size / 2**20),
        }
        for part in PARTS:
            result[part] = start_part(part, path, options.measure, folder)
        result["machine"] = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
        libraries = ("torch", "transformers", "datasets", "pyarrow")
        result["versions"] = {name: version(name) for name in libraries}
        print(json.dumps(result))


def write_records(path: Path, count: int) -> None:
    """Two turns of 10 to 60 words each."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            asked, said = (" ".join(draw.choices(WORDS, k=draw.randint(10, 60))) for _ in range(2))
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
            record = json.dumps({"id": f"record_{i}", "conversations": turns})
            file.write(("[\n" if i == 0 else ",\n") + record)
        file.write("\n]\n")


def start_part(part: str, path: Path, measure: str, folder: str) -> dict:
    command = [sys.executable, __file__, "--part", part, "--data", str(path), "--measure", measure]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": f"{folder}/cache",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LOCAL_RANK": "0" if part == "prepare" else "1",
        "RANK": "0" if part == "prepare" else "1",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def run_part(part: str, path: str, measure: str) -> dict:
    from torch.utils.data import DataLoader, RandomSampler
    from transformers import AutoTokenizer

    from vlmtune.collators.padded import PaddedCollator
    from vlmtune.collators.sample import SampleEncoder
    from vlmtune.data.dataset import ArrowRows, prepare_dataset
    from vlmtune.data.images import PixelLimits
    from vlmtune.data.sources import resolve_sources
    from vlmtune.models import Ovis2_5Processor
    from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

    peak = Peak()
    began, cpu_began = time.perf_counter(), cpu_seconds()
    if measure == "tokens":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/goldens/ovis2_5/tokenizer")
        processor = Ovis2_5Processor(Ovis2_5ImageProcessor(), tokenizer)
        limits = PixelLimits(448**2, 448**2, 448**2, 448**2, 448**2, 448**2, 8, 8)
        encoder = SampleEncoder(processor, limits, 4096, 4096)
        encode, collate = encoder.columns, PaddedCollator(encoder)
    else:
        encode, collate = count_words, list
    prepared = prepare_dataset(
        resolve_sources([path], None),
        check_files=lambda conversation: [],
        encode=encode,
        skip_bad=False,
        fingerprint=measure,
    )
    if part == "read":
        rows = ArrowRows(prepared.dataset)
        sampler = RandomSampler(rows)
        loader = DataLoader(rows, batch_size=8, sampler=sampler, collate_fn=collate)
        assert sum(1 for _ in loader) == -(-len(rows) // 8)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(cpu_seconds() - cpu_began, 1),
        "libraries_mb": peak.before,
        "above_mb": peak.end() - peak.before,
        "samples": len(prepared.dataset),
        "tokens": prepared.tokens,
    }


def count_words(conversation, sizes) -> dict:
    counts = [len(turn.text.split()) for turn in conversation.turns]
    return {
        "ids": [],
        "trained": [],
        "grids": [],
        "length": sum(counts),
        "trained_tokens": counts[-1],
        "cut": 0,
        "patches": 0,
        "patches_squared": 0,
    }


def cpu_seconds() -> float:
    """Of this process and those it started that have ended."""
    return sum(os.times()[:4])


class Peak(threading.Thread):
    """Polls the anonymous memory of this process and those it started, in MB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.highest = anonymous_mb()
        self.stop = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.stop.wait(0.05):
            self.highest = max(self.highest, anonymous_mb())

    def end(self) -> int:
        self.stop.set()
        self.join()
        return max(self.highest, anonymous_mb())


def anonymous_mb() -> int:
    import psutil

    this, total = psutil.Process(), 0
    for process in [this, *this.children()]:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text("utf-8").splitlines():
                total += int(line.split()[1]) if line.startswith("Pss_Anon:") else 0
    return total // 1024


if __name__ == "__main__":
    main()
