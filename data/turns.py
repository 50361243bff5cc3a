"""The turns of a record: how they may be written, and what is wrong with them."""

import difflib
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
TOOL_RESPONSE = re.compile(r"<tool_response>.*?</tool_response>", re.DOTALL)
PLAIN = "plain"
"""Role of text outside the chat format: a caption and what stands before it."""

_SHORT = reprlib.Repr()  # a value may be as long and as deeply nested as JSON can be
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


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
class TurnForm:
    """How a record writes its turns.

    Attributes:
        key: Of the list of turns.
        speaker, text: Keys of a turn.
        roles: What may stand under `speaker`, and the role of the `Turn` it makes.
        synonyms: Other words for `roles`, in lower case.
        answer: The one of `roles` that is trained, and what its turns are called.
    """

    key: str
    speaker: str
    text: str
    roles: dict[str, str]
    synonyms: dict[str, str]
    answer: tuple[str, str]

    def keys_of(self, turn: Any) -> tuple[str, str] | None:
        """Where the speaker and the text of a turn stand, if need be under the keys of the other
        form; None where that is not sure."""
        if not isinstance(turn, dict):
            return None
        if self.speaker in turn and self.text in turn:
            return self.speaker, self.text
        speakers = [key for key in ("from", "role") if key in turn]
        texts = [key for key in ("value", "content") if key in turn]
        return (speakers[0], texts[0]) if len(speakers) == len(texts) == 1 else None

    def role_meant(self, speaker: Any) -> str | None:
        """The one of `roles` that a word surely means."""
        if not isinstance(speaker, str):
            return None
        word = speaker.strip().lower()
        return word if word in self.roles else self.synonyms.get(word)


ROLES = {"human": "user", "gpt": "assistant", "ignored_gpt": "assistant", "system": "system"}
CONVERSATIONS = TurnForm(
    key="conversations",
    speaker="from",
    text="value",
    roles=ROLES,
    synonyms={"user": "human"} | dict.fromkeys(("assistant", "bot", "model", "chatgpt"), "gpt"),
    answer=("gpt", "turn from"),
)
MESSAGES = TurnForm(
    key="messages",
    speaker="role",
    text="content",
    roles={role: role for role in ("user", "assistant", "system")},
    synonyms={"human": "user"} | dict.fromkeys(("gpt", "bot", "model", "chatgpt"), "assistant"),
    answer=("assistant", "message of"),
)


def form_of(record: dict[str, Any]) -> TurnForm:
    messages = record.get("messages") is not None and record.get("conversations") is None
    return MESSAGES if messages else CONVERSATIONS


def text_place(record: dict[str, Any], turns: Sequence[Turn], i: int) -> str:
    """Where in the record the text of a turn stands."""
    if turns[i].role == PLAIN:
        return ("caption_template", "caption")[i]
    form = form_of(record)
    keys = form.keys_of(record[form.key][i])
    return f"{form.key}[{i}]" + (f".{keys[1]}" if keys else "")


def read_turns(record: dict[str, Any], at: str, faults: list[DataError]) -> tuple[list[Turn], bool]:
    """The turns of a record of either form, and whether all their texts could be read; what is
    wrong with them is added to `faults`."""
    form = form_of(record)
    written, at = record.get(form.key), f"{at}, {form.key}"
    if not isinstance(written, list) or not written:
        what = "is empty." if written == [] else f"is {name_of(written)}, not a list."
        fix = f'write a list of {{"{form.speaker}": ..., "{form.text}": ...}}.'
        faults.append(DataError(at, what, fix, "turns-missing"))
        return [], False
    turns, whole = [], True
    for i, turn in enumerate(written):
        keys = form.keys_of(turn)
        if keys != (form.speaker, form.text):
            what = f'is not an object with "{form.speaker}" and "{form.text}".'
            faults.append(DataError(f"{at}[{i}]", what, "write both keys.", "turn-form"))
        if keys is None:
            turns.append(Turn("", ""))
            whole = False
            continue
        speaker, text = turn[keys[0]], turn[keys[1]]
        word = speaker if isinstance(speaker, str) and speaker in form.roles else None
        if word is None:
            word = form.role_meant(speaker)
            if word is None or keys[0] == form.speaker:  # else "turn-form" tells of it
                faults.append(_unknown_role(speaker, word, form, f"{at}[{i}].{keys[0]}"))
        readable, answer = True, word == form.answer[0]
        if not isinstance(text, str) or not text.isascii():
            parts = "content" in (keys[1], form.text) and isinstance(text, list)
            read: Any = _read_parts if parts else read_text
            text, readable = read(text, f"{at}[{i}].{keys[1]}", faults)
            whole = whole and readable
        if answer and readable and (not text.strip() or "tool_response>" in text):
            _check_answer(text, f"{at}[{i}].{keys[1]}", faults)
        turns.append(Turn(form.roles[word] if word else "", text, answer))
    if not any(turn.trained for turn in turns) and all(turn.role for turn in turns):
        what = f'has no {form.answer[1]} "{form.answer[0]}".'
        fix = "add an answer, or remove the record."
        faults.append(DataError(at, what, fix, "answer-none"))
    return turns, whole


