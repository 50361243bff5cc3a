"""Data files to a checked, Arrow-backed dataset, made once and shared by all processes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.config import HF_DATASETS_CACHE
from tqdm import tqdm

from .. import __version__
from ..core.distributed import local_rank, rank
from ..core.errors import DataError
from .conversation import Conversation, parse_conversation, record_id
from .records import read_records

T = TypeVar("T")

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


@dataclass(frozen=True)
class PreparedData:
    """Samples to train on, and the ledger of those left out, `{"file", "record", "id", "where",
    "what", "fix"}` each."""

    dataset: datasets.Dataset
    left_out: list[dict[str, Any]]


def prepare_dataset(
    paths: Sequence[str],
    image_folder: str | None,
    *,
    check_files: Callable[[Conversation], Any],
    measure: Callable[[Conversation, Any], tuple[int, int]],
    skip_bad: bool,
    fingerprint: str,
) -> PreparedData:
    """Check every record and file, measure every sample, and keep the result on disk.

    The result is reused while the data files, the media files' sizes and times, and `fingerprint`
    stay the same; it is written under a temporary name and renamed when complete.

    Args:
        check_files: Sizes of a conversation's media; raises DataError for a bad file.
        measure: Tokens and trained tokens of a conversation with media of those sizes.
        skip_bad: Leave bad records out and list them, instead of raising the first.
        fingerprint: Whatever else the result depends on: tokenizer, limits, template.

    Raises:
        DataError: the first bad record, or else the first with a bad file; or no sample is left.
    """
    conversations, left_out = _parse(paths, image_folder, skip_bad)
    key = _key(paths, conversations, f"{fingerprint}|{skip_bad}|{image_folder}")
    folder = Path(HF_DATASETS_CACHE) / "vlmtune" / key
    if (folder / RECHECK).exists() and local_rank() == 0:
        shutil.rmtree(folder)
    if not folder.exists():
        rows, recheck = _measured(conversations, check_files, measure, skip_bad, left_out)
        if not rows:
            raise DataError(
                ", ".join(paths),
                f"no sample is left to learn from; {len(left_out)} were left out"
                + (f", the first because: {left_out[0]['what']}" if left_out else "."),
                "mend the data, or raise multimodal_max_length and text_max_length.",
            )
        _write(rows, left_out, folder, recheck)
    dataset = datasets.load_from_disk(str(folder))
    assert isinstance(dataset, datasets.Dataset)
    ledger = json.loads((folder / "left_out.json").read_text(encoding="utf-8"))
    return PreparedData(dataset, ledger)


def _parse(
    paths: Sequence[str], image_folder: str | None, skip_bad: bool
) -> tuple[list[Conversation], list[dict[str, Any]]]:
    conversations: list[Conversation] = []
    left_out: list[dict[str, Any]] = []
    for path in paths:
        for index, record in read_records(path):
            try:
                conversations.append(parse_conversation(record, path, index, image_folder))
            except DataError as error:
                if not skip_bad:
                    raise
                left_out.append(_entry(path, index, record_id(record, index), error))
    return conversations, left_out


def _measured(
    conversations: Sequence[Conversation],
    check_files: Callable[[Conversation], Any],
    measure: Callable[[Conversation, Any], tuple[int, int]],
    skip_bad: bool,
    left_out: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], bool]:
    rows, recheck = [], False
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        sizes = pool.map(_outcome(check_files), conversations)
        bar = tqdm(
            zip(conversations, sizes, strict=True),
            "Checking data",
            total=len(conversations),
            disable=rank() > 0,
        )
        for conversation, outcome in bar:
            try:
                if isinstance(outcome, DataError):
                    recheck = True
                    raise outcome
                length, trained = measure(conversation, outcome)
            except DataError as error:
                if not skip_bad:
                    pool.shutdown(cancel_futures=True)
                    raise
                left_out.append(_entry_of(conversation, error))
                continue
            if trained:
                rows.append({**conversation.to_row(), "length": length, "trained_tokens": trained})
            else:
                left_out.append(_entry_of(conversation, _nothing_to_learn(conversation, length)))
    return rows, recheck


def _outcome(call: Callable[[Conversation], T]) -> Callable[[Conversation], T | DataError]:
    def run(conversation: Conversation) -> T | DataError:
        try:
            return call(conversation)
        except DataError as error:
            return error

    return run


def _nothing_to_learn(conversation: Conversation, length: int) -> DataError:
    return DataError(
        conversation.where("conversations"),
        f"no token to learn from is left after the cut to {length} tokens.",
        "raise multimodal_max_length or text_max_length, or lower the pixel limits.",
    )


def _entry_of(conversation: Conversation, error: DataError) -> dict[str, Any]:
    return _entry(conversation.source, conversation.record, conversation.id, error)


def _entry(file: str, record: int, identity: Any, error: DataError) -> dict[str, Any]:
    reason = {"where": error.where, "what": error.what, "fix": error.fix}
    return {"file": file, "record": record, "id": identity, **reason}


def _key(paths: Sequence[str], conversations: Sequence[Conversation], rest: str) -> str:
    digest = hashlib.sha256(f"{__version__}|{rest}".encode())
    for path in paths:
        digest.update(str(path).encode() + Path(path).read_bytes())
    for file in sorted({f for c in conversations for f in c.media_files}):
        try:
            stat = os.stat(file)
            digest.update(f"{file}|{stat.st_size}|{stat.st_mtime_ns}".encode())
        except OSError:
            digest.update(f"{file}|missing".encode())
    return digest.hexdigest()[:32]


def _write(
    rows: list[dict[str, Any]], left_out: list[dict[str, Any]], folder: Path, recheck: bool
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(str(partial))
    if bars:
        datasets.enable_progress_bars()
    ledger = json.dumps(left_out, ensure_ascii=False)
    # A lone surrogate becomes the escape that JSON has for it.
    (partial / "left_out.json").write_text(ledger, "utf-8", errors="backslashreplace")
    if recheck:
        (partial / RECHECK).touch()
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
