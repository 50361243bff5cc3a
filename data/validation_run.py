"""Every record of every source through every check."""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from .duplicates import Seen, remembering
from .findings import CODES, Finding
from .pool import ALONE, shared
from .record_inspection import CheckSample, Chunk, Inspection, Looked
from .records import open_text
from .sources import Source
from .tables import open_table
from .validation_files import Copies, Report, check_targets

CHUNK = 64
"""Records that a process takes at a time. Of a source's first ones fewer: images may be slow."""

EXAMPLES = 3
"""Findings of each code that are shown."""


@dataclass
class Summary:
    """What was found.

    Attributes:
        files: Data files, those of the evaluation first.
        counts: Findings by code, and in `mendable` those of them that `--fix` mends.
        examples: The first findings of each code.
        notes: What was written, what is missing there, what was not looked at; a line each.
    """

    files: list[str]
    records: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    mendable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        self.counts[finding.code] += 1
        examples = self.examples.setdefault(finding.code, [])
        if len(examples) < EXAMPLES:
            examples.append(finding)

    def number_of(self, severity: str) -> int:
        return sum(n for code, n in self.counts.items() if CODES[code].severity == severity)


class _Run:
    """One validation: the chunks to look at, and what is gathered from them."""

    def __init__(self, sources: Sequence[Source], evaluation: int, seen: Seen):
        self.sources, self.evaluation, self.seen = sources, evaluation, seen
        self.summary = Summary([source.path for source in sources])
        self.report: Report | None = None
        self.fixed: Copies | None = None
        self.quarantined: Copies | None = None
        self.mended = self.broken = self.videos = 0
        self.faults: list[str] = []

    def chunks(self) -> Iterator[Chunk]:
        for number, source in enumerate(self.sources):
            records, size = _until_fault(source), 1
            while chunk := list(islice(records, size)):
                yield number, chunk
                size = min(2 * size, CHUNK)

    def take(self, number: int, looked: Sequence[Looked]) -> None:
        """Count, report and write what became of a chunk."""
        for one in looked:
            self.summary.records += one.position is not None
            self.videos += one.has_video
            for finding in (*one.findings, *self._seen_before(number, one)):
                self.summary.add(finding)
                if number >= self.evaluation and finding.code in one.mended:
                    self.summary.mendable[finding.code] += 1
                if self.report:
                    self.report.add(finding)
            if number >= self.evaluation:
                self._write(number - self.evaluation, one)

    def _seen_before(self, number: int, one: Looked) -> Iterator[Finding]:
        position, path = one.position, self.sources[number].path
        if position is None:
            return

        def found(code: str, field: str, what: str, fix: str) -> Finding:
            severity = CODES[code].severity
            return Finding(code, severity, path, position, one.identity, field, what, fix)

        if one.has_id:
            before = self.seen.first_id(number, one.identity, position)
            if before is not None:
                what = f"record {before} has the same id."
                yield found("id-duplicate", "id", what, "give each record an id of its own.")
        if one.key is None:
            return
        before = self.seen.first_sample(one.key, (number, position))
        if before is None:
            return
        place = f"record {before[1]} of {self.sources[before[0]].path}"
        if before[0] < self.evaluation <= number:
            what = f"{place}, which is evaluated on, is the same sample."
            yield found("sample-in-eval", "", what, "remove it from one of the two files.")
        else:
            what = f"{place} is the same sample."
            yield found("sample-duplicate", "", what, "remove one of them.")

    def _write(self, number: int, one: Looked) -> None:
        if one.position is None:
            self.faults.append(self.sources[number + self.evaluation].path)
        elif one.text is None:
            self.broken += 1
        elif one.aside and self.quarantined:
            self.quarantined.add(number, one.text)
        elif self.fixed:
            self.fixed.add(number, one.text)
            self.mended += bool(one.mended)

    def finish(self) -> None:
        """Give the outputs their names."""
        tell = self.summary.notes.append
        if self.videos:
            from .image_checks import can_open_videos

            if not can_open_videos():
                tell(f"not opened: {counted(self.videos, 'video')}, PyAV is not installed")
        if self.quarantined:
            self.quarantined.finish()
            count = counted(sum(self.quarantined.counts), "record")
            tell(f"{self.quarantined.target}: {count} with errors")
        if self.fixed:
            self.fixed.finish()
            count = counted(sum(self.fixed.counts), "record")
            tell(f"{self.fixed.target}: {count}, {self.mended:,} of them mended")
        if self.fixed or self.quarantined:
            if self.broken:
                tell(f"not written: {counted(self.broken, 'record')} of broken JSON")
            for path in self.faults:
                tell(f"not written: what {path} holds from its fault on")
        if self.report:
            totals = {
                "files": self.summary.files,
                "records": self.summary.records,
                "counts": dict(self.summary.counts),
            }
            self.report.finish(totals)
            tell(f"{self.report.output.path}: {counted(self.report.count, 'finding')}")


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _check_readable(source: Source) -> None:
    if source.is_table:
        open_table(source.path)
        return
    if os.path.exists(source.path) and not os.path.isfile(source.path):
        what, fix = "is a pipe or a device, which can be read only once.", "write a file first."
        raise DataError(source.path, what, fix)
    with open_text(source.path):
        pass


