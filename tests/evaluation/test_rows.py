"""Rows of answers: what of them is scored, and the share of unfinished thoughts."""

import pytest

from vlmtune.evaluation.rows import score_rows, unfinished_thoughts
from vlmtune.evaluation.samples import answer_in, without_tools

CALL = "<tool_call>Crop [1, 2, 3, 4]</tool_call><tool_response><image></tool_response>"


def row(answer: str = "", *references: str, unfinished: bool = False, error: str | None = None):
    return {
        "answer": answer,
        "references": references,
        "unfinished_thought": unfinished,
        "error": error,
    }


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("four", "four"),
        (f"<think>\nI look. {CALL}\n</think>\n\nfour", "four"),
        (f"Look: {CALL}\nfour\n{CALL}", "Look: \nfour"),
        ("four <tool_call>Crop [1, ", "four"),
        ("four<tool_response>a\nb", "four"),
        ("<tool_response>a</tool_call>b</tool_response>four", "four"),
        ("four</tool_call>", "four</tool_call>"),
        ("<think>\nand so on", ""),
    ],
)
def test_what_is_scored_is_the_answer_without_thought_and_tools(text, answer):
    assert answer_in(text) == answer


def test_answer_is_not_parted_at_a_second_end_of_a_thought():
    assert without_tools("a </think> b") == "a </think> b"


def test_rows_are_scored_without_thoughts_and_tools_on_both_sides_and_errors_as_empty():
    rows = [
        row(f"I see\n{CALL} four.", "<think>\nhm\n</think>\n\nI see four."),
        row("I see four.", "five", f"I see\n{CALL}\nfour."),
        row("four", "four", error="gone"),
        row("", CALL),
    ]
    scores = score_rows(rows, ["exact_match", "rouge_l"], resamples=1)
    assert scores["exact_match"].per_sample == [1, 1, 0, 1]
    assert scores["rouge_l"].per_sample == [1, 1, 0, 0]


def test_share_of_unfinished_thoughts_is_of_the_answers_that_were_to_think():
    rows = [row(unfinished=True), row(), row(unfinished=True), row(error="gone")]
    assert unfinished_thoughts(rows, [True, True, False, True]) == {"unfinished_thoughts": 0.5}
    assert unfinished_thoughts(rows, [False, True, False, True]) == {"unfinished_thoughts": 0.0}
    assert unfinished_thoughts(rows, [False, False, False, True]) == {}
