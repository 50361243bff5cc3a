"""Text is parted into thought and answer, and replies go into JSON."""

import json

import pytest
from PIL import Image

from vlmtune.core.errors import DataError
from vlmtune.inference.reply import Reply, parse_reply


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        pytest.param("A cat.", False, ("", "A cat.", False), id="answer"),
        pytest.param("\n A cat.\n\n", False, ("", "A cat.", False), id="answer-stripped"),
        pytest.param("", False, ("", "", False), id="nothing"),
        pytest.param(
            "<think>\nFur.\n</think>\n\nA cat.", False, ("Fur.", "A cat.", False), id="both"
        ),
        pytest.param("<think>\n\n</think>\n\nA cat.", False, ("", "A cat.", False), id="empty"),
        pytest.param("<think>\nFur, and", False, ("Fur, and", "", True), id="unfinished"),
        pytest.param("\n<think>", False, ("", "", True), id="just-begun"),
        pytest.param("Fur.\n</think>\nA cat.", True, ("Fur.", "A cat.", False), id="opened"),
        pytest.param("Fur, and", True, ("Fur, and", "", True), id="opened-unfinished"),
        pytest.param("Fur.</think>A cat.", False, ("Fur.", "A cat.", False), id="never-begun"),
        pytest.param(
            "<think>a</think>b</think>c", False, ("a", "b</think>c", False), id="first-end-parts"
        ),
        pytest.param(
            "Write <think> first.", False, ("", "Write <think> first.", False), id="about-the-tag"
        ),
    ],
)
def test_the_first_end_of_a_thought_parts_it_from_the_answer(text, opened, expected):
    assert parse_reply(text, opened) == expected


def test_a_reply_is_made_of_its_text_and_goes_into_json_without_images_and_ids():
    crop = Image.new("RGB", (2, 2))
    reply = Reply.of("<think>\nFur.\n</think>\n\nA cat.", [5, 6, 7], "stop", images=[crop])
    assert (reply.thinking, reply.answer, reply.unfinished_thought) == ("Fur.", "A cat.", False)
    assert reply.images == [crop]
    assert json.loads(json.dumps(reply.to_dict())) == {
        "text": "<think>\nFur.\n</think>\n\nA cat.",
        "thinking": "Fur.",
        "answer": "A cat.",
        "unfinished_thought": False,
        "ended": "stop",
        "tokens": 3,
        "tool_rounds": 0,
        "error": None,
    }


def test_a_request_that_failed_says_where_what_and_the_fix_in_one_line():
    reply = Reply.failed(DataError("cat.png", "is no image", "save it again"))
    assert (reply.ended, reply.answer, reply.tokens) == ("error", "", [])
    assert reply.error == "cat.png: is no image. Fix: save it again."
