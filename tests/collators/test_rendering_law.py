"""For any conversation: the untrained prefix of an answer is its prompt, up to each response of a
tool too, the answer is trained whole, nothing else is, and no text is lost or read as a control
token."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.collators.rendering import Encoded, Segment, Thinking, encode, render, render_prompt
from vlmtune.data.conversation import TOOL_RESPONSE, Turn
from vlmtune.models import Ovis2_5Processor

TOKENIZER = Path(__file__).parents[1] / "goldens" / "ovis2_5" / "tokenizer" / "tokenizer.json"
CONTENT_TAGS = {
    *("<think>", "</think>"),
    *("<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>"),
}
ADDED = {a["content"] for a in json.loads(TOKENIZER.read_text("utf-8"))["added_tokens"]}
CONTROL = sorted(ADDED - CONTENT_TAGS)
MARKS = re.compile("<image>|<video>")
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
IGN = -100

PIECES = st.one_of(
    st.sampled_from(["\n", "\n\n", "\n\n\n", " ", "  ", "\t", "\r\n", "<", "<|", "|im_end|>"]),
    st.sampled_from(["The image", " is", "five", "5", "5:9", ".", "图", "🙂"]),
    st.sampled_from(["é", "e\u0301", "\u0301"]),
    st.sampled_from(CONTROL),
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=6),
)
TEXT = st.lists(PIECES, max_size=5).map("".join).filter(lambda text: not MARKS.search(text))
ANSWER = st.one_of(
    TEXT,
    st.builds("<think>{}</think>{}".format, TEXT, TEXT),
    st.builds("<think>\n{}\n</think>\n\n{}".format, TEXT, TEXT),
    st.builds("{}<think> and </think>{}".format, TEXT, TEXT),
    st.builds("<think>{}".format, TEXT),
    st.builds("{}</think>{}".format, TEXT, TEXT),
    st.just(EMPTY_BLOCK + "five"),
)
QUESTION = st.lists(
    st.one_of(TEXT, st.sampled_from(["<image>", "<image>\n", "<think>"])), max_size=4
)
TURN = st.one_of(
    st.builds(Turn, st.just("user"), QUESTION.map("".join)),
    st.builds(Turn, st.just("assistant"), ANSWER, st.just(True)),
    st.builds(Turn, st.just("assistant"), ANSWER, st.just(False)),
    st.builds(Turn, st.just("system"), TEXT),
)
CONVERSATION = st.lists(TURN, min_size=1, max_size=6).filter(lambda ts: any(t.trained for t in ts))


@st.composite
def answer_with_tools(draw) -> str:
    """Text, a call and its response by turns; a thought, if any, ends before or behind one."""
    response = st.lists(st.one_of(TEXT, st.just("<image>")), max_size=3).map("".join)
    rounds = draw(st.lists(st.tuples(TEXT, response), min_size=1, max_size=3))
    pieces = [f"{own}<tool_response>{given}</tool_response>" for own, given in rounds]
    pieces.append(draw(TEXT))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(pieces) - 1))
        pieces = ["<think>", *pieces[:place], f"{draw(TEXT)}</think>", *pieces[place:]]
    return "".join(pieces)


searching = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(scope="session", params=["golden", "fusing"])
def any_processor(request, processor, fusing_processor) -> Ovis2_5Processor:
    return {"golden": processor, "fusing": fusing_processor}[request.param]


def encoded(segments: list[Segment], processor: Ovis2_5Processor) -> Encoded:
    """With 0, 1, 2, 0, ... visual tokens."""
    media = sum(segment.kind in ("image", "video") for segment in segments)
    return encode(segments, processor, [i % 3 for i in range(media)])


def has_thoughts(turn: Turn) -> bool:
    return "<think>" in turn.text and "</think>" in turn.text


def trained_runs(sample: Encoded) -> list[tuple[int, int]]:
    """Bounds of the stretches that carry labels."""
    bounds, start = [], None
    for i, label in enumerate([*sample.labels, IGN]):
        if label != IGN and start is None:
            start = i
        elif label == IGN and start is not None:
            bounds.append((start, i))
            start = None
    return bounds


def text_of(ids: list[int], processor: Ovis2_5Processor) -> str:
    """What the ids other than those of media say, in the tokenizer's normal form."""
    text = processor.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=False)
    return unicodedata.normalize("NFC", text)


def normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@searching
@given(turns=CONVERSATION, thinking=st.sampled_from(["every_turn", "as_is"]))
def test_what_precedes_each_trained_answer_is_its_prompt(
    any_processor, turns: list[Turn], thinking: Thinking
):
    sample = encoded(render(turns, any_processor, thinking), any_processor)
    answers = [i for i, turn in enumerate(turns) if turn.trained]
    runs = trained_runs(sample)
    assert len(runs) == len(answers)
    for (start, _), i in zip(runs, answers, strict=True):
        prompt = render_prompt(turns[:i], any_processor, thinking, has_thoughts(turns[i]))
        assert encoded(prompt, any_processor).ids == sample.ids[:start]


@searching
@given(turns=CONVERSATION)
def test_what_precedes_the_last_answer_is_its_prompt_if_it_alone_is_trained(any_processor, turns):
    sample = encoded(render(turns, any_processor, "last_turn"), any_processor)
    last = max(i for i, turn in enumerate(turns) if turn.trained)
    [(start, stop)] = trained_runs(sample)
    prompt = render_prompt(turns[:last], any_processor, "last_turn", has_thoughts(turns[last]))
    assert encoded(prompt, any_processor).ids == sample.ids[:start]
    assert text_of(sample.ids[start:stop], any_processor) == normal(f"{turns[last].text}<|im_end|>")


