"""Sources to a checked, Arrow-backed dataset, made once and shared by all processes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
from datasets.config import HF_DATASETS_CACHE
from tqdm import tqdm

from .. import __version__
from ..core.distributed import local_rank, rank
from ..core.errors import DataError
from .conversation import PLAIN, Conversation, record_id
from .sources import Source
from .tables import REFERENCE, open_table

T = TypeVar("T")
R = TypeVar("R")
CheckFiles = Callable[[Conversation], Any]
Measure = Callable[[Conversation, Any], tuple[int, int]]

ROWS = 1000
"""Rows of a batch in the Arrow file."""

CHUNK = 8
"""Records, or media files, that a thread takes at a time."""

RECHECK = "recheck"
"""Stands in a prepared folder when a media file failed: that may be mended without a trace."""

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "record": datasets.Value("int64"),
        "turns": [
            {
                "role": datasets.Value("string"),
                "text": datasets.Value("string"),
                "trained": datasets.Value("bool"),
            }
        ],
        "image_files": datasets.List(datasets.Value("string")),
        "video_file": datasets.Value("string"),
        "frame_files": datasets.List(datasets.Value("string")),
        "length": datasets.Value("int64"),
        "trained_tokens": datasets.Value("int64"),
    }
)


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

    def add(self, source: int, row: dict[str, Any], has_images: bool) -> None:
        self.sizes[source] += 1
        self.tokens += row["length"]
        self.trained_tokens += row["trained_tokens"]
        self.longest = max(self.longest, row["length"])
        self.has_images |= has_images


@dataclass(frozen=True)
class PreparedData:
    """Samples to train on, the ledger of those left out, `{"file", "record", "id", "where",
    "what", "fix"}` each, and sums over the samples."""

    dataset: datasets.Dataset
    left_out: list[dict[str, Any]]
    totals: Totals

    @property
    def tokens(self) -> int:
        return self.totals.tokens

    @property
    def trained_tokens(self) -> int:
        return self.totals.trained_tokens

    @property
    def longest(self) -> int:
        return self.totals.longest

    @property
    def has_images(self) -> bool:
        return self.totals.has_images

    @property
    def sizes(self) -> list[int]:
        """Samples of each source; they lie one source after another."""
        return self.totals.sizes


def prepare_dataset(
    sources: Sequence[Source],
    *,
    check_files: CheckFiles,
    measure: Measure,
    skip_bad: bool,
    fingerprint: str,
) -> PreparedData:
    """Check every record and file, measure every sample, and keep the result on disk.

    The result is reused while the sources, the media files' sizes and times, and `fingerprint`
    stay the same; it is written under a temporary name and renamed when complete. Records are
    read one at a time, twice: all are parsed before the first file is opened. Only a machine's
    first process looks at the media files of a result; the others take what it left.

    Args:
        check_files: Sizes of a conversation's media; raises DataError for a bad file.
        measure: Tokens and trained tokens of a conversation with media of those sizes.
        skip_bad: Leave bad records out and list them, instead of raising the first.
        fingerprint: Whatever else the result depends on: tokenizer, limits, template.

    Raises:
        DataError: the first bad record, or else the first with a bad file; or no sample is left.
    """
    open_table.cache_clear()  # a table may have been written anew
    key = hashlib.sha256(f"{__version__}|{fingerprint}|{skip_bad}".encode())
    for source in sources:
        key.update(source.fingerprint().encode())
    folder = Path(HF_DATASETS_CACHE) / "vlmtune" / key.hexdigest()[:32]
    if local_rank() == 0 and folder.exists() and _is_stale(folder):
        _remove(folder)
    if not folder.exists():
        preparation = _Preparation(sources, check_files, measure, skip_bad)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            preparation.write(partial)
            with suppress(OSError):  # another process was first
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _load(folder)


def sample_row(conversation: Conversation, sizes: Any, measure: Measure) -> dict[str, Any]:
    """The row of a sample whose media have these sizes.

    Raises:
        NothingToLearn: no trained token is left.
        DataError: the sample cannot be encoded.
    """
    length, trained = measure(conversation, sizes)
    if not trained:
        raise NothingToLearn(
            conversation.where(
                "caption" if conversation.turns[-1].role == PLAIN else "conversations"
            ),
            f"no token to learn from is left after the cut to {length} tokens.",
            "raise multimodal_max_length or text_max_length, or lower the pixel limits.",
        )
    return {**conversation.to_row(), "length": length, "trained_tokens": trained}


def ledger_entry(file: str, record: int, identity: str, error: DataError) -> dict[str, Any]:
    reason = {"where": error.where, "what": error.what, "fix": error.fix}
    return {"file": file, "record": record, "id": identity, **reason}


@dataclass(frozen=True)
class _Seen:
    """A record after a look at its media files: `found` is their sizes, or what is wrong."""

    record: int
    identity: str
    conversation: Conversation | None
    stats: list[str]
    found: Any

    def row(self, measure: Measure) -> dict[str, Any]:
        if isinstance(self.found, DataError):
            raise self.found
        assert self.conversation is not None
        return sample_row(self.conversation, self.found, measure)


class _Preparation:
    def __init__(
        self,
        sources: Sequence[Source],
        check_files: CheckFiles,
        measure: Measure,
        skip_bad: bool,
    ):
        self.sources, self.skip_bad = sources, skip_bad
        self.check_files, self.measure = check_files, measure
        self.records = self._parsed()
        self.totals = Totals([0] * len(sources))
        self.left_out: list[dict[str, Any]] = []
        self.left_out_media: list[str] = []
        self.kept_stats, self.left_out_stats = hashlib.sha256(), hashlib.sha256()
        self.recheck = False

    def write(self, folder: Path) -> None:
        """Write samples, ledger, totals and the state of the media files."""
        schema, rows = FEATURES.arrow_schema, self._rows()
        with (
            pa.OSFile(str(folder / "data.arrow"), "wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            while batch := list(islice(rows, ROWS)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        if not any(self.totals.sizes):
            left_out = self.left_out
            raise DataError(
                ", ".join(source.path for source in self.sources),
                f"no sample is left to learn from; {len(left_out)} were left out"
                + (f", the first because: {left_out[0]['what']}" if left_out else "."),
                "mend the data, or raise multimodal_max_length and text_max_length.",
            )
        digests = [self.kept_stats.hexdigest(), self.left_out_stats.hexdigest()]
        media = {"digests": digests, "left_out": self.left_out_media}
        _write_json(folder / "totals.json", asdict(self.totals))
        _write_json(folder / "media.json", media)
        if self.recheck:
            (folder / RECHECK).touch()
        _write_json(folder / "left_out.json", self.left_out)

    def _parsed(self) -> int:
        """How many records there are; raises for an unreadable source, then for a bad record."""
        count, first = 0, None
        for source in self.sources:
            for index, record in source.records():
                count += 1
                try:
                    source.parse(index, record)
                except DataError as error:
                    first = first or error
        if first and not self.skip_bad:
            raise first
        return count

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the samples; what is left out is noted."""
        with (
            ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
            tqdm(total=self.records, desc="Checking data", disable=rank() > 0) as bar,
        ):
            for number, source in enumerate(self.sources):
                for seen in _ahead(pool, partial(self._look, source), source.records()):
                    bar.update()
                    try:
                        row = seen.row(self.measure)
                    except DataError as error:
                        if not self.skip_bad and not isinstance(error, NothingToLearn):
                            pool.shutdown(cancel_futures=True)
                            raise
                        self._leave_out(source, seen, error)
                        continue
                    _add_stats(self.kept_stats, seen.stats)
                    self.totals.add(number, row, bool(seen.stats))
                    yield row

    def _look(self, source: Source, numbered: tuple[int, Any]) -> _Seen:
        index, record = numbered
        try:
            conversation = source.parse(index, record)
        except DataError as error:
            return _Seen(index, record_id(record, index), None, [], error)
        stats = [_stat(file) for file in conversation.media_files]
        try:
            found = self.check_files(conversation)
        except DataError as error:
            found = error
        return _Seen(index, conversation.id, conversation, stats, found)

    def _leave_out(self, source: Source, seen: _Seen, error: DataError) -> None:
        self.left_out.append(ledger_entry(source.path, seen.record, seen.identity, error))
        if seen.conversation is not None:
            self.recheck |= seen.found is error
            self.left_out_media += seen.conversation.media_files
            _add_stats(self.left_out_stats, seen.stats)


