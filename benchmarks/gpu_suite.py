"""Speed, memory and parity of training on one Hopper GPU: ours, and plain TRL.

    python benchmarks/gpu_suite.py                        at most 8 minutes
    python benchmarks/gpu_suite.py --device cpu --tiny    the same code, to see that it runs

Random weights of Ovis2.5-2B and 9B, made on the device; made photos and text with lengths like
LLaVA's; no network, no flash-attn. Every part runs in a process of its own with a time limit, and
the results are written to benchmarks/results/gpu_suite.json after each, so that a part that fails
costs only itself.

- `matmul`: the rate of large bfloat16 products, which every MFU is a share of.
- `packed_2b`: full fine-tuning, float32 weights and Adam in bf16 autocast, rows of 8,192 tokens,
  nothing recomputed. `lora_9b`: LoRA on the language model, frozen weights in bfloat16.
- `padded_2b`: the same as `packed_2b` in batches of 8 random samples, not packed.
- `trl_tuned_2b`, `trl_default_2b`: TRL's SFTTrainer on the same samples, with its collator and its
  fused head, batches of 8; as a user sets it up (workers, nothing recomputed), and its defaults
  apart from `max_length`. Accumulation makes an optimizer step about as large everywhere.
- `parity`: ids, pixels and losses of both sides, packed samples against each alone, attention
  inside segments against a block mask.

Of the training parts: tokens/s counts real tokens. MFU counts useful operations alone
(models/ovis2_5/flops.py): no padding, no recomputing, the head at supervised positions. Times are
CUDA events over ten optimizer steps after three to warm up; the peak memory is reset there too.
`planned_over_peak` is what `vlmtune plan` says of the same micro-batches over that peak; goal:
0.9 to 1.1. `data_wait_share` is the time that the process waited for its loader.
"""

import argparse
import datetime
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import (
    PHOTO_SIZES,
    ROOT,
    SEED,
    llava_like,
    save_photos,
    sentence,
    train_tokenizer,
    vocabulary,
)

RESULT = Path(__file__).parent / "results/gpu_suite.json"
LIMIT = 470
"""Seconds of the whole suite."""
LIMITS = {
    "matmul": 45,
    "packed_2b": 100,
    "lora_9b": 110,
    "padded_2b": 90,
    "trl_tuned_2b": 90,
    "trl_default_2b": 110,
    "parity": 80,
}
SETTING: dict[str, Any] = {
    "row_tokens": 8192,
    "rows": 3,
    "batches": 5,
    "warm_up": 3,
    "steps": 10,
    "workers": 4,
    "min_pixels": 448**2,
    "matrix": 8192,
}
SAMPLES, PAGE_SIDES = 640, (704, 832, 960, 1120)
TINY: dict[str, Any] = {
    "row_tokens": 512,
    "rows": 1,
    "batches": 1,
    "warm_up": 1,
    "steps": 2,
    "workers": 1,
    "min_pixels": 16**2,
    "matrix": 128,
}
TINY_SAMPLES, TINY_SHARE = 40, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, two steps")
    parser.add_argument("--parts", default=",".join(LIMITS), help="some of them, by comma")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--part", choices=tuple(LIMITS), help="run one part, in --folder")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_part(options)))
        return
    parts = options.parts.split(",")
    if unknown := set(parts) - LIMITS.keys():
        parser.error(f"no such parts: {', '.join(sorted(unknown))}")
    if options.tiny and options.output == RESULT:
        options.output = Path(tempfile.gettempdir()) / "gpu_suite_tiny.json"
    began = time.monotonic()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "tiny": options.tiny,
        "seed": SEED,
        "setting": TINY if options.tiny else SETTING,
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), options.tiny)
        for part in parts:
            left = LIMIT - (time.monotonic() - began)
            found = start_part(part, options, folder, min(LIMITS[part], left))
            result["parts"][part] = found
            result["compared"] = compared(result["parts"])
            result["seconds"] = round(time.monotonic() - began)
            write(options.output, result)
            print(f"{part}: {json.dumps(found)}", flush=True)
    print(json.dumps(result))
    if any("failed" in found for found in result["parts"].values()):
        sys.exit(1)


def run_part(options: argparse.Namespace) -> dict:
    from gpu_parity import parity
    from gpu_parts import Setting, matmul, ours, trl

    chosen = TINY if options.tiny else SETTING
    setting = Setting(options.folder, options.device, **chosen)
    match options.part:
        case "matmul":
            return matmul(setting)
        case "packed_2b":
            return ours(setting, "2b", packed=True, lora=False)
        case "lora_9b":
            return ours(setting, "9b", packed=True, lora=True)
        case "padded_2b":
            return ours(setting, "2b", packed=False, lora=False)
        case "trl_tuned_2b":
            return trl(setting, "2b", tuned=True)
        case "trl_default_2b":
            return trl(setting, "2b", tuned=False)
    return parity(setting)


