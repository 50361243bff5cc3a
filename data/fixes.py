"""What has one sure fix in a record."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from .checks import check_text
from .conversation import Conversation, is_blank, read_conversation
from .findings import CODES
from .turns import IMAGE_MARK, PLAIN, VIDEO_MARK, Turn, form_of, text_place

Record = dict[str, Any]

_MEDIA = ("image", "images", "video", "video_frames")
_UNREAD = {"turns-missing", "turn-form", "role-unknown", "text-type", "content-part", "media-twice"}
# What other formats write where an image stands; HTML's <img> is taken for one.
_LIKE_A_MARK = re.compile(r"[<\[]\W{0,2}(?:image|img|video|vision|picture)", re.IGNORECASE)
# Right behind the text: behind a space, as in "It is </s>", it may be what the text is about.
_END_TOKENS = re.compile(
    r"(?<=\S)(?:(?:<\|(?:im_end|endoftext|eot_id)\|>|<end_of_turn>|<eos>|</s>)\s*+)++\Z"
)


def fix_record(record: Record, data_format: str = "conversation") -> tuple[Record, list[str]]:
    """A copy with everything mended that has one sure fix, and the codes that are gone; the record
    itself where there are none.

    A fix is taken if nothing of its code is left and nothing of any code is added; a code with one
    doubtful place therefore stays in all its places.
    """
    conversation, first = _look(record, data_format)
    codes = first
    while conversation:
        for code, mend in _FIXES.items():
            if code not in codes:
                continue
            mended = mend(record, conversation, codes)
            read, left = _look(mended, data_format)
            # Text with half a character is read as whole: writing that back would hide it.
            if code not in left and left < codes and left["surrogate"] == codes["surrogate"]:
                record, conversation, codes = mended, read, left
                break
        else:
            break
    return record, [code for code in CODES if code in first and code not in codes]


def _look(record: Record, data_format: str) -> tuple[Conversation | None, Counter[str]]:
    """The record's conversation, and how often each code is found in it."""
    conversation, found = read_conversation(record, "", 0, data_format=data_format)
    if conversation:
        found += check_text(record, conversation)
    return conversation, Counter(error.code for error in found)


def _in_own_form(record: Record, conversation: Conversation, codes: Counter[str]) -> Record:
    """The turns with the keys and roles of the record's form."""
    if codes.keys() & {"text-type", "content-part"}:
        return record
    form = form_of(record)

    def rewritten(written: Any, turn: Turn) -> Any:
        keys = form.keys_of(written)
        if keys is None or keys == (form.speaker, form.text):
            return written
        own = {keys[0]: form.speaker, keys[1]: form.text}
        new = {own.get(key, key): value for key, value in written.items()}
        new[form.speaker] = form.role_meant(new[form.speaker]) or new[form.speaker]
        if form.text == "value":  # parts become text
            new["value"] = turn.text
        return new

    turns = map(rewritten, record[form.key], conversation.turns)
    return {**record, form.key: list(turns)}


def _with_known_roles(record: Record, conversation: Conversation, codes: Counter[str]) -> Record:
    form = form_of(record)

    def known(written: Any) -> Any:
        meant = form.role_meant(written.get(form.speaker)) if isinstance(written, dict) else None
        return {**written, form.speaker: meant} if meant else written

    return {**record, form.key: [known(written) for written in record[form.key]]}


def _with_media_and_marks(
    record: Record, conversation: Conversation, codes: Counter[str]
) -> Record:
    """Of a text without marks: no keys that name no file, and the marks of the files of the one
    other key before the first question."""
    if codes.keys() & _UNREAD or any(_LIKE_A_MARK.search(t.text) for t in conversation.turns):
        return record
    named = {key: _listed(record[key]) for key in _MEDIA if record.get(key) is not None}
    empty = {key for key, values in named.items() if all(map(is_blank, values))}
    record = {key: value for key, value in record.items() if key not in empty}
    asked = [i for i, turn in enumerate(conversation.turns) if turn.role == "user"]
    match [key for key in named if key not in empty]:
        case [key] if asked and not any(map(is_blank, named[key])):
            image = key in ("image", "images")
            return _with_marks(record, asked[0], image, len(named[key]) if image else 1)
    return record


def _with_marks(record: Record, question: int, image: bool, count: int) -> Record:
    form = form_of(record)
    turns = list(record[form.key])
    text = turns[question][form.text]
    if isinstance(text, list):
        text = [{"type": "image" if image else "video"}] * count + text
    else:
        text = f"{IMAGE_MARK if image else VIDEO_MARK}\n" * count + text
    turns[question] = {**turns[question], form.text: text}
    return {**record, form.key: turns}


def _with_opened_thoughts(
    record: Record, conversation: Conversation, codes: Counter[str]
) -> Record:
    def opened(turn: Turn) -> str:
        thought, closing, _ = turn.text.partition("</think>")
        if not (turn.trained and closing and thought.strip()) or "<think>" in thought:
            return turn.text
        return f"<think>{turn.text}" if thought[0] == "\n" else f"<think>\n{turn.text}"

    return _with_texts(record, conversation, opened)


def _without_end_tokens(record: Record, conversation: Conversation, codes: Counter[str]) -> Record:
    return _with_texts(record, conversation, lambda turn: _END_TOKENS.sub("", turn.text))


def _without_last_questions(
    record: Record, conversation: Conversation, codes: Counter[str]
) -> Record:
    if codes.keys() & _UNREAD:
        return record
    stop = len(conversation.turns)
    while (turn := conversation.turns[stop - 1]).role == "user" and not (
        IMAGE_MARK in turn.text or VIDEO_MARK in turn.text
    ):
        stop -= 1
    key = form_of(record).key
    return {**record, key: record[key][:stop]}


def _with_texts(
    record: Record, conversation: Conversation, change: Callable[[Turn], str]
) -> Record:
    """The record with other texts, where a text is a string or a list of one text part."""
    form = form_of(record)
    for i, turn in enumerate(conversation.turns):
        text = change(turn)
        if text == turn.text:
            continue
        if turn.role == PLAIN:
            record = {**record, text_place(record, conversation.turns, i): text}
            continue
        turns = list(record[form.key])
        match turns[i]:
            case {form.text: str()}:
                turns[i] = {**turns[i], form.text: text}
            case {form.text: [{"type": "text"} as part]}:
                turns[i] = {**turns[i], form.text: [{**part, "text": text}]}
        record = {**record, form.key: turns}
    return record


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_FIXES: dict[str, Callable[[Record, Conversation, Counter[str]], Record]] = {
    "turn-form": _in_own_form,
    "role-unknown": _with_known_roles,
    "media-field": _with_media_and_marks,
    "image-marks-few": _with_media_and_marks,
    "video-marks": _with_media_and_marks,
    "think-unopened": _with_opened_thoughts,
    "special-token": _without_end_tokens,
    "question-last": _without_last_questions,
}
