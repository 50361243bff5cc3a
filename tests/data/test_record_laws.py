"""What holds for every record, however broken: reading, parsing, checking and mending agree."""

import copy
import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.core.errors import DataError
from vlmtune.data.checks import check_text
from vlmtune.data.conversation import parse_conversation, read_conversation
from vlmtune.data.findings import CODES, Finding
from vlmtune.data.fixes import fix_record

PIECES = (
    *("A cat.", "What?", " ", "\n", "图", "\ud83d", "[1]", "<img>"),
    *("<image>", "<video>", "<think>", "</think>", "<tool_response>", "</tool_response>"),
    *("<|im_end|>", "</s>", "[INST]"),
)
ROLES = ("human", "gpt", "user", "assistant", "system", "ignored_gpt", "Bot", " GPT", "tool", "")
PATHS = ("a.png", "/b.png", "", "None", "a\0.png", "\ud83d", None, 5, float("nan"))

JUNK = (None, True, 0, -7, 2.5, float("nan"), "", "a\ud83d", [], {}, [[1]], {"type": "text"})

NEVER_MENDED = {
    *("turns-missing", "text-type", "content-part", "surrogate", "answer-none", "answer-empty"),
    *("tool-response", "image-marks-many", "caption-empty", "caption-template", "id-type"),
}

junk = st.sampled_from(JUNK)
texts = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts | junk}),
    st.sampled_from([{"type": "image"}, {"type": "video"}, {"type": "audio"}, {}, "image"]),
)
questions = st.sampled_from(["What?", "<image>\nWhat?", "", "What?</s>"])
answers = st.sampled_from(["A cat.", "A cat.<|im_end|>\n", "Fur.</think>A cat.", "<image>"])
speakers = st.sampled_from(ROLES) | junk
contents = texts | st.lists(parts, max_size=3) | junk
right_turns = st.one_of(
    st.fixed_dictionaries({"from": st.sampled_from(ROLES[:2]), "value": texts}),
    st.fixed_dictionaries({"role": st.sampled_from(ROLES[2:5]), "content": contents}),
)
turns = st.one_of(
    right_turns,
    st.fixed_dictionaries(
        {},
        optional={"from": speakers, "value": contents, "role": speakers, "content": contents},
    ),
    junk,
)
media = st.sampled_from(PATHS) | st.lists(st.sampled_from(PATHS), max_size=3) | junk
records = st.one_of(
    junk,
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.text(max_size=3) | junk,
            "conversations": st.lists(turns, max_size=4) | junk,
            "messages": st.lists(turns, max_size=4) | junk,
            "caption": texts | junk,
            "caption_template": texts | junk,
            **dict.fromkeys(("image", "images", "video", "video_frames"), media),
        },
    ),
    # Right ones and nearly right ones, which random keys seldom make.
    st.fixed_dictionaries(
        {
            "conversations": st.tuples(
                st.fixed_dictionaries({"from": st.just("human"), "value": questions}),
                st.fixed_dictionaries({"from": st.just("gpt"), "value": answers}),
            ).map(list)
        },
        optional={"image": st.sampled_from(["a.png", ["a.png"], []])},
    ),
    st.fixed_dictionaries(
        {"conversations": st.lists(right_turns, min_size=1, max_size=4)},
        optional={"image": media, "video": media},
    ),
)
formats = st.sampled_from(["conversation", "conversation", "caption"])


def found_in(record, data_format: str) -> list[DataError]:
    conversation, faults = read_conversation(record, "d.json", 3, None, data_format)
    return [*faults, *(check_text(record, conversation) if conversation else [])]


@settings(deadline=None, max_examples=200)
@given(records, formats)
def test_a_record_is_parsed_exactly_if_reading_finds_no_fault(record, data_format):
    given_text = repr(record)
    conversation, faults = read_conversation(record, "d.json", 3, "/data", data_format)
    assert repr(record) == given_text
    try:
        parsed = parse_conversation(record, "d.json", 3, "/data", data_format)
    except DataError as error:
        assert faults and (str(error), error.code) == (str(faults[0]), faults[0].code)
    else:
        assert not faults and parsed == conversation
    assert (conversation is None) == (not isinstance(record, dict))


@settings(deadline=None, max_examples=200)
@given(records, formats)
def test_every_finding_has_a_known_code_and_its_place(record, data_format):
    conversation, faults = read_conversation(record, "d.json", 3, None, data_format)
    identity = conversation.id if conversation else ""
    for error in found_in(record, data_format):
        finding = Finding.of(error, "d.json", 3, identity)
        assert finding.severity == CODES[error.code].severity
        assert error.where == (
            "d.json, record 3"
            + (f' (id "{identity}")' if conversation else "")
            + (f", {finding.field}" if finding.field else "")
        )
        json.dumps(vars(finding), ensure_ascii=False)
    assert all(CODES[error.code].severity == "error" for error in faults)


@settings(deadline=None, max_examples=200)
@given(records, formats)
def test_a_mended_record_has_lost_the_codes_it_tells_and_gained_none(record, data_format):
    if not isinstance(record, dict):
        return
    before = copy.deepcopy(record)
    mended, codes = fix_record(record, data_format)
    assert repr(record) == repr(before)
    first, left = (Counter(e.code for e in found_in(r, data_format)) for r in (record, mended))
    assert left <= first
    assert set(codes) == first.keys() - left.keys()
    assert not NEVER_MENDED & set(codes)
    assert (mended is record) == (not codes)
    assert fix_record(mended, data_format) == (mended, [])
