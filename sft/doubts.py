"""What in a plan is probably not meant, or will be refused: each with its key and what to do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl.trainer.sft_config import SFTConfig

from ..configs.schema import RunConfig
from ..configs.train_modules import parse_train_modules
from ..core.errors import ConfigError
from ..data.images import open_image
from .cost_forecast import interval
from .data import RunData
from .forecast import Doubt, Forecast
from .output import check_output_dir

LOOKED_AT = 256
"""Samples whose images' sizes are read."""

LONG = 2.0
"""Hours of a run that should not go without a checkpoint."""

MOST_KEPT = 10
"""Checkpoints to keep that need not have been asked for."""

MUCH_PADDING = 0.2
"""Share of the computed tokens."""

FEW_STEPS = 100
"""Steps of an epoch up to which a single one counts."""

PIXEL_KEYS = [
    f"{media}_{bound}_pixels"
    for media in ("single_image", "multiple_image", "video")
    for bound in ("min", "max")
]


def find_doubts(
    config: RunConfig, args: SFTConfig, data: RunData, model: Any, plan: Forecast
) -> list[Doubt]:
    """All of them, what training refuses and what does not fit first; `model` is its config."""
    return [
        *_refused(config, args, model, plan),
        *_memory(config, plan),
        *_samples(plan),
        *_pixels(config, data),
        *_rates(config),
        *_steps(config, args, plan),
        *_evaluation(config, args, plan),
        *_saving(config, args, plan),
    ]


def _refused(config: RunConfig, args: SFTConfig, model: Any, plan: Forecast) -> Iterator[Doubt]:
    try:
        resume = args.resume_from_checkpoint
        check_output_dir(Path(plan.output_dir), config.loop.overwrite_output_dir, resume)
    except ConfigError as error:
        yield Doubt(error.where, f"{error.what}, so training is refused", error.fix)
    limit = getattr(model.llm_config, "max_position_embeddings", None)
    longest = max(int(part.lengths.largest) for part in (plan.train, *plan.evaluation))
    if limit and longest > limit:
        yield Doubt(
            "multimodal_max_length, text_max_length",
            f"training is refused: a sample has {longest:,} tokens, the language model "
            f"{limit:,} positions",
            f"set both to {limit} or less",
        )


def _memory(config: RunConfig, plan: Forecast) -> Iterator[Doubt]:
    used = next(engine for engine in plan.engines if engine.configured)
    usable = plan.gpu_memory * (1 - plan.reserve)
    if config.training.get("fsdp"):
        yield Doubt("fsdp", "the memory plan knows DeepSpeed alone", "see a short run's peak")
    if not used.fits:
        others = [e for e in plan.engines if e.fits and not e.refused and e.name != "yours"]
        fix = "lower per_device_train_batch_size, the length or pixel limits, or use more GPUs"
        if others:
            best = others[0]
            file = f"configs/zero/{best.name}.json"
            fix = (
                f"leave deepspeed out: {best.peak / 1e9:.1f} GB"
                if best.name == "none"
                else f'"deepspeed": "{file}" needs {best.peak / 1e9:.1f} GB'
            )
            if best.host:
                fix += f", and {best.host / 1e9:.1f} GB of the machine's memory"
        yield Doubt(
            "deepspeed" if others else "per_device_train_batch_size",
            f"the costliest batch needs {used.peak / 1e9:.1f} GB of a GPU's "
            f"{plan.gpu_memory / 1e9:.0f}, of which {usable / 1e9:.1f} are planned with; most of "
            f"it are {used.dominant}",
            fix,
        )


