"""What is looked at in a record, in whatever process."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError
from .boxes import check_boxes
from .checks import check_text
from .conversation import Conversation, read_conversation, record_id
from .duplicates import sample_key
from .findings import CODES, Finding
from .fixes import fix_record
from .sources import Source

Size = tuple[int, int, int]
"""Frames, height and width of a media file."""

CheckSample = Callable[[Conversation, Sequence[Size]], list[DataError]]

Chunk = tuple[int, list[tuple[int | None, Any]]]
"""Number of a source, and some of its records with their positions; a DataError without a position
is the fault that ends the file."""


@dataclass(frozen=True)
class Looked:
    """What one process found of a record.

    Attributes:
        position: None for a fault of the file.
        key: What two equal samples share; None for a record that cannot be read as a whole.
        mended: Codes that a copy would not have any more.
        text: The record, mended where that was asked for, as JSON; None where it is broken.
        aside: Whether `text` belongs to the quarantine.
    """

    position: int | None
    identity: str
    has_id: bool
    findings: list[Finding]
    key: bytes | None = None
    mended: Sequence[str] = ()
    text: str | None = None
    aside: bool = False
    has_video: bool = False


@dataclass(frozen=True)
class Inspection:
    """What is done with a chunk, in whatever process."""

    sources: Sequence[Source]
    decode: bool
    check_sample: CheckSample | None
    fix: bool
    quarantine: bool

    def look(self, chunk: Chunk) -> tuple[int, list[Looked]]:
        number, records = chunk
        source, found = self.sources[number], []
        for position, record in records:
            if position is None:
                fault = Finding.of(record, source.path, None, "")
                found.append(Looked(None, "", False, [fault]))
                continue
            try:
                found.append(self._look(source, position, record))
            except RecursionError:
                where = f"{source.path}, record {position}"
                what, fix = "is nested too deeply.", "write a record of a few levels."
                error = DataError(where, what, fix, "json-value")
                found.append(Looked(position, "", False, [_finding(error, source, position, "")]))
        return number, found

    def _look(self, source: Source, position: int, record: Any) -> Looked:
        identity = record_id(record, position)
        conversation, errors = self._errors(source, position, record)
        findings = [_finding(error, source, position, identity) for error in errors]
        fixed, mended = record, []
        if any(CODES[finding.code].fixable for finding in findings):
            fixed, mended = fix_record(record, source.data_format)
        bad = any(finding.severity == "error" for finding in findings)
        key = sample_key(conversation) if conversation else None
        text, aside = None, False
        if (self.fix or self.quarantine) and not isinstance(record, DataError):
            aside = bad and self.quarantine
            if aside and self.fix and mended:
                aside = any(map(_is_error, self._errors(source, position, fixed)[1]))
            kept = fixed if self.fix and not aside else record
            text = json.dumps(kept, ensure_ascii=False)
        has_id = isinstance(record, dict) and record.get("id") is not None
        has_video = bool(conversation and conversation.video)
        return Looked(position, identity, has_id, findings, key, mended, text, aside, has_video)

    def _errors(
        self, source: Source, position: int, record: Any
    ) -> tuple[Conversation | None, list[DataError]]:
        """The conversation, where all of it could be read, and what is wrong with it."""
        conversation, faults = read_conversation(
            record, source.path, position, source.folder, source.data_format
        )
        if conversation is None:
            return None, faults
        found = [*faults, *check_text(record, conversation)]
        sizes: list[Size] | None = []
        if conversation.media_files:
            # Imported here: Pillow, which text does not need.
            from .image_checks import inspect_media

            sizes, media = inspect_media(conversation, self.decode)
            found += media
        if sizes is not None:
            found += check_boxes(record, conversation, sizes)
            if self.check_sample and not any(map(_is_error, found)):
                found += self.check_sample(conversation, sizes)
        return None if faults else conversation, found


def _finding(error: DataError, source: Source, position: int, identity: str) -> Finding:
    return Finding.of(error, source.path, position, identity)


def _is_error(error: DataError) -> bool:
    return CODES[error.code].severity == "error"
