"""The text of `train_modules`: names of modules, each with its own learning rate or none."""

import re
from dataclasses import dataclass

from ..core.errors import ConfigError

_NAME = re.compile(r"(\w+|\d+-\d+)(\.(\w+|\d+-\d+))*")


@dataclass(frozen=True)
class TrainModule:
    """A module path, maybe with a range of indices in it, and its rate; None is learning_rate."""

    name: str
    learning_rate: float | None = None


def parse_train_modules(text: str, key: str = "train_modules") -> list[TrainModule]:
    """Read `name[:lr]("|" name[:lr])*`; spaces are ignored.

    Args:
        key: Whose text it is, for errors.

    Raises:
        ConfigError: an entry is empty, not written like a module path, given twice, or has a rate
            that is not a positive number.

    Source: grammar of AIDC-AI/Ovis 2.5.0; ranges such as `llm.model.layers.20-27` are ours.
    """
    entries: list[TrainModule] = []
    for part in text.replace(" ", "").split("|"):
        name, colon, rate = part.partition(":")
        if not name:
            raise _bad(key, f'"{text}" has an entry without a name', 'write names joined by "|"')
        if not _NAME.fullmatch(name):
            raise _bad(
                key,
                f'"{name}" is not written like a module',
                "write a dotted path, a range of indices as 20-27",
            )
        for low, high in re.findall(r"(\d+)-(\d+)", name):
            if int(low) > int(high):
                raise _bad(key, f'"{name}" counts down', f"write {high}-{low}")
        if name in (entry.name for entry in entries):
            raise _bad(key, f'"{name}" is given twice', "keep one of them")
        entries.append(TrainModule(name, _rate(rate, name, key) if colon else None))
    return entries


def _rate(text: str, name: str, key: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 < rate < float("inf"):
        raise _bad(key, f'"{text}" is no learning rate for {name}', f"write {name}:1e-4")
    return rate


def _bad(key: str, what: str, fix: str) -> ConfigError:
    return ConfigError(key, what, fix)
