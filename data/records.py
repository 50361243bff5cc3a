"""Data files to records: a JSON array, JSON lines, or an object around the list."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import DataError


def read_records(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield `(position, record)`, positions counted from 1; for a broken line of JSON lines the
    record is the DataError that tells of it.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, not JSON (with its line), or holds
            no list of records.
    """
    text = _read(Path(path))
    if not text.strip():
        raise DataError(str(path), "the file is empty.", "write a JSON array of records.")
    if Path(path).suffix == ".jsonl" or _is_json_lines(text):
        yield from _json_lines(text, path)
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(path, error.lineno, error) from None
    except (ValueError, RecursionError) as error:
        raise _unheld(path, error) from None
    yield from enumerate(_records_in(content, path), start=1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        what, fix = "there is no such file.", "check the path; it is relative to where you start."
    except UnicodeDecodeError as error:
        what, fix = (
            f"is not UTF-8 text ({error.reason} at byte {error.start}).",
            "save it as UTF-8.",
        )
    except OSError as error:
        what, fix = f"cannot be read: {error.strerror}.", "check the path and its permissions."
    raise DataError(str(path.absolute()), what, fix)


def _is_json_lines(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return False
    return True


def _json_lines(text: str, path: str | Path) -> Iterator[tuple[int, Any]]:
    position = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        position += 1
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            record = _broken(path, number, error)
        except (ValueError, RecursionError) as error:
            record = _unheld(f"{path}, line {number}", error)
        yield position, record


def _records_in(content: Any, path: str | Path) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and "conversations" in content:
        return [content]
    if isinstance(content, dict):
        lists = [v for v in content.values() if isinstance(v, list) and v]
        if len(lists) == 1:
            return lists[0]
    raise DataError(
        str(path),
        "holds no list of records.",
        "write a JSON array of records, or an object with one list in it.",
    )


def _unheld(where: str | Path, error: Exception) -> DataError:
    return DataError(
        str(where), f"holds JSON that Python refuses: {error}.", "shorten or remove that value."
    )


def _broken(path: str | Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(
        f"{path}, line {line}, column {error.colno}",
        f"broken JSON: {error.msg}.",
        "mend that line, or write the file with a JSON library.",
    )
