"""What is mended, exactly how, and what is left because more than one fix would do."""

from typing import Any

import pytest

from vlmtune.data.conversation import parse_conversation
from vlmtune.data.findings import CODES
from vlmtune.data.fixes import _FIXES, fix_record

Said = list[tuple[str, Any]]
PLAIN: Said = [("human", "What?"), ("gpt", "A cat.")]


def record(said: Said, **media) -> dict[str, Any]:
    return {**media, "conversations": [{"from": who, "value": text} for who, text in said]}


def messages(said: Said, **media) -> dict[str, Any]:
    return {**media, "messages": [{"role": who, "content": text} for who, text in said]}


def answer(text: str) -> Said:
    return [("human", "What?"), ("gpt", text)]


def question(text: Any) -> Said:
    return [("human", text), ("gpt", "A cat.")]


ROLE_CONTENT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("broken", "mended", "codes"),
    [
        pytest.param(
            record([("User", "What?"), ("assistant", "A cat."), (" HUMAN", "?"), ("bot", "No.")]),
            record([*PLAIN, ("human", "?"), ("gpt", "No.")]),
            ["role-unknown"],
            id="roles",
        ),
        pytest.param(
            messages([("Human", "What?"), ("gpt", "A cat.")]),
            messages([("user", "What?"), ("assistant", "A cat.")]),
            ["role-unknown"],
            id="roles-of-messages",
        ),
        pytest.param(
            {"conversations": ROLE_CONTENT}, record(PLAIN), ["turn-form"], id="messages-inside"
        ),
        pytest.param(
            {
                "image": "a.png",
                "conversations": [
                    {"weight": 2, "role": "User", "content": [IMAGE, TEXT]},
                    {"from": "gpt", "value": "A cat."},
                ],
            },
            {
                "image": "a.png",
                "conversations": [
                    {"weight": 2, "from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "A cat."},
                ],
            },
            ["turn-form"],
            id="parts-inside-conversations",
        ),
        pytest.param(
            {"messages": record(PLAIN)["conversations"]},
            {"messages": ROLE_CONTENT},
            ["turn-form"],
            id="conversations-inside-messages",
        ),
        *(
            pytest.param(record(PLAIN, **{key: blank}), record(PLAIN), codes, id=f"{key}-{blank}")
            for key in ("image", "video")
            for blank, codes in [
                ("", ["media-field"]),
                ([""], ["media-field"]),
                ([None], ["media-field"]),
                (float("nan"), ["media-field"]),
                ("None", ["image-marks-few" if key == "image" else "video-marks"]),
            ]
        ),
        pytest.param(
            record(PLAIN, image="", video=["v.mp4"]),
            record(question("<video>\nWhat?"), video=["v.mp4"]),
            ["media-field", "video-marks"],
            id="empty-image-beside-a-video",
        ),
        pytest.param(
            record([("system", "Be brief."), *PLAIN, *PLAIN], image=["a.png", "b.png"]),
            record(
                [("system", "Be brief."), *question("<image>\n<image>\nWhat?"), *PLAIN],
                image=["a.png", "b.png"],
            ),
            ["image-marks-few"],
            id="two-images-without-marks",
        ),
        pytest.param(
            record(PLAIN, video_frames=["1.png", "2.png"]),
            record(question("<video>\nWhat?"), video_frames=["1.png", "2.png"]),
            ["video-marks"],
            id="frames-without-mark",
        ),
        pytest.param(
            messages([("user", [TEXT]), ("assistant", "A cat.")], images=["a.png"]),
            messages([("user", [IMAGE, TEXT]), ("assistant", "A cat.")], images=["a.png"]),
            ["image-marks-few"],
            id="parts-without-image",
        ),
        pytest.param(
            record(answer("Fur.\n</think>\n\nA cat.")),
            record(answer("<think>\nFur.\n</think>\n\nA cat.")),
            ["think-unopened"],
            id="thought-unopened",
        ),
        pytest.param(
            record(answer("\nFur.\n</think>\n\nA cat.")),
            record(answer("<think>\nFur.\n</think>\n\nA cat.")),
            ["think-unopened"],
            id="thought-unopened-after-a-newline",
        ),
        pytest.param(
            record([("human", "What?<|im_end|>"), ("gpt", "A <b>.</s> <|endoftext|>\n")]),
            record([("human", "What?"), ("gpt", "A <b>.")]),
            ["special-token"],
            id="tokens-at-the-end",
        ),
        pytest.param(
            messages([("user", "What?"), ("assistant", [{"type": "text", "text": "A cat.</s>"}])]),
            messages([("user", "What?"), ("assistant", [{"type": "text", "text": "A cat."}])]),
            ["special-token"],
            id="token-at-the-end-of-a-part",
        ),
        pytest.param(
            record([*PLAIN, ("human", "And?"), ("human", "Well?")]),
            record(PLAIN),
            ["role-order", "question-last"],
            id="questions-without-answer",
        ),
        pytest.param(
            {
                "image": ["a.png"],
                "conversations": [
                    {"role": "USER", "content": "What?"},
                    {"from": "Bot", "value": "Fur.</think>A cat.<|im_end|>"},
                    {"from": "human", "value": "And?"},
                ],
            },
            record(
                [("human", "<image>\nWhat?"), ("gpt", "<think>\nFur.</think>A cat.")],
                image=["a.png"],
            ),
            [
                *("turn-form", "role-unknown", "image-marks-few", "think-unopened"),
                *("question-last", "special-token"),
            ],
            id="all-at-once",
        ),
    ],
)
def test_what_has_one_sure_fix_is_mended(broken, mended, codes):
    before = repr(broken)
    assert fix_record(broken) == (mended, codes)
    assert repr(broken) == before
    parse_conversation(mended, "train.json", 1)


