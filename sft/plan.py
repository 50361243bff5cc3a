"""What a run is going to do, told before its first step."""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from ..configs.schema import RunConfig
from ..core.distributed import world_size
from ..core.errors import ConfigError
from ..data.dataset import PreparedData


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a run, as the trainer will count them."""

    batch: int
    per_epoch: int
    total: int


def schedule(samples: int, args: SFTConfig) -> Schedule:
    """Effective batch and steps: per-device batch x accumulation x processes.

    Raises:
        ConfigError: there is no whole batch.
    """
    ranks, accumulation = world_size(), args.gradient_accumulation_steps
    batch = args.per_device_train_batch_size
    if batch < 1:
        raise ConfigError("per_device_train_batch_size", f"is {batch}", "give 1 or more")
    if args.dataloader_drop_last:
        batches = samples // batch // ranks
    else:
        batches = math.ceil(math.ceil(samples / batch) / ranks)
    if batches == 0:
        raise ConfigError(
            "dataloader_drop_last",
            f"drops everything: {samples} samples fill no batch of {batch} on {ranks} processes",
            "lower per_device_train_batch_size, or leave dataloader_drop_last out",
        )
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Schedule(batch * accumulation * ranks, per_epoch, total)


def banner(
    config: RunConfig,
    args: SFTConfig,
    model: PreTrainedModel,
    train: PreparedData,
    evaluation: PreparedData | None,
) -> str:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
    plan = schedule(len(train.dataset), args)
    held_out = len(evaluation.dataset) if evaluation else 0
    left_out = len(train.left_out) + (len(evaluation.left_out) if evaluation else 0)
    lengths = train.dataset["length"]
    lines = {
        "model": f"{config.model.model_path} ({type(model).__name__}, {model.dtype})",
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.1%})",
        "samples": f"{len(train.dataset):,} train, {held_out:,} eval"
        + (f", {left_out:,} left out (bad_samples.jsonl)" if left_out else ""),
        "tokens": f"{sum(lengths):,} in all, longest sample {max(lengths):,}, "
        f"{sum(train.dataset['trained_tokens']) / sum(lengths):.1%} trained",
        "batch": f"{plan.batch} = {args.per_device_train_batch_size} per device x "
        f"{args.gradient_accumulation_steps} accumulation x {world_size()} processes",
        "steps": f"{plan.total:,} = {plan.per_epoch:,} per epoch, "
        f"{plan.total / plan.per_epoch:.2f} epochs",
        "trainer": f"{config.model.trainer}, learning rate {args.learning_rate:g}, "
        f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'} on {args.device.type}",
        "output": str(Path(args.output_dir or ".").resolve()),
    }
    return "\n".join(f"  {key:8} {value}" for key, value in lines.items())
