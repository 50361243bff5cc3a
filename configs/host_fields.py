"""The names and annotations of the host's training arguments, read without importing the host."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Base classes first: a subclass may annotate a field anew.
_SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)

# Values the host takes although its annotation (transformers 5.23) leaves them out.
_WIDER = {"fsdp": "bool | str | list | None", "resume_from_checkpoint": "bool | str | None"}


@cache
def host_fields() -> dict[str, str]:
    """Every init field of `trl.SFTConfig`: name -> annotation as written.

    Importing `SFTConfig` costs seconds; parsing its three source files costs milliseconds.
    """
    found: dict[str, str] = {}
    for package, path, class_name in _SOURCES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        source = (Path(spec.origin).parent / path).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                found.update(_init_fields(node))
    return found | _WIDER


def _init_fields(class_def: ast.ClassDef) -> dict[str, str]:
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in class_def.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not _is_init_false(node.value)
    }


def _is_init_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and any(
        keyword.arg == "init" and ast.unparse(keyword.value) == "False"
        for keyword in value.keywords
    )
