"""Rows of answers, as `inference.files.answer_file` writes them: what they are worth."""

from collections.abc import Sequence
from typing import Any

from .samples import answer_in, without_tools
from .scores import Score, score

Row = dict[str, Any]


def score_rows(rows: Sequence[Row], names: Sequence[str], **settings: Any) -> dict[str, Score]:
    """`scores.score` of the answers, each against its row's `references`.

    Thoughts, tool calls and what tools gave back are left out on both sides; a row with an `error`
    counts as empty.
    """
    predictions = ["" if row["error"] else without_tools(row["answer"]) for row in rows]
    references = [[answer_in(text) for text in row["references"]] for row in rows]
    return score(predictions, references, names, **settings)


def unfinished_thoughts(rows: Sequence[Row], thinks: Sequence[bool]) -> dict[str, float]:
    """`{"unfinished_thoughts": share}`: of the answers that were to think, those that did not end
    their thought; empty where none was.

    Args:
        thinks: Of each row, whether it was to think. One with an error is no answer.
    """
    asked = [
        row["unfinished_thought"]
        for row, thought in zip(rows, thinks, strict=True)
        if thought and not row["error"]
    ]
    return {"unfinished_thoughts": sum(asked) / len(asked)} if asked else {}
