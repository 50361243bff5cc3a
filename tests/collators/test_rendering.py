"""Conversations against the ids and labels of the reference, and the rules it does not have."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlmtune.collators.rendering import Encoded, Segment, Thinking, encode, render, render_prompt
from vlmtune.core.errors import DataError
from vlmtune.data.conversation import ROLES, Turn, parse_conversation

GOLDENS = Path(__file__).parents[1] / "goldens" / "ovis2_5"
CONVERSATIONS = json.loads((GOLDENS / "conversation" / "conversations.json").read_text("utf-8"))
SFT: dict[str, Any] = CONVERSATIONS["sft"]
PROMPTS: dict[str, Any] = CONVERSATIONS["generation_prompts"]
TEMPLATES: dict[str, Any] = CONVERSATIONS["hub_chat_template"]
ERRORS: dict[str, Any] = CONVERSATIONS["errors"]
SPELLED_OUT = "special_token_text_in_question"
IGN = -100
TURN_END = 322


def turns_of(conversations: list[dict[str, str]]) -> list[Turn]:
    return [
        Turn(ROLES[turn["from"]], turn["value"], trained=turn["from"] == "gpt")
        for turn in conversations
    ]


def encoded(segments: list[Segment], processor) -> Encoded:
    return encode(segments, processor, [0] * sum(s.kind in ("image", "video") for s in segments))


def with_reference_marks(sample: Encoded) -> tuple[list[int], list[int]]:
    """Ids and labels with each medium, here its two indicators alone, as -200 or -201."""
    ids, labels = list(sample.ids), list(sample.labels)
    for begin, end in reversed(sample.media):
        ids[begin:end] = {(-301, -302): [-200], (-303, -304): [-201]}[tuple(ids[begin:end])]
        assert labels[begin:end] == [IGN, IGN]
        labels[begin:end] = [IGN]
    return ids, labels


def trained_text(sample: Encoded, processor) -> str:
    return processor.tokenizer.decode([label for label in sample.labels if label != IGN])


def human(text: str) -> Turn:
    return Turn("user", text)


def gpt(text: str) -> Turn:
    return Turn("assistant", text, trained=True)


def ignored(text: str) -> Turn:
    return Turn("assistant", text)


@pytest.mark.parametrize("name", [name for name in SFT if name != SPELLED_OUT])
def test_sample_has_the_ids_and_labels_of_the_reference(processor, name):
    sample = encoded(render(turns_of(SFT[name]["conversations"]), processor), processor)
    expected = SFT[name]["tiny"]
    assert with_reference_marks(sample) == (expected["input_ids"], expected["labels"])
    assert trained_text(sample, processor) == "".join(expected["loss_text"])


def test_control_token_spelled_out_by_the_user_stays_text_unlike_in_the_reference(processor):
    question = SFT[SPELLED_OUT]["conversations"][0]["value"]
    before, after = question.split("<|im_end|>")
    sample = encoded(render(turns_of(SFT[SPELLED_OUT]["conversations"]), processor), processor)

    theirs = SFT[SPELLED_OUT]["tiny"]
    assert theirs["input_ids"].count(TURN_END) == 3
    first = theirs["input_ids"].index(TURN_END)
    rest = len(theirs["input_ids"]) - first - 1
    assert sample.ids.count(TURN_END) == 2
    assert sample.ids[:first] == theirs["input_ids"][:first]
    assert processor.tokenizer.decode(sample.ids[first:-rest]) == "<|im_end|>"
    assert sample.ids[-rest:] == theirs["input_ids"][-rest:]
    assert sample.labels == [IGN] * (len(sample.ids) - rest) + theirs["labels"][-rest:]

    turn_ends = [i for i, token in enumerate(sample.ids) if token == TURN_END]
    prompt = processor.tokenizer.decode(sample.ids[: turn_ends[0] + 1])
    assert prompt == f"<|im_start|>user\n{before}<|im_end|>{after}<|im_end|>"
    assert turn_ends[1] == len(sample.ids) - 1


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("thinking", ["every_turn", "last_turn"])
def test_prompt_has_the_ids_of_the_reference(processor, name, thinking):
    turns = turns_of(PROMPTS[name]["conversations"])
    on = name.endswith("enable_thinking_true")
    prompt = encoded(render_prompt(turns, processor, thinking, enable_thinking=on), processor)
    expected = PROMPTS[name]["tiny"]["input_ids"]
    if thinking == "every_turn" and name.startswith("with_history/"):
        # The reference trains this history with empty think blocks, and prompts without.
        block = processor.tokenizer("<think>\n\n</think>\n\n")["input_ids"]
        answer = processor.tokenizer("A square.")["input_ids"]
        [start] = [i for i in range(len(expected)) if expected[i : i + len(answer)] == answer]
        expected = [*expected[:start], *block, *expected[start:]]
        training = render([*turns, gpt("<think>5</think>5" if on else "5")], processor)
        assert encoded(training, processor).ids[: len(prompt.ids)] == prompt.ids
    assert with_reference_marks(prompt)[0] == expected


@pytest.mark.parametrize("enable_thinking", [False, True])
def test_last_turn_writes_history_as_the_published_template(processor, enable_thinking):
    given = TEMPLATES["history_with_thinking"]
    history = [Turn(m["role"], m["content"], m["role"] == "assistant") for m in given["messages"]]
    prompt = encoded(
        render_prompt(history, processor, "last_turn", enable_thinking=enable_thinking), processor
    )
    assert any("<think>" in turn.text for turn in history)
    mode = f"add_generation_prompt,enable_thinking={enable_thinking}"
    assert processor.tokenizer.decode(prompt.ids) == given["rendered"][mode]


@pytest.mark.parametrize(
    ("name", "media", "what"),
    [
        ("unknown_role", {}, 'unknown role "user".'),
        ("empty_list", {}, "is empty."),
        *(
            (name, {"image": "a.png", "video": "b.mp4"}, "has more than one of")
            for name in ("mixed_image_and_video_turns", "image_and_video_same_turn")
        ),
        ("mixed_image_and_video_turns", {"image": "a.png"}, 'the record has no "video".'),
        ("image_and_video_same_turn", {"video": "b.mp4"}, '"image" lists 0 files.'),
    ],
)
def test_what_the_reference_rejects_or_spoils_is_refused_as_data(name, media, what):
    conversations = ERRORS[name]["conversations"]
    with pytest.raises(DataError) as error:
        parse_conversation({"conversations": conversations, **media}, "train.json", 1)
    assert what in error.value.what


def test_image_in_an_answer_carries_no_label_unlike_in_the_reference(processor):
    assert -200 in ERRORS["image_token_in_answer"]["labels"]
    turns = [human("<image>\nx"), gpt("see <image> there")]
    sample = encode(render(turns, processor), processor, [1, 2])
    text = processor.tokenizer
    see, there = text("see ")["input_ids"], text(" there")["input_ids"]
    answer = [*see, -301, -300, -300, -302, *there, TURN_END]
    start = len(sample.ids) - len(answer)
    assert sample.ids[start:] == answer
    assert sample.labels == [IGN] * start + [*see, IGN, IGN, IGN, IGN, *there, TURN_END]
    assert sample.media == [(3, 6), (start + len(see), start + len(see) + 4)]


# Single characters of the golden tokenizer: a 64, b 65, c 66, 5 20, newline 198, two 260; the
# added tokens <|im_start|> 321, <|im_end|> 322, <tool_response> 342 and 343, <think> 344 and 345;
# the words user 314, assistant 295.
USER_5 = [321, 314, 198, 20, 322, 198]
ASSISTANT = [321, 295, 198]
NO_THOUGHT = [344, 260, 345, 260]


@pytest.mark.parametrize(
    ("answer", "ids", "trained"),
    [
        pytest.param("c", [66, 322], "11", id="plain"),
        pytest.param(
            "c<tool_response>5</tool_response>b", [66, 342, 20, 343, 65, 322], "100011", id="middle"
        ),
        pytest.param(
            "<tool_response>5</tool_response>b", [342, 20, 343, 65, 322], "00011", id="first"
        ),
        pytest.param(
            "b<tool_response>5</tool_response>", [65, 342, 20, 343, 322], "10001", id="last"
        ),
        pytest.param(
            "<tool_response></tool_response>c<tool_response>5\n5</tool_response>",
            [342, 343, 66, 342, 20, 198, 20, 343, 322],
            "001000001",
            id="two-and-over-lines",
        ),
        pytest.param(
            "b<tool_response>5<image>5</tool_response>c",
            [65, 342, 20, -301, -300, -302, 20, 343, 66, 322],
            "1000000011",
            id="image-in-a-response",
        ),
        pytest.param("b<image>c", [65, -301, -300, -302, 66, 322], "100011", id="image"),
        pytest.param("<image>c", [-301, -300, -302, 66, 322], "00011", id="image-first"),
        pytest.param("b<video>", [65, -303, -300, -304, 322], "10001", id="video-last"),
        pytest.param(
            "b<image><image>",
            [65, -301, -300, -302, -301, -300, -302, 322],
            "10000001",
            id="images-side-by-side",
        ),
    ],
)
def test_what_an_answer_was_given_is_not_trained(processor, answer, ids, trained):
    sample = encode(render([human("5"), gpt(answer)], processor), processor, [1, 1])
    before = [*USER_5, *ASSISTANT, *NO_THOUGHT]
    assert sample.ids == before + ids
    expected = [i if on == "1" else IGN for i, on in zip(ids, trained, strict=True)]
    assert sample.labels == [IGN] * len(before) + expected
    assert sample.trained_tokens == trained.count("1")


@pytest.mark.parametrize(
    ("thinking", "answer", "ids"),
    [
        ("every_turn", "c", [*NO_THOUGHT, 66]),
        ("every_turn", "<think>5</think>c", [344, 20, 345, 66]),
        ("every_turn", "<think>c", [*NO_THOUGHT, 344, 66]),
        ("last_turn", "c", [*NO_THOUGHT, 66]),
        ("last_turn", "<think>5</think>c", [344, 20, 345, 66]),
        ("as_is", "c", [66]),
        ("as_is", "<think>5</think>c", [344, 20, 345, 66]),
        ("as_is", "<think>c", [344, 66]),
    ],
)
def test_empty_block_stands_untrained_before_answers_without_thoughts(
    processor, thinking: Thinking, answer, ids
):
    sample = encode(render([human("5"), gpt(answer)], processor, thinking), processor)
    before = [*USER_5, *ASSISTANT]
    assert sample.ids == [*before, *ids, 322]
    block = len(NO_THOUGHT) if ids[:4] == NO_THOUGHT else 0
    assert sample.labels == [IGN] * (len(before) + block) + [*ids[block:], 322]


@pytest.mark.parametrize("thinking", ["every_turn", "last_turn", "as_is"])
def test_ignored_answer_has_neither_block_nor_labels(processor, thinking: Thinking):
    turns = [human("5"), ignored("b"), human("5"), gpt("<think>a</think>c"), ignored("b")]
    sample = encode(render(turns, processor, thinking), processor)
    unlearned = [*ASSISTANT, 65, 322, 198]
    before = [*USER_5, *unlearned, *USER_5, *ASSISTANT]
    learned = [344, 64, 345, 66, 322]
    assert sample.ids == [*before, *learned, 198, *unlearned]
    assert sample.labels == [IGN] * len(before) + learned + [IGN] * (1 + len(unlearned))


@pytest.mark.parametrize(
    ("earlier", "kept"),
    [
        ("<think>a</think>\n\nc", [66]),
        ("<think>a</think>c\n", [66, 198]),
        ("<think>a</think><think>b</think>\nc", [66]),
        ("a</think>c", [66]),
        ("<think>c", [344, 66]),
        ("<think>a</think>", []),
    ],
)
@pytest.mark.parametrize("speaker", [gpt, ignored])
def test_last_turn_trains_the_last_answer_alone_and_strips_earlier_thoughts(
    processor, speaker, earlier, kept
):
    turns = [human("5"), speaker(earlier), human("5"), gpt("<think>a</think>b"), human("5")]
    sample = encode(render(turns, processor, "last_turn"), processor)
    before = [*USER_5, *ASSISTANT, *kept, 322, 198, *USER_5, *ASSISTANT]
    learned = [344, 64, 345, 65, 322]
    assert sample.ids == [*before, *learned, 198, *USER_5]
    assert sample.labels == [IGN] * len(before) + learned + [IGN] * (1 + len(USER_5))


@pytest.mark.parametrize("earlier", ["\nc", "\n<think>c", "\n\n"])
def test_last_turn_keeps_answers_without_thoughts_as_they_are(processor, earlier):
    sample = encode(render([human("5"), gpt(earlier), gpt("c")], processor, "last_turn"), processor)
    assert processor.tokenizer.decode(sample.ids) == (
        f"<|im_start|>user\n5<|im_end|>\n<|im_start|>assistant\n{earlier}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nc<|im_end|>"
    )


def test_last_turn_keeps_think_tags_of_the_user(processor):
    sample = encode(render([human("a</think>b"), gpt("c")], processor, "last_turn"), processor)
    assert sample.ids[:6] == [321, 314, 198, 64, 345, 65]


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
@pytest.mark.parametrize("make", [render, render_prompt])
def test_last_turn_refuses_to_drop_a_medium_within_a_thought(processor, make, mark):
    turns = [human("5"), gpt(f"<think>{mark}</think>c"), human("5"), gpt("b")]
    with pytest.raises(DataError) as error:
        make(turns, processor, thinking="last_turn")
    assert error.value.where == "thinking: last_turn"
    assert error.value.what == "would drop an earlier thought that holds an image."
    assert error.value.fix == 'use "thinking": "every_turn" for this data.'


def test_last_turn_keeps_an_image_behind_an_earlier_thought(processor):
    turns = [human("5"), gpt("<think>a</think><image>"), human("5"), gpt("<think><image></think>b")]
    sample = encode(render(turns, processor, "last_turn"), processor, [1, 1])
    assert [sample.ids[begin:end] for begin, end in sample.media] == [[-301, -300, -302]] * 2


def test_each_medium_takes_its_own_number_of_visual_tokens(processor):
    turns = [human("<image>5<image><image>"), gpt("c")]
    sample = encode(render(turns, processor), processor, [2, 0, 1])
    media = [-301, -300, -300, -302, 20, -301, -302, -301, -300, -302]
    assert sample.ids[:13] == [321, 314, 198, *media]
    assert sample.media == [(3, 7), (8, 10), (10, 13)]


CAPTION = [Turn("plain", "See <image>: "), Turn("plain", "A cat.", True)]


@pytest.mark.parametrize("thinking", ["every_turn", "last_turn", "as_is"])
def test_caption_has_no_chat_around_it_and_ends_in_a_trained_stop_token(processor, thinking):
    segments = render(CAPTION, processor, thinking)
    assert segments == [
        Segment("See "),
        Segment("<image>", kind="image"),
        Segment(": "),
        Segment("A cat.", trained=True),
        Segment("<|im_end|>", trained=True, kind="control"),
    ]
    sample = encode(segments, processor, [2])
    head, tail, caption = (processor.text_ids(t) for t in ("See ", ": ", "A cat."))
    end = processor.control_id("<|im_end|>")
    prompt = [*head, -301, -300, -300, -302, *tail]
    assert sample.ids == [*prompt, *caption, end]
    assert sample.labels == [*[IGN] * len(prompt), *caption, end]
    # The untrained prefix is the prompt.
    given = render_prompt(CAPTION[:1], processor, thinking)
    assert encode(given, processor, [2]).ids == prompt


@pytest.mark.parametrize("thinking", ["every_turn", "last_turn", "as_is"])
def test_conversation_without_an_answer_trains_nothing(processor, thinking):
    sample = encode(render([Turn("user", "")], processor, thinking), processor)
    assert len(sample.ids) == 5
    assert sample.trained_tokens == 0
