"""What is said of records that training accepts, and the form of a finding."""

from typing import Any

import pytest

from vlmtune.core.errors import DataError
from vlmtune.data.checks import check_text
from vlmtune.data.conversation import read_conversation
from vlmtune.data.findings import CODES, Finding
from vlmtune.data.turns import CONVERSATIONS, MESSAGES

AT = 'train.json, record 17 (id "a"), '
CODES_OF_TEXT = {
    *("think-unclosed", "think-unopened", "think-nested", "think-empty", "think-in-question"),
    *("thought-only", "id-type", "role-order", "system-order", "answer-first", "question-last"),
    *("question-empty", "special-token", "mark-in-answer"),
}


def found_in(record: dict[str, Any], data_format: str = "conversation") -> list[tuple[str, str]]:
    conversation, faults = read_conversation(record, "train.json", 17, None, data_format)
    assert conversation is not None and not faults
    found = check_text(record, conversation)
    return [(error.where.removeprefix(AT), error.code) for error in found]


def said(*turns: tuple[str, str], **rest) -> dict[str, Any]:
    written = [{"from": speaker, "value": text} for speaker, text in turns]
    return {"id": "a", "conversations": written, **rest}


def answered(answer: str, question: str = "What?", **rest) -> dict[str, Any]:
    return said(("human", question), ("gpt", answer), **rest)


Q, A = ("human", "What?"), ("gpt", "A cat.")
CLEAN = [
    said(("system", "Be brief."), Q, A, Q, ("ignored_gpt", "A dog."), Q, A),
    said(Q, A, id=7),
    said(("human", "<image>"), A, image="a.png"),
    answered("<think>\nFur.\n</think>\n\nA cat."),
    answered("<think>a</think>b<think>c</think>d"),
    answered("<think>a</think><tool_response></think><think></tool_response>b"),
    answered("Zoom.<tool_response><image></tool_response>A cat.", image="a.png"),
    answered("see <b>[1]</b>, x < y, [image], <box>1,2,3,4</box>, a | b |> c"),
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
]


@pytest.mark.parametrize("record", CLEAN)
def test_nothing_is_said_of_a_good_record(record):
    assert found_in(record) == []


@pytest.mark.parametrize(
    ("record", "place", "code"),
    [
        (answered("<think>Fur. A cat."), "conversations[1].value", "think-unclosed"),
        (answered("Fur.</think>A cat."), "conversations[1].value", "think-unopened"),
        (answered("<think>a<think>b</think>c"), "conversations[1].value", "think-nested"),
        (answered("<think>\n\n</think>\n\nA cat."), "conversations[1].value", "think-empty"),
        (answered("<think>\nFur.\n</think>\n"), "conversations[1].value", "thought-only"),
        (answered("A cat.", "<think>?"), "conversations[0].value", "think-in-question"),
        (said(("system", "Use </think>."), Q, A), "conversations[0].value", "think-in-question"),
        (said(Q, A, id=1.5), "id", "id-type"),
        (said(Q, A, id=True), "id", "id-type"),
        (said(Q, Q, A), "conversations[1]", "role-order"),
        (said(Q, ("ignored_gpt", "A dog."), A), "conversations[2]", "role-order"),
        (said(Q, ("system", "Be brief."), A), "conversations[1]", "system-order"),
        (said(A, Q, A), "conversations[0]", "answer-first"),
        (said(Q, A, Q), "conversations[2]", "question-last"),
        (answered("A cat.", " \n"), "conversations[0].value", "question-empty"),
        (answered("A <image>.", image="a.png"), "conversations[1].value", "mark-in-answer"),
        (answered("A <video>.", video="a.mp4"), "conversations[1].value", "mark-in-answer"),
    ],
)
def test_what_is_suspicious_is_found_at_its_place(record, place, code):
    id_of = record["id"]
    found = [
        (p.replace(f'train.json, record 17 (id "{id_of}"), ', ""), c) for p, c in found_in(record)
    ]
    assert found == [(place, code)]


