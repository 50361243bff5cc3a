"""An answer while it is written: its parts so far, the same in the terminal, how it ended."""

from typing import TYPE_CHECKING, TextIO

from ..inference.reply import END_OF_THOUGHT, THINK, parse_reply
from .page import VISIBLE

if TYPE_CHECKING:
    from ..inference import Reply, Sampling


def parts_so_far(text: str) -> tuple[str, str]:
    """Thought and answer of a text that goes on; an end that may become a tag is not yet shown."""
    before, bracket, rest = text.rpartition("<")
    end = bracket + rest
    if any(end and tag != end and tag.startswith(end) for tag in (THINK, END_OF_THOUGHT)):
        text = before
    return parse_reply(text)[:2]


def how_it_ended(reply: "Reply", sampling: "Sampling") -> str | None:
    """What kept an answer from its end."""
    if reply.ended == "length":
        part = "thought" if reply.unfinished_thought else "answer"
        return f"the {part} was cut off at {sampling.max_new_tokens:,} new tokens"
    if reply.ended == "tool_rounds":
        return f"the answer was cut off after {reply.tool_rounds} calls of tools"
    if reply.ended == "tool_call":
        return "the answer ends at a call that stands behind the text of a mark, such as <image>"
    return None


class AnswerPrinter:
    """Writes the parts of one answer as they grow: in colour the thought is dimmed, else each part
    has a heading where there is a thought. Nothing in them can move the cursor or hide text."""

    def __init__(self, out: TextIO, colour: bool):
        self.out, self.colour = out, colour
        self.thinking = self.answer = ""

    def show(self, thinking: str, answer: str) -> None:
        """Write what is new.

        Args:
            thinking, answer: All so far, each of them longer than before or the same.
        """
        if thinking and self.answer and not self.thinking:
            # What began without a tag was a thought: the prompt had opened it.
            self.thinking, self.answer = self.answer, ""
        if thinking and not self.thinking:
            self._write("" if self.colour else "thinking:\n")
        self._write(thinking[len(self.thinking) :], dim=True)
        if answer and not self.answer and thinking:
            self._write("\n\n" if self.colour else "\n\nanswer:\n")
        self._write(answer[len(self.answer) :])
        self.thinking, self.answer = thinking, answer

    def end(self) -> None:
        """End the line."""
        self._write("\n")

    def _write(self, text: str, dim: bool = False) -> None:
        if text:
            text = text.translate(VISIBLE)
            # Whole codes with each piece: no interruption leaves the terminal dimmed.
            self.out.write(f"\x1b[2m{text}\x1b[0m" if dim and self.colour else text)
            self.out.flush()
