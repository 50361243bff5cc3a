"""Boxes in text: their forms, and which of them cannot be meant for the image."""

import time

import pytest

from vlmtune.data.boxes import Box, check_boxes, find_boxes
from vlmtune.data.conversation import read_conversation


@pytest.mark.parametrize(
    ("tag", "coordinates"),
    [
        ("<box>1,2,30,40</box>", (1, 2, 30, 40)),
        ("<box>(1,2),(30,40)</box>", (1, 2, 30, 40)),
        ("<box>[[0.1, 0.25], [0.5, 1]]</box>", (0.1, 0.25, 0.5, 1)),
        ("<box> ( 1 , 2 ) , ( 30 , 40 ) </box>", (1, 2, 30, 40)),
        ("<box>[-1, 2, 3, 4.50]</box>", (-1, 2, 3, 4.5)),
        ("<point>3,4</point>", (3, 4)),
        ("<point>(3, 4)</point>", (3, 4)),
    ],
)
def test_every_form_of_a_box_is_found_with_its_place(tag, coordinates):
    text = f"A cat {tag} sits."
    assert find_boxes(text) == [Box(6, 6 + len(tag), coordinates)]
    assert find_boxes(tag * 2)[1] == Box(len(tag), 2 * len(tag), coordinates)


@pytest.mark.parametrize(
    "text",
    [
        "<box></box>",
        "<box>1,2,3</box>",
        "<box>1,2,3,4,5</box>",
        "<point>1,2,3,4</point>",
        "<box>one,2,3,4</box>",
        "<box>1 2,3,4,5</box>",
        "<box>1,2,3,4</point>",
        "<box>1,2,3,4",
        "1,2,3,4",
    ],
)
def test_other_text_is_no_box(text):
    assert find_boxes(text) == []


@pytest.mark.parametrize("inside", [" " * 50_000, "1," + " " * 50_000, "1" * 50_000, "[" * 50_000])
def test_long_text_in_a_tag_takes_no_time(inside):
    began = time.perf_counter()
    assert find_boxes(f"<box>{inside}</box>") == []
    assert time.perf_counter() - began < 0.5


def codes(text: str, *sizes: tuple[int, int]) -> list[str]:
    record = {
        "conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": text}]
    }
    conversation, _ = read_conversation(record, "t.json", 1)
    return [e.code for e in check_boxes(record, conversation, [(1, h, w) for h, w in sizes])]


@pytest.mark.parametrize(
    ("text", "sizes", "expected"),
    [
        pytest.param("<box>0,0,1,1</box>", [(10, 10)], [], id="whole-image-in-shares"),
        pytest.param("<box>0,0,1000,1000</box>", [(10, 10)], [], id="whole-image-in-thousandths"),
        pytest.param("<box>0,0,1200,900</box>", [(900, 1200)], [], id="whole-image-in-pixels"),
        pytest.param("<box>0,0,1201,900</box>", [(900, 1200)], ["box-outside"], id="too-wide"),
        pytest.param("<box>0,0,1200,901</box>", [(900, 1200)], ["box-outside"], id="too-high"),
        pytest.param("<point>1201,3</point>", [(900, 1200)], ["box-outside"], id="point"),
        pytest.param("<box>0,0,1201,9</box>", [(9, 9), (900, 1300)], [], id="inside-the-second"),
        pytest.param("<box>-1,0,3,3</box>", [(10, 10)], ["box-outside"], id="negative"),
        pytest.param("<box>-1,0,3,3</box>", [], ["box-outside"], id="negative-without-image"),
        pytest.param("<box>0,0,1201,900</box>", [], [], id="pixels-of-no-image"),
        pytest.param("<box>5,1,4,2</box>", [(10, 10)], ["box-inverted"], id="right-before-left"),
        pytest.param("<box>1,5,2,4</box>", [(10, 10)], ["box-inverted"], id="low-before-high"),
        pytest.param("<box>1,1,1,1</box>", [(10, 10)], [], id="no-area"),
        pytest.param(
            "<box>1300,0,1,9</box>", [(900, 1200)], ["box-inverted", "box-outside"], id="2"
        ),
    ],
)
def test_boxes_that_no_image_can_hold_are_told(text, sizes, expected):
    assert codes(text, *sizes) == expected


def test_finding_of_a_box_names_the_turn_the_tag_and_the_size():
    answer = {"role": "assistant", "content": "It <box>0,0,1201,900</box>."}
    record = {
        "id": "a",
        "image": "a.png",
        "messages": [{"role": "user", "content": "<image>"}, answer],
    }
    conversation, _ = read_conversation(record, "t.json", 3)
    [error] = check_boxes(record, conversation, [(1, 900, 1200)])
    assert error.where == 't.json, record 3 (id "a"), messages[1].content'
    assert error.what == "<box>0,0,1201,900</box> lies outside the image of 1200 x 900 pixels."
