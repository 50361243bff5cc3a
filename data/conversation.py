"""One checked form for every conversation record."""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DataError

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
TOOL_RESPONSE = re.compile(r"<tool_response>.*?</tool_response>", re.DOTALL)
ROLES = {"human": "user", "gpt": "assistant", "ignored_gpt": "assistant", "system": "system"}
MESSAGE_ROLES = ("user", "assistant", "system")
PLAIN = "plain"
"""Role of text outside the chat format: a caption and what stands before it."""


class ImageReference(str):
    """Where in a table an image is kept, instead of a path: `data.tables` writes and reads it."""


@dataclass(frozen=True)
class Turn:
    """One turn; `role` is `system`, `user`, `assistant` or `plain`.

    `trained` is true for answers the model learns: `gpt`, not `ignored_gpt`, and captions. The
    text holds one `<image>` or `<video>` where a file of the conversation stands.
    """

    role: str
    text: str
    trained: bool = False


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
    """A record as a `Conversation`.

    Args:
        record: A LLaVA record `{"id", "image": str | [str], "video", "video_frames",
            "conversations"}`, one with `messages` of role and content in place of
            `conversations`, a caption record `{"image", "caption", "caption_template"}`, or the
            error `read_records` found in its place. `images` is another name of `image`.
        source, index: Data file and 1-based position, for messages.
        image_folder: What relative media paths are relative to.
        data_format: `conversation`, or `caption` for caption records.

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
    if data_format == "caption":
        places, turns = _parse_caption(record, at)
    elif record.get("messages") is not None and record.get("conversations") is None:
        places, turns = _parse_messages(record["messages"], at)
    else:
        places, turns = _parse_turns(record.get("conversations"), at)
    image_key = "image" if record.get("images") is None else "images"
    if image_key == "images" and record.get("image") is not None:
        raise DataError(at, 'has both "image" and "images".', "keep one of them.")
    images = _paths(record, image_key, at, image_folder)
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
    marked = dict(zip(places, turns, strict=True))
    _check_marks(marked, IMAGE_MARK, len(images), image_key, at)
    field_name = "video_frames" if frames else "video"
    _check_marks(marked, VIDEO_MARK, 1 if video or frames else 0, field_name, at)
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


def _parse_turns(conversations: Any, at: str) -> tuple[list[str], list[Turn]]:
    """The turns, and where in the record the text of each stands."""
    at = f"{at}, conversations"
    _check_list(conversations, at, '{"from": ..., "value": ...}')
    synonyms = {"user": "human", "assistant": "gpt", "bot": "gpt", "model": "gpt"}
    turns = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(
                f"{at}[{i}]", 'is not an object with "from" and "value".', "write both keys."
            )
        speaker, text = turn["from"], turn["value"]
        _check_role(speaker, ROLES, synonyms, f"{at}[{i}].from")
        _check_text(text, f"{at}[{i}].value")
        if speaker == "gpt":
            _check_answer(text, f"{at}[{i}].value")
        turns.append(Turn(ROLES[speaker], text, trained=speaker == "gpt"))
    if not any(turn.trained for turn in turns):
        raise DataError(at, 'has no turn from "gpt".', "add an answer, or remove the record.")
    return [f"conversations[{i}].value" for i in range(len(turns))], turns


def _parse_messages(messages: Any, at: str) -> tuple[list[str], list[Turn]]:
    at = f"{at}, messages"
    _check_list(messages, at, '{"role": ..., "content": ...}')
    synonyms = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(
                f"{at}[{i}]", 'is not an object with "role" and "content".', "write both keys."
            )
        role = message["role"]
        _check_role(role, MESSAGE_ROLES, synonyms, f"{at}[{i}].role")
        text = _content_text(message["content"], f"{at}[{i}].content")
        if role == "assistant":
            _check_answer(text, f"{at}[{i}].content")
        turns.append(Turn(role, text, trained=role == "assistant"))
    if not any(turn.trained for turn in turns):
        fix = "add an answer, or remove the record."
        raise DataError(at, 'has no message of "assistant".', fix)
    return [f"messages[{i}].content" for i in range(len(turns))], turns


def _content_text(content: Any, at: str) -> str:
    """Content as text; the parts of a list stand on lines of their own, as in the chat template."""
    if not isinstance(content, list):
        _check_text(content, at)
        return content
    pieces = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            _check_text(part.get("text"), f"{at}[{i}].text")
            pieces.append(part["text"])
        elif kind in ("image", "video"):
            pieces.append(IMAGE_MARK if kind == "image" else VIDEO_MARK)
        else:
            raise DataError(
                f"{at}[{i}]",
                "is no part of a message.",
                'write {"type": "text", "text": ...}, {"type": "image"} or {"type": "video"}.',
            )
    return "\n".join(pieces)


def _parse_caption(record: dict, at: str) -> tuple[list[str], list[Turn]]:
    caption: Any = record.get("caption")
    template: Any = record.get("caption_template")
    template = IMAGE_MARK if template is None else template
    _check_text(caption, f"{at}, caption")
    _check_text(template, f"{at}, caption_template")
    if not caption.strip():
        raise DataError(f"{at}, caption", "is empty.", "write the caption, or remove the record.")
    if template.count(IMAGE_MARK) != 1:
        raise DataError(
            f"{at}, caption_template",
            f'{template.count(IMAGE_MARK)} "{IMAGE_MARK}" placeholders.',
            "write exactly one, where the image stands.",
        )
    return ["caption_template", "caption"], [Turn(PLAIN, template), Turn(PLAIN, caption, True)]


def _check_list(turns: Any, at: str, form: str) -> None:
    if not isinstance(turns, list) or not turns:
        what = "is empty." if turns == [] else f"is {_name_of(turns)}, not a list."
        raise DataError(at, what, f"write a list of {form}.")


def _check_role(role: Any, known: Collection[str], synonyms: dict[str, str], at: str) -> None:
    if isinstance(role, str) and role in known:
        return
    close = difflib.get_close_matches(str(role), known, n=1)
    nearest = synonyms.get(str(role)) or (close[0] if close else next(iter(known)))
    raise DataError(
        at, f'unknown role "{role}".', f'write "{nearest}"; known are {", ".join(known)}.'
    )


def _check_text(text: Any, at: str) -> None:
    if not isinstance(text, str):
        raise DataError(at, f"is {_name_of(text)}, not text.", "write a string.")
    if not _is_unicode(text):
        raise DataError(at, "holds half a surrogate pair.", "write the whole character.")


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


def _check_marks(turns: dict[str, Turn], mark: str, files: int, field_name: str, at: str) -> None:
    found = sum(turn.text.count(mark) for turn in turns.values())
    if found == files:
        return
    places = [place for place, turn in turns.items() if mark in turn.text]
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
    return [
        v if isinstance(v, ImageReference) else str(Path(folder or "") / Path(v).expanduser())
        for v in values
    ]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(value: Any) -> str:
    names = {type(None): "missing", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"{type(value).__name__} {value!r}")