def _samples(plan: Forecast) -> Iterator[Doubt]:
    for part in (plan.train, *plan.evaluation):
        of = "" if part.name == "train" else f" of {part.name}"
        if part.truncated:
            longest = max(sample.tokens + sample.cut for sample in part.longest)
            yield Doubt(
                "multimodal_max_length, text_max_length",
                f"{part.truncated:,} of {part.samples:,} samples{of} are cut and lose "
                f"{part.cut_tokens:,} tokens of their ends",
                f"raise them to {longest:,}, the longest sample, or lower the pixel limits",
            )
        if left_out := sum(part.left_out.values()):
            yield Doubt(
                "data_path" if part.name == "train" else "eval_data_path",
                f"{left_out:,} of the records{of} are left out, most because: "
                f"{next(iter(part.left_out)).rstrip('.')}",
                "see them all with vlmtune validate --config",
            )
    layout = next(layout for layout in plan.layouts if layout.configured)
    if layout.name != "packing" and layout.padding > MUCH_PADDING:
        grouped = layout.name == "group_by_length"
        yield Doubt(
            "packing" if grouped else "train_sampling_strategy",
            f"{layout.padding:.0%} of the computed tokens are padding",
            '"packing": true computes none' + ("" if grouped else ", group_by_length less"),
        )


def _pixels(config: RunConfig, data: RunData) -> Iterator[Doubt]:
    images = data.encoder.processor.image_processor
    side = images.patch_size * images.hidden_stride
    for key in PIXEL_KEYS:
        if key in config.sources and 0 < getattr(config.data, key) < side**2:
            yield Doubt(
                key,
                f"is less than the {side} x {side} pixels of one visual token, and no image "
                "becomes smaller than that",
                f"give {side**2} or more",
            )
    assert data.train is not None
    sizes: dict[str, list[tuple[int, int]]] = {}
    dataset = data.train.dataset.select_columns(["image_files"])
    for i in np.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT)).astype(int):
        files = dataset[int(i)]["image_files"]
        low, _ = data.encoder.limits.for_images(len(files)) if files else (0, 0)
        key = "single_image_min_pixels" if len(files) == 1 else "multiple_image_min_pixels"
        for file in files:
            with open_image(file, file) as image:
                sizes.setdefault(key, []).append((image.width * image.height, low))
    for key, found in sizes.items():
        small = sorted(pixels for pixels, low in found if pixels < low)
        if len(small) > len(found) / 2:
            yield Doubt(
                key,
                f"{len(small)} of {len(found)} images looked at are smaller and will be enlarged, "
                "which costs tokens and shows nothing new",
                f"lower it to {small[len(small) // 2]:,}, the middle one of these sizes",
            )


def _rates(config: RunConfig) -> Iterator[Doubt]:
    entries = parse_train_modules(config.model.train_modules)
    for key in ("learning_rate", "base_learning_rate"):
        own = not config.adapter.use_lora and all(entry.learning_rate for entry in entries)
        if own and key in config.sources:
            yield Doubt(
                key,
                "is used by no module: each of train_modules has a rate of its own",
                f"leave {key} out, or leave out the rate of a module that should have it",
            )


def _steps(config: RunConfig, args: SFTConfig, plan: Forecast) -> Iterator[Doubt]:
    steps, samples = plan.steps, plan.train.per_epoch
    if {"max_steps", "num_train_epochs"} <= config.sources.keys() and args.max_steps > 0:
        yield Doubt(
            "num_train_epochs",
            f"has no effect: max_steps {args.max_steps:,} ends the run after {steps.epochs:.2f} "
            "epochs",
            "keep one of them",
        )
    if steps.warmup >= steps.total:
        yield Doubt(
            "warmup_steps",
            f"the rate rises for {steps.warmup:,} steps, the run has {steps.total:,}: it never "
            "reaches the learning rate",
            "give a share of the run, such as 0.05",
        )
    if args.logging_strategy == IntervalStrategy.STEPS and (
        interval(args.logging_steps, steps) > steps.total
    ):
        yield Doubt(
            "logging_steps",
            f"is {args.logging_steps:g}, the run has {steps.total:,} steps: no loss is logged",
            "lower it",
        )
    if config.data.packing:
        return
    layout = next(layout for layout in plan.layouts if layout.configured)
    # It leaves out what does not reach every process, and no step of fewer accumulated batches.
    drop = args.dataloader_drop_last
    taken = layout.micro_batches * steps.per_device if drop else samples
    dropped, rest = samples - taken, taken % steps.global_batch
    counts = steps.per_epoch <= min(FEW_STEPS, steps.total)  # the last step of an epoch
    if dropped * FEW_STEPS > samples:
        yield Doubt(
            "dataloader_drop_last",
            f"leaves out {dropped:,} of {samples:,} samples of every epoch, which fill no batch",
            "leave it out, or choose a batch that divides the samples",
        )
    elif steps.global_batch > samples:
        yield Doubt(
            "per_device_train_batch_size",
            f"a step is of {steps.global_batch:,} samples, and an epoch has {samples:,}, which "
            "make one smaller step",
            "choose a batch that divides the samples, or use fewer GPUs or less accumulation",
        )
    elif rest and counts:
        also = "" if steps.accumulation > 1 else ", or dataloader_drop_last"
        yield Doubt(
            "per_device_train_batch_size",
            f"the last of {steps.per_epoch:,} steps of an epoch has {rest:,} samples, the others "
            f"{steps.global_batch:,}, and it moves the weights as far as they do",
            f"choose a batch that divides the samples{also}",
        )


