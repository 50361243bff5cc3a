"""What the length limits and `thinking` of a run do to a sample, told before it is trained on."""

import pytest

from vlmtune.collators.sample import SampleEncoder
from vlmtune.collators.sample_checks import check_sample
from vlmtune.data.conversation import Conversation, parse_conversation
from vlmtune.data.findings import Finding

# 3 tokens of the header, 1 of the question, 9 up to the answer; the answer and its end are trained.
LENGTH = 3 + 1 + 9 + 2
SMALL = (1, 8, 8)
"""An image of one merge block at the least pixels of the tests: 3 tokens."""


def parse(question: str, *rest: str, **media) -> Conversation:
    turns = [
        {"from": "gpt" if i % 2 else "human", "value": text}
        for i, text in enumerate((question, *rest))
    ]
    return parse_conversation({"id": "one", **media, "conversations": turns}, "train.json", 17)


def found(encoder: SampleEncoder, conversation: Conversation, files=()) -> list[Finding]:
    errors = check_sample(encoder, conversation, files)
    return [Finding.of(error, "train.json", 17, "one") for error in errors]


@pytest.fixture
def limited(make_encoder):
    """`limited(tokens, key=value)`: an encoder of that limit with one visual token per image."""
    pixels = {
        f"{kind}_{end}_pixels": 64
        for kind in ("single_image", "multiple_image", "video")
        for end in ("min", "max")
    }

    def make(limit: int, **changes) -> SampleEncoder:
        limits = {"text_max_length": limit, "multimodal_max_length": limit}
        return make_encoder(**{**pixels, **limits, **changes})

    return make


@pytest.mark.parametrize("limit", [LENGTH, LENGTH + 1])
def test_a_sample_that_fits_has_no_findings(limited, limit):
    assert found(limited(limit), parse("5", "9")) == []


def test_a_cut_names_the_tokens_the_limit_and_what_is_lost(limited):
    conversation = parse("5", "9", "5", "9")
    [finding] = found(limited(LENGTH + 5), conversation)
    whole = 2 * LENGTH + 1
    assert (finding.code, finding.severity) == ("too-long", "warning")
    assert (finding.record, finding.id, finding.field) == (17, "one", "conversations")
    assert finding.what == (
        f"{whole} tokens, cut to {LENGTH + 5} by text_max_length {LENGTH + 5}: 2 of 4 trained ones "
        "are lost."
    )
    assert finding.fix == f"raise text_max_length to {whole}, or shorten the sample."


@pytest.mark.parametrize(
    ("limit", "code"), [(LENGTH - 1, "too-long"), (LENGTH - 2, "no-supervision")]
)
def test_a_sample_without_a_trained_token_left_is_an_error(limited, limit, code):
    [finding] = found(limited(limit), parse("5", "9"))
    assert finding.code == code
    if code == "no-supervision":
        assert finding.severity == "error"
        assert finding.what == (
            f"no token to learn from is left of {LENGTH} after the cut to {limit}: training leaves "
            "the sample out."
        )


def test_images_that_do_not_fit_are_counted(limited):
    conversation = parse("5", "9", "<image><image><image>", "9", image=["a", "b", "c"])
    # The first question and answer with the newline between, a header and one image.
    encoder = limited(LENGTH + 1 + 3 + 3 + 2)
    cut, media = found(encoder, conversation, [SMALL] * 3)
    assert (cut.code, media.code, media.severity) == ("too-long", "media-cut", "warning")
    assert cut.what.startswith(f"{2 * LENGTH + 9} tokens, cut to {LENGTH + 7} by multimodal_max_")
    assert media.field == "image"
    assert media.what == (
        f"2 of 3 images do not fit into multimodal_max_length {LENGTH + 9}, and the model does not "
        "see them."
    )


def test_frames_of_a_video_are_as_large_as_the_first_one_taken(limited):
    conversation = parse("<video>", "9", video_frames=["a", "b", "c", "d"])
    files = [(1, 800, 8), (1, 8, 8), (1, 8, 8), (1, 800, 8)]
    encoder = limited(100, min_frames=2, max_frames=2, video_max_pixels=8000)
    # Of four frames the second and the fourth are taken: 2 visual tokens and their ends.
    whole = encoder.expand(conversation, encoder.media_sizes(conversation, files))
    assert encoder.taken(4) == [1, 3]
    assert len(whole.ids) == LENGTH - 1 + 4
    [cut, media] = found(
        limited(8, min_frames=2, max_frames=2),
        parse("5", "9", "<video>", "9", video_frames=["a"] * 2),
        [SMALL] * 2,
    )
    assert (cut.code, media.code, media.field) == ("no-supervision", "media-cut", "video_frames")


def test_a_caption_is_named_by_its_field(limited):
    record = {"id": "one", "image": "a.png", "caption": "9 9 9"}
    conversation = parse_conversation(record, "train.json", 17, None, "caption")
    [finding] = found(limited(3), conversation, [SMALL])
    assert (finding.code, finding.field) == ("no-supervision", "caption")


def test_an_earlier_thought_with_an_image_is_found_where_history_has_none(limited):
    given = parse("5", "<think>\n<image>\n</think>\n\n9", "5", "9", image="a.png")
    assert found(limited(100), given, [SMALL]) == []
    [finding] = found(limited(100, thinking="last_turn"), given, [SMALL])
    assert (finding.code, finding.severity) == ("thinking-history", "error")
    assert finding.field == "thinking: last_turn"
