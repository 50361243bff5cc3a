"""Values as users write them -> values of the annotated type."""

import ast
import json
from contextlib import suppress
from dataclasses import fields
from typing import Any

from ..core.errors import ConfigError

_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "list": "a list of strings",
    "dict": "a JSON object",
    "None": "null",
}


def coerce(value: Any, annotation: str, *, key: str, source: str, from_command_line: bool) -> Any:
    """Read one value as its annotation says.

    Args:
        value: From a file (any JSON value) or the command line (text, or True for a bare flag).
        annotation: The field's annotation as text, for example "float | None".
        key: The key as the user wrote it, and `source`, where: both for the error.
        from_command_line: There, "null" and "none" mean None where the field is optional, because
            null cannot be written in another way.

    Raises:
        ConfigError: the value is not of the annotated type.
    """
    kinds = kinds_of(annotation)
    if key.endswith("_kwargs"):
        kinds.discard("str")  # the host's "str" there is JSON text, parsed here
    types = kinds - {"None"}
    parsed = value
    if from_command_line and "None" in kinds and str(value).lower() in ("null", "none"):
        # report_to is the one optional field whose "none" is a word of the host
        return "none" if key == "report_to" else None
    if value is False and key.endswith("_strategy"):
        parsed = "no"  # YAML 1.1 reads a bare no as false
    elif types == {"bool"}:
        parsed = _BOOLEANS.get(str(value).lower(), value)
    elif types in ({"int"}, {"float"}):
        parsed = _number(value)
        if types == {"int"} and isinstance(parsed, float) and parsed.is_integer():
            parsed = int(parsed)
    elif isinstance(value, str) and types - {"str"}:
        parsed = _json_of(value, kinds)
        if _is_list_of_strings(kinds) and isinstance(parsed, str):
            parsed = [part.strip() for part in parsed.split("|") if part.strip()]
    if not _fits(parsed, kinds):
        expected = " or ".join(word for kind, word in _EXPECTED.items() if kind in kinds)
        shown = "a bare flag" if from_command_line and value is True else repr(value)
        raise ConfigError(
            f"{source}, {key}", f"{shown} is not {expected}", f'give "{key}" {expected}'
        )
    return parsed


def kinds_of(annotation: str) -> set[str]:
    """The type names a union allows: "dict[str, Any] | str | None" -> {"dict", "str", "None"}."""

    def walk(node: ast.expr) -> set[str]:
        match node:
            case ast.BinOp(left=left, right=right):
                return walk(left) | walk(right)
            case ast.Subscript(value=ast.Name(id="Literal"), slice=literal):
                return walk(literal)
            case ast.Subscript(value=container):
                return walk(container)
            case ast.Constant(value=constant):
                return {"None" if constant is None else type(constant).__name__}
            case ast.Name(id=name):
                return {name}
        raise ValueError(f"cannot read the annotation {annotation!r}")

    return walk(ast.parse(annotation, mode="eval").body)


def _number(value: Any) -> Any:
    if isinstance(value, str):
        for number in (int, float):
            with suppress(ValueError):
                return number(value)
    return value


def _json_of(text: str, kinds: set[str]) -> Any:
    with suppress(ValueError):
        parsed = json.loads(text)
        if _fits(parsed, kinds):
            return parsed
    return text


def _is_list_of_strings(kinds: set[str]) -> bool:
    return "list" in kinds and "str" not in kinds


def _fits(value: Any, kinds: set[str]) -> bool:
    name = "None" if value is None else type(value).__name__
    if name == "int" and "float" in kinds:
        return True
    if isinstance(value, list) and _is_list_of_strings(kinds):
        return all(isinstance(item, str) and item for item in value)
    return name in kinds and value == value  # NaN differs from itself


def check_choices(config: Any) -> None:
    """Raises ConfigError for a dataclass field outside the choices its metadata names."""
    for f in fields(config):
        choices = f.metadata.get("choices")
        value = getattr(config, f.name)
        if choices and value not in choices:
            listed = " or ".join("null" if choice is None else choice for choice in choices)
            raise ConfigError(f.name, f'"{value}" is not a choice of {f.name}', f"give {listed}")
