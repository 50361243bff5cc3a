"""LoRA settings on a model: its adapters, and the parts that are trained fully beside them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..configs.adapter import AdapterConfig
from ..configs.schema import ModelConfig
from ..configs.train_modules import TrainModule, parse_train_modules
from ..core.errors import ConfigError, ModelError
from ..models.parts import is_under, modules_at
from .targets import fits_pattern, frozen_paths, inside, is_linear, matches

ADAPTER = "default"
"""PEFT's name for the one adapter of a run."""


@dataclass(frozen=True)
class FullPart:
    """A part trained fully beside the adapters: its entry of `train_modules`, None for one of
    `modules_to_save`, and the paths of its modules."""

    name: str
    learning_rate: float | None
    modules: list[str]


def full_parts(
    model: PreTrainedModel, settings: ModelConfig, adapter: AdapterConfig
) -> list[FullPart]:
    """What `train_modules` and `modules_to_save` name; of a tied embedding and head, both.

    Raises:
        ConfigError: a name is no module of the model, is frozen by another key, or two overlap.
    """
    entries: list[TrainModule] = []
    if settings.train_modules != "all":
        entries = parse_train_modules(settings.train_modules)
    parts = [
        FullPart(e.name, e.learning_rate, modules_at(e.name, model, "train_modules"))
        for e in entries
    ]
    for name in adapter.modules_to_save:
        modules = [m for m, _ in model.named_modules() if m == name or m.endswith(f".{name}")]
        if not modules:
            near = get_close_matches(name, [m for m, _ in model.named_modules() if m])
            raise ConfigError(
                "modules_to_save",
                f'no module of the model is "{name}" or ends in it',
                f"did you mean {', '.join(near)}?" if near else "write a module path",
            )
        parts.append(FullPart(name, None, modules))
    parts = [FullPart(p.name, p.learning_rate, _with_tied(p.modules, model)) for p in parts]
    _check_apart(parts)
    for part in parts:
        if not any(
            p.requires_grad for m in part.modules for p in model.get_submodule(m).parameters()
        ):
            key = "modules_to_save" if part.name in adapter.modules_to_save else "train_modules"
            raise ConfigError(key, f'"{part.name}" has no parameter to train', "remove it")
        for key, frozen in frozen_paths(settings).items():
            if clash := [m for m in part.modules if is_under(m, frozen) or is_under(frozen, m)]:
                raise ConfigError(
                    key, f"leaves {frozen} as it is, but {clash[0]} is trained", "keep one of them"
                )
    return parts