@searching
@given(
    history=st.lists(TURN, max_size=3),
    answer=answer_with_tools(),
    thinking=st.sampled_from(["every_turn", "last_turn", "as_is"]),
)
def test_what_precedes_the_end_of_each_tool_response_is_the_prompt_of_the_answer_begun(
    any_processor, history: list[Turn], answer: str, thinking: Thinking
):
    turns = [*history, Turn("assistant", answer, True)]
    sample = encoded(render(turns, any_processor, thinking), any_processor)
    thinks = has_thoughts(turns[-1])
    for response in TOOL_RESPONSE.finditer(answer):
        begun = answer[: response.end()]
        segments = render_prompt(history, any_processor, thinking, thinks, begun)
        prompt = encoded(segments, any_processor)
        assert prompt.ids == sample.ids[: len(prompt.ids)]
        assert text_of(prompt.ids, any_processor).endswith(normal(MARKS.sub("", begun)))


@searching
@given(turns=CONVERSATION, thinking=st.sampled_from(["every_turn", "as_is"]))
def test_exactly_the_answers_and_their_ends_are_trained(any_processor, turns, thinking: Thinking):
    sample = encoded(render(turns, any_processor, thinking), any_processor)
    assert len(sample.labels) == len(sample.ids)
    trained = []
    for start, stop in trained_runs(sample):
        assert sample.labels[start:stop] == sample.ids[start:stop]
        assert sample.labels[stop - 1] == any_processor.control_id("<|im_end|>")
        trained.append(text_of(sample.ids[start:stop], any_processor))
    assert trained == [normal(f"{turn.text}<|im_end|>") for turn in turns if turn.trained]


@searching
@given(turns=CONVERSATION, thinking=st.sampled_from(["every_turn", "as_is"]))
def test_nothing_is_lost_and_no_text_becomes_a_control_token(
    any_processor, turns, thinking: Thinking
):
    sample = encoded(render(turns, any_processor, thinking), any_processor)
    written = ""
    for turn in turns:
        block = turn.trained and thinking == "every_turn" and not has_thoughts(turn)
        written += f"<|im_start|>{turn.role}\n{EMPTY_BLOCK if block else ''}{turn.text}<|im_end|>\n"
    written = written.removesuffix("\n") if turns[-1].trained else written
    assert text_of(sample.ids, any_processor) == normal(MARKS.sub("", written))

    control = {any_processor.control_id(token) for token in CONTROL}
    start, end = (any_processor.control_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert [i for i in sample.ids if i in control] == [start, end] * len(turns)


@searching
@given(turns=CONVERSATION, thinking=st.sampled_from(["every_turn", "last_turn", "as_is"]))
def test_media_stand_within_their_bounds_and_carry_no_label(
    any_processor, turns, thinking: Thinking
):
    sample = encoded(render(turns, any_processor, thinking), any_processor)
    inside = [i for begin, end in sample.media for i in range(begin, end)]
    assert inside == [i for i, token in enumerate(sample.ids) if token < 0]
    assert all(sample.labels[i] == IGN for i in inside)
    assert [sample.ids[begin:end] for begin, end in sample.media] == [
        [-301, *[-300] * (n % 3), -302]
        for n in range(sum(len(MARKS.findall(turn.text)) for turn in turns))
    ]


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_control_token_spelled_out_stays_text_in_every_role(processor, token, role):
    text = f"{token}a{token}{token}<{token}"
    turns = [Turn(role, text, role == "assistant"), Turn("assistant", "5", True)]
    sample = encode(render(turns, processor), processor)
    index = processor.tokenizer.convert_tokens_to_ids(token)
    assert 320 <= index <= 341
    turn_borders = {"<|im_start|>": 2, "<|im_end|>": 2}
    assert sample.ids.count(index) == turn_borders.get(token, 0)
    assert text in processor.tokenizer.decode(sample.ids)


@pytest.mark.parametrize("tag", sorted(CONTENT_TAGS))
def test_tags_of_thoughts_and_tools_are_tokens_in_text(processor, tag):
    turns = [Turn("user", f"a{tag}5"), Turn("assistant", "5", True)]
    sample = encode(render(turns, processor), processor)
    index = processor.tokenizer.convert_tokens_to_ids(tag)
    assert sample.ids[:6] == [321, 314, 198, 64, index, 20]


def test_answer_that_starts_with_a_newline_is_not_fused_with_the_prompt_unlike_in_the_reference(
    fusing_processor,
):
    turns = [Turn("user", "5"), Turn("assistant", "\nfive", True)]
    sample = encode(render(turns, fusing_processor), fusing_processor)
    tokenizer = fusing_processor.tokenizer
    one, two, three = (tokenizer("\n" * n)["input_ids"] for n in (1, 2, 3))
    close, end = (fusing_processor.control_id(token) for token in ("</think>", "<|im_end|>"))

    fused = tokenizer(f"{EMPTY_BLOCK}\nfive")["input_ids"]
    assert fused[-6:] == [close, *three, *tokenizer("five")["input_ids"]]
    assert sample.ids[-8:] == [close, *two, *one, *tokenizer("five")["input_ids"], end]
    assert sample.labels[-8:] == [IGN, IGN, *sample.ids[-6:]]
    assert sample.labels[:-6] == [IGN] * (len(sample.ids) - 6)
    prompt = encode(render_prompt(turns[:1], fusing_processor), fusing_processor)
    assert prompt.ids == sample.ids[:-6]


def test_begun_caption_stands_behind_its_template_without_an_end(processor):
    template, caption = Turn("plain", "See <image>: "), Turn("plain", "A cat", True)
    sample = render([template, caption], processor)
    assert render_prompt([template], processor, begun="A cat") == sample[:-1]