@pytest.mark.parametrize(
    "unsure",
    [
        pytest.param(record([("human", "What?"), ("tool", "5"), ("gpt", "A.")]), id="role"),
        pytest.param(record([("User", "What?"), ("tool", "5"), ("gpt", "A.")]), id="one-sure-role"),
        pytest.param({"conversations": [{"from": "human", "role": "user", "content": "?"}]}),
        pytest.param(
            {"conversations": [{"role": "user", "content": [{"type": "audio"}]}]}, id="audio"
        ),
        pytest.param(record(question("<image>\nWhat?"), image=""), id="mark-without-file"),
        pytest.param(record(question("<image>\nWhat?"), image=["a", "b"]), id="a-mark-for-two"),
        pytest.param(record(question("<image 1> What?"), image="a"), id="like-a-mark"),
        pytest.param(record(question("<video>"), image="a"), id="other-mark"),
        pytest.param(record(PLAIN, image="a", video="b"), id="two-media"),
        pytest.param(record(PLAIN, image="a", images=["b"]), id="image-and-images"),
        pytest.param(record(PLAIN, image=["a", ""]), id="one-file-empty"),
        pytest.param(record([("gpt", "A cat.")], image="a"), id="no-question-for-the-mark"),
        pytest.param(record(answer("</think>A cat.")), id="no-thought"),
        pytest.param(record(answer("a</think>b</think>c")), id="closed-twice"),
        pytest.param(record(answer("<think>Fur. A cat.")), id="thought-unclosed"),
        pytest.param(record(answer("<s>old</s> new <s>price</s>")), id="html-strike"),
        pytest.param(record(answer("a<|im_end|>b</s>")), id="token-inside"),
        pytest.param(record(answer("<|im_end|>")), id="nothing-but-a-token"),
        pytest.param(record(answer("It is </s>")), id="token-that-is-the-answer"),
        pytest.param(record([*PLAIN, ("human", "<image>")], image="a"), id="last-with-image"),
        pytest.param(record([*PLAIN, ("human", "cut \ud83d")]), id="last-with-half-a-character"),
        pytest.param(record([*PLAIN, ("human", 5)]), id="last-without-text"),
        pytest.param(record([("human", "What?")]), id="no-answer"),
        pytest.param({"messages": [], "conversations": None}, id="no-turns"),
        pytest.param(record(PLAIN), id="nothing-wrong"),
    ],
)
def test_what_is_doubtful_or_right_stays_as_it_is(unsure):
    mended, codes = fix_record(unsure)
    assert mended is unsure and codes == []


def test_only_the_end_of_a_caption_is_mended():
    broken = {"image": "a.png", "caption": "A cat.</s>\n", "caption_template": "<image></s>"}
    mended = {"image": "a.png", "caption": "A cat.", "caption_template": "<image>"}
    assert fix_record(broken, "caption") == (mended, ["special-token"])
    unsure = {"image": "", "caption": "A cat."}
    assert fix_record(unsure, "caption") == (unsure, [])


def test_the_table_says_what_is_mended():
    assert set(_FIXES) == {code for code, kind in CODES.items() if kind.fixable}
