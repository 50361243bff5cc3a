"""A file that several processes write together, a line for each record, and that a later run goes
on with.

While a run lasts, `OUT.jsonl.parts` holds the lines of each process. `OUT.jsonl.settings.json`
stays, and says with what settings the file was made.
"""

import fcntl
import heapq
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..core.distributed import rank, world_size
from ..core.errors import ConfigError, DataError
from ..core.logging import say

PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the others: they may have slower records."""

LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}
"""What JSON may hold as it is, and `str.splitlines` parts lines at."""


@dataclass(frozen=True)
class Parts:
    """Attributes:
    output: The file that gets its name when it is complete; each line is a JSON object with the
        number of its "record".
    settings: What all of its lines depend on, as JSON.
    """

    output: Path
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def settings_file(self) -> Path:
        return self.output.with_name(f"{self.output.name}.settings.json")

    @property
    def _done(self) -> Path:
        return self.folder / "done.jsonl"

    @property
    def _mine(self) -> Path:
        return self.folder / f"rank-{rank()}.jsonl"

    def is_complete(self) -> bool:
        """Whether the output is there already.

        Raises:
            ConfigError: it was made or begun with other settings, or it cannot be made.
        """
        where, complete = f"output {self.output}", self.output.exists()
        if not self.output.absolute().parent.is_dir():
            raise ConfigError(where, f"there is no folder {self.output.parent}", "make it first")
        if self.output.is_dir():
            raise ConfigError(where, "is a folder", "give the name of a file")
        if complete or self.folder.exists():
            self._check_settings("made" if complete else "begun")
        return complete

    def _check_settings(self, made: str) -> None:
        where, now = f"output {self.output}", json.loads(json.dumps(self.settings))
        try:
            then = json.loads(self.settings_file.read_text("utf-8"))
        except (OSError, ValueError):
            what = f"is there already, and no {self.settings_file.name} says how it was {made}"
            raise ConfigError(where, what, "give another name, or move it") from None
        changed = [key for key in then | now if then.get(key) != now.get(key)]
        if changed:
            told = [
                f"{key} was {_told(then.get(key))}, is {_told(now.get(key))}" for key in changed
            ]
            aside = f", or remove {self.folder} to start anew" if made == "begun" else ""
            raise ConfigError(
                where,
                f"was {made} with other settings: {'; '.join(told)}",
                f"give those settings or another output{aside}",
            )

    @contextmanager
    def begun(self) -> Iterator[Callable[[], None]]:
        """What earlier runs have written is gathered, and no other run can write. Yields what waits
        until all processes have called it, and ends this one when another has failed.

        Raises:
            ConfigError: another run is writing.
            DataError: the folder cannot be written.
        """
        wait = _meeting()
        if rank():
            wait()
            yield wait
            return
        with self.writing():
            if not self.folder.exists():
                partial = self.output.with_name(f".partial-{os.getpid()}-{self.output.name}")
                partial.write_text(json.dumps(self.settings, indent=1) + "\n", "utf-8")
                partial.rename(self.settings_file)
                self.folder.mkdir()
            lock = (self.folder / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fix = "wait for it, or stop it"
                raise ConfigError(
                    f"output {self.output}", "another run is writing it", fix
                ) from None
            with self.writing():
                self._gather()
            wait()
            yield wait

    def done(self) -> set[int]:
        """The records that earlier runs have written."""
        with self.writing():
            return {number for number, _ in _lines(self._done)}

    @contextmanager
    def lines(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """What writes a line of this process, to be called in the order of the records. When the
        block ends early, a line says that what was written is kept."""
        with self.writing():
            file = self._mine.open("xb")

        def write(row: dict[str, Any]) -> None:
            line = json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n"
            with self.writing():
                file.write(line.encode("utf-8", "backslashreplace"))
                file.flush()

        try:
            with file:
                yield write
        except BaseException:
            say(f"What is done is kept in {self.folder}; the same command goes on from there.")
            raise

    def finish(self, total: int) -> None:
        """Give the output its name, by one process, after all have written.

        Raises:
            DataError: it cannot be written, or has not a line for each of `total` records.
        """
        with self.writing():
            found = self._gather()
            if found != total:
                raise DataError(
                    str(self.output),
                    f"{total} records were to be answered, and {found} lines are there",
                    "see that no data file changes, and that all processes write to one file "
                    "system",
                )
            self._done.rename(self.output)
            shutil.rmtree(self.folder)

    def _gather(self) -> int:
        """Put the lines of all processes into one file, by record, each once; how many there are.
        Every file has them in the order of the records."""
        files = sorted(self.folder.glob("*.jsonl"))
        count, last, partial = 0, 0, self.folder / "done.partial"
        with partial.open("wb") as file:
            for number, line in heapq.merge(*map(_lines, files), key=itemgetter(0)):
                if number != last:
                    file.write(line)
                    count, last = count + 1, number
        partial.rename(self._done)
        for part in self.folder.glob("rank-*.jsonl"):
            part.unlink()
        return count

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises DataError where the operating system refuses."""
        try:
            yield
        except OSError as error:
            raise DataError(
                str(error.filename or self.folder),
                f"cannot be read or written: {error.strerror}",
                "check the folder and its free space, and that all processes see it",
            ) from None


def _told(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number of the record and line, for all but one that a killed process has half written."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)["record"], line


def _meeting() -> Callable[[], None]:
    """What waits until all processes have called it."""
    if world_size() == 1:
        return lambda: None
    import torch.distributed as dist

    group = _connection()

    def wait() -> None:
        try:
            dist.barrier(group)
        except RuntimeError:  # its connection is closed; it has said why itself
            raise SystemExit(1) from None

    return wait


@cache
def _connection() -> Any:
    """The group of all processes, until they end: who connects a second time may meet the end of
    the first."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.new_group(backend="gloo", timeout=PATIENCE)
