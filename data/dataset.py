"""Sources to a checked, encoded, Arrow-backed dataset, made once and shared by all processes."""

import hashlib
import json
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.config import HF_DATASETS_CACHE

from .. import __version__
from ..core.distributed import local_rank, usable_cores
from .pool import ahead
from .preparation import (
    RECHECK,
    ROWS,
    CheckFiles,
    Encode,
    Preparation,
    Totals,
    add_states,
    file_state,
)
from .sources import Source
from .tables import open_table

FORMAT = 2
"""Counted up when rows change that the same settings give: their form, rendering, arithmetic."""

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "record": datasets.Value("int64"),
        "image_files": datasets.List(datasets.Value("string")),
        "video_file": datasets.Value("string"),
        "frame_files": datasets.List(datasets.Value("string")),
        "ids": datasets.List(datasets.Value("int32")),
        "trained": datasets.List(datasets.Value("int32")),
        "grids": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int64"),
        "trained_tokens": datasets.Value("int64"),
        "cut": datasets.Value("int64"),
        "patches": datasets.Value("int64"),
        "patches_squared": datasets.Value("int64"),
    }
)
"""Columns of a sample. None is called `image` or `images`: TRL takes such a dataset over.

`ids` are cut to the length limit, with one VISUAL_ATOM_ID for all of a medium's; `trained` are
bounds (start, stop, start, stop, ...) of the trained runs in the sample with every visual token,
of which there are `length`, `cut` more were beyond the limit; `grids` are frames, rows and columns
of each medium that is left, and `patches_squared` is the sum of (rows * columns)^2 over all frames.
"""


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

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, int64 `[samples]`, such as `length` or `patches`."""
        return self.dataset.data.column(name).to_numpy()


class ArrowRows(Sequence[dict[str, Any]]):
    """Rows of a memory-mapped dataset, each read by itself; `ids`, `trained` and `grids` are numpy
    arrays. Pickled, it is the name of the file.

    Raises:
        ValueError: the dataset is a selection of other rows (`indices`).
    """

    def __init__(self, dataset: datasets.Dataset):
        if dataset._indices is not None:
            raise ValueError("ArrowRows reads datasets without an indices mapping.")
        self.dataset = dataset
        self._batches = [(b.schema.names, b.columns) for b in dataset.data.table.to_batches()]
        sizes = (len(columns[0]) for _, columns in self._batches)
        self._starts = list(accumulate(sizes, initial=0))

    def __reduce__(self):
        return ArrowRows, (self.dataset,)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        names, columns = self._batches[number]
        at = index - self._starts[number]
        return {
            name: column[at].values.to_numpy()
            if name in ("ids", "trained", "grids")
            else column[at].as_py()
            for name, column in zip(names, columns, strict=True)
        }


def prepare_dataset(
    sources: Sequence[Source],
    *,
    check_files: CheckFiles,
    encode: Encode,
    skip_bad: bool,
    fingerprint: str,
) -> PreparedData:
    """Check every record and file, encode every sample, and keep the result on disk.

    The result is reused while the sources, the media files' sizes and times, and `fingerprint`
    stay the same; it is written under a temporary name and renamed when complete. Records are
    read one at a time, twice: all are parsed before the first file is opened. Only a machine's
    first process looks at the media files of a result; the others take what it left. Work of more
    than a second is done by as many forked processes as there are cores; the result does not
    depend on them.

    Args:
        check_files: Sizes of a conversation's media; raises DataError for a bad file.
        encode: The columns `ids` to `patches_squared` of a conversation with media of those sizes.
        skip_bad: Leave bad records out and list them, instead of raising the first.
        fingerprint: Whatever else the result depends on: tokenizer, limits, template.

    Raises:
        DataError: the first bad record, or else the first with a bad file; or no sample is left;
            or a process was killed.
    """
    open_table.cache_clear()  # a table may have been written anew
    key = hashlib.sha256(f"{__version__}|{FORMAT}|{fingerprint}|{skip_bad}".encode())
    for source in sources:
        key.update(source.fingerprint().encode())
    folder = Path(HF_DATASETS_CACHE) / "vlmtune" / key.hexdigest()[:32]
    if local_rank() == 0 and folder.exists() and _is_stale(folder):
        _remove(folder)
    if not folder.exists():
        schema = FEATURES.arrow_schema
        preparation = Preparation(sources, check_files, encode, skip_bad, schema)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            preparation.write(partial)
            with suppress(OSError):  # another process was first
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _load(folder)


def _is_stale(folder: Path) -> bool:
    """Whether a media file failed when the folder was made, or has changed since."""
    if (folder / RECHECK).exists():
        return True
    prepared = _load(folder)
    media = json.loads((folder / "media.json").read_text("utf-8"))
    files = _media_of(prepared.dataset) if prepared.has_images else iter(())
    return [_digest(files), _digest(iter(media["left_out"]))] != media["digests"]


def _digest(files: Iterator[str]) -> str:
    """Of the state of these files, in their order."""
    digest, cores = hashlib.sha256(), usable_cores()
    chunks = iter(lambda: list(islice(files, ROWS)), [])
    with ThreadPoolExecutor(cores) as pool:
        for states in ahead(pool, cores, lambda chunk: [file_state(f) for f in chunk], chunks):
            add_states(digest, states)
    return digest.hexdigest()


def _media_of(dataset: datasets.Dataset) -> Iterator[str]:
    """The media files of all rows, as `Conversation.media_files` orders them."""
    names = ["image_files", "frame_files", "video_file"]
    for batch in dataset.data.table.select(names).to_batches():
        columns: Iterable[list] = (column.to_pylist() for column in batch.columns)
        for images, frames, video in zip(*columns, strict=True):
            yield from [*images, *frames, *([video] if video else [])]


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
