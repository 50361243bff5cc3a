"""What a run will be: its config, data and model without weights to a `Forecast`."""

from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.training_args import OptimizerNames
from trl.trainer.sft_config import SFTConfig

from ..configs.adapter import AdapterConfig
from ..configs.schema import DataConfig, LoopConfig, ModelConfig, RunConfig
from ..core.errors import ConfigError
from ..data.mixing import MixSampler, mix_weights
from ..data.sources import resolve_sources
from ..models import Ovis2_5Processor
from ..models.loading import load_processor
from .arguments import global_batch, planned_arguments
from .batches import train_batches
from .cost_forecast import (
    COUNTS,
    RESERVE,
    PlannedModel,
    compute,
    costliest,
    disk,
    engine_memory,
    recompute_policies,
)
from .data import RunData, prepare, sample_encoder, seed_of
from .data_forecast import describe, layouts, micro_batches
from .doubts import find_doubts
from .forecast import DataForecast, Forecast, Setting, Steps
from .memory import OPTIMIZERS, meta_model
from .plan import schedule
from .rows import check_rows, plan_rows

OF_THIS_MACHINE = ("dataloader_num_workers", "dataloader_persistent_workers", "report_to")
"""Settings that follow from what is found here, which need not be where the run will be."""

UNCOUNTED = (
    "CUDA context, NCCL buffers and fragmentation, for which the reserve stands",
    "evaluation batches",
)
"""What the memory estimate leaves out of every run."""


def forecast(
    config: RunConfig,
    gpus: int,
    gpu_memory: int,
    mfu: float = 0.4,
    tflops: float = 989.0,
    title: str = "",
) -> Forecast:
    """Read the data as training would, into the same cache, and the model's config; no weights, no
    GPU, and nothing is written into the output folder.

    Args:
        config: Of a run that trains, on data that is not streamed, a model that is there.
        gpu_memory: Bytes of a GPU.
        mfu: Share of `tflops`, 10^12 operations a second of a GPU, that training reaches.
        title: What the forecast is of, for its reader.

    Raises:
        VLMTuneError: as training would, for what it sees before its first step.
    """
    args, settings = planned_arguments(config, gpus)
    data, described = load_data(config, args, load_processor(config.model.model_path))
    train, packed = data.train, config.data.packing
    assert train is not None
    if packed:
        check_rows(config, data)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    model, modules = meta_model(config, precision, args.learning_rate)
    policies = recompute_policies(config, args)
    planned = PlannedModel(model, modules, policies, precision)
    packing = plan_rows(config, model, data)
    batches = train_batches(args, data, packing if packed else None, rank=0, world=gpus)
    epoch = micro_batches(train, batches)
    counted = schedule(batches, args)
    steps = Steps(
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        gpus=gpus,
        global_batch=global_batch(args, gpus),
        per_epoch=counted.per_epoch,
        total=counted.total,
        epochs=counted.total / counted.per_epoch,
        warmup=args.get_warmup_steps(counted.total),
    )
    counts = [train.column(name) for name in COUNTS]

    def flops(samples: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return planned.flops(tokens, *(column[samples] for column in counts[1:]))

    worst = costliest(planned, train, epoch, steps)
    held_out = list(data.evaluation.values())
    result = Forecast(
        config=title,
        model=config.model.model_path,
        output_dir=str(Path(args.output_dir or ".").resolve()),
        precision=precision,
        gpus=gpus,
        gpu_memory=gpu_memory,
        reserve=RESERVE,
        settings=changed_settings(config, settings, args),
        notes=config.notes,
        parameters=planned.parameters(),
        train=described[0],
        evaluation=described[1:],
        layouts=layouts(args, data, packing, packed, flops, gpus),
        steps=steps,
        costliest=worst,
        engines=engine_memory(config, args, planned, worst, gpus, gpu_memory),
        left_out_of_memory=uncounted(args),
        compute=compute(args, planned, train, epoch, held_out, steps, mfu, tflops),
        disk=disk(config, args, planned, steps),
        doubts=[],
    )
    return replace(result, doubts=find_doubts(config, args, data, planned.base.config, result))


def load_data(
    config: RunConfig, args: SFTConfig, processor: Ovis2_5Processor
) -> tuple[RunData, list[DataForecast]]:
    """The data as `sft.data.load_data` has it, without a ledger in the output folder; and what it
    is, of the training data first."""
    encoder, settings = sample_encoder(config, processor), config.data
    sources = resolve_sources(settings.data_path, settings.image_folder, settings.datainfo)
    passes = mix_weights(settings.mix, [source.name for source in sources])
    train = prepare(config, sources, encoder)
    sampler = MixSampler(train.sizes, passes, seed_of(args)) if settings.mix else None
    per_epoch = sampler.samples if sampler else train.sizes
    if not sum(per_epoch):
        raise ConfigError("mix", "no sample is drawn in an epoch", "raise a number of passes")
    merged = processor.image_processor.hidden_stride**2
    described = [describe("train", train, sources, passes, per_epoch, merged)]
    evaluation = {}
    for name, paths in settings.eval_sets.items():
        sources = resolve_sources(paths, settings.image_folder, settings.datainfo)
        evaluation[name] = held_out = prepare(config, sources, encoder)
        once, sizes = [1.0] * len(sources), held_out.sizes
        described.append(describe(f"eval {name}".strip(), held_out, sources, once, sizes, merged))
    return RunData(encoder, train, evaluation, sampler), described


def uncounted(args: SFTConfig) -> list[str]:
    """What the memory estimate leaves out."""
    optimizer = OptimizerNames(args.optim).value
    other = f"what {optimizer} keeps in another way than adamw_torch, as which it counts"
    return [*UNCOUNTED, *([] if optimizer in OPTIMIZERS else [other])]


def changed_settings(config: RunConfig, settings: dict[str, Any], args: SFTConfig) -> list[Setting]:
    """The keys whose values are not the defaults of our dataclasses or of the host, in the order
    of the file or command line that gave them, then those that follow from others."""
    defaults = {
        field.name: field.default if field.default is not MISSING else _made(field)
        for owner in (ModelConfig, DataConfig, LoopConfig, AdapterConfig, SFTConfig)
        for field in fields(owner)
    }
    values = {**config.to_dict(), **settings}
    if config.loop.base_learning_rate:
        values["learning_rate"] = args.learning_rate
    computed = [key for key in values if key not in config.sources and key not in OF_THIS_MACHINE]
    return [
        Setting(key, values[key], defaults[key], config.sources.get(key, "computed"))
        for key in [*config.sources, *computed]
        if key in values and values[key] != defaults[key]
    ]


def _made(field: Any) -> object:
    return None if field.default_factory is MISSING else field.default_factory()
