"""Memory and time of merging a LoRA into a 1 GB model: ours, a plain loop over files, PEFT.

    python benchmarks/merge_memory.py > benchmarks/results/merge_memory.json

Makes a random Ovis2.5 of about 520 M parameters in bfloat16, in files of at most 250 MB, and a LoRA
of rank 16 on all its linear layers, in a temporary folder; then merges it in a process per variant,
the variants in turn, on one thread. `ours_qlora` also measures what nf4 would change in the base.
Prints one JSON line. `peak_mb` is the peak of RssAnon, polled, over its value when the libraries
were imported; mapped weight files, which the system may drop at any time, are not in it.
`equal_tensors` are those with the bits of PEFT's.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

VARIANTS = ("ours", "ours_qlora", "file_loop", "peft")
SEED = 0
SHARD_SIZE = "250MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("make", *VARIANTS), help="run one part, in --folder")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = start_part("make", folder)
        runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.rounds):
            for variant in VARIANTS:
                shutil.rmtree(folder / variant, ignore_errors=True)
                runs[variant].append(start_part(variant, folder))
        shards = [file.stat().st_size for file in (folder / "base").glob("*.safetensors")]
        largest = max(shards) / 1e6
        result = {
            "date": datetime.date.today().isoformat(),
            "seed": SEED,
            "rounds": options.rounds,
            "model": {
                **model,
                "weights_mb": round(sum(shards) / 1e6, 1),
                "files": len(shards),
                "largest_file_mb": round(largest, 1),
            },
        }
        for variant in VARIANTS:
            result[variant] = {
                **summary(runs[variant], largest),
                "equal_tensors": equal_tensors(folder / variant, folder / "peft"),
            }
        result["machine"] = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
        libraries = ("torch", "transformers", "peft", "safetensors")
        result["versions"] = {name: version(name) for name in libraries}
        print(json.dumps(result))


def summary(runs: list[dict], largest: float) -> dict:
    """Median of each number, with lowest and highest."""
    found = {}
    for key in ("peak_mb", "seconds", "cpu_seconds"):
        values = [run[key] for run in runs]
        found[key] = statistics.median(values)
        found[f"{key}_spread"] = [min(values), max(values)]
    return {**found, "peak_over_largest_file": round(found["peak_mb"] / largest, 2)}


def equal_tensors(one: Path, other: Path) -> str:
    import torch

    ours, theirs = read_weights(one), read_weights(other)
    same = sum(torch.equal(theirs[name], ours[name]) for name in theirs.keys() & ours.keys())
    return f"{same} of {len(theirs.keys() | ours.keys())}"


def read_weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def start_part(part: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # libraries print there too


def make(folder: Path) -> dict:
    """Base and adapter with random values, in B too."""
    import torch
    from peft import LoraConfig, get_peft_model

    from vlmtune.core.checkpoints import RUN_FILE
    from vlmtune.lora.quantization import Quantization
    from vlmtune.models import Ovis2_5, Ovis2_5Config

    config = Ovis2_5Config(
        llm_config={
            "model_type": "qwen3",
            "vocab_size": 48000,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": False,
        },
        vit_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
        },
        visual_vocab_size=16384,
    )
    torch.manual_seed(SEED)
    model = Ovis2_5(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=SHARD_SIZE)
    count = sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    modules = 0
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
            modules += 1
    adapted.save_pretrained(folder / "adapter")
    # The same adapter as if it had been trained on nf4 weights, which the merge then measures.
    shutil.copytree(folder / "adapter", folder / "qlora")
    linear = [
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "base_layer") and ".llm." in name
    ]
    quantization = Quantization(4, "nf4", True, "bfloat16", linear)
    run = json.dumps({"quantization": quantization.to_dict()})
    (folder / "qlora" / RUN_FILE).write_text(run, "utf-8")
    return {"parameters": count, "adapted_modules": modules, "rank": 16}


def ours(folder: Path) -> dict:
    from vlmtune.lora.merge import merge

    with Measured() as measured:
        merge(str(folder / "base"), [(str(folder / "adapter"), 1.0)], folder / "ours")
    return measured.result


def ours_qlora(folder: Path) -> dict:
    from vlmtune.lora.merge import merge

    with Measured() as measured:
        merge(str(folder / "base"), [(str(folder / "qlora"), 1.0)], folder / "ours_qlora")
    return measured.result


def file_loop(folder: Path) -> dict:
    """What people write themselves: a file at a time, added to in float32."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with Measured() as measured:
        base, output = folder / "base", folder / "file_loop"
        output.mkdir()
        settings = json.loads((folder / "adapter/adapter_config.json").read_text("utf-8"))
        scaling = settings["lora_alpha"] / settings["r"]
        with safe_open(folder / "adapter/adapter_model.safetensors", "pt") as adapter:
            for file in sorted(base.glob("*.safetensors")):
                with safe_open(file, "pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                for name in tensors:
                    module = f"base_model.model.{name.removesuffix('.weight')}"
                    if f"{module}.lora_A.weight" in adapter.keys():  # noqa: SIM118
                        a = adapter.get_tensor(f"{module}.lora_A.weight")
                        b = adapter.get_tensor(f"{module}.lora_B.weight")
                        merged = tensors[name].float() + b @ a * scaling
                        tensors[name] = merged.to(torch.bfloat16)
                save_file(tensors, output / file.name, metadata={"format": "pt"})
        for name in ("config.json", "model.safetensors.index.json"):
            shutil.copy(base / name, output)
    return measured.result


def peft(folder: Path) -> dict:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    import vlmtune.models  # noqa: F401

    with Measured() as measured:
        model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype="auto")
        merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "peft", max_shard_size=SHARD_SIZE)
    return measured.result


class Measured(threading.Thread):
    """Time, and peak of this process's anonymous memory above its start, of a `with` block."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.result: dict = {}

    def __enter__(self) -> "Measured":
        self.before = self.highest = anonymous_mb()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, cpu_seconds = (
            time.perf_counter() - self.began,
            time.process_time() - self.cpu_began,
        )
        self.stop.set()
        self.join()
        self.result = {
            "peak_mb": round(self.highest - self.before, 1),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
        }

    def run(self) -> None:
        while not self.stop.wait(0.002):
            self.highest = max(self.highest, anonymous_mb())


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status tells no RssAnon; this needs Linux.")


PARTS = {
    "make": make,
    "ours": ours,
    "ours_qlora": ours_qlora,
    "file_loop": file_loop,
    "peft": peft,
}

if __name__ == "__main__":
    main()