def _evaluation(config: RunConfig, args: SFTConfig, plan: Forecast) -> Iterator[Doubt]:
    steps, compute, strategy = plan.steps, plan.compute, args.eval_strategy
    asked = config.training.get("do_eval", True)
    if not plan.evaluation:
        if "eval_steps" in config.sources:
            yield Doubt("eval_steps", "has no effect: there is no eval_data_path", "give one")
        return
    if strategy == IntervalStrategy.NO:
        yield Doubt(
            "eval_strategy",
            f"is no: eval_data_path is used {'once, after the last step' if asked else 'never'}",
            'give "eval_strategy": "steps" or "epoch", or leave eval_data_path out',
        )
        return
    ends = steps.epochs if strategy == IntervalStrategy.EPOCH else steps.total
    if args.eval_delay > ends:
        yield Doubt(
            "eval_delay",
            f"is {args.eval_delay:g}, after the end of the run: it never evaluates while it trains",
            "lower it",
        )
    elif strategy == IntervalStrategy.STEPS and (every := interval(args.eval_steps or 1, steps)) > (
        steps.total
    ):
        yield Doubt(
            "eval_steps",
            f"is {every:,}, the run has {steps.total:,} steps: it evaluates at the end alone",
            "lower it, or give a share of the run, such as 0.1",
        )
    patience = config.loop.early_stopping_patience
    if patience and compute.evaluations <= patience + 1:
        yield Doubt(
            "early_stopping_patience",
            f"is {patience}, and there are {compute.evaluations} evaluations: nothing can stop "
            "the run before its end",
            f"lower it below {max(compute.evaluations - 1, 2)}, or evaluate more often",
        )
    if compute.evaluations > 1 and compute.evaluation_hours > compute.hours:
        yield Doubt(
            "eval_steps" if strategy == IntervalStrategy.STEPS else "eval_strategy",
            f"{compute.evaluations:,} evaluations take longer than the training itself",
            "evaluate less often, or on fewer samples",
        )


def _saving(config: RunConfig, args: SFTConfig, plan: Forecast) -> Iterator[Doubt]:
    steps, disk, hours = plan.steps, plan.disk, plan.compute.hours
    if args.save_strategy == SaveStrategy.NO and hours > LONG:
        yield Doubt(
            "save_strategy",
            f"is no: a run of {hours:.1f} hours that fails has nothing to go on from",
            'give "save_strategy": "steps" and "save_steps": 0.1',
        )
    every = interval(args.save_steps, steps)
    told = "save_steps" in config.sources or hours > LONG
    if args.save_strategy == SaveStrategy.STEPS and every > steps.total and told:
        yield Doubt(
            "save_steps",
            f"is {every:,}, the run has {steps.total:,} steps: a checkpoint is written at the end "
            "alone",
            "lower it, or give a share of the run, such as 0.2",
        )
    if not args.save_total_limit and disk.kept > MOST_KEPT:
        yield Doubt(
            "save_total_limit",
            f"is not given: all {disk.kept:,} checkpoints stay, {disk.most / 1e9:,.0f} GB",
            "give 2 or 3",
        )
