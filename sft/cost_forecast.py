"""What a run costs: memory under each engine, operations and time, and disk."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames
from trl.trainer.sft_config import SFTConfig

from ..configs.recompute import TOWERS, parse_recompute
from ..configs.schema import RunConfig
from ..data.dataset import PreparedData
from ..models.ovis2_5.flops import STAGES, forward_flops, training_flops
from .arguments import COMPILE_KEYS
from .data_forecast import MicroBatches, computed_at, sample_ref
from .forecast import Compute, Costliest, Disk, EngineMemory, ModuleCount, Parameters, Steps
from .memory import Batch, checkpoint_bytes, count, estimate
from .modules import TrainedModule
from .probe import kept_for_backward
from .rows import stages

RESERVE = 0.10
"""Share of a GPU's memory left for the CUDA context, NCCL and fragmentation: assumed."""

NO_ENGINE = "none"
ENGINES = (
    NO_ENGINE,
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero2_offload",
    "zero3_offload",
    "zero3_offload_all",
)
"""A run without DeepSpeed, and the files of configs/zero."""

COUNTS = ("length", "trained_tokens", "patches", "patches_squared")


@dataclass(frozen=True)
class PlannedModel:
    """A model on the meta device, with what of it is trained and how.

    Attributes:
        modules: What is trained.
        policies: What the backward pass computes again, by tower.
        precision: What the run computes in: "bf16", "fp16" or "fp32".
    """

    model: PreTrainedModel | PeftModel
    modules: list[TrainedModule]
    policies: Mapping[str, str]
    precision: str

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def parameters(self) -> Parameters:
        total = sum(p.numel() for p in self.model.parameters())
        trained = [
            ModuleCount(m.name, m.size, m.size / total, m.learning_rate) for m in self.modules
        ]
        return Parameters(total, sum(m.size for m in self.modules), trained)

    def flops(self, *counts: np.ndarray) -> np.ndarray:
        """Operations of a step on samples of these `COUNTS`."""
        trained, adapted = stages(self.base)
        return training_flops(self.base.config, *counts, trained=trained, adapted=adapted)

    def recomputed_flops(self, *counts: np.ndarray) -> np.ndarray:
        """Operations that the backward pass computes again where it comes: of layers of policy
        `full`, and of both heads, which are computed in chunks; what `selective` computes again is
        no product."""
        trained, adapted = stages(self.base)
        products, attention = forward_flops(self.base.config, *counts)

        def reached(stage: str) -> bool:
            return not (trained | adapted).isdisjoint(STAGES[: STAGES.index(stage) + 1])

        again = products["head"].copy()
        if reached("table"):
            again += products["visual_head"]
        for tower, stage in {"llm": "llm", "visual_tokenizer": "vit"}.items():
            if reached(stage) and self.policies[tower] == "full":
                again += products[stage] + attention[stage]
        return again

    def evaluation_flops(self, *counts: np.ndarray) -> np.ndarray:
        return training_flops(self.base.config, *counts, trained=(), adapted=())


def recompute_policies(config: RunConfig, args: SFTConfig) -> dict[str, str]:
    """Of each tower; `gradient_checkpointing` computes both again whole."""
    if config.loop.recompute is not None:
        return parse_recompute(config.loop.recompute)
    return dict.fromkeys(TOWERS, "full" if args.gradient_checkpointing else "none")


def costliest(
    planned: PlannedModel, data: PreparedData, epoch: MicroBatches, steps: Steps
) -> Costliest:
    """Of the micro-batches that the run reaches, the one that a probe would run: which keeps the
    most for its backward pass."""
    together = steps.gpus * steps.accumulation
    kept = kept_for_backward(planned.model, epoch.tokens, epoch.patches)
    at = int(kept[: steps.total * together].argmax())
    samples = epoch.groups[at]
    own = int(data.column("length")[samples].sum())
    return Costliest(
        step=at // together + 1,
        process=at % steps.gpus,
        tokens=int(epoch.tokens[at]),
        trained_tokens=int(epoch.trained_tokens[at]),
        patches=int(epoch.patches[at]),
        padded=own < int(epoch.tokens[at]),
        samples=[sample_ref(data, i) for i in samples],
    )


def engine_memory(
    config: RunConfig,
    args: SFTConfig,
    planned: PlannedModel,
    batch: Costliest,
    gpus: int,
    gpu_memory: int,
) -> list[EngineMemory]:
    """Every engine, and the run's own DeepSpeed file where it is none of them."""
    shipped = {name: _shipped(name) for name in ENGINES}
    configured, settings = configured_engine(config, shipped)
    found = []
    rows = 1 if config.data.packing else len(batch.samples)
    counts = batch.tokens, batch.trained_tokens, batch.patches
    for name, zero in {**shipped, configured: settings}.items():
        terms = estimate(
            planned.model,
            Batch(rows, *counts, padded=batch.padded),
            zero=zero,
            gpus=gpus,
            recompute=planned.policies,
            precision=planned.precision,
            optimizer=OptimizerNames(args.optim).value,
            accumulation=args.gradient_accumulation_steps > 1,
        )
        always = {term: terms[term] for term in ("weights", "master", "moments")}
        backward = {term: terms[term] for term in ("gradients", "backward", "activations")}
        in_step = terms["step"] > sum(backward.values())
        alive = {**always, **({"step": terms["step"]} if in_step else backward)}
        found.append(
            EngineMemory(
                name=name,
                terms=alive,
                peak=terms["peak"],
                dominant=max(alive, key=lambda term: alive[term]),
                moment="optimizer step" if in_step else "backward",
                host=terms["host"],
                fits=terms["peak"] <= gpu_memory * (1 - RESERVE),
                configured=name == configured,
                refused=_refused(config, zero),
            )
        )
    return found


