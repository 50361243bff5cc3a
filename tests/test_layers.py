"""Imports run in one direction: a room uses only the rooms to its left (DESIGN: the house)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "core",
    "configs",
    "data",
    "models",
    "collators",
    "lora",
    "inference",
    "evaluation",
    "sft",
    "cli",
]
FILES = [f for room in ORDER for f in sorted((ROOT / room).rglob("*.py"))]


def rooms_imported_by(file: Path) -> set[str]:
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            names = [n.name for n in node.names] if not "".join(target) else [target[0]]
            found.update(names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [n.name for n in node.names]
            )
            assert not any(n.split(".")[0] in ("vlmtune", *ORDER) for n in names), names
    return found & set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_room_imports_only_from_its_left(file):
    room = file.relative_to(ROOT).parts[0]
    allowed = set(ORDER[: ORDER.index(room) + 1])
    assert rooms_imported_by(file) <= allowed


def test_every_package_stands_in_the_order():
    rooms = {f.parent.name for f in ROOT.glob("*/__init__.py")}
    assert rooms == set(ORDER)
