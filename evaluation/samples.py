"""The records that are evaluated, and what each says about its image."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..core.errors import DataError
from ..data.conversation import PLAIN, Conversation, read_conversation
from ..data.sources import Source
from ..inference.files import UNANSWERED, references_of
from ..inference.reply import parse_reply

_TOOLS = re.compile(r"<(tool_call|tool_response)>.*?(?:</\1>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """Attributes:
    record: Its number, from 1 through all sources.
    conversation: None where nothing of the record could be read.
    texts: Answers or captions of it, as `answer_in` finds them.
    thinks: Whether its own answer has a thought.
    error: Why the record is no question or dialogue; one without an answer can be.
    """

    record: int
    conversation: Conversation | None
    texts: list[str]
    thinks: bool = False
    error: str | None = None

    @property
    def described_image(self) -> str | None:
        """The only image, where there is one and a text about it."""
        images = self.conversation.images if self.conversation else []
        return images[0] if len(images) == 1 and self.texts else None


def read_samples(sources: Sequence[Source], limit: int | None = None) -> list[Sample]:
    """The first `limit` records.

    Raises:
        DataError: a source is missing or broken.
    """
    records = ((s, index, record) for s in sources for index, record in s.records())
    return [_sample(n, *one) for n, one in enumerate(islice(records, limit), start=1)]


def _sample(number: int, source: Source, index: int, record: Any) -> Sample:
    conversation, faults = read_conversation(
        record, source.path, index, source.folder, source.data_format
    )
    faults = [fault for fault in faults if fault.code not in UNANSWERED]
    texts, written = [], ""
    if conversation:
        last = conversation.turns[-1:]
        written = "".join(turn.text for turn in last if turn.role in ("assistant", PLAIN))
        try:
            listed = references_of(record, conversation, written)
            texts = [answer_in(text) for text in listed]
        except DataError as error:
            faults.append(error)
    error = " ".join(str(faults[0]).split()) if faults else None
    return Sample(number, conversation, texts, bool(parse_reply(written)[0]), error)


def answer_in(text: str) -> str:
    """What of a text is scored: no thought, no tool call, nothing that a tool gave back."""
    return without_tools(parse_reply(text)[1])


def without_tools(answer: str) -> str:
    """An answer without its tool calls and their responses; one that is begun and not ended goes
    to the end."""
    return _TOOLS.sub("", answer).strip()
