"""One checked form for every conversation record."""

import difflib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DataError

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
TOOL_RESPONSE = re.compile(r"<tool_response>.*?</tool_response>", re.DOTALL)
ROLES = {"human": "user", "gpt": "assistant", "ignored_gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One turn; `role` is `system`, `user` or `assistant`.

    `trained` is true for answers the model learns: `gpt`, not `ignored_gpt`. The text holds one
    `<image>` or `<video>` where a file of the conversation stands.
    """

    role: str
    text: str
    trained: bool = False


@dataclass(frozen=True)
class Conversation:
    """A record after its checks; media paths are resolved, files are not opened yet.

    Attributes:
        images: Image files in the order of their `<image>` marks.
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
        """Columns for Arrow. None is called `image` or `images`: TRL takes such a dataset over."""
        row = asdict(self)
        row["image_files"], row["frame_files"] = row.pop("images"), row.pop("frames")
        row["video_file"] = row.pop("video")
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Conversation":
        return cls(
            id=row["id"],
            turns=[Turn(**turn) for turn in row["turns"]],
            images=row["image_files"],
            video=row["video_file"],
            frames=row["frame_files"],
            source=row["source"],
            record=row["record"],
        )


def parse_conversation(
    record: Any, source: str, index: int, image_folder: str | None = None
) -> Conversation:
    """A LLaVA record as a `Conversation`.

    Args:
        record: `{"id", "image": str | [str], "video", "video_frames", "conversations"}`, or the
            error `read_records` found in its place.
        source, index: Data file and 1-based position, for messages.
        image_folder: What relative media paths are relative to.

    Raises:
        DataError: with file, record, id and field, for anything that could not be trained on.
    """
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(
            f"{source}, record {index}",
            f"is {_name_of(record)}, not an object.",
            'write {"id": ..., "conversations": [...]}.',
        )
    identity = record_id(record, index)
    at = f'{source}, record {index} (id "{identity}")'
    turns = _parse_turns(record.get("conversations"), at)
    images = _paths(record, "image", at, image_folder)
    video = _paths(record, "video", at, image_folder)
    frames = _paths(record, "video_frames", at, image_folder)
    if len(video) > 1:
        raise DataError(f"{at}, video", f"lists {len(video)} files.", "give one video per record.")
    if sum(map(bool, (images, video, frames))) > 1:
        raise DataError(
            at,
            'has more than one of "image", "video" and "video_frames".',
            "keep one kind of media per record.",
        )
    _check_marks(turns, IMAGE_MARK, len(images), "image", at)
    field_name = "video_frames" if frames else "video"
    _check_marks(turns, VIDEO_MARK, 1 if video or frames else 0, field_name, at)
    return Conversation(
        id=identity,
        turns=turns,
        images=images,
        video=video[0] if video else None,
        frames=frames,
        source=source,
        record=index,
    )


def record_id(record: Any, index: int) -> str:
    """The record's id as text; its position where it has none."""
    identity = record.get("id") if isinstance(record, dict) else None
    return str(index if identity is None else identity).encode("utf-8", "replace").decode()


def _parse_turns(conversations: Any, at: str) -> list[Turn]:
    at = f"{at}, conversations"
    if not isinstance(conversations, list) or not conversations:
        what = "is empty." if conversations == [] else f"is {_name_of(conversations)}, not a list."
        raise DataError(at, what, 'write a list of {"from": ..., "value": ...}.')
    turns = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(
                f"{at}[{i}]", 'is not an object with "from" and "value".', "write both keys."
            )
        speaker, text = turn["from"], turn["value"]
        if not isinstance(speaker, str) or speaker not in ROLES:
            synonyms = {"user": "human", "assistant": "gpt", "bot": "gpt", "model": "gpt"}
            close = difflib.get_close_matches(str(speaker), ROLES, n=1)
            nearest = synonyms.get(str(speaker)) or (close[0] if close else "human")
            raise DataError(
                f"{at}[{i}].from",
                f'unknown role "{speaker}".',
                f'write "{nearest}"; known are {", ".join(ROLES)}.',
            )
        if not isinstance(text, str):
            raise DataError(
                f"{at}[{i}].value", f"is {_name_of(text)}, not text.", "write a string."
            )
        if not _is_unicode(text):
            raise DataError(
                f"{at}[{i}].value", "holds half a surrogate pair.", "write the whole character."
            )
        if speaker == "gpt":
            _check_answer(text, f"{at}[{i}].value")
        turns.append(Turn(ROLES[speaker], text, trained=speaker == "gpt"))
    if not any(turn.trained for turn in turns):
        raise DataError(at, 'has no turn from "gpt".', "add an answer, or remove the record.")
    return turns


def _check_answer(text: str, at: str) -> None:
    if not text.strip():
        raise DataError(at, "answer without text.", "write the answer, or remove the turn.")
    rest = TOOL_RESPONSE.sub("", text)
    if "<tool_response>" in rest or "</tool_response>" in rest:
        raise DataError(
            at,
            "<tool_response> and </tool_response> do not pair up.",
            "close each <tool_response> in the same answer.",
        )


def _check_marks(turns: list[Turn], mark: str, files: int, field_name: str, at: str) -> None:
    found = sum(turn.text.count(mark) for turn in turns)
    if found == files:
        return
    places = [f"conversations[{i}].value" for i, turn in enumerate(turns) if mark in turn.text]
    where = f"{at}, {', '.join(places) or field_name}"
    fix = f'list a file in "{field_name}" for each placeholder, or remove the surplus.'
    listed = f'"{field_name}" lists {files} file{"" if files == 1 else "s"}'
    if mark == VIDEO_MARK:
        listed = f'the record has {"a" if files else "no"} "{field_name}"'
        fix = 'write one "<video>" and give one video.'
    raise DataError(
        where,
        f'{found} "{mark}" placeholder{"" if found == 1 else "s"}, but {listed}.',
        fix,
    )


def _paths(record: dict, key: str, at: str, folder: str | None) -> list[str]:
    value = record.get(key)
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise DataError(
            f"{at}, {key}", f"is {_name_of(value)}.", "write a path, or a list of paths."
        )
    for v in values:
        if not isinstance(v, str) or not v or "\0" in v or not _is_unicode(v):
            fix = "write the path of a file, or remove the key."
            raise DataError(f"{at}, {key}", f"{v!r} is no path.", fix)
    return [str(Path(folder or "") / Path(v).expanduser()) for v in values]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(value: Any) -> str:
    names = {type(None): "missing", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"{type(value).__name__} {value!r}")
