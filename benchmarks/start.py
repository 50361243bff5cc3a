"""Time until the command answers, and until the first step of training is logged.

    python benchmarks/start.py

`help` and `config_error` are whole processes: `vlmtune --help`, and `vlmtune train` with a key that
does not exist. `first_step` is from the launch of a process until its first loss is in a file, on a
random tiny Ovis2.5 and the sample data: `vlmtune train`, which checks data and model, against a
bare script around TRL's SFTTrainer: same records, batch, order and optimizer, each with its own
defaults else. Both in turn, seconds; `cpu` is the processor time of the process and its loader
processes up to then, `wall` the clock's. One launch each, the rest three times. `equal` compares
the first losses.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measuring import environment, summary
from synthetic import ROOT

ROUNDS, LIMIT = 3, 240
GOALS = {"help_s": 0.3, "config_error_s": 0.3, "first_step_ratio": 1.1}
DATA, IMAGES = ROOT / "sample_data/train.json", ROOT / "sample_data/images"
TRAINING = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "warmup_steps": 0,
    "bf16": False,
    "report_to": "none",
}
TRL_SCRIPT = f"""
import json, sys
from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer
import vlmtune.models  # registers Ovis2.5

class Log(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        with open(sys.argv[2] + "/log.jsonl", "a") as file:
            file.write(json.dumps(logs) + "\\n")

rows = []
for record in json.load(open({str(DATA)!r})):
    asked, said = (turn["value"] for turn in record["conversations"])
    images = [{str(IMAGES)!r} + "/" + record["image"]]
    prompt = "<|im_start|>user\\n" + asked + "<|im_end|>\\n<|im_start|>assistant\\n"
    rows.append({{"images": images, "prompt": prompt, "completion": said + "<|im_end|>"}})
data = Dataset.from_list(rows).cast_column("images", List(Image()))
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="float32")
args = SFTConfig(sys.argv[2], max_length=None, save_strategy="no", use_cpu=True, **{TRAINING!r})
processor = AutoProcessor.from_pretrained(sys.argv[1])
SFTTrainer(model, args, train_dataset=data, processing_class=processor, callbacks=[Log()]).train()
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        records = [r for r in json.loads(DATA.read_text("utf-8")) if usable(r)]
        (folder / "train.json").write_text(json.dumps(records), "utf-8")
        script = TRL_SCRIPT.replace(str(DATA), str(folder / "train.json"))
        (folder / "bare.py").write_text(script, "utf-8")
        ours = [sys.executable, "-m", "vlmtune.cli.main"]
        commands = {
            "help": [*ours, "--help"],
            "config_error": [*ours, "train", "--model_pth", "x"],
        }
        whole = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, command in commands.items():
                whole[name].append(answered(command, failing=name == "config_error"))
        steps = {
            "trl": lambda out: [
                sys.executable,
                str(folder / "bare.py"),
                str(folder / "model"),
                out,
            ],
            "ours": lambda out: [*ours, "train", *flags(folder, out)],
        }
        first = {name: until_first_step(command, folder / name) for name, command in steps.items()}
    trl, ours = first["trl"], first["ours"]
    assert abs(trl["loss"] - ours["loss"]) < 1e-4, first
    result: dict[str, Any] = {"benchmark": "start", "goal": GOALS}
    result |= {name: both(runs) for name, runs in whole.items()}
    result["first_step"] = {
        **{name: both([run]) for name, run in first.items()},
        **{f"{kind}_ratio": round(ours[kind] / trl[kind], 2) for kind in ("cpu", "wall")},
    }
    libraries = ("torch", "transformers", "trl", "datasets")
    print(json.dumps({**result, "equal": True, **environment(*libraries)}))


def usable(record: dict[str, Any]) -> bool:
    """One image and one answer, as the bare script reads them."""
    return isinstance(record.get("image"), str) and len(record["conversations"]) == 2


def make_model(folder: Path) -> None:
    script = ROOT / "scripts/make_tiny_ovis2_5.py"
    command = [sys.executable, str(script), "--data", str(DATA), "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def flags(folder: Path, output: str) -> list[str]:
    keys = {
        "model_path": folder / "model",
        "data_path": folder / "train.json",
        "image_folder": IMAGES,
        "output_dir": output,
        "thinking": "as_is",
        **TRAINING,
    }
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def settings(cache: Path | str) -> dict[str, str]:
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(cache),
    }


def answered(command: list[str], failing: bool) -> dict[str, float]:
    """Times of a process that ends by itself."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, env=settings("/tmp"), capture_output=True, text=True)
    after = os.times()
    assert (done.returncode != 0) == failing, done.stderr
    assert not failing or "ConfigError" in done.stderr, done.stderr
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return {"cpu": cpu, "wall": time.perf_counter() - began}


def until_first_step(command: Callable[[str], list[str]], folder: Path) -> dict[str, float]:
    """Times until the first line of log.jsonl is written; the process is then ended."""
    folder.mkdir()
    log, words = folder / "out" / "log.jsonl", command(str(folder / "out"))
    log.parent.mkdir()
    with (folder / "output.txt").open("w") as output:
        began = time.perf_counter()
        process = psutil.Popen(words, env=settings(folder / "cache"), stdout=output, stderr=output)
        while not log.exists() or not log.read_text("utf-8").endswith("\n"):
            assert process.poll() is None, (folder / "output.txt").read_text("utf-8")
            assert time.perf_counter() - began < LIMIT
            time.sleep(0.01)
        wall = time.perf_counter() - began
        started = [process, *process.children(recursive=True)]
        spent = [one.cpu_times() for one in started]
        cpu = sum(times.user + times.system for times in spent)
        for one in started:
            one.kill()
        psutil.wait_procs(started)
    first = json.loads(log.read_text("utf-8").splitlines()[0])
    return {"cpu": cpu, "wall": wall, "loss": first["loss"]}


def both(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {kind: summary([run[kind] for run in runs]) for kind in ("cpu", "wall")}


if __name__ == "__main__":
    main()
