"""JSON files to records, one at a time: an array, JSON lines, or an object around the list."""

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..core.errors import DataError

CHUNK = 1 << 20
"""Characters read at a time from an array."""

_WHITESPACE = " \t\n\r"
_DECODER = json.JSONDecoder()
# An escape, number or literal that the end of what was read cut in two ends this near it.
_CUT = 32


def read_records(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield `(position, record)`, positions counted from 1; for a broken line of JSON lines the
    record is the DataError that tells of it.

    An array and JSON lines are read piece by piece; an object around the list is held whole.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, not JSON (with its line), or holds
            no list of records. What comes before the fault has been yielded by then.
    """
    with open_text(path) as file:
        first = _first_character(file)
    if not first:
        what, fix = "the file is empty.", "write a JSON array of records."
        raise DataError(str(path), what, fix, "file-empty")
    if Path(path).suffix == ".jsonl" or (first == "{" and _is_json_lines(path)):
        yield from _json_lines(path)
    elif first == "[":
        yield from _array(path)
    else:
        yield from enumerate(_records_in(_whole(path), path), start=1)


@contextmanager
def open_text(path: str | Path) -> Iterator[IO[str]]:
    """The file as text, without a byte order mark.

    Raises:
        DataError: it is missing, unreadable, or, while it is read, found not to be UTF-8.
    """
    path, code = Path(path), "file-unreadable"
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
        return
    except FileNotFoundError:
        what, fix = "there is no such file.", "check the path; it is relative to where you start."
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text ({error.reason} at byte {_first_wrong_byte(path)})."
        fix, code = "save it as UTF-8.", "encoding"
    except OSError as error:
        what, fix = f"cannot be read: {error.strerror}.", "check the path and its permissions."
    raise DataError(str(path.absolute()), what, fix, code)


def _first_wrong_byte(path: Path) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return offset - pending + error.start
            offset += len(chunk)


def _first_character(file: IO[str]) -> str:
    """The first character that is no space, or nothing."""
    while chunk := file.read(CHUNK):
        if text := chunk.lstrip():
            return text[0]
    return ""


def _is_json_lines(path: str | Path) -> bool:
    with open_text(path) as file:
        filled = (line for line in file if line.strip())
        try:
            json.loads(next(filled))
        except (ValueError, RecursionError):
            return False
        return next(filled, None) is not None


def _json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    position = 0
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            position += 1
            try:
                record = json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                record = _broken(path, number, error.colno, error.msg)
            except (ValueError, RecursionError) as error:
                record = _unheld(f"{path}, line {number}", error)
            yield position, record


def _array(path: str | Path) -> Iterator[tuple[int, Any]]:
    with open_text(path) as file:
        reader = _ArrayReader(path, file)
        reader.take("[")
        if reader.next_character() == "]":
            reader.take("]")
        else:
            position = 1
            yield position, reader.value(position)
            while reader.next_character() == ",":
                reader.take(",")
                position += 1
                yield position, reader.value(position)
            reader.take("]", "Expecting ',' delimiter")
        if reader.next_character():
            raise reader.broken("Extra data", reader.index)


class _ArrayReader:
    """A window over the text of an array; `index` is where in it the next value starts."""

    def __init__(self, path: str | Path, file: IO[str]):
        self.path, self.file = path, file
        self.text, self.index, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the window's first character

    def next_character(self) -> str:
        """The next character that is no space; nothing at the end of the file."""
        while True:
            while self.index < len(self.text):
                if self.text[self.index] not in _WHITESPACE:
                    return self.text[self.index]
                self.index += 1
            if self.ended:
                return ""
            self._read_on()

    def take(self, character: str, otherwise: str = "Expecting value") -> None:
        if self.next_character() != character:
            raise self.broken(otherwise, self.index)
        self.index += 1

    def value(self, position: int) -> Any:
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.index)
            except json.JSONDecodeError as error:
                # "Unterminated string" is reported where the string starts.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _CUT
                if self.ended or not cut:
                    raise self.broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise _unheld(f"{self.path}, record {position}", error) from None
            else:
                if self.ended or end < len(self.text) - _CUT:
                    self.index = end
                    return value
            self._read_on()

    def _read_on(self) -> None:
        """Drop what was taken and read as much again as is left, so a long value costs little."""
        self.line, self.column = self._place(self.index)
        left = self.text[self.index :]
        more = self.file.read(max(CHUNK, len(left)))
        self.text, self.index, self.ended = left + more, 0, not more

    def _place(self, index: int) -> tuple[int, int]:
        lines = self.text.count("\n", 0, index)
        if not lines:
            return self.line, self.column + index
        return self.line + lines, index - self.text.rindex("\n", 0, index)

    def broken(self, what: str, index: int) -> DataError:
        return _broken(self.path, *self._place(index), what)


def _whole(path: str | Path) -> Any:
    with open_text(path) as file:
        text = file.read()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(path, error.lineno, error.colno, error.msg) from None
    except (ValueError, RecursionError) as error:
        raise _unheld(path, error) from None


def _records_in(content: Any, path: str | Path) -> list[Any]:
    if isinstance(content, dict) and ("conversations" in content or "messages" in content):
        return [content]
    if isinstance(content, dict):
        lists = [v for v in content.values() if isinstance(v, list) and v]
        if len(lists) == 1:
            return lists[0]
    raise DataError(
        str(path),
        "holds no list of records.",
        "write a JSON array of records, or an object with one list in it.",
        "file-form",
    )


def _unheld(where: str | Path, error: Exception) -> DataError:
    what = f"holds JSON that Python refuses: {error}."
    return DataError(str(where), what, "shorten or remove that value.", "json-value")


def _broken(path: str | Path, line: int, column: int, what: str) -> DataError:
    return DataError(
        f"{path}, line {line}, column {column}",
        f"broken JSON: {what}.",
        "mend that line, or write the file with a JSON library.",
        "json",
    )
