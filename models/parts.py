"""Parts of a model by the names users write: module paths, ranges of indices, short names."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from torch import nn

from ..core.errors import ConfigError

LANGUAGE, VISION = "llm", "visual_tokenizer.vit"
"""Where a family keeps its language model and its vision encoder."""

FREEZES = {"freeze_llm": LANGUAGE, "freeze_vision_tower": VISION}
"""Config keys that leave a part as it is."""


def paths_under(path: str, model: nn.Module, key: str) -> set[str]:
    """Paths of all modules and parameters at `path` and below it.

    Args:
        path: A module or parameter path, maybe with a range of indices (`llm.model.layers.20-27`),
            or a short name in the model's `module_aliases`; "all" is everything.
        key: Of the config, for errors.

    Raises:
        ConfigError: the model has no such module, or the range an end that it has not.
    """
    aliases = {"all": "", **getattr(model, "module_aliases", {})}
    full = aliases.get(path, path)
    parts = full.split(".") if full else []
    modules = [name for name, _ in model.named_modules() if name]
    known = [*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False))]
    for chosen in _range_ends(parts):
        if not any(_fits(chosen, name) for name in known):
            near = get_close_matches(path, [*aliases, *known], n=3)
            top = [*aliases, *(name for name, _ in model.named_children())]
            raise ConfigError(
                key,
                f'the model has no module "{".".join(chosen)}"',
                f"did you mean {', '.join(near)}" if near else f"known are {', '.join(top)}",
            )
    return {name for name in known if _fits(parts, name)}


def modules_at(path: str, model: nn.Module, key: str) -> list[str]:
    """Paths of the modules that `path` names themselves, not of what is below them.

    Raises:
        ConfigError: as `paths_under`, or `path` names a parameter or the whole model.
    """
    full = getattr(model, "module_aliases", {}).get(path, path)
    depth = full.count(".")
    below = paths_under(path, model, key)
    found = [
        name for name, _ in model.named_modules() if name in below and name.count(".") == depth
    ]
    if not found or path == "all":
        raise ConfigError(
            key, f'"{path}" is no module', f"name modules, such as {LANGUAGE} or {VISION}"
        )
    return found


def is_under(name: str, path: str) -> bool:
    """Whether a module or parameter path is `path` or below it."""
    return name == path or name.startswith(f"{path}.")


def _range_ends(parts: list[str]) -> Iterator[list[str]]:
    """The path with each end of its range; a path without a range as it is."""
    for i, part in enumerate(parts):
        if "-" in part:
            for end in part.split("-"):
                yield [*parts[:i], end, *parts[i + 1 :]]
            return
    yield parts


def _fits(parts: Sequence[str], name: str) -> bool:
    have = name.split(".")
    return len(have) >= len(parts) and all(map(_fits_part, parts, have))


def _fits_part(wanted: str, have: str) -> bool:
    bounds = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if not bounds:
        return wanted == have
    return have.isdigit() and int(bounds[1]) <= int(have) <= int(bounds[2])
