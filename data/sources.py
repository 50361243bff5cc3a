"""The names in `data_path` to sources of records, and the `datainfo` file that names sets."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from .conversation import Conversation, parse_conversation
from .records import open_text, read_records
from .tables import open_table, table_records

FORMATS = ("conversation", "caption")
FILES = (".json", ".jsonl")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")


@dataclass(frozen=True)
class Source:
    """A set of records.

    Attributes:
        name: Of the set in `datainfo`; else the file's name without its ending.
        path: JSON, JSON lines or parquet file, `datasets` folder, or Hub dataset.
        folder: What relative media paths start from.
        data_format: `conversation` or `caption`.
    """

    name: str
    path: str
    folder: str | None = None
    data_format: str = "conversation"

    @property
    def is_table(self) -> bool:
        path = Path(self.path)
        if path.is_dir() or path.suffix == ".parquet":
            return True
        if path.suffix in FILES or path.exists():
            return False
        return HUB_NAME.fullmatch(self.path) is not None

    def records(self) -> Iterator[tuple[int, Any]]:
        """`(position, record)`, as `read_records` and `table_records` yield them.

        Raises:
            DataError: the source cannot be read.
        """
        return table_records(self.path) if self.is_table else read_records(self.path)

    def parse(self, index: int, record: Any) -> Conversation:
        """Raises DataError for a record that could not be trained on."""
        return parse_conversation(record, self.path, index, self.folder, self.data_format)

    def fingerprint(self) -> str:
        """Changes when the source changes: from a file's bytes, a table's files' sizes and times.

        Raises:
            DataError: the source cannot be read.
        """
        digest = hashlib.sha256(f"{self.path}|{self.folder}|{self.data_format}".encode())
        if not self.is_table:
            with open_text(self.path):  # for its errors
                pass
            with open(self.path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            return digest.hexdigest()
        path = Path(self.path)
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        for file in files:
            stat = file.stat()
            digest.update(f"{file}|{stat.st_size}|{stat.st_mtime_ns}".encode())
        if not files:
            digest.update(open_table(self.path)._fingerprint.encode())
        return digest.hexdigest()


def resolve_sources(
    names: Sequence[str], folder: str | None, datainfo: str | None = None
) -> list[Source]:
    """The sources that `data_path` names.

    Args:
        names: Each the name of a set in `datainfo`, a path, or a Hub dataset.
        folder: `image_folder`, for what is no set of `datainfo`.

    Raises:
        ConfigError: `datainfo` is broken, or a name is neither a set nor like a path or dataset.
    """
    sets = read_datainfo(datainfo) if datainfo else {}
    sources = []
    for name in names:
        if name in sets:
            sources.append(sets[name])
            continue
        path = Path(os.path.expanduser(name))
        if datainfo and not path.exists() and not path.suffix and path.name == str(path):
            nearest = difflib.get_close_matches(name, sets, n=1, cutoff=0.0)
            raise ConfigError(
                "data_path",
                f'there is no set "{name}" in {datainfo}',
                f'write "{nearest[0]}"; it has {", ".join(sets)}',
            )
        named = path.stem if path.exists() or path.suffix in (*FILES, ".parquet") else name
        sources.append(Source(named, os.path.expanduser(name), folder))
    return sources


def read_datainfo(path: str) -> dict[str, Source]:
    """The sets of a file `{name: {"meta_file", "image_dir", "data_format"}}`; other keys of a set,
    such as `storage_type`, are ignored, and paths are relative to the working directory.

    Raises:
        ConfigError: the file is missing or broken, or a set lacks one of the three keys.
    """
    where = f"datainfo {path}"
    try:
        with open_text(path) as file:
            content = json.load(file)
    except DataError as error:
        raise ConfigError(where, error.what, error.fix) from None
    except ValueError as error:
        raise ConfigError(where, f"is broken JSON: {error}", "mend it there") from None
    form = 'write {"name": {"meta_file": ..., "image_dir": ..., "data_format": ...}}'
    if not isinstance(content, dict) or not content:
        raise ConfigError(where, "is no object of named sets", form)
    return {name: _source(name, entry, f'{where}, "{name}"') for name, entry in content.items()}


def _source(name: str, entry: Any, where: str) -> Source:
    if not isinstance(entry, dict):
        raise ConfigError(where, "is no object", "give meta_file, image_dir and data_format")
    missing = [key for key in ("meta_file", "image_dir", "data_format") if key not in entry]
    if missing:
        raise ConfigError(
            where,
            f"has no {', '.join(missing)}",
            "give meta_file, image_dir (null where there are no images) and data_format",
        )
    meta_file, folder, data_format = (entry[k] for k in ("meta_file", "image_dir", "data_format"))
    if not isinstance(meta_file, str) or not meta_file:
        raise ConfigError(f"{where}, meta_file", f"{meta_file!r} is no path", "give a path")
    if folder is not None and not isinstance(folder, str):
        raise ConfigError(f"{where}, image_dir", f"{folder!r} is no path", "give a path or null")
    if data_format not in FORMATS:
        raise ConfigError(
            f"{where}, data_format",
            f'"{data_format}" is not a format',
            f"give {' or '.join(FORMATS)}",
        )
    folder = os.path.expanduser(folder) if folder else None
    return Source(name, os.path.expanduser(meta_file), folder, data_format)
