"""Memory of a micro-batch: what both towers keep for the backward pass, and what the heads need."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.ovis2_5.memory import loss_head_bytes, visual_head_bytes
from ..models.supervised_head import active
from .recompute import apply_recompute
from .traced_layers import LayerBytes, first_inputs, trace_layers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one process, as the GPU gets it.

    Attributes:
        rows: Padded rows, all as long as the longest sample; 1 for packed ones, which are put one
            behind the other.
        tokens: Positions of all rows.
        trained_tokens: Positions that a loss is computed at.
        patches: Of all images and frames.
        padded: Whether a row has padding, for which attention takes a mask.
    """

    rows: int
    tokens: int
    trained_tokens: int
    patches: int
    padded: bool = False


def activation_bytes(
    model: PreTrainedModel | PeftModel,
    batch: Batch,
    recompute: Mapping[str, str],
    *,
    precision: str = "bf16",
    deepspeed: bool = False,
) -> int:
    """Bytes of a micro-batch at the worst moment of the backward pass, without gradients of
    weights: what both towers keep, and in turn the loss head, layers of the language model, and,
    when those are gone, the visual head and layers of the vision tower.

    Left out: embeddings and features on the way between the parts, and what a GPU's attention
    kernel sets aside.

    Args:
        model: Of `meta_model`.
        recompute: Of `parse_recompute`: the policy of each tower.
        deepspeed: Whether DeepSpeed casts all weights to `precision`, else autocast does.
    """
    policies = tuple(sorted(recompute.items()))
    return _activation_bytes(model, batch, policies, precision, deepspeed)


@lru_cache(maxsize=4)
def _activation_bytes(
    model: PreTrainedModel | PeftModel,
    batch: Batch,
    recompute: tuple[tuple[str, str], ...],
    precision: str,
    deepspeed: bool,
) -> int:
    base = base_of(model.train())
    apply_recompute(model, dict(recompute))
    half = precision != "fp32"
    dtype = DTYPES[precision] if deepspeed else None
    autocast = DTYPES[precision] if half and not deepspeed else None
    vision = _trace_vision(base, batch, dtype, autocast) if batch.patches else []
    language = _trace_language(base, batch, dtype, autocast)
    llm, vit = (sum(layer.kept for layer in tower) for tower in (language, vision))
    config, text, vit_config = base.config, base.config.llm_config, base.config.vit_config
    words = active(base.get_output_embeddings())
    in_half = half and deepspeed
    tokens = batch.trained_tokens
    loss_head = loss_head_bytes(text, tokens, in_half, trained=_trained(words), cast=half)
    logits = loss_head_bytes(text, tokens, half=False, cast=False)
    visual_head = 0
    if _trained(base.visual_tokenizer) or _trained(base.vte):
        head, table = base.visual_tokenizer.head, base.vte
        visual_head = _casts(autocast, head, table) + visual_head_bytes(
            config,
            batch.patches // vit_config.hidden_stride**2,
            in_half,
            head=_trained(head),
            table=_trained(table),
            cast=half,
        )
    cached = sum(layer.cached for layer in (*language, *vision))
    return max(
        llm + vit + _casts(autocast, words) + max(cached + logits, loss_head),
        llm + vit + max(layer.working for layer in language),
        vit + visual_head,
        vit + max((layer.working for layer in vision), default=0),
    )


def _casts(autocast: torch.dtype | None, *modules: nn.Module) -> int:
    """Bytes of the copies that a head makes of its float32 matrices."""
    if autocast is None:
        return 0
    matrices = [p for m in modules for p in m.parameters() if p.dim() > 1]
    return sum(autocast.itemsize * p.numel() for p in matrices if p.dtype == torch.float32)


def _trace_language(
    base: Any, batch: Batch, dtype: torch.dtype | None, autocast: torch.dtype | None
) -> list[LayerBytes]:
    decoder, layers = base.get_decoder(), _layers(base, "llm")
    embedding: Any = active(base.get_input_embeddings())
    reached = any(_trained(m) for m in (embedding, base.visual_tokenizer, base.vte))
    length, width = batch.tokens // batch.rows, base.config.llm_config.hidden_size
    embedded = next(embedding.parameters()).dtype
    hidden = torch.empty(
        (batch.rows, length, width), dtype=dtype or embedded, device="meta", requires_grad=reached
    )
    # Given, so that no family looks at positions to find packed samples.
    mask = torch.empty((batch.rows, 1, length, length), dtype=torch.bool, device="meta")
    args, named = first_inputs(
        layers[0],
        lambda: decoder(inputs_embeds=hidden, attention_mask=mask, use_cache=False),
    )
    if not batch.padded:
        named = {name: None if value is mask else value for name, value in named.items()}
    return trace_layers(layers, (args, named), reached, dtype, autocast)


def _trace_vision(
    base: Any, batch: Batch, dtype: torch.dtype | None, autocast: torch.dtype | None
) -> list[LayerBytes]:
    vit, tower = base.config.vit_config, base.visual_tokenizer.vit
    layers = _layers(base, "visual_tokenizer")
    patches = torch.empty((batch.patches, vit.num_channels * vit.patch_size**2), device="meta")
    side = vit.hidden_stride
    grid = (1, side, batch.patches // side)
    (hidden, *rest), named = first_inputs(layers[0], lambda: tower(patches, [grid]))
    reached = _trained(tower.vision_model.embeddings)
    inputs = (hidden if dtype is None else hidden.to(dtype), *rest), named
    return trace_layers(layers, inputs, reached, dtype, autocast)


def _layers(base: Any, tower: str) -> list[nn.Module]:
    return [
        m for m in base.get_submodule(tower).modules() if isinstance(m, GradientCheckpointingLayer)
    ]


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def base_of(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
