"""One checked form for every conversation record."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from .turns import (
    IMAGE_MARK,
    PLAIN,
    ROLES,
    TOOL_RESPONSE,
    VIDEO_MARK,
    Turn,
    is_unicode,
    name_of,
    read_caption,
    read_turns,
    shown,
    text_place,
)

__all__ = [
    "IMAGE_MARK",
    "PLAIN",
    "ROLES",
    "TOOL_RESPONSE",
    "VIDEO_MARK",
    "Conversation",
    "ImageReference",
    "Turn",
    "is_blank",
    "parse_conversation",
    "read_conversation",
    "record_id",
]


class ImageReference(str):
    """Where in a table an image is kept, instead of a path: `data.tables` writes and reads it."""


@dataclass(frozen=True)
class Conversation:
    """A record after its checks; media paths are resolved, files are not opened yet.

    Attributes:
        images: Image files, or references to images in a table (`data.tables`), in the order of
            their `<image>` marks.
        video: A video file, or None.
        frames: Image files that together are one video.
        source, record: Data file and 1-based position in it, for messages.
    """

    id: str
    turns: list[Turn]
    images: list[str] = field(default_factory=list)
    video: str | None = None
    frames: list[str] = field(default_factory=list)
    source: str = ""
    record: int = 0

    @property
    def media_files(self) -> list[str]:
        return [*self.images, *self.frames, *([self.video] if self.video else [])]

    def where(self, place: str) -> str:
        return f'{self.source}, record {self.record} (id "{self.id}"), {place}'

    def to_row(self) -> dict[str, Any]:
        """Its columns in a prepared dataset; the turns are there as ids."""
        return {
            "id": self.id,
            "source": self.source,
            "record": self.record,
            "image_files": self.images,
            "video_file": self.video,
            "frame_files": self.frames,
        }


def parse_conversation(
    record: Any,
    source: str,
    index: int,
    image_folder: str | None = None,
    data_format: str = "conversation",
) -> Conversation:
    """A record as a `Conversation`; arguments as of `read_conversation`.

    Raises:
        DataError: the first fault, with file, record, id and field, of what could not be trained
            on.
    """
    conversation, faults = read_conversation(record, source, index, image_folder, data_format)
    if conversation is None or faults:
        raise faults[0]
    return conversation


def read_conversation(
    record: Any,
    source: str,
    index: int,
    image_folder: str | None = None,
    data_format: str = "conversation",
) -> tuple[Conversation | None, list[DataError]]:
    """What could be read of a record, and all that keeps it from being trained on.

    Args:
        record: A LLaVA record `{"id", "image": str | [str], "video", "video_frames",
            "conversations"}`, one with `messages` of role and content in place of
            `conversations`, a caption record `{"image", "caption", "caption_template"}`, or the
            error `read_records` found in its place. `images` is another name of `image`.
        source, index: Data file and 1-based position, for messages.
        image_folder: What relative media paths are relative to.
        data_format: `conversation`, or `caption` for caption records.

    Returns:
        The conversation, None for what is no object, and its faults, each with a code. A turn of a
        faulty record stands at its place: without text where that could not be read, and with the
        role `""` where that is not known. What follows from a fault alone is not told of.
    """
    if isinstance(record, DataError):
        return None, [record]
    if not isinstance(record, dict):
        what = f"is {name_of(record)}, not an object."
        fix = 'write {"id": ..., "conversations": [...]}.'
        return None, [DataError(f"{source}, record {index}", what, fix, "not-object")]
    identity = record_id(record, index)
    at = f'{source}, record {index} (id "{identity}")'
    faults: list[DataError] = []
    read = read_caption if data_format == "caption" else read_turns
    turns, whole = read(record, at, faults)
    image_key = "image" if record.get("images") is None else "images"
    if image_key == "images" and record.get("image") is not None:
        what = 'has both "image" and "images".'
        faults.append(DataError(at, what, "keep one of them.", "media-twice"))
    images, image_files = _read_paths(record, image_key, at, image_folder, faults)
    video, video_files = _read_paths(record, "video", at, image_folder, faults)
    frames, frame_files = _read_paths(record, "video_frames", at, image_folder, faults)
    if video_files and video_files > 1:
        what, fix = f"lists {video_files} files.", "give one video per record."
        faults.append(DataError(f"{at}, video", what, fix, "video-several"))
    if sum(map(bool, (image_files, video_files, frame_files))) > 1:
        what = 'has more than one of "image", "video" and "video_frames".'
        fix = "keep one kind of media per record."
        faults.append(DataError(at, what, fix, "media-mixed"))
    if whole and image_files is not None:
        _check_marks(record, turns, IMAGE_MARK, image_files, image_key, at, faults)
    if whole and video_files in (0, 1) and frame_files is not None:
        key, files = ("video_frames", 1) if frame_files else ("video", video_files)
        _check_marks(record, turns, VIDEO_MARK, files, key, at, faults)
    conversation = Conversation(
        id=identity,
        turns=turns,
        images=images,
        video=video[0] if video else None,
        frames=frames,
        source=source,
        record=index,
    )
    return conversation, faults


def record_id(record: Any, index: int) -> str:
    """The record's id as text; its position where it has none."""
    identity = record.get("id") if isinstance(record, dict) else None
    if not isinstance(identity, str):
        identity = str(index) if identity is None else shown(identity)
    return identity.encode("utf-8", "replace").decode()


def is_blank(value: Any) -> bool:
    """Whether a value where a path belongs says that there is none."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "null", "nan")
    return value is None or value != value  # only NaN differs from itself


def _read_paths(
    record: dict[str, Any], key: str, at: str, folder: str | None, faults: list[DataError]
) -> tuple[list[str], int | None]:
    """The paths under a key, and how many files it lists: broken paths count, empty ones do not;
    None where that is not known."""
    value = record.get(key)
    if value is None:
        return [], 0
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        what = f"is {name_of(value)}."
        fix = "write a path, or a list of paths."
        faults.append(DataError(f"{at}, {key}", what, fix, "media-field"))
        return [], 0 if is_blank(value) else None
    paths, files = [], len(values)
    for v in values:
        if isinstance(v, ImageReference):
            paths.append(v)
        elif isinstance(v, str) and v and "\0" not in v and is_unicode(v):
            paths.append(str(Path(folder or "", os.path.expanduser(v))))
        else:
            what, fix = f"{shown(v)} is no path.", "write the path of a file, or remove the key."
            faults.append(DataError(f"{at}, {key}", what, fix, "media-field"))
            files -= is_blank(v)
    return paths, files


def _check_marks(
    record: dict[str, Any],
    turns: list[Turn],
    mark: str,
    files: int,
    key: str,
    at: str,
    faults: list[DataError],
) -> None:
    found = sum(turn.text.count(mark) for turn in turns)
    if found == files:
        return
    places = [text_place(record, turns, i) for i, turn in enumerate(turns) if mark in turn.text]
    code = "image-marks-few" if found < files else "image-marks-many"
    fix = f'list a file in "{key}" for each placeholder, or remove the surplus.'
    listed = f'"{key}" lists {files} file{"" if files == 1 else "s"}'
    if mark == VIDEO_MARK:
        code = "video-marks"
        listed = f'the record has {"a" if files else "no"} "{key}"'
        fix = 'write one "<video>" and give one video.'
    what = f'{found} "{mark}" placeholder{"" if found == 1 else "s"}, but {listed}.'
    faults.append(DataError(f"{at}, {', '.join(places) or key}", what, fix, code))
