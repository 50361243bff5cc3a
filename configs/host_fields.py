"""The host's training arguments, read from their source without importing the host."""

import ast
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Base classes first: a subclass may annotate a field anew.
_SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)

# Values the host takes although its annotation (transformers 5.23) leaves them out.
_WIDER = {"fsdp": "bool | str | list | None", "resume_from_checkpoint": "bool | str | None"}

# Defaults that the host computes: of torch 2.8 and newer.
_COMPUTED = {"optim": "adamw_torch_fused"}


@dataclass(frozen=True)
class ConfigKey:
    """What a key may be, and who says so.

    Attributes:
        annotation: As written, for example "float | None".
        default: What it is where nobody gives it.
        help: One or more sentences; "" where the host has none.
        choices: Its values; None where it has no list of them, or the host computes it.
        owner: The package of the class that declares it: "transformers", "trl" or "vlmtune".
    """

    annotation: str
    default: Any
    help: str
    choices: tuple[Any, ...] | None
    owner: str


@cache
def host_fields() -> dict[str, ConfigKey]:
    """Every init field of `trl.SFTConfig` by its name.

    Importing `SFTConfig` costs seconds; parsing its three source files costs milliseconds.
    """
    found: dict[str, ConfigKey] = {}
    for package, path, class_name in _SOURCES:
        found.update(_init_fields(_classes(package, path)[class_name], package))
    return found


@cache
def host_enums() -> dict[str, tuple[str, ...]]:
    """Name of an enum in the host's annotations -> its values."""
    return {
        name: tuple(
            str(node.value.value)
            for node in class_def.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        )
        for path in ("training_args.py", "trainer_utils.py")
        for name, class_def in _classes("transformers", path).items()
        if any(ast.unparse(base) == "ExplicitEnum" for base in class_def.bases)
    }


def _classes(package: str, path: str) -> dict[str, ast.ClassDef]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    source = (Path(spec.origin).parent / path).read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _init_fields(class_def: ast.ClassDef, package: str) -> Iterator[tuple[str, ConfigKey]]:
    for node in class_def.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        name = node.target.id
        given = {}
        if isinstance(node.value, ast.Call):
            given = {word.arg: word.value for word in node.value.keywords}
        if _literal(given.get("init")) is False:
            continue
        metadata = _literal_items(given.get("metadata"))
        choices = metadata.get("choices")
        default = _literal(given.get("default"))
        if "default_factory" in given:
            default = {"list": list, "dict": dict}[ast.unparse(given["default_factory"])]()
        yield (
            name,
            ConfigKey(
                _WIDER.get(name, ast.unparse(node.annotation)),
                _COMPUTED.get(name, default),
                metadata.get("help", "").replace("%%", "%"),  # doubled for argparse
                tuple(choices) if choices else None,
                package,
            ),
        )


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal; None for anything else."""
    if node is not None:
        with suppress(ValueError):
            return ast.literal_eval(node)
    return None


def _literal_items(node: ast.expr | None) -> dict[str, Any]:
    """The items of a dict display whose values are literals."""
    if not isinstance(node, ast.Dict):
        return {}
    items = {
        str(_literal(key)): _literal(value)
        for key, value in zip(node.keys, node.values, strict=True)
    }
    return {key: value for key, value in items.items() if value is not None}
