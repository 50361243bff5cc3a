"""A run on adapters: from the config to a wrapped model and the modules it trains."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..configs.schema import RunConfig
from ..core.errors import ConfigError
from ..lora.adapter import Adapter, Change, check_fits
from ..lora.checkpoint import Checkpoint, fingerprint
from ..lora.quantization import Quantization, quantization_for
from ..lora.settings import (
    ADAPTER,
    FullPart,
    add_adapter,
    full_parts,
    load_adapter,
    saved_parts,
)
from ..lora.targets import frozen_paths, target_modules
from ..models.parts import LANGUAGE, VISION, is_under
from .modules import TrainedModule, table

PREFIX = "base_model.model."
"""What PEFT puts before the paths of the model below."""


@dataclass(frozen=True)
class AdapterPlan:
    """What a run puts on a model, decided on its structure alone.

    Attributes:
        targets: Paths of the adapted layers; empty where an adapter is continued.
        full: Parts trained fully beside them.
        quantization: Of the frozen weights, None where they stay as they are.
    """

    targets: list[str] = field(default_factory=list)
    full: list[FullPart] = field(default_factory=list)
    quantization: Quantization | None = None

    @property
    def full_modules(self) -> list[str]:
        return [module for part in self.full for module in part.modules]

    def facts(self, base: Checkpoint) -> dict[str, Any]:
        """What a merge must know of the weights below an adapter, for the run file."""
        return {
            "base": {"model_path": base.source, "fingerprint": fingerprint(base)},
            "quantization": self.quantization and self.quantization.to_dict(),
        }


def plan_adapters(base: Checkpoint | PreTrainedModel, config: RunConfig, dtype: str) -> AdapterPlan:
    """Resolve the settings on the model's structure.

    Args:
        base: A model without weights as well: then the adapter to continue is not compared with
            them.
        dtype: Of the frozen weights.

    Raises:
        ConfigError: names that match nothing, too much, or what no adapter can sit on.
        ModelError: the adapter to continue cannot be read, or is of another base.
    """
    model = base.model if isinstance(base, Checkpoint) else base
    settings = config.adapter
    full = full_parts(model, config.model, settings)
    modules = [module for part in full for module in part.modules]
    targets, frozen = [], frozen_paths(config.model)
    if settings.adapter_path:
        begun = Adapter.open(settings.adapter_path)
        if isinstance(base, Checkpoint):
            _check_continued(begun, check_fits(begun, base), model, config, modules)
        saved = begun.config.modules_to_save or []
        modules += [n for n, _ in model.named_modules() if any(map(n.endswith, saved))]
    else:
        if frozen and settings.lora_bias == "all":
            raise ConfigError(
                next(iter(frozen)),
                "leaves a part as it is, but lora_bias all trains the biases of all parts",
                "set lora_bias to none or lora_only",
            )
        targets = target_modules(model, config.model, settings, modules, config.loop.trainer)
    return AdapterPlan(targets, full, quantization_for(model, settings, modules, dtype))


def _check_continued(
    begun: Adapter,
    changed: dict[str, Change],
    model: PreTrainedModel,
    config: RunConfig,
    full: Sequence[str],
) -> None:
    """Raises ConfigError where this run cannot train on what the adapter trains."""
    settings = config.adapter
    for key, part in frozen_paths(config.model).items():
        if any(is_under(name, part) for name in changed):
            raise ConfigError(
                key,
                f"leaves {part} as it is, but the adapter of adapter_path changes it",
                "keep one of them",
            )
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    on_head = changed.get(f"{head}.weight")
    if config.loop.trainer == "trl" and on_head and on_head.low_rank:
        raise ConfigError(
            "adapter_path",
            f"its adapter sits on the output head {head}, which TRL refuses",
            'use "trainer": "standard"',
        )
    if settings.load_in_8bit and begun.config.use_dora:
        raise ConfigError(
            "load_in_8bit", "does not go with a DoRA adapter (PEFT 0.21)", "use load_in_4bit"
        )
    if begun.config.bias != "none" and is_deepspeed_zero3_enabled():
        raise ConfigError(
            "adapter_path",
            "its adapter trains biases of the model, which ZeRO-3 splits before they are read",
            "use configs/zero/zero2.json",
        )
    if begun.config.bias != "none" and (settings.load_in_4bit or settings.load_in_8bit):
        raise ConfigError(
            "adapter_path",
            "its adapter trains biases of the model, which bitsandbytes rounds",
            "leave load_in_4bit and load_in_8bit out",
        )
    saved = begun.config.modules_to_save or []
    for module in full:
        if not any(map(module.endswith, saved)):
            raise ConfigError(
                "adapter_path",
                f"its adapter does not train {module} fully",
                f"leave {module} out; fully trained are {', '.join(saved) or 'no parts'}",
            )


def apply_adapters(
    model: PreTrainedModel, config: RunConfig, plan: AdapterPlan, learning_rate: float
) -> tuple[PeftModel, list[TrainedModule]]:
    """Put the adapters on, and say what is trained at which rate.

    Raises:
        ConfigError, ModelError: the adapter to continue does not fit.
    """
    if config.adapter.adapter_path:
        adapted = load_adapter(model, config.adapter)
    else:
        adapted = add_adapter(model, config.adapter, plan.targets, plan.full_modules)
    return adapted, _trained(adapted, plan.full, learning_rate)


def _trained(
    model: PeftModel, full: Sequence[FullPart], learning_rate: float
) -> list[TrainedModule]:
    copies = saved_parts(model)
    named = {module: part.name for part in full for module in part.modules}
    owner = {**{module: module for module in copies}, **named}
    rates = {part.name: part.learning_rate for part in full}
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = name.removeprefix(PREFIX).replace(f".modules_to_save.{ADAPTER}", "")
            module = next((m for m in copies if is_under(path, m)), None)
            kind = "lora" if ".lora_" in name else "biases of"
            label = owner[module] if module else f"{kind} {_part(path)}"
            parameters.setdefault(label, {})[name] = parameter
    return [
        TrainedModule(name, rates.get(name) or learning_rate, own)
        for name, own in parameters.items()
    ]


def _part(path: str) -> str:
    known = (LANGUAGE, VISION)
    return next((part for part in known if is_under(path, part)), path.partition(".")[0])


def adapter_table(model: PeftModel) -> str:
    """Where every adapter sits: one line for layers of the same kind, rank and alpha."""
    kinds: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        own = [p for name, p in layer.named_parameters() if f".{ADAPTER}" in name]
        shape = f"{module.in_features} -> {module.out_features}"
        rank, alpha = str(module.r[ADAPTER]), f"{module.lora_alpha[ADAPTER]:g}"
        base = type(module.get_base_layer()).__name__
        key = (re.sub(r"\.\d+(?=\.|$)", ".*", path), base, shape, rank, alpha)
        kinds.setdefault(key, []).append(
            (path, sum(getattr(p, "ds_numel", p.numel()) for p in own))
        )
    rows = [("adapters on", "layers", "kind", "size", "rank", "alpha", "parameters")]
    for (_, base, shape, rank, alpha), found in kinds.items():
        paths = [path for path, _ in found]
        size = sum(count for _, count in found)
        rows.append((_collapsed(paths), str(len(found)), base, shape, rank, alpha, f"{size:,}"))
    return table(rows)


def _collapsed(paths: Sequence[str]) -> str:
    """Paths that differ in their numbers as one: `layers.0-3,6.mlp.fc1`."""
    columns = [
        list(dict.fromkeys(column)) for column in zip(*(p.split(".") for p in paths), strict=True)
    ]
    return ".".join(column[0] if len(column) == 1 else _ranges(column) for column in columns)


def _ranges(numbers: Sequence[str]) -> str:
    runs = []
    ordered = sorted(map(int, numbers))
    for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(runs)