def start_part(part: str, options: argparse.Namespace, folder: str, limit: float) -> dict:
    """What the part found, or why it found nothing."""
    if limit < 20:
        return {"failed": f"left out: the suite's {LIMIT} seconds are over"}
    command = [sys.executable, __file__, "--part", part, "--folder", folder]
    command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": f"{folder}/cache",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": one_gpu() if options.device == "cuda" else "",
    }
    began = time.monotonic()
    # A tiny run is about whether it runs, on machines of any speed.
    allowed = None if options.tiny else limit
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=allowed,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit:.0f} seconds"}
        if done.returncode:
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-20:]
            print("\n".join(last), file=sys.stderr)
            return {"failed": last[-1] if last else f"exit code {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "part_seconds": round(time.monotonic() - began)}


def one_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def compared(parts: dict[str, dict]) -> dict[str, float]:
    """MFU of each part, and ratios between them."""
    ceiling = parts.get("matmul", {}).get("tflops")
    found = {}
    for name, part in parts.items():
        if ceiling and "tokens_per_second" in part:
            found[f"mfu_{name}"] = round(part["tflops"] / ceiling, 4)
    speed = {
        name: part["tokens_per_second"]
        for name, part in parts.items()
        if "tokens_per_second" in part
    }
    for other in ("padded_2b", "trl_tuned_2b", "trl_default_2b"):
        if {"packed_2b", other} <= speed.keys():
            found[f"packed_2b_over_{other}"] = round(speed["packed_2b"] / speed[other], 3)
    return found


def machine(device: str) -> dict[str, Any]:
    libraries = ("torch", "transformers", "trl", "peft")
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
    }
    if device == "cuda":
        asked = ["nvidia-smi", f"--id={one_gpu()}", "--query-gpu=name,driver_version"]
        asked.append("--format=csv,noheader")
        told = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout
        found["gpu"], found["driver"] = told.splitlines()[0].split(", ")
    return found


def make_data(folder: Path, tiny: bool) -> None:
    """Samples with images, and the folders of two models without weights."""
    from vlmtune.models import Ovis2_5Processor
    from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

    draw = np.random.default_rng(SEED)
    words = vocabulary(draw)
    tokenizer = train_tokenizer(draw, words)
    share, count = (TINY_SHARE, TINY_SAMPLES) if tiny else (1, SAMPLES)
    images = folder / "images"
    images.mkdir()
    photos, pages = (
        [Path(file).name for file in save_photos(images, draw, small(sizes, share), 64 // share)]
        for sizes in (PHOTO_SIZES, [(side, side) for side in PAGE_SIDES] + [(900, 700)])
    )
    columns = llava_like(draw, count)
    records = []
    for i, (length, trained, patches) in enumerate(
        zip(columns["length"], columns["trained_tokens"], columns["patches"], strict=True)
    ):
        text = (length - patches // 4) // share
        said = max(trained // share, 1)
        asked = sentence(draw, words, max(text - said, 1))
        # No two answers are the same, so that a sample is known by its own.
        answer = f"{i} {sentence(draw, words, said)}"
        record: dict[str, Any] = {"id": str(i)}
        if patches:
            record["images"] = [str(draw.choice(photos if patches < 1600 else pages))]
            asked = f"<image>\n{asked}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append({**record, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), "utf-8")
    for size in ("2b", "9b"):
        config = model_config(size, tokenizer, tiny)
        config.save_pretrained(folder / size)
        patch = config.vit_config.patch_size
        Ovis2_5Processor(Ovis2_5ImageProcessor(patch), tokenizer).save_pretrained(folder / size)


def small(sizes: Any, share: int) -> list[tuple[int, int]]:
    return [(width // share, height // share) for width, height in sizes]


def model_config(size: str, tokenizer: Any, tiny: bool) -> Any:
    if tiny:
        return runpy.run_path(str(ROOT / "scripts/make_tiny_ovis2_5.py"))["tiny_config"](tokenizer)
    return runpy.run_path(str(ROOT / "benchmarks/zero_memory.py"))["ovis_config"](size.upper())


def write(path: Path, result: dict[str, Any]) -> None:
    """At once, so that a suite that is stopped leaves what it has found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(result) + "\n", "utf-8")
    shutil.move(aside, path)


if __name__ == "__main__":
    main()
