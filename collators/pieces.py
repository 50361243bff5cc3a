"""Ids and labels of a sample to pieces that a reader can name."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from ..models import Ovis2_5Processor
from ..models.ovis2_5.configuration_ovis2_5 import IMAGE_BEGIN_ID, VIDEO_BEGIN_ID
from ..models.ovis2_5.vision_ovis2_5 import Grid
from .rendering import IGNORE_INDEX

KINDS = ("prompt", "image", "video", "empty think", "thought", "answer", "tool response", "stop")
"""`prompt` is all that no assistant wrote, role headers and the newlines between turns included;
`stop` ends an answer."""

OBJECT, CUT = "\ufffc", "\ufffd"
"""Characters that stand for a medium, and that a part of a character is decoded to."""

LONGEST = 4
"""Bytes of a character, and so tokens of one."""

_GIVEN = re.compile(r"<tool_response>.*?(?:</tool_response>|\Z)", re.DOTALL)
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>\n{0,2}|\Z)", re.DOTALL)
"""Of what the cut has left; the template puts two newlines behind a block."""


@dataclass(frozen=True)
class Token:
    """The tokens that make up `text`: one, those that a character needs, or all of a medium.

    Attributes:
        ids: Token ids.
        labels: Unshifted labels, as many; -100 where nothing is learnt.
        text: As decoded; of a medium `⟨image 1: 14×20 → 280 tokens⟩`.
    """

    ids: list[int]
    labels: list[int]
    text: str


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind (KINDS), all trained or none.

    Attributes:
        medium: Of an image or video: its number in the sample, from 0.
    """

    kind: str
    trained: bool
    tokens: list[Token]
    medium: int | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def length(self) -> int:
        """Token ids in it."""
        return sum(len(token.ids) for token in self.tokens)


class _Part(NamedTuple):
    """A token, and what its ids tell: `text`, `start` or `end` of a turn, `image` or `video`."""

    token: Token
    form: str

    @property
    def trained(self) -> bool:
        return self.token.labels[-1] != IGNORE_INDEX

    @property
    def text(self) -> str:
        """One character for a medium, in which no tag can be found."""
        return OBJECT if self.form in ("image", "video") else self.token.text


def pieces_of(
    ids: Sequence[int],
    labels: Sequence[int],
    grids: Sequence[Grid],
    processor: Ovis2_5Processor,
) -> list[Piece]:
    """The pieces of a sample, together all of its ids and labels.

    Turns are told apart by their control tokens, which no text can hold, and think blocks and tool
    responses by the text of an assistant's turn.
    """
    parts = list(_parts(ids, labels, grids, processor))
    starts = [i for i, part in enumerate(parts) if part.form == "start"]
    turns = [parts[a:b] for a, b in zip([0, *starts], [*starts, len(parts)], strict=True)]
    kinds = [kind for turn in turns for kind in _kinds(turn)]
    pieces: list[Piece] = []
    media = 0
    for (kind, trained), run in groupby(
        zip(kinds, parts, strict=True), key=lambda pair: (pair[0], pair[1].trained)
    ):
        tokens = [part.token for _, part in run]
        if kind in ("image", "video"):
            pieces += [Piece(kind, False, [t], media + i) for i, t in enumerate(tokens)]
            media += len(tokens)
        else:
            pieces.append(Piece(kind, trained, tokens))
    return pieces


def _kinds(turn: Sequence[_Part]) -> Iterator[str]:
    """The kind of each part of a turn with what follows it, or of text outside the chat format."""
    text = "".join(part.text for part in turn)
    of_text = ["prompt"] * len(text)
    end = next((i for i, part in enumerate(turn) if part.form == "end"), len(turn))
    in_chat = bool(turn) and turn[0].form == "start"
    begin = text.find("\n") + 1
    # SentencePiece tokenizers may write a space behind a control token.
    answered = in_chat and text[len(turn[0].text) : begin].strip() == "assistant"
    if answered:
        stop = sum(len(part.text) for part in turn[:end])
        of_text[begin:stop] = ["answer"] * (stop - begin)
        _name_blocks(text[begin:stop], of_text, begin)
    at = 0
    for i, part in enumerate(turn):
        if part.form in ("image", "video"):
            yield part.form
        elif in_chat:
            yield "stop" if answered and i == end else of_text[at]
        else:
            yield "prompt" if not part.trained else "stop" if i == end else "answer"
        at += len(part.text)


def _name_blocks(text: str, kinds: list[str], begin: int) -> None:
    """Name what an answer was given and what it thought; `kinds[begin:]` are its characters."""
    for given in _GIVEN.finditer(text):
        start, stop = given.span()
        kinds[begin + start : begin + stop] = ["tool response"] * (stop - start)
        text = text[:start] + OBJECT * (stop - start) + text[stop:]
    for block in _THOUGHT.finditer(text):
        name = "thought" if block[1].strip() else "empty think"
        for at in range(begin + block.start(), begin + block.end()):
            if kinds[at] == "answer":
                kinds[at] = name


def _parts(
    ids: Sequence[int],
    labels: Sequence[int],
    grids: Sequence[Grid],
    processor: Ovis2_5Processor,
) -> Iterator[_Part]:
    """Tokens in their order, those of a medium and those of a character as one."""
    decode = _decoder(processor)
    controls = {
        processor.control_id(processor.turn_start): "start",
        processor.control_id(processor.turn_end): "end",
    }
    media, at = 0, 0
    while at < len(ids):
        if ids[at] in (IMAGE_BEGIN_ID, VIDEO_BEGIN_ID):
            form: Any = "image" if ids[at] == IMAGE_BEGIN_ID else "video"
            stop = at + processor.image_processor.visual_tokens(grids[media]) + 2
            text = _span(form, media + 1, grids[media], processor)
            media += 1
        elif form := controls.get(ids[at]):
            stop, text = at + 1, decode(ids[at : at + 1])
        else:
            form, stop, text = "text", at + 1, decode(ids[at : at + 1])
            while text.endswith(CUT) and (more := _rest(ids, at, stop, decode)):
                stop += more
                text = decode(ids[at:stop])
        yield _Part(Token(list(ids[at:stop]), list(labels[at:stop]), text), form)
        at = stop


def _rest(ids: Sequence[int], start: int, stop: int, decode: Callable[[Sequence[int]], str]) -> int:
    """How many tokens more go on with the character that those from `start` to `stop` end in; 0
    where it is whole, or cut off. Its other bytes are read otherwise behind its first ones."""
    text = decode(ids[start:stop])
    for more in range(1, LONGEST):
        behind = ids[stop : stop + more]
        if len(behind) < more or min(behind) < 0:
            break
        if decode(ids[start : stop + more]) != text + decode(behind):
            return more
    return 0


def _span(form: str, number: int, grid: Grid, processor: Ovis2_5Processor) -> str:
    images = processor.image_processor
    side = f"{grid[1] // images.hidden_stride}×{grid[2] // images.hidden_stride}"
    frames = f"{grid[0]}×" if form == "video" else ""
    return f"⟨{form} {number}: {frames}{side} → {images.visual_tokens(grid)} tokens⟩"


def _decoder(processor: Ovis2_5Processor) -> Callable[[Sequence[int]], str]:
    """Text of ids inside a turn. SentencePiece tokenizers drop the space that starts a text, so it
    is read behind a turn's first token."""
    tokenizer: Any = processor.tokenizer
    start = processor.control_id(processor.turn_start)
    known: dict[tuple[int, ...], str] = {}

    def decode(ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in known:
            text = tokenizer.decode(
                [start, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            known[key] = text.removeprefix(processor.turn_start)
        return known[key]

    return decode
