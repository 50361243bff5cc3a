"""Which layers get adapters, by names, expressions or parts of the model."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..configs.adapter import ALL_LINEAR, AdapterConfig
from ..configs.schema import ModelConfig
from ..configs.train_modules import parse_train_modules
from ..core.errors import ConfigError
from ..models.parts import FREEZES, LANGUAGE, VISION, is_under, modules_at


def target_modules(
    model: PreTrainedModel,
    settings: ModelConfig,
    adapter: AdapterConfig,
    full: Collection[str],
    trainer: str,
) -> list[str]:
    """Full paths of the modules that get adapters, in the model's order.

    Args:
        full: Paths of modules that are trained fully; nothing in them gets an adapter.
        trainer: The config's `trainer`: TRL computes with the head's weight, past an adapter.

    Raises:
        ConfigError: nothing matches, something outside the named parts does, or a layer that no
            adapter can sit on.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    head = next((n for n, m in modules.items() if m is model.get_output_embeddings()), None)
    wanted = adapter.lora_target_modules
    at = {name: modules_at(name, model, "lora_parts") for name in _part_names(adapter)}
    parts = [path for paths in at.values() for path in paths] or None
    if wanted is None or wanted == ALL_LINEAR:
        found = [n for n, m in modules.items() if is_linear(m) and n != head]
        found = [n for n in found if parts is None or inside(n, parts)]
    else:
        found = [n for n in modules if matches(n, wanted)]
        if adapter.apply_lora_to_vision is False:
            found = [n for n in found if not is_under(n, VISION)]
        _check_named(found, wanted, parts, modules)
        if head in found and trainer == "trl":
            raise ConfigError(
                "lora_target_modules",
                f"matches the output head {head}; TRL computes the loss from its weight, so an "
                "adapter on it would never be trained",
                f'name other layers, train it fully ("train_modules": "{head}"), or use '
                '"trainer": "standard"',
            )
    kept = [
        n for n in found if not inside(n, full) and not inside(n, frozen_paths(settings).values())
    ]
    if adapter.apply_lora_to_vision is False:
        kept = [n for n in kept if not is_under(n, VISION)]
    if not kept:
        told = "all matches are frozen, trained fully or kept out" if found else "nothing matches"
        raise ConfigError(
            "lora_target_modules" if wanted else "lora_parts",
            f"leaves no layer for an adapter: {told}",
            "name layers such as q_proj,v_proj, or a part with linear layers such as llm",
        )
    for name, paths in at.items() if adapter.lora_parts else ():
        if not any(inside(layer, paths) for layer in kept):
            raise ConfigError(
                "lora_parts",
                f'"{name}" gets no adapter: it has no linear layer, or is frozen, trained fully or '
                "kept out",
                f'take it out; a part like vte is trained with "train_modules": "{name}"',
            )
    if adapter.apply_lora_to_vision and not any(is_under(n, VISION) for n in kept):
        raise ConfigError(
            "apply_lora_to_vision",
            f"is true, but no layer of {VISION} gets an adapter",
            "leave it out, or let lora_target_modules match layers there",
        )
    for name in kept:
        _check_kind(name, modules[name])
    _check_biases(kept, modules, adapter.lora_bias)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, key):
            if not any(fits_pattern(name, pattern) for name in kept):
                raise ConfigError(
                    key,
                    f'"{pattern}" matches no adapted layer',
                    f"write the end of a path, as that of {kept[0]}",
                )
    return kept


def frozen_paths(settings: ModelConfig) -> dict[str, str]:
    """Key -> part, of the keys that are on."""
    return {key: path for key, path in FREEZES.items() if getattr(settings, key)}


def _part_names(adapter: AdapterConfig) -> list[str]:
    """Parts that adapters must stay in; none is the whole model."""
    if adapter.lora_parts:
        names = [entry.name for entry in parse_train_modules(adapter.lora_parts, "lora_parts")]
    elif adapter.lora_target_modules is None:
        names = [LANGUAGE]
    else:
        return []
    more = adapter.apply_lora_to_vision and VISION not in names
    return [*names, VISION] if more else names


def _check_named(
    found: list[str],
    wanted: list[str] | str,
    parts: list[str] | None,
    modules: Mapping[str, nn.Module],
) -> None:
    for name in wanted if isinstance(wanted, list) else []:
        if not any(matches(module, [name]) for module in modules):
            leaves = {module.rpartition(".")[2] for module, m in modules.items() if is_linear(m)}
            near = get_close_matches(name, sorted(leaves)) or sorted(leaves - {"0"})
            raise ConfigError(
                "lora_target_modules",
                f'no layer is "{name}" or ends in it',
                f"write {', '.join(near)}",
            )
    outside = [name for name in found if parts is not None and not inside(name, parts)]
    if outside:
        raise ConfigError(
            "lora_target_modules",
            f"matches {outside[0]} and {len(outside) - 1} more outside of lora_parts",
            f'add their part to lora_parts, write an expression such as "{LANGUAGE}\\..*q_proj", '
            "or leave lora_target_modules out: all linear layers of the parts",
        )


def _check_kind(name: str, module: nn.Module) -> None:
    """Raises ConfigError where PEFT's adapter would compute something else than the layer does."""
    if is_linear(module) or type(module) is nn.Embedding:
        return
    own = isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
    what = "is no linear layer"
    if own:
        what = f"is a {type(module).__name__}, which computes in a way of its own"
    raise ConfigError(
        "lora_target_modules",
        f"{name} {what}; an adapter cannot sit on it",
        f'train it fully: "train_modules": "{name}"' if own else "name linear layers",
    )


def _check_biases(kept: list[str], modules: Mapping[str, nn.Module], bias: str | bool) -> None:
    without = [name for name in kept if getattr(modules[name], "bias", None) is None]
    if bias is True and without:
        raise ConfigError(
            "lora_bias",
            f"is true, but {without[0]} has no bias that an adapter's could be merged into",
            "set it to none, or name layers that have a bias",
        )
    if bias == "lora_only" and len(without) == len(kept):
        raise ConfigError(
            "lora_bias", "is lora_only, but no adapted layer has a bias", "set it to none"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter of PEFT computes what the layer does."""
    # Exactly this forward: a subclass with another one would be adapted as what it is not.
    kind = type(module)
    return kind is Conv1D or (isinstance(module, nn.Linear) and _stock(kind))


def _stock(kind: type[nn.Module]) -> bool:
    return kind is nn.Linear or kind.__module__.startswith("bitsandbytes.")


def matches(name: str, wanted: list[str] | str) -> bool:
    """Whether a path is meant, as PEFT reads names and expressions."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in wanted)


def fits_pattern(name: str, pattern: str) -> bool:
    """As PEFT reads it (0.21, `get_pattern_key`): at the end of a path."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def inside(name: str, paths: Collection[str]) -> bool:
    """Whether a path is one of `paths` or below it."""
    return any(is_under(name, path) for path in paths)
