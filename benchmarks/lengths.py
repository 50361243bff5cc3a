"""Seconds to know the exact length of every sample, and to have its tokens, without decoding.

    python benchmarks/lengths.py

Prepares records of one photo and a few questions each, from files that lie in the page cache, as
`vlmtune train` does before its first step: parse, read each image's header, tokenize, write Arrow;
on one core and on two, without the first second, in which one process works alone. `headers` is the
part of it that the image files take, `decode` what decoding them would. All in seconds for 100,000
records: `cpu` of all processes, `wall` the clock's.
Equal are the rows of all runs, and each length and the tokens and pixels that the collator makes.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

RECORDS, FILES, ROUNDS, BATCH = 1000, 64, 3, 8
SCALE = 100_000 / RECORDS


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = f"{temporary}/cache"  # read when datasets is imported
        run(Path(temporary))


def run(folder: Path) -> None:
    import numpy as np
    import torch
    from measuring import environment, summary
    from PIL import Image
    from synthetic import (
        PHOTO_SIZES,
        SEED,
        save_photos,
        sentence,
        train_tokenizer,
        vocabulary,
    )

    from vlmtune.collators.padded import PaddedCollator
    from vlmtune.collators.sample import SampleEncoder
    from vlmtune.data import preparation
    from vlmtune.data.conversation import Conversation
    from vlmtune.data.dataset import ArrowRows, prepare_dataset
    from vlmtune.data.images import PixelLimits
    from vlmtune.data.sources import resolve_sources
    from vlmtune.models import Ovis2_5Processor
    from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

    torch.set_num_threads(1)
    draw = np.random.default_rng(SEED)
    words = vocabulary(draw)
    processor = Ovis2_5Processor(Ovis2_5ImageProcessor(), train_tokenizer(draw, words))
    limits = PixelLimits(448**2, 1792**2, 448**2, 1792**2, 448**2, 1792**2, 1, 1)
    encoder = SampleEncoder(processor, limits, 8192, 8192)
    files = save_photos(folder, draw, PHOTO_SIZES, FILES)
    talks = [
        [
            {"from": name, "value": sentence(draw, words, int(draw.integers(4, 24)))}
            for _ in range(draw.integers(1, 10))
            for name in ("human", "gpt")
        ]
        for _ in range(500)
    ]
    for talk in talks:
        talk[0]["value"] = f"<image>\n{talk[0]['value']}"
    records = [
        {"id": str(i), "image": files[i % FILES], "conversations": talks[i % len(talks)]}
        for i in range(RECORDS)
    ]
    data = folder / "train.json"
    data.write_text(json.dumps(records), "utf-8")

    cores = sorted(os.sched_getaffinity(0))[:2]
    spent: dict[int, list[tuple[float, float]]] = {count: [] for count in range(1, len(cores) + 1)}
    made: list[Any] = []
    for number in range(ROUNDS):
        for count, found in spent.items():
            os.sched_setaffinity(0, cores[:count])
            wall, cpu = time.perf_counter(), cpu_seconds()
            with patch.object(preparation, "ALONE", 0):
                prepared = prepare_dataset(
                    resolve_sources([str(data)], None),
                    check_files=encoder.check_files,
                    encode=encoder.columns,
                    skip_bad=False,
                    fingerprint=f"{count} of {number}",
                )
            found.append((cpu_seconds() - cpu, time.perf_counter() - wall))
            made.append(prepared.dataset)
    decode, headers = [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        for file in files:
            Image.open(file).load()
        decode.append((time.process_time() - began) / FILES * 100_000)
        began = time.process_time()
        for file in files:
            encoder.check_files(Conversation(file, [], [file]))
        headers.append((time.process_time() - began) / FILES * 100_000)

    first = made[0].data.table
    assert all(other.data.table.equals(first) for other in made)
    rows, collate = ArrowRows(made[0]), PaddedCollator(encoder)
    for start in range(0, FILES, BATCH):
        some = [rows[i] for i in range(start, start + BATCH)]
        batch = collate(some)
        assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in some]
        assert len(batch["pixel_values"]) == sum(row["patches"] for row in some)
    result = {
        "benchmark": "lengths",
        "records": RECORDS,
        "mean_tokens": round(prepared.tokens / RECORDS, 1),
        "seconds_per_100k": {
            f"{count}_cores": {
                "cpu": summary([cpu * SCALE for cpu, _ in found], 1),
                "wall": summary([wall * SCALE for _, wall in found], 1),
            }
            for count, found in spent.items()
        },
        "headers_seconds_per_100k": summary(headers, 1),
        "decode_seconds_per_100k": summary(decode, 1),
        "equal": True,
    }
    print(json.dumps({**result, **environment("torch", "transformers", "datasets", "pyarrow")}))


def cpu_seconds() -> float:
    """Of this process and those it started that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