def configured_engine(
    config: RunConfig, shipped: Mapping[str, dict[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """Name and `zero_optimization` block of what the run uses."""
    given = config.training.get("deepspeed")
    if not given:
        return NO_ENGINE, {}
    settings = json.loads(Path(given).read_text("utf-8")) if isinstance(given, str) else given
    zero = _completed(settings.get("zero_optimization", {}))
    same = (name for name, block in shipped.items() if block == zero)
    return next(same, "yours"), zero


def _shipped(name: str) -> dict[str, Any]:
    if name == NO_ENGINE:
        return {}
    file = files("vlmtune.configs") / "zero" / f"{name}.json"
    return _completed(json.loads(file.read_text("utf-8"))["zero_optimization"])


def _completed(zero: Mapping[str, Any]) -> dict[str, Any]:
    """With DeepSpeed's defaults (0.19, runtime/zero/config.py) of what memory depends on, and
    without what is offloaded nowhere."""
    stage = zero.get("stage", 0)
    defaults = {"stage": 0, "overlap_comm": stage == 3, "sub_group_size": 10**9}
    defaults["stage3_max_live_parameters"] = 10**9
    nowhere = [
        key
        for key in ("offload_optimizer", "offload_param")
        if (zero.get(key) or {}).get("device", "none") == "none"
    ]
    return {key: value for key, value in {**defaults, **zero}.items() if key not in nowhere}


def _refused(config: RunConfig, zero: Mapping[str, Any]) -> str:
    if zero.get("stage") != 3:
        return ""
    adapter = config.adapter
    if adapter.use_lora and (adapter.load_in_4bit or adapter.load_in_8bit):
        return "ZeRO-3 splits no weights of 4 or 8 bits"
    return (
        "ZeRO-3 does not go with torch_compile"
        if any(map(config.training.get, COMPILE_KEYS))
        else ""
    )


def evaluations(args: SFTConfig, steps: Steps) -> int:
    """How often a run evaluates while it trains."""
    match args.eval_strategy:
        case IntervalStrategy.STEPS:
            every = interval(args.eval_steps or 1, steps)
            return sum(1 for step in points(every, steps.total) if step >= args.eval_delay)
        case IntervalStrategy.EPOCH:
            ends = range(1, math.ceil(steps.epochs) + 1)
            return sum(1 for epoch in ends if min(epoch, steps.epochs) >= args.eval_delay)
    return 0


def saves(args: SFTConfig, steps: Steps) -> int:
    """How many checkpoints a run writes."""
    match args.save_strategy:
        case SaveStrategy.STEPS:
            return len(points(interval(args.save_steps, steps), steps.total))
        case SaveStrategy.EPOCH:
            return math.ceil(steps.epochs)
        case SaveStrategy.BEST:
            return evaluations(args, steps)
    return 0


def interval(every: float, steps: Steps) -> int:
    """Steps between two events; below 1 it is given as a share of the run."""
    return math.ceil(every * steps.total) if every < 1 else int(every)


def points(every: int, total: int) -> Sequence[int]:
    """Steps of an event, which the end of a run has too; it alone where `every` is 0."""
    found = list(range(every, total + 1, every)) if every else []
    return found if found and found[-1] == total else [*found, total]


def compute(
    args: SFTConfig,
    planned: PlannedModel,
    data: PreparedData,
    epoch: MicroBatches,
    evaluation: Sequence[PreparedData],
    steps: Steps,
    mfu: float,
    tflops: float,
) -> Compute:
    """Operations and time of the run, every epoch taken as the first."""
    counts = [data.column(name)[epoch.groups.indices] for name in COUNTS]
    widened = [computed_at(epoch, data.column("length")), *counts[1:]]
    useful, computed = planned.flops(*counts).sum(), planned.flops(*widened).sum()
    again = planned.recomputed_flops(*widened).sum()
    count = evaluations(args, steps)
    evaluated = count * sum(
        planned.evaluation_flops(*(e.column(name) for name in COUNTS)).sum() for e in evaluation
    )
    per_hour = 3600 * mfu * tflops * 1e12 * steps.gpus
    hours = float(computed * steps.epochs / per_hour)
    return Compute(
        flops_per_epoch=float(useful),
        flops=float(useful * steps.epochs),
        padded=float((computed - useful) * steps.epochs),
        recomputed=float(again * steps.epochs),
        evaluated=float(evaluated),
        mfu=mfu,
        tflops=tflops,
        hours=hours,
        gpu_hours=hours * steps.gpus,
        evaluations=count,
        evaluation_hours=float(evaluated / per_hour),
        tokens_per_second=float(counts[0].sum() * steps.epochs / hours / 3600),
    )


def disk(config: RunConfig, args: SFTConfig, planned: PlannedModel, steps: Steps) -> Disk:
    """Of checkpoints and the finished model, without logs."""
    _, zero = configured_engine(config, {})
    weights, optimizer = checkpoint_bytes(
        count(planned.model),
        zero,
        adapters=bool(config.adapter.use_lora),
        precision=planned.precision,
        optimizer=OptimizerNames(args.optim).value,
    )
    one = weights if args.save_only_model else weights + optimizer
    written = saves(args, steps)
    # The best one stays beside the newest.
    limit = max(args.save_total_limit or written, 2 if args.load_best_model_at_end else 1)
    kept = min(written, limit)
    return Disk(
        weights=weights,
        optimizer=one - weights,
        saves=written,
        kept=kept,
        final=weights,
        most=max(min(written, limit + 1) * one, kept * one + weights),
    )