@pytest.mark.parametrize(
    "token",
    [
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_1|>"),
        *("<|begin▁of▁sentence|>", "<\uff5cUser\uff5c>", "<s>", "</s>", "<bos>", "<eos>", "<pad>"),
        *("<unk>", "<image_pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        *("<image_soft_token>", "<IMG_CONTEXT>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        *("[IMG]", "[IMG_BREAK]"),
    ],
)
@pytest.mark.parametrize("speaker", [0, 1])
def test_control_tokens_of_any_model_are_found_in_any_turn(token, speaker):
    texts = ["What?", "A cat."]
    texts[speaker] = f"a{token} b"
    record = answered(texts[1], texts[0])
    assert found_in(record) == [(f"conversations[{speaker}].value", "special-token")]


def test_findings_of_a_record_come_in_order_each_code_once_in_a_turn():
    record = said(
        ("gpt", "a</think>b</think>c<s><s><think></think>"), ("human", ""), ("gpt", "<think>d")
    )
    assert found_in(record) == [
        ("conversations[0]", "answer-first"),
        ("conversations[0].value", "think-unopened"),
        ("conversations[0].value", "think-empty"),
        ("conversations[0].value", "thought-only"),
        ("conversations[0].value", "special-token"),
        ("conversations[1].value", "question-empty"),
        ("conversations[2].value", "think-unclosed"),
    ]


def test_places_of_messages_and_captions_are_named_as_they_are_written():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "<s>"}]},
        {"role": "assistant", "content": "</think>a"},
    ]
    assert found_in({"id": "a", "messages": messages}) == [
        ("messages[0].content", "special-token"),
        ("messages[1].content", "think-unopened"),
    ]
    caption = {"id": "a", "image": "a.png", "caption": "A cat.</s>"}
    assert found_in(caption, "caption") == [("caption", "special-token")]


def test_turns_that_could_not_be_read_are_passed_over():
    record = {"id": "a", "conversations": [5, {"from": "tool", "value": "<s>"}]}
    conversation, faults = read_conversation(record, "train.json", 17)
    assert conversation is not None
    assert [fault.code for fault in faults] == ["turn-form", "role-unknown"]
    [error] = check_text(record, conversation)
    assert (error.where, error.code) == (f"{AT}conversations[1].value", "special-token")


def test_every_code_of_text_is_in_the_table_with_its_severity():
    broken = {"think-unclosed", "think-unopened", "think-nested"}
    assert {c: CODES[c].severity for c in CODES_OF_TEXT} == {
        c: "error" if c in broken else "warning" for c in CODES_OF_TEXT
    }


@pytest.mark.parametrize(
    ("where", "record", "identity", "field"),
    [
        (f"{AT}conversations[1].value", 17, "a", "conversations[1].value"),
        ('train.json, record 17 (id "a")', 17, "a", ""),
        ("train.json, record 17", 17, "", ""),
        ("train.json, line 3, column 7", 17, "", "line 3, column 7"),
        ("train.json", None, "", ""),
        ("/data/train.json", None, "", ""),
    ],
)
def test_a_finding_names_the_field_apart_from_the_record(where, record, identity, field):
    error = DataError(where, "is broken.", "mend it.", "json")
    assert Finding.of(error, "train.json", record, identity) == Finding(
        "json", "error", "train.json", record, identity, field, "is broken.", "mend it."
    )


def test_a_role_is_meant_by_its_synonyms_in_any_case():
    assert CONVERSATIONS.role_meant(" USER") == "human"
    assert CONVERSATIONS.role_meant("Assistant") == CONVERSATIONS.role_meant("GPT") == "gpt"
    assert MESSAGES.role_meant("Human") == "user"
    assert MESSAGES.role_meant("Model") == "assistant"
    assert [CONVERSATIONS.role_meant(word) for word in ("tool", "", None, ["gpt"])] == [None] * 4
    assert MESSAGES.role_meant("ignored_gpt") is None
