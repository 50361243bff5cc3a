"""What a run is going to do, told before its first step."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from ..configs.recompute import parse_recompute
from ..configs.schema import RunConfig
from ..core.distributed import world_size
from ..core.errors import ConfigError
from ..data.dataset import PreparedData
from ..data.packing import PackingPlan, imbalance
from .adapters import adapter_table
from .arguments import global_batch
from .batches import EpochBatches
from .data import RunData
from .modules import TrainedModule, module_table
from .recompute import describe_recompute


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a run, as the trainer will count them."""

    per_epoch: int
    total: int


def schedule(batches: EpochBatches, args: SFTConfig) -> Schedule:
    """Optimizer steps for an epoch of these micro-batches of a process.

    Raises:
        ConfigError: no micro-batch is left.
    """
    count, accumulation = len(batches), args.gradient_accumulation_steps
    if count == 0:
        raise ConfigError(
            "dataloader_drop_last",
            f"drops everything: {batches.samples} samples fill no batch of "
            f"{args.per_device_train_batch_size} on {batches.world} processes",
            "lower per_device_train_batch_size, or leave dataloader_drop_last out",
        )
    per_epoch = math.ceil(count / accumulation)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Schedule(per_epoch, total)


def banner(
    config: RunConfig,
    args: SFTConfig,
    model: PreTrainedModel | PeftModel,
    modules: list[TrainedModule],
    data: RunData,
    batches: EpochBatches | None,
) -> str:
    """The whole plan of a run in a dozen lines, and the tables of what is trained and of where
    adapters sit; `batches` are those it trains on, None where they are streamed."""
    adapted = isinstance(model, PeftModel)
    base: Any = model.get_base_model() if adapted else model
    total = sum(map(_size, model.parameters()))
    trained = sum(module.size for module in modules)
    lines = {
        "model": f"{config.model.model_path} ({type(base).__name__}, {_kept_in(base)})",
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.1%})",
        **_data_lines(data, args, batches),
        "batch": f"{global_batch(args)}{' rows' if config.data.packing else ''} = "
        f"{args.per_device_train_batch_size} per device x "
        f"{args.gradient_accumulation_steps} accumulation x {world_size()} processes",
        "trainer": f"{config.loop.trainer}, learning rate {_rate(config, args)}, "
        f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'} on {args.device.type}",
        "output": str(Path(args.output_dir or ".").resolve()),
    }
    if config.loop.recompute:
        policies = describe_recompute(parse_recompute(config.loop.recompute))
        lines["trainer"] += f", recompute {policies}"
    plan = "\n".join(f"  {key:8} {value}" for key, value in lines.items())
    tables = [module_table(modules)]
    if adapted:
        tables.append(adapter_table(model))
    return "\n".join([plan, *tables])


def _size(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also where this process holds a part or a packed form of it."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


def _kept_in(model: PreTrainedModel) -> str:
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return str(model.dtype)
    bits = f"4-bit {settings.bnb_4bit_quant_type}" if settings.load_in_4bit else "8-bit"
    return f"{bits}, the rest {model.dtype}"


def _data_lines(data: RunData, args: SFTConfig, batches: EpochBatches | None) -> dict[str, str]:
    held_out = sum(len(d.dataset) for d in data.evaluation.values())
    if data.train is None or batches is None:
        return {
            "samples": f"a stream, {held_out:,} eval",
            "steps": f"{args.max_steps:,}",
        }
    train, size = data.train, len(data.sampler or data.train.dataset)
    plan = schedule(batches, args)
    left_out = sum(len(d.left_out) for d in (train, *data.evaluation.values()))
    return {
        "samples": f"{size:,} train, {held_out:,} eval"
        + (f", {left_out:,} left out (bad_samples.jsonl)" if left_out else ""),
        "tokens": f"{train.tokens:,} in the data, longest sample {train.longest:,}, "
        f"{train.trained_tokens / train.tokens:.1%} trained",
        **_batch_lines(train, batches),
        "steps": f"{plan.total:,} = {plan.per_epoch:,} per epoch, "
        f"{plan.total / plan.per_epoch:.2f} epochs",
    }


def _batch_lines(train: PreparedData, batches: EpochBatches) -> dict[str, str]:
    """How full the first epoch's batches are."""
    groups, lengths = batches.order(0), train.column("length")
    tokens = int(lengths[groups.indices].sum())
    if not isinstance(batches.order, PackingPlan):
        longest = np.maximum.reduceat(lengths[groups.indices], groups.starts)
        padded = int((longest * groups.sizes()).sum())
        return {"padding": f"{1 - tokens / padded:.1%} of the first epoch's batches"}
    plan = batches.order
    line = (
        f"{plan.rows:,} of {plan.bounds.tokens:,} tokens, "
        f"{tokens / plan.rows / plan.bounds.tokens:.1%} filled, "
        f"{len(groups.indices) / plan.rows:.1f} samples each"
    )
    if batches.world > 1:
        waiting = imbalance(groups, plan.samples.costs, batches.world)
        line += f", processes balanced to {waiting:.3f} (largest / mean planned cost)"
    return {"rows": line}


def _rate(config: RunConfig, args: SFTConfig) -> str:
    rate = f"{args.learning_rate:g}"
    if base := config.loop.base_learning_rate:
        rate += f" = {base:g} x sqrt({global_batch(args)} / {config.loop.base_batch_size})"
    return rate