def _until_fault(source: Source) -> Iterator[tuple[int | None, Any]]:
    """The records of a source; the fault that ends it stands where they end.

    Raises:
        DataError: the source cannot be read.
    """
    position = 0
    try:
        for position, record in source.records():
            yield position, record
        if not position:
            fix = "add records, or leave it out."
            yield None, DataError(source.path, "there is no record.", fix, "file-empty")
    except DataError as error:
        if error.code in ("", "file-unreadable"):
            raise
        yield None, error


@contextmanager
def _progress(sources: Sequence[Source], decode: bool) -> Iterator[Any]:
    """A bar on a terminal, for what takes more than a second; its end is known where decoding takes
    so long that counting the records first is nothing."""
    if not sys.stderr or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    total = sum(1 for source in sources for _ in _until_fault(source)) if decode else None
    with tqdm(desc="Checking data", unit=" records", total=total, delay=1) as bar:
        yield bar


def validate(
    sources: Sequence[Source],
    evaluation: Sequence[Source] = (),
    *,
    decode: bool = False,
    jobs: int = 1,
    check_sample: CheckSample | None = None,
    fix: Path | None = None,
    quarantine: Path | None = None,
    report: Path | None = None,
) -> Summary:
    """Check all records, in constant memory; the sources are read once and never written.

    Args:
        evaluation: Sources that no training sample should be in; they are checked too, and first.
        decode: Decode every image and video to its end, instead of reading its header.
        jobs: Processes, used when the work takes more than a second.
        check_sample: Further checks of a record without errors, given the sizes of its media.
        fix: Where a copy of `sources` is written with everything mended that has one sure fix.
        quarantine: Where the records that still have errors go, as they were, instead.
        report: Where every finding is written as JSON: `{"version", "findings", "files",
            "records", "counts"}`.

    Raises:
        ConfigError: an output exists, or cannot be made of these sources.
        DataError: a source cannot be opened, an output cannot be written, or a process was killed.
    """
    check_targets(sources, fix, quarantine, report)
    every = [*evaluation, *sources]
    for source in every:
        _check_readable(source)
    started = time.monotonic()
    with ExitStack() as stack:
        run = _Run(every, len(evaluation), stack.enter_context(remembering()))
        if report:
            run.report = Report(report)
            stack.callback(run.report.output.discard)
        if fix:
            run.fixed = Copies(fix, sources)
            stack.callback(run.fixed.discard)
        if quarantine:
            run.quarantined = Copies(quarantine, sources)
            stack.callback(run.quarantined.discard)
        work = Inspection(every, decode, check_sample, bool(fix), bool(quarantine))
        names = ", ".join(source.path for source in every)
        alone = ALONE if jobs > 1 else math.inf
        results = closing(shared(work.look, run.chunks(), jobs, alone, names))
        bar = stack.enter_context(_progress(every, decode))
        for number, looked in stack.enter_context(results):
            run.take(number, looked)
            if bar is not None:
                bar.update(len(looked))
        run.finish()
    run.summary.seconds = time.monotonic() - started
    return run.summary
