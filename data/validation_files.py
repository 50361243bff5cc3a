"""Files that validation writes: each under a temporary name until it is complete."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from .findings import Finding
from .sources import FILES, Source


class Output:
    """A text file that gets its name when it is complete.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
        try:
            self.file = self.partial.open("x", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, text: str) -> None:
        try:
            self.file.write(text)
        except OSError as error:
            raise self._unwritable(error) from None

    def finish(self) -> None:
        try:
            self.file.close()
            self.partial.rename(self.path)
        except OSError as error:
            raise self._unwritable(error) from None

    def discard(self) -> None:
        """Remove what is not finished."""
        with suppress(OSError):  # what it held is to be lost
            self.file.close()
        self.partial.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> DataError:
        what, fix = f"cannot be written: {error.strerror}.", "check the folder and its free space."
        return DataError(str(self.path), what, fix)


class Report:
    """Every finding as JSON, written as it is found."""

    def __init__(self, path: Path):
        self.output = Output(path)
        self.before = '{"version": 1, "findings": [\n'
        self.count = 0

    def add(self, finding: Finding) -> None:
        self.output.write(self.before + json.dumps(asdict(finding), ensure_ascii=False))
        self.before = ",\n"
        self.count += 1

    def finish(self, totals: dict[str, Any]) -> None:
        rest = json.dumps(totals, ensure_ascii=False).removeprefix("{")
        self.output.write(f"{'' if self.count else self.before}\n], {rest}\n")
        self.output.finish()


class Copies:
    """Records of each source in a file of their own: `target` itself for one source, files of the
    sources' names in the folder `target` for several. `.jsonl` gets a record per line, `.json` an
    array.

    Raises:
        DataError: they cannot be written.
    """

    def __init__(self, target: Path, sources: Sequence[Source]):
        self.target, self.folder = target, None
        paths = [target]
        if len(sources) > 1:
            self.folder = target.with_name(f".partial-{os.getpid()}-{target.name}")
            try:
                self.folder.mkdir()
            except OSError as error:
                what = f"cannot be made: {error.strerror}."
                raise DataError(str(target), what, "check the folder it lies in.") from None
            paths = [self.folder / Path(source.path).name for source in sources]
        self.outputs: list[Output] = []
        self.counts = [0] * len(paths)
        try:
            for path in paths:
                self.outputs.append(Output(path))
        except DataError:
            self.discard()
            raise

    def add(self, number: int, text: str) -> None:
        """Add a record, as JSON, of the source with this number."""
        output, first = self.outputs[number], not self.counts[number]
        if output.path.suffix == ".jsonl":
            output.write(f"{text}\n")
        else:
            output.write(("[\n" if first else ",\n") + text)
        self.counts[number] += 1

    def finish(self) -> None:
        for output, count in zip(self.outputs, self.counts, strict=True):
            if output.path.suffix != ".jsonl":
                output.write("\n]\n" if count else "[]\n")
            output.finish()
        if self.folder:
            self.folder.rename(self.target)

    def discard(self) -> None:
        for output in self.outputs:
            output.discard()
        if self.folder and self.folder.exists():
            for output in self.outputs:
                output.path.unlink(missing_ok=True)
            self.folder.rmdir()


def check_targets(
    sources: Sequence[Source], fix: Path | None, quarantine: Path | None, report: Path | None
) -> None:
    """See that nothing is overwritten and that copies of the sources can be made.

    Raises:
        ConfigError: an output exists or is asked for twice, or a source has no copy.
    """
    flags = {"--fix": fix, "--quarantine": quarantine, "--report": report}
    given = {flag: path for flag, path in flags.items() if path}
    for flag, path in given.items():
        if path.exists():
            raise ConfigError(f"{flag} {path}", "exists already", "give another name, or move it")
        if not path.absolute().parent.is_dir():
            what = f"there is no folder {path.parent}"
            raise ConfigError(f"{flag} {path}", what, "make it first")
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ConfigError(" ".join(given), "name the same file", "give each a name of its own")
    for flag in given.keys() - {"--report"}:
        if table := next((s.path for s in sources if s.is_table), None):
            raise ConfigError(
                flag,
                f"{table} is a table, and copies are written as JSON alone",
                "write its records to a .jsonl file first, or leave the flag out",
            )
        if len(sources) == 1 and given[flag].suffix not in FILES:
            fix_text = f"end it in {' or '.join(FILES)}"
            raise ConfigError(f"{flag} {given[flag]}", "is neither .json nor .jsonl", fix_text)
        names = [Path(source.path).name for source in sources]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"{flag} {given[flag]}",
                "two of the files have the same name, and the copies would too",
                "check them one by one",
            )
