"""The parts of gpu_suite.py that measure speed: large products, and training, ours and TRL's."""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from vlmtune.configs.load import load_config
from vlmtune.configs.recompute import parse_recompute
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.attention import packing_attention
from vlmtune.models.loading import load_processor
from vlmtune.models.ovis2_5.flops import STAGES, training_flops
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.batches import train_batches
from vlmtune.sft.data import load_data
from vlmtune.sft.memory import Batch, estimate
from vlmtune.sft.modules import TrainedModule, apply_train_modules
from vlmtune.sft.rows import plan_rows
from vlmtune.sft.trainer import make_trainer

LORA_RANK = 64
BATCH = 8


@dataclass(frozen=True)
class Setting:
    """What a part runs on.

    Attributes:
        folder: With `data.json`, `images` and a folder for each model without weights.
        row_tokens: Length of a packed row.
        rows, batches: Micro-batches of an optimizer step, packed and of `BATCH` samples.
    """

    folder: Path
    device: str
    row_tokens: int
    rows: int
    batches: int
    warm_up: int
    steps: int
    workers: int
    min_pixels: int
    matrix: int

    @property
    def half(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def matmul(setting: Setting) -> dict:
    """The rate of products of large bfloat16 matrices, the best of three shapes."""
    rates = {}
    for rows, inner, columns in ((1, 1, 1), (1, 0.5, 2), (2, 0.25, 2)):
        m, k, n = (int(side * setting.matrix) for side in (rows, inner, columns))
        a = torch.randn(m, k, device=setting.device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=setting.device, dtype=torch.bfloat16)
        for _ in range(5):
            a @ b
        count = 50 if setting.device == "cuda" else 2
        with Timer(setting.device) as timer:
            for _ in range(count):
                a @ b
        rates[f"{m}x{k}x{n}"] = round(2 * m * k * n * count / timer.seconds / 1e12, 3)
    return {"tflops": max(rates.values()), "shapes": rates}


class Timer:
    """Seconds of a `with` block on the device, by its events."""

    def __init__(self, device: str):
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> "Timer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if self.device == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.began = time.perf_counter()

    def stop(self) -> None:
        if self.device == "cuda":
            self.events[1].record()
            torch.cuda.synchronize()
            self.seconds = self.events[0].elapsed_time(self.events[1]) / 1000
        else:
            self.seconds = time.perf_counter() - self.began


def build_model(setting: Setting, size: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    set_seed(0)
    config = AutoConfig.from_pretrained(setting.folder / size)
    with torch.device(setting.device):
        return AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attention
        )


def ours(setting: Setting, size: str, packed: bool, lora: bool) -> dict:
    """Training as `vlmtune train` does it, but with random weights made on the device."""
    batch, accumulation = (1, setting.rows) if packed else (BATCH, setting.batches)
    keys = {
        **data_keys(setting, size),
        "output_dir": str(setting.folder / "out"),
        "packing": packed,
        **({"packing_length": setting.row_tokens} if packed else {}),
        "recompute": "none",
        "train_sampling_strategy": "random",
        "per_device_train_batch_size": batch,
        **loop_keys(setting, accumulation),
        "dataloader_num_workers": setting.workers,
    }
    file = setting.folder / "run.json"
    file.write_text(json.dumps(keys), "utf-8")
    config = load_config([str(file)])
    args = training_arguments(config)
    data = load_data(config, args, load_processor(config.model.model_path))
    attention = packing_attention(None) if packed else "sdpa"

    def built(setting: Setting) -> tuple[Any, list[TrainedModule]]:
        model = build_model(setting, size, setting.half if lora else torch.float32, attention)
        if lora:
            return add_lora(model, args.learning_rate)
        return model, apply_train_modules(model, config.model, args.learning_rate)

    model, modules = built(setting)
    packing = plan_rows(config, model, data) if packed else None
    batches = train_batches(args, data, packing, rank=0, world=1)
    trainer = make_trainer(config, model, args, data, batches, modules, [], {})
    result, measured = watched(trainer, setting, lora)
    planned, _ = built(replace(setting, device="meta"))
    peak = planned_peak(planned, args, measured)
    over = result["peak_gib"] and round(peak / result["peak_gib"], 3)
    return {**result, "planned_peak_gib": round(peak, 2), "planned_over_peak": over}


def planned_peak(model: Any, args: SFTConfig, batches: list[Batch]) -> float:
    """GiB that `vlmtune plan` expects of a GPU with the largest of these micro-batches."""
    peaks = [
        estimate(
            model,
            batch,
            zero={},
            gpus=1,
            recompute=parse_recompute("none"),
            precision="bf16" if args.bf16 else "fp32",
            optimizer=OptimizerNames(args.optim).value,
            accumulation=args.gradient_accumulation_steps > 1,
        )["peak"]
        for batch in batches
    ]
    return max(peaks) / 2**30


def data_keys(setting: Setting, size: str) -> dict[str, Any]:
    return {
        "model_path": str(setting.folder / size),
        "data_path": str(setting.folder / "data.json"),
        "image_folder": str(setting.folder / "images"),
        "multimodal_max_length": setting.row_tokens,
        "text_max_length": setting.row_tokens,
        "single_image_min_pixels": setting.min_pixels,
        "thinking": "every_turn",
    }


def loop_keys(setting: Setting, accumulation: int) -> dict[str, Any]:
    return {
        "gradient_accumulation_steps": accumulation,
        "max_steps": setting.warm_up + setting.steps,
        "learning_rate": 1e-5,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def add_lora(model: Any, learning_rate: float) -> tuple[Any, list[TrainedModule]]:
    layers = r"llm\.model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
    settings = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=layers)
    adapted = get_peft_model(model, settings)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    return adapted, [TrainedModule("llm", learning_rate, trained)]


def trl(setting: Setting, size: str, tuned: bool) -> dict:
    """Plain TRL on the same samples: its collator, padded batches and its fused head."""
    collation: dict[str, Any] = {"dataloader_num_workers": setting.workers} if tuned else {}
    if tuned:
        collation |= {"dataloader_persistent_workers": True, "gradient_checkpointing": False}
    cpu = setting.device == "cpu"
    args = SFTConfig(
        output_dir=str(setting.folder / "trl"),
        max_length=None,  # its default of 1,024 cuts through images, which the model refuses
        per_device_train_batch_size=BATCH,
        use_cpu=cpu,
        bf16=not cpu,
        **loop_keys(setting, setting.batches),
        **collation,
    )
    trainer = SFTTrainer(
        model=build_model(setting, size, torch.float32),
        args=args,
        train_dataset=trl_dataset(setting),
        processing_class=trl_processor(setting, size),
    )
    return watched(trainer, setting, lora=False)[0]


class SmallImages(Ovis2_5Processor):
    """Keeps the pixel limit of the run."""

    min_pixels = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{**kwargs, "min_pixels": self.min_pixels})