def read_caption(
    record: dict[str, Any], at: str, faults: list[DataError]
) -> tuple[list[Turn], bool]:
    """A caption record's template and caption, as `read_turns`."""
    template = record.get("caption_template")
    caption, caption_read = read_text(record.get("caption"), f"{at}, caption", faults)
    template, template_read = read_text(
        IMAGE_MARK if template is None else template, f"{at}, caption_template", faults
    )
    if caption_read and not caption.strip():
        fix = "write the caption, or remove the record."
        faults.append(DataError(f"{at}, caption", "is empty.", fix, "caption-empty"))
    one_mark = template.count(IMAGE_MARK) == 1
    if template_read and not one_mark:
        what = f'{template.count(IMAGE_MARK)} "{IMAGE_MARK}" placeholders.'
        fix = "write exactly one, where the image stands."
        faults.append(DataError(f"{at}, caption_template", what, fix, "caption-template"))
    turns = [Turn(PLAIN, template), Turn(PLAIN, caption, True)]
    return turns, caption_read and one_mark


def read_text(text: Any, at: str, faults: list[DataError]) -> tuple[str, bool]:
    """The text, with "?" for half a surrogate pair, and whether there was any."""
    if not isinstance(text, str):
        what = f"is {name_of(text)}, not text."
        faults.append(DataError(at, what, "write a string.", "text-type"))
        return "", False
    if is_unicode(text):
        return text, True
    what, fix = "holds half a surrogate pair.", "write the whole character."
    faults.append(DataError(at, what, fix, "surrogate"))
    return text.encode("utf-8", "replace").decode(), True


def _read_parts(parts: list[Any], at: str, faults: list[DataError]) -> tuple[str, bool]:
    """Parts of a message as text, on lines of their own as in the chat template; whether all of
    them could be read."""
    pieces, whole = [], True
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            piece, read = read_text(part.get("text"), f"{at}[{i}].text", faults)
            whole = whole and read
            pieces.append(piece)
        elif kind in ("image", "video"):
            pieces.append(IMAGE_MARK if kind == "image" else VIDEO_MARK)
        else:
            what = "is no part of a message."
            fix = 'write {"type": "text", "text": ...}, {"type": "image"} or {"type": "video"}.'
            faults.append(DataError(f"{at}[{i}]", what, fix, "content-part"))
            whole = False
    return "\n".join(pieces), whole


def _unknown_role(speaker: Any, meant: str | None, form: TurnForm, at: str) -> DataError:
    written = (speaker if isinstance(speaker, str) else shown(speaker))[:100]
    close = difflib.get_close_matches(written, form.roles, n=1)
    nearest = meant or (close[0] if close else next(iter(form.roles)))
    what = f'unknown role "{written}".'
    return DataError(
        at, what, f'write "{nearest}"; known are {", ".join(form.roles)}.', "role-unknown"
    )


def _check_answer(text: str, at: str, faults: list[DataError]) -> None:
    if not text.strip():
        fix = "write the answer, or remove the turn."
        faults.append(DataError(at, "answer without text.", fix, "answer-empty"))
    rest = TOOL_RESPONSE.sub("", text)
    if "<tool_response>" in rest or "</tool_response>" in rest:
        what = "<tool_response> and </tool_response> do not pair up."
        fix = "close each <tool_response> in the same answer."
        faults.append(DataError(at, what, fix, "tool-response"))


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_of(value: Any) -> str:
    names = {type(None): "missing", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"{type(value).__name__} {shown(value)}")


def shown(value: Any) -> str:
    """The value as Python writes it, shortened where it is long or deep."""
    return _SHORT.repr(value)
