"""What training accepts of a record's text and is still broken or suspicious."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..core.errors import DataError
from .conversation import Conversation
from .turns import IMAGE_MARK, PLAIN, TOOL_RESPONSE, VIDEO_MARK, Turn, form_of, name_of, text_place

CONTROL_TOKEN = re.compile(
    r"<(?:\|[^\s|<>]{1,40}\||\uff5c[^\uff5c<>]{1,40}\uff5c"  # Qwen, Llama, Phi, GLM; DeepSeek
    r"|/?s|bos|eos|pad|unk|(?:image|video)_pad|(?:start|end)_of_(?:turn|image)"
    r"|image_soft_token|IMG_CONTEXT|<SYS>|</SYS>)>"
    r"|\[(?:/?INST|IMG|IMG_BREAK|IMG_END)\]"
)
"""Strings that are one control token to some model, and plain text to ours."""

THINK_TAG = re.compile(r"<(/?)think>")
_EMPTY_THINK = re.compile(r"<think>\s*</think>")
_MARK = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")


def check_text(record: dict[str, Any], conversation: Conversation) -> list[DataError]:
    """Findings of a record's id, the order of its turns and their text, of each code at most one
    in a turn.

    Args:
        conversation: What `read_conversation` read of the record.
    """
    turns, where = conversation.turns, conversation.where
    found = []
    identity = record.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        what = f"is {name_of(identity)}, neither text nor a whole number."
        found.append(DataError(where("id"), what, "write a string.", "id-type"))
    if turns and turns[0].role != PLAIN:
        key = form_of(record).key
        found += [
            DataError(where(f"{key}[{i}]"), what, fix, code) for i, code, what, fix in _order(turns)
        ]
    for i, turn in enumerate(turns):
        text = turn.text
        if "<" not in text and "[" not in text and (turn.role != "user" or text.strip()):
            continue
        found += [
            DataError(where(text_place(record, turns, i)), what, fix, code)
            for code, what, fix in _text(turn)
        ]
    return found


def _order(turns: Sequence[Turn]) -> Iterator[tuple[int, str, str, str]]:
    """Number of a turn, and the code, what and fix of its place among the others."""
    roles = [turn.role for turn in turns]
    if "" in roles:  # an unknown one may be anything
        return
    before = ""
    for i, role in enumerate(roles):
        if role == "system" and i:
            what = "a system turn that is not the first."
            yield i, "system-order", what, "make it the first turn, or join it to a question."
        elif role == before:
            what = f"the role is that of the turn before, {role}."
            yield i, "role-order", what, "join the two turns, or add the one between them."
        elif role == "assistant" and "user" not in roles[:i]:
            what = "an answer before any question."
            yield i, "answer-first", what, "add its question."
        before = role
    if before == "user" and any(turn.trained for turn in turns):
        what = "a last question without an answer: nothing is learned from it."
        yield len(turns) - 1, "question-last", what, "add its answer, or remove the turn."


def _text(turn: Turn) -> Iterator[tuple[str, str, str]]:
    """Code, what and fix of a turn's text."""
    text = turn.text
    if turn.role == "user" and not text.strip():
        fix = "write the question, or remove the turn."
        yield "question-empty", "question without text.", fix
    own = TOOL_RESPONSE.sub("", text) if turn.role == "assistant" else text
    if "think>" in text and (tag := THINK_TAG.search(text)):
        if turn.trained:
            yield from _thoughts(own)
        elif turn.role in ("user", "system"):
            what = f"{tag[0]} outside an answer, where no thought begins or ends."
            fix = "move a thought into its answer; leave what only speaks of the tag."
            yield "think-in-question", what, fix
    if turn.role == "assistant" and (mark := _MARK.search(own)):
        what = f"{mark[0]} in an answer: the model is shown the file, and does not learn to write."
        yield "mark-in-answer", what, "move it to the question before."
    if token := CONTROL_TOKEN.search(text):
        what = f'"{token[0]}" stands in the text: it is read as letters, never as a control token.'
        yield "special-token", what, "remove it; the chat format adds the control tokens itself."


def _thoughts(text: str) -> Iterator[tuple[str, str, str]]:
    """Code, what and fix of the think blocks of an answer, its tool responses taken out."""
    broken, inside = {}, False
    for tag in THINK_TAG.finditer(text):
        closing = bool(tag[1])
        if closing and not inside:
            what = "</think> closes no <think>."
            broken["think-unopened"] = what, "write <think> where the thought begins."
        elif inside and not closing:
            what = "<think> inside a think block."
            broken["think-nested"] = what, "close the first block, or remove the second <think>."
        inside = not closing
    if inside:
        what = "<think> is not closed: the whole rest is learned as a thought."
        broken["think-unclosed"] = what, "write </think> where the thought ends."
    yield from ((code, *said) for code, said in broken.items())
    if _EMPTY_THINK.search(text):
        what = "an empty think block in an answer: the model learns to write it."
        yield "think-empty", what, 'remove it; the key "thinking" adds an untrained one.'
    _, closing, answer = text.rpartition("</think>")
    if closing and not answer.strip():
        yield "thought-only", "nothing follows the thought.", "write the answer after </think>."