def trl_processor(setting: Setting, size: str) -> SmallImages:
    processor = SmallImages.from_pretrained(setting.folder / size)
    processor.min_pixels = setting.min_pixels
    return processor


def trl_dataset(setting: Setting) -> Dataset:
    """The samples as prompts and completions, in random order."""
    records = json.loads((setting.folder / "data.json").read_text("utf-8"))
    rows = []
    for record in records:
        asked, said = (turn["value"] for turn in record["conversations"])
        files = [str(setting.folder / "images" / name) for name in record.get("images", [])]
        rows.append(
            {
                "images": [{"path": file, "bytes": None} for file in files],
                "prompt": f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
                + Ovis2_5Processor.empty_think,
                "completion": f"{said}<|im_end|>",
            }
        )
    random.Random(0).shuffle(rows)
    # TRL takes a set for one of images where the first sample has one.
    rows.sort(key=lambda row: not row["images"])
    text = Value("string")
    features = Features({"images": List(Image()), "prompt": text, "completion": text})
    return Dataset.from_list(rows, features=features)


def watched(trainer: Trainer, setting: Setting, lora: bool) -> tuple[dict, list[Batch]]:
    """Train, and measure the steps after the warm-up, of which the micro-batches are returned."""
    watch = Watch(trainer, setting)
    trainer.add_callback(watch)
    trainer.train()
    model: Any = trainer.model
    config = (model.get_base_model() if lora else model).config
    seconds, tokens, positions, flops = watch.timer.seconds, 0, 0, 0.0
    batches = []
    for lengths, trained, grids, allocated in watch.contents:
        frames = [(h * w) for t, h, w in grids for _ in range(t)]
        totals = np.zeros((3, len(lengths)))  # only the lengths matter sample by sample
        totals[:, 0] = int(trained), sum(frames), sum(f**2 for f in frames)
        stages = {"trained": (), "adapted": ("llm",)} if lora else {"trained": STAGES}
        flops += float(training_flops(config, np.array(lengths), *totals, **stages).sum())
        tokens, positions = tokens + sum(lengths), positions + allocated
        padded = allocated > sum(lengths)
        rows = len(lengths) if padded else 1
        batches.append(Batch(rows, allocated, int(trained), sum(frames), padded))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "steps": setting.steps,
        "seconds_per_step": round(seconds / setting.steps, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "padding_share": round(1 - tokens / positions, 4),
        "tflops": round(flops / seconds / 1e12, 3),
        "data_wait_share": round(watch.waited / seconds, 4),
        "peak_gib": watch.peak_gib,
        "last_loss": losses[-1] if losses else None,
    }
    return result, batches


class Watch(TrainerCallback):
    """Time, waiting and contents of the measured steps.

    `waited` is how long the process waited for its loader, an upper bound of how long the device
    had nothing to do because of it. `contents` of each micro-batch: the lengths of its samples, its
    number of trained tokens, the grids of its images, and its positions with padding.
    """

    def __init__(self, trainer: Any, setting: Setting):
        self.setting, self.timer = setting, Timer(setting.device)
        self.running, self.waited, self.peak_gib = False, 0.0, None
        self._batches: list[dict[str, Any]] = []
        own_step, own_samples = trainer.training_step, trainer.get_batch_samples

        def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.running:
                kept = ("input_ids", "labels", "attention_mask", "cu_seq_lens_q", "grid_thws")
                self._batches.append({k: inputs[k] for k in kept if k in inputs})
            return own_step(model, inputs, *args, **kwargs)

        def get_batch_samples(batches: Iterator, *args: Any) -> Any:
            return own_samples(self._timed(batches), *args)

        trainer.training_step, trainer.get_batch_samples = training_step, get_batch_samples

    def _timed(self, batches: Iterator) -> Iterator:
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self.running:
                self.waited += time.perf_counter() - began
            yield batch

    @property
    def contents(self) -> Iterator[tuple[list[int], int, list[list[int]], int]]:
        for batch in self._batches:
            packed = "cu_seq_lens_q" in batch
            counts = batch["cu_seq_lens_q"].diff() if packed else batch["attention_mask"].sum(1)
            lengths = counts.tolist()
            grids = batch["grid_thws"].tolist() if "grid_thws" in batch else []
            trained = int((batch["labels"] != -100).sum())
            yield lengths, trained, grids, batch["input_ids"].numel()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.setting.warm_up:
            if self.setting.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.running = True
            self.timer.start()
        elif state.global_step == self.setting.warm_up + self.setting.steps:
            self.timer.stop()
            self.running = False
            if self.setting.device == "cuda":
                self.peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 2)
