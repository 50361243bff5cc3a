"""Records to Arrow batches: several processes check and encode them, one writes."""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from ..core.distributed import rank, usable_cores
from ..core.errors import DataError
from .conversation import PLAIN, Conversation, record_id
from .pool import ALONE, shared
from .sources import Source
from .tables import REFERENCE

CheckFiles = Callable[[Conversation], Any]
Encode = Callable[[Conversation, Any], dict[str, Any]]
Chunk = tuple[int, list[tuple[int, Any]]]
"""Number of a source, and some of its records with their positions."""

CHUNK = 32
"""Records that a process takes at a time. Of a source's first ones fewer: they may be videos."""

ROWS = 1000
"""Least rows of a batch in the Arrow file; the last one may have fewer."""

RECHECK = "recheck"
"""Stands in a prepared folder when a media file failed: that may be mended without a trace."""


class NothingToLearn(DataError):
    """A sample without a token to learn from: left out and listed, whatever becomes of bad ones."""


@dataclass
class Totals:
    """Of all samples: tokens, trained ones, the longest sample's; whether any has an image or
    video; and samples of each source."""

    sizes: list[int]
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    has_images: bool = False

    def add(self, source: int, batch: pa.RecordBatch, has_images: bool) -> None:
        lengths, trained = (batch.column(c).to_numpy() for c in ("length", "trained_tokens"))
        self.sizes[source] += len(lengths)
        self.tokens += int(lengths.sum())
        self.trained_tokens += int(trained.sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        self.has_images |= has_images


def require_learnable(conversation: Conversation, row: dict[str, Any]) -> None:
    """Raises NothingToLearn for a row without trained tokens."""
    if not row["trained_tokens"]:
        raise NothingToLearn(
            conversation.where(
                "caption" if conversation.turns[-1].role == PLAIN else "conversations"
            ),
            f"no token to learn from is left after the cut to {row['length']} tokens.",
            "raise multimodal_max_length or text_max_length, or lower the pixel limits.",
        )


def ledger_entry(file: str, record: int, identity: str, error: DataError) -> dict[str, Any]:
    reason = {"where": error.where, "what": error.what, "fix": error.fix}
    return {"file": file, "record": record, "id": identity, **reason}


@dataclass(frozen=True)
class _LeftOut:
    """A record left out, its media files and their state; `by_file`: one of them is bad."""

    entry: dict[str, Any]
    files: list[str]
    states: list[str]
    by_file: bool


@dataclass(frozen=True)
class _Looked:
    """What became of a chunk: its rows, the state of their media files, and what was left out; or
    the error that ends the preparation."""

    source: int
    records: int
    rows: pa.RecordBatch
    states: list[str]
    left_out: list[_LeftOut]
    error: DataError | None = None


@dataclass(frozen=True)
class _Work:
    """What is done with a chunk, in whatever process."""

    sources: Sequence[Source]
    check_files: CheckFiles
    encode: Encode
    skip_bad: bool
    schema: pa.Schema

    def look(self, chunk: Chunk) -> _Looked:
        number, records = chunk
        rows, states, left_out, fatal = [], [], [], None
        for index, record in records:
            conversation, found, checked = None, [], False
            try:
                conversation = self.sources[number].parse(index, record)
                found = [file_state(file) for file in conversation.media_files]
                sizes = self.check_files(conversation)
                checked = True
                row = {**conversation.to_row(), **self.encode(conversation, sizes)}
                require_learnable(conversation, row)
            except DataError as error:
                if not self.skip_bad and not isinstance(error, NothingToLearn):
                    fatal = error
                    break
                identity = conversation.id if conversation else record_id(record, index)
                entry = ledger_entry(self.sources[number].path, index, identity, error)
                files = conversation.media_files if conversation else []
                bad_file = conversation is not None and not checked
                left_out.append(_LeftOut(entry, files, found, bad_file))
                continue
            rows.append(row)
            states += found
        batch = pa.RecordBatch.from_pylist(rows, schema=self.schema)
        return _Looked(number, len(records), batch, states, left_out, fatal)


class Preparation:
    """One making of a prepared folder."""

    def __init__(
        self,
        sources: Sequence[Source],
        check_files: CheckFiles,
        encode: Encode,
        skip_bad: bool,
        schema: pa.Schema,
    ):
        self.work = _Work(sources, check_files, encode, skip_bad, schema)
        self.totals = Totals([0] * len(sources))
        self.left_out: list[dict[str, Any]] = []
        self.left_out_media: list[str] = []
        self.kept_states, self.left_out_states = hashlib.sha256(), hashlib.sha256()
        self.recheck = False

    def write(self, folder: Path) -> None:
        """Write samples, ledger, totals and the state of the media files."""
        schema = self.work.schema
        with (
            closing(self._looked()) as looked,
            pa.OSFile(str(folder / "data.arrow"), "wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            for batch in _of_many_rows(self._batches(looked)):
                writer.write_batch(batch)
        if not any(self.totals.sizes):
            left_out = self.left_out
            raise DataError(
                _names(self.work.sources),
                f"no sample is left to learn from; {len(left_out)} were left out"
                + (f", the first because: {left_out[0]['what']}" if left_out else "."),
                "mend the data, or raise multimodal_max_length and text_max_length.",
            )
        digests = [self.kept_states.hexdigest(), self.left_out_states.hexdigest()]
        media = {"digests": digests, "left_out": self.left_out_media}
        _write_json(folder / "totals.json", asdict(self.totals))
        _write_json(folder / "media.json", media)
        if self.recheck:
            (folder / RECHECK).touch()
        _write_json(folder / "left_out.json", self.left_out)

    def _batches(self, results: Iterable[_Looked]) -> Iterator[pa.RecordBatch]:
        """Rows of the samples; what is left out is noted.

        Raises:
            DataError: a source is unreadable, or else the first bad record, or else the first bad
                sample.
        """
        records = self._parse_all()
        with tqdm(total=records, desc="Checking data", disable=rank() > 0) as bar:
            for looked in results:
                if looked.error:
                    raise looked.error
                bar.update(looked.records)
                for left_out in looked.left_out:
                    self._leave_out(left_out)
                add_states(self.kept_states, looked.states)
                self.totals.add(looked.source, looked.rows, bool(looked.states))
                yield looked.rows

    def _parse_all(self) -> int:
        """Number of records. Raises the first bad one's error, unless such are left out. Sending
        the records to other processes would take longer than to parse them."""
        count, bad = 0, None
        for source in self.work.sources:
            for index, record in source.records():
                count += 1
                if bad or self.work.skip_bad:
                    continue
                try:
                    source.parse(index, record)
                except DataError as error:
                    bad = error
        if bad:
            raise bad
        return count

    def _looked(self) -> Generator[_Looked, None, None]:
        """What became of each chunk, in order."""
        names = _names(self.work.sources)
        return shared(self.work.look, self._chunks(), usable_cores(), ALONE, names)

    def _chunks(self) -> Iterator[Chunk]:
        for number, source in enumerate(self.work.sources):
            records, size = source.records(), 1
            while chunk := list(islice(records, size)):
                yield number, chunk
                size = min(2 * size, CHUNK)

    def _leave_out(self, left_out: _LeftOut) -> None:
        self.left_out.append(left_out.entry)
        self.recheck |= left_out.by_file
        self.left_out_media += left_out.files
        add_states(self.left_out_states, left_out.states)


def _of_many_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at least ROWS: a table of many batches is slow to open."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= ROWS:
            yield pa.concat_batches(held)
            held = []
    if held:
        yield pa.concat_batches(held)


def file_state(file: str) -> str:
    """Name, size and time of change of a media file."""
    if file.startswith(REFERENCE):
        return file
    try:
        stat = os.stat(file)
    except OSError:
        return f"{file}|missing"
    return f"{file}|{stat.st_size}|{stat.st_mtime_ns}"


def add_states(digest: "hashlib._Hash", states: Iterable[str]) -> None:
    for state in states:
        digest.update(f"{state}\n".encode())


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.path for source in sources)


def _write_json(path: Path, content: Any) -> None:
    # A lone surrogate becomes the escape that JSON has for it.
    text = json.dumps(content, ensure_ascii=False)
    path.write_text(text, "utf-8", errors="backslashreplace")