def add_adapter(
    model: PreTrainedModel, adapter: AdapterConfig, targets: Sequence[str], full: Sequence[str]
) -> PeftModel:
    """The model with new adapters, those and fully trained parts in float32 and trainable, all
    else frozen."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    names, bias = adapter.lora_target_modules, adapter.lora_bias
    # What the user wrote is kept where PEFT would find the same layers by it.
    written = isinstance(names, list) and _as_peft(model, names) == list(targets)
    try:
        config = LoraConfig(
            r=adapter.lora_r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            target_modules=names if written else list(targets),
            modules_to_save=list(full) or None,
            use_dora=adapter.use_dora,
            use_rslora=adapter.use_rslora,
            bias="none" if bias is True else bias,  # type: ignore[arg-type]
            lora_bias=bias is True,
            init_lora_weights=adapter.init_lora_weights,  # type: ignore[arg-type]
            rank_pattern=_by_path(adapter.rank_pattern, targets),
            alpha_pattern=_by_path(adapter.alpha_pattern, targets),
        )
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "lora settings", " ".join(str(error).split()), "change the key it names"
        ) from error
    assert isinstance(adapted, PeftModel)
    return _ready(adapted, frozen)


def load_adapter(model: PreTrainedModel, adapter: AdapterConfig) -> PeftModel:
    """The model with the adapter of `adapter_path`, to be trained on.

    Raises:
        ModelError: PEFT cannot put it on the model.
    """
    path = str(adapter.adapter_path)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    try:
        adapted = _ready(PeftModel.from_pretrained(model, path, is_trainable=True), frozen)
        # Once more, now that fully trained parts are in float32 and round nothing.
        set_peft_model_state_dict(adapted, load_peft_weights(path, device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"adapter_path {path}",
            f"cannot be put on the model: {reason}",
            "give an adapter of this model_path, complete",
        ) from error
    # The fingerprint is the same; the path may be one of another machine.
    adapted.peft_config[ADAPTER].base_model_name_or_path = model.name_or_path
    return adapted


def saved_parts(model: PeftModel) -> dict[str, nn.Module]:
    """Path in the model below -> the trained copy, of each fully trained module."""
    wrapped = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return {name: module.modules_to_save[ADAPTER] for name, module in wrapped.items()}


def _ready(model: PeftModel, frozen: Collection[str]) -> PeftModel:
    """Tie what the model ties, freeze again what its family never trains, and train in float32."""
    base = model.get_base_model()
    for name, parameter in base.named_parameters():
        if name.replace(f".modules_to_save.{ADAPTER}", "").replace(".base_layer", "") in frozen:
            parameter.requires_grad_(False)
    _tie_copies(base, saved_parts(model))
    # ZeRO-3 casts nothing, wants one dtype, and has float32 masters of its own.
    dtype = _dtype(base) if is_deepspeed_zero3_enabled() else torch.float32
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        trained = [p for p in own if p.requires_grad]
        # A norm computes in one dtype, so its frozen half goes along.
        for parameter in trained if is_linear(module) else own if trained else []:
            parameter.data = parameter.data.to(dtype)
    # PEFT would save the frozen embedding below an adapter on it as well.
    model.save_pretrained = partial(  # type: ignore[method-assign]
        model.save_pretrained, save_embedding_layers=False
    )
    return model


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if not p.requires_grad)


def _tie_copies(model: nn.Module, copies: dict[str, nn.Module]) -> None:
    def trained(name: str) -> nn.Module | None:
        path = next((path for path in copies if is_under(name, path)), None)
        return path and copies[path].get_submodule(name[len(path) + 1 :])  # type: ignore[return]

    for name, source in _tied_modules(model).items():
        one, other = trained(name), trained(source)
        if one and other:
            one.weight = other.weight


def _tied_modules(model: nn.Module) -> dict[str, str]:
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {n.rpartition(".")[0]: source.rpartition(".")[0] for n, source in tied.items()}


def _with_tied(modules: list[str], model: PreTrainedModel) -> list[str]:
    pairs = _tied_modules(model)
    both = {**pairs, **{source: name for name, source in pairs.items()}}
    partners = [other for one, other in both.items() if inside(one, modules)]
    return [*modules, *(partner for partner in partners if not inside(partner, modules))]


def _check_apart(parts: Sequence[FullPart]) -> None:
    seen: dict[str, str] = {}
    for part in parts:
        for module in part.modules:
            for other, name in seen.items():
                if is_under(module, other) or is_under(other, module):
                    raise ConfigError(
                        "train_modules, modules_to_save",
                        f'"{name}" and "{part.name}" both train {max(module, other, key=len)}',
                        "name each module once",
                    )
            seen[module] = part.name


def _as_peft(model: nn.Module, names: list[str]) -> list[str]:
    return [name for name, _ in model.named_modules() if matches(name, names)]


def _by_path(patterns: Mapping[str, int], targets: Sequence[str]) -> dict[str, int]:
    """Numbers by whole paths: of patterns that fit one path PEFT takes the first, and saves them
    in another order."""
    found = {name: [p for p in patterns if fits_pattern(name, p)] for name in targets}
    return {name: patterns[fitting[0]] for name, fitting in found.items() if fitting}
