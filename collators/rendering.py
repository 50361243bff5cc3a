"""The one place where a conversation becomes segments, and segments become ids and labels.

Rules of Ovis2.5: the answer and its `<|im_end|>` are trained, a real think block with its tags
too; role headers, the empty think block put before an answer without thoughts, media, tool
responses and the newline between turns are not. The untrained prefix of an answer is, token by
token, the prompt `render_prompt` makes for it. Plain turns, of which captions are made, have no
header, no think block and no newline; a trained one ends in `<|im_end|>` too.

Source: AIDC-AI/Ovis 2.5.0, `Qwen3ConversationFormatter`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ..core.errors import DataError
from ..data.conversation import IMAGE_MARK, PLAIN, TOOL_RESPONSE, VIDEO_MARK, Turn
from ..models import Ovis2_5Processor

IGNORE_INDEX = -100
Thinking = Literal["every_turn", "last_turn", "as_is"]

_MARK = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered conversation.

    `kind` is `text` (the user's words, never read as control tokens), `control` (one control token
    of the tokenizer), `image` or `video` (a place for visual tokens).
    """

    text: str
    trained: bool = False
    kind: Literal["text", "control", "image", "video"] = "text"


@dataclass(frozen=True)
class Encoded:
    """Token ids `[T]`, unshifted labels `[T]`, and the bounds `[start, stop)` of each medium, its
    indicators included."""

    ids: list[int]
    labels: list[int]
    media: list[tuple[int, int]]

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


def render(
    turns: Sequence[Turn], processor: Ovis2_5Processor, thinking: Thinking = "every_turn"
) -> list[Segment]:
    """Segments of a training sample.

    Args:
        thinking: What happens to answers without a think block, and to history.
            `every_turn`: the untrained empty block stands before each of them, as the reference
            trains. `last_turn`: only the last answer is trained, and earlier ones are written as
            the published chat template writes history, without thoughts and blocks.
            `as_is`: nothing is added or removed.
    """
    if thinking == "last_turn":
        last = max((i for i, turn in enumerate(turns) if turn.trained), default=0)
        turns = [_as_history(turn) if i < last else turn for i, turn in enumerate(turns)]
    segments = list(_turns(turns, processor, thinking))
    # The reference drops the newline after an answer that ends the sample.
    return segments[:-1] if turns[-1].trained and turns[-1].role != PLAIN else segments


def render_prompt(
    history: Sequence[Turn],
    processor: Ovis2_5Processor,
    thinking: Thinking = "every_turn",
    enable_thinking: bool = False,
    begun: str = "",
) -> list[Segment]:
    """Segments of the prompt for the next answer: the training prefix of that answer.

    Args:
        history: All turns before the answer, its own question last.
        thinking: As the model was trained.
        enable_thinking: Whether the model is to write a think block itself.
        begun: What is there of the answer already. Where it ends in a tool's response, the prompt
            is the training sample up to there.
    """
    if thinking == "last_turn":
        history = [_as_history(turn) for turn in history]
    if history and history[-1].role == PLAIN:
        return [*_turns(history, processor, thinking), *_body(Turn(PLAIN, begun, True))]
    return [
        *_turns(history, processor, thinking),
        *_header("assistant", processor),
        *([Segment(processor.empty_think)] if not enable_thinking and thinking != "as_is" else []),
        *_body(Turn("assistant", begun, True)),
    ]


def encode(
    segments: Sequence[Segment], processor: Ovis2_5Processor, visual_tokens: Sequence[int] = ()
) -> Encoded:
    """Ids and labels; the n-th image or video segment takes `visual_tokens[n]` visual tokens.

    Neighbouring text of one kind is tokenized together, as the reference does, but never across
    the border of what is trained, so that the prefix stays the prompt.
    """
    ids: list[int] = []
    labels: list[int] = []
    media: list[tuple[int, int]] = []
    counts = iter(visual_tokens)
    for (kind, trained), run in groupby(segments, key=lambda s: (s.kind, s.trained)):
        if kind == "text":
            pieces = [processor.text_ids("".join(s.text for s in run))]
        elif kind == "control":
            pieces = [[processor.control_id(s.text)] for s in run]
        else:
            pieces = [processor.visual_ids(next(counts), video=kind == "video") for _ in run]
        for piece in pieces:
            if kind in ("image", "video"):
                media.append((len(ids), len(ids) + len(piece)))
            ids += piece
            labels += piece if trained else [IGNORE_INDEX] * len(piece)
    return Encoded(ids, labels, media)


def truncate(sample: Encoded, max_length: int) -> Encoded:
    """The longest prefix of at most `max_length` tokens that cuts no image or video.

    Unlike the reference, images that are complete stay even if the cut falls into their neighbour.
    """
    stop = min(len(sample.ids), max_length)
    for begin, end in sample.media:
        if begin < stop < end:
            stop = begin
    return Encoded(
        sample.ids[:stop], sample.labels[:stop], [(b, e) for b, e in sample.media if e <= stop]
    )


def _turns(
    turns: Sequence[Turn], processor: Ovis2_5Processor, thinking: Thinking
) -> Iterator[Segment]:
    for turn in turns:
        if turn.role == PLAIN:
            yield from _body(turn)
            if turn.trained:
                yield Segment(processor.turn_end, True, "control")
            continue
        yield from _header(turn.role, processor)
        if turn.trained and thinking != "as_is" and not _has_think_pair(turn.text):
            yield Segment(processor.empty_think)
        yield from _body(turn)
        yield Segment(processor.turn_end, turn.trained, "control")
        yield Segment("\n")


def _header(role: str, processor: Ovis2_5Processor) -> Iterator[Segment]:
    yield Segment(processor.turn_start, kind="control")
    yield Segment(f"{role}\n")


def _body(turn: Turn) -> Iterator[Segment]:
    """The turn's text; what an answer was given and did not write is untrained."""
    start = 0
    for given in TOOL_RESPONSE.finditer(turn.text) if turn.role == "assistant" else ():
        yield from _text_and_media(turn.text[start : given.start()], turn.trained)
        yield from _text_and_media(given.group(), False)
        start = given.end()
    yield from _text_and_media(turn.text[start:], turn.trained)


def _text_and_media(text: str, trained: bool) -> Iterator[Segment]:
    for piece in _MARK.split(text):
        if piece == IMAGE_MARK:
            yield Segment(piece, kind="image")
        elif piece == VIDEO_MARK:
            yield Segment(piece, kind="video")
        elif piece:
            yield Segment(piece, trained)


def _as_history(turn: Turn) -> Turn:
    if turn.role != "assistant":
        return turn
    thoughts, closing, answer = turn.text.rpartition("</think>")
    if not closing:
        return Turn(turn.role, turn.text)
    if _MARK.search(thoughts):
        raise DataError(
            "thinking: last_turn",
            "would drop an earlier thought that holds an image.",
            'use "thinking": "every_turn" for this data.',
        )
    return Turn(turn.role, answer.lstrip("\n"))


def _has_think_pair(text: str) -> bool:
    return "<think>" in text and "</think>" in text
