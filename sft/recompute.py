"""What the backward pass computes again to save memory, and compiled layers."""

from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configs.recompute import TOWERS

ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
"""Attention kernels whose results `selective` keeps. Attention made of several products is computed
again: its results are as large as the square of the length."""
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1}
"""Matrix products whose results `selective` keeps, and which argument is the left matrix."""
WIDENING = 8
"""A product this many times wider than its inner size, such as LoRA's second, costs little beside
what it would keep."""


def apply_recompute(model: PreTrainedModel | PeftModel, policies: Mapping[str, str]) -> None:
    """Set for the layers of each tower what the backward pass computes again.

    Args:
        policies: Of `parse_recompute`: "none", "selective" (all but matrix products and attention)
            or "full".
    """
    functions = {
        "full": partial(checkpoint, use_reentrant=False),
        "selective": partial(
            checkpoint,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, _policy),
        ),
    }
    for tower, policy in policies.items():
        for layer in _layers(model, tower):
            layer.gradient_checkpointing = policy != "none"
            layer._gradient_checkpointing_func = functions.get(policy)


def describe_recompute(policies: Mapping[str, str]) -> str:
    """Such as "llm selective, visual_tokenizer none"."""
    return ", ".join(f"{tower} {policy}" for tower, policy in policies.items())


def recompute_line(policies: Mapping[str, str], history: list[dict[str, Any]]) -> str:
    """What the policies cost and saved: the median speed and the highest memory of a log.

    Args:
        history: `trainer.state.log_history`.
    """
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    peaks = [entry["peak_memory_gib"] for entry in history if "peak_memory_gib" in entry]
    line = f"recompute {describe_recompute(policies)}"
    if not speeds:
        return line
    return f"{line}: {median(speeds):,.0f} tokens/s, peak {max(peaks):.2f} GiB"


def compile_layers(
    model: PreTrainedModel | PeftModel, backend: str = "inductor", mode: str | None = None
) -> None:
    """Compile the layers of both towers one by one: layers of one kind share their code, the
    lengths of batches are free, and the names of tensors stay.

    On a CPU a layer that `attend_within` serves runs uncompiled while it is computed again.
    """
    # Layers of both towers, with and without mask and gradient, count against one limit, of 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for tower in TOWERS:
        for layer in _layers(model, tower):
            layer.compile(backend=backend, mode=mode, dynamic=True)


def _layers(model: PreTrainedModel | PeftModel, tower: str) -> Iterator[Any]:
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    for module in base.get_submodule(tower).modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield module


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition(".")[0] if isinstance(op, torch._ops.OpOverload) else ""
    kept = name in ATTENTION
    if name in PRODUCTS:
        left, right = args[PRODUCTS[name] :][:2]
        kept = right.shape[1] < WIDENING * left.shape[1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