def _ahead(pool: ThreadPoolExecutor, call: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
    """`call` of each item, in order, a bounded number of them computed ahead."""
    waiting: deque[Future[list[R]]] = deque()
    while chunk := list(islice(items, CHUNK)):
        waiting.append(pool.submit(lambda chunk: [call(item) for item in chunk], chunk))
        if len(waiting) > 4 * (os.cpu_count() or 1):
            yield from waiting.popleft().result()
    for future in waiting:
        yield from future.result()


def _is_stale(folder: Path) -> bool:
    """Whether a media file failed when the folder was made, or has changed since."""
    if (folder / RECHECK).exists():
        return True
    prepared = _load(folder)
    media = json.loads((folder / "media.json").read_text("utf-8"))
    kept, left_out = hashlib.sha256(), hashlib.sha256()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        if prepared.has_images:
            _add_stats(kept, _ahead(pool, _stat, _media_of(prepared.dataset)))
        _add_stats(left_out, _ahead(pool, _stat, iter(media["left_out"])))
    return [kept.hexdigest(), left_out.hexdigest()] != media["digests"]


def _media_of(dataset: datasets.Dataset) -> Iterator[str]:
    """The media files of all rows, as `Conversation.media_files` orders them."""
    table = dataset.with_format("arrow")
    for start in range(0, len(dataset), ROWS):
        batch: Any = table[start : start + ROWS]
        columns = [
            batch.column(c).to_pylist() for c in ("image_files", "frame_files", "video_file")
        ]
        for images, frames, video in zip(*columns, strict=True):
            yield from [*images, *frames, *([video] if video else [])]


def _stat(file: str) -> str:
    if file.startswith(REFERENCE):
        return file
    try:
        stat = os.stat(file)
    except OSError:
        return f"{file}|missing"
    return f"{file}|{stat.st_size}|{stat.st_mtime_ns}"


def _add_stats(digest: "hashlib._Hash", stats: Iterable[str]) -> None:
    for stat in stats:
        digest.update(f"{stat}\n".encode())


def _load(folder: Path) -> PreparedData:
    dataset = datasets.Dataset.from_file(str(folder / "data.arrow"))
    ledger = json.loads((folder / "left_out.json").read_text("utf-8"))
    totals = Totals(**json.loads((folder / "totals.json").read_text("utf-8")))
    return PreparedData(dataset, ledger, totals)


def _remove(folder: Path) -> None:
    """Out of the way in one move, so that no process takes half of it."""
    aside = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    with suppress(OSError):  # another machine was first
        folder.rename(aside / folder.name)
    shutil.rmtree(aside)


def _write_json(path: Path, content: Any) -> None:
    # A lone surrogate becomes the escape that JSON has for it.
    text = json.dumps(content, ensure_ascii=False)
    path.write_text(text, "utf-8", errors="backslashreplace")
