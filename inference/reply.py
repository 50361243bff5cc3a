"""What a model replied: its text, its thought and its answer."""

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from ..core.errors import VLMTuneError

THINK, END_OF_THOUGHT = "<think>", "</think>"
Ended = Literal["stop", "length", "tool_call", "tool_rounds", "error"]


@dataclass(frozen=True)
class Reply:
    """Attributes:
    text: All that is new, control tokens left out.
    thinking, answer: Its two parts, as `parse_reply` finds them.
    unfinished_thought: Whether the thought was begun and not ended.
    tokens: The new ids, with the token that stopped them and without padding.
    ended: By a stop token, by max_new_tokens, by a tool call that nothing answered, by the limit
        of rounds with tools, or by an error.
    error: What went wrong, when `ended` is "error".
    images: What tools gave back, in order.
    tool_rounds: How many tool calls were answered.
    """

    text: str
    thinking: str
    answer: str
    unfinished_thought: bool
    tokens: list[int]
    ended: Ended
    error: str | None = None
    images: list[Image.Image] = field(default_factory=list)
    tool_rounds: int = 0

    @classmethod
    def of(
        cls, text: str, tokens: list[int], ended: Ended, *, opened: bool = False, **more: Any
    ) -> "Reply":
        """The reply with that text; `opened` as `parse_reply` takes it."""
        return cls(text, *parse_reply(text, opened), tokens, ended, **more)

    @classmethod
    def failed(cls, error: VLMTuneError) -> "Reply":
        """The reply to a request that could not be answered."""
        return cls("", "", "", False, [], "error", " ".join(str(error).split()))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without the images, and with the number of tokens in their place."""
        return {
            "text": self.text,
            "thinking": self.thinking,
            "answer": self.answer,
            "unfinished_thought": self.unfinished_thought,
            "ended": self.ended,
            "tokens": len(self.tokens),
            "tool_rounds": self.tool_rounds,
            "error": self.error,
        }


def parse_reply(text: str, opened: bool = False) -> tuple[str, str, bool]:
    """Thought and answer, both stripped, and whether the thought was left unfinished.

    The first `</think>` parts them, whether `<think>` was written or not. A thought that is begun
    and not ended is all there is, with an empty answer; text that does not begin with `<think>` and
    has no `</think>` is the answer.

    Args:
        opened: Whether the prompt itself ended in `<think>`.
    """
    before, ended, after = text.partition(END_OF_THOUGHT)
    begun = before.lstrip()
    if not ended and not opened and not begun.startswith(THINK):
        return "", text.strip(), False
    return begun.removeprefix(THINK).strip(), after.strip(), not ended
