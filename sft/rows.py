"""Packed rows of a run: their bounds from the config, their costs from the model."""

from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from ..configs.schema import RunConfig
from ..data.packing import RowBounds
from ..models.ovis2_5.flops import training_flops
from .batches import Packing
from .data import RunData

PATHS = {"vit": "visual_tokenizer.vit.", "visual_head": "visual_tokenizer.head.", "table": "vte."}
"""Where the parameters of a stage begin; those of the language model and its head are found by
the head."""


def check_rows(config: RunConfig, data: RunData) -> None:
    """Raises ConfigError for samples that fit no row."""
    assert data.train is not None
    row_bounds(config).check(data.train.column("length"), data.train.column("patches"))


def row_bounds(config: RunConfig) -> RowBounds:
    settings = config.data
    tokens = settings.packing_length or settings.multimodal_max_length
    return RowBounds(tokens, settings.packing_max_patches)


def plan_rows(config: RunConfig, model: PreTrainedModel | PeftModel, data: RunData) -> Packing:
    """How the training data is packed; a sample costs the operations of a step on it."""
    assert data.train is not None
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = ("length", "trained_tokens", "patches", "patches_squared")
    counts = [data.train.column(name) for name in names]
    trained, adapted = stages(base)
    costs = training_flops(base.config, *counts, trained=trained, adapted=adapted)
    return Packing(row_bounds(config), np.asarray(costs))


def stages(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Stages with trained weights, and those with adapters."""
    head: Any = model.get_output_embeddings()
    trained: set[str] = set()
    adapted: set[str] = set()
    of_head = {id(p) for p in head.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            stage = next((s for s, path in PATHS.items() if name.startswith(path)), "llm")
            stage = "head" if id(parameter) in of_head else stage
            (adapted if "lora_" in name else trained).add(stage)
    return trained, adapted
