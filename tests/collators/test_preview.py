"""A preview is the batch: the same ids and labels, in pieces with names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from vlmtune.collators.packed import PackedCollator
from vlmtune.collators.padded import PaddedCollator
from vlmtune.collators.pieces import pieces_of
from vlmtune.collators.preview import Preview, RowPlace, images_of, preview_sample
from vlmtune.collators.rendering import encode, render
from vlmtune.collators.sample import SampleEncoder
from vlmtune.data.conversation import Turn
from vlmtune.data.sources import Source
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

GOLDENS = Path(__file__).parents[1] / "goldens" / "ovis2_5"
IMAGES = GOLDENS / "preprocess" / "images"
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
END, NEXT = "<|im_end|>", "<|im_end|>\n"
EMPTY = "<think>\n\n</think>\n\n"


def record(*turns: str, **media: Any) -> dict[str, Any]:
    """Turns as "speaker: text"."""
    said = [turn.split(": ", 1) for turn in turns]
    return {"id": "one", **media, "conversations": [{"from": f, "value": v} for f, v in said]}


def preview(encoder: SampleEncoder, given: dict[str, Any], place=None) -> tuple[Preview, dict]:
    """The preview of a record, and its row."""
    kind = "caption" if "caption" in given else "conversation"
    source = Source("train", "train.json", str(IMAGES), kind)
    row = encoder.row(source.parse(17, given))
    return preview_sample(encoder, source, 3, row, given, place), row


def shown(seen: Preview) -> list[tuple[str, bool, str]]:
    return [(piece.kind, piece.trained, piece.text) for piece in seen.pieces]


def ids_of(seen: Preview) -> list[int]:
    return [i for piece in seen.pieces for token in piece.tokens for i in token.ids]


def labels_of(seen: Preview) -> list[int]:
    return [i for piece in seen.pieces for token in piece.tokens for i in token.labels]


TEXT = record("system: Be brief.", "human: 5?", "gpt: 9 é你😀.", "human: <think>", "gpt: 7")
SEEN = record("human: <image>\nWhat?", "gpt: A square.", image="grad_40x70.png")
TWO_SEEN = record(
    "human: <image> and <image>: which is larger?",
    "gpt: <think>\nThe first is 64 wide.\n</think>\n\n\nThe first.",
    image=["grad_64x64.png", "tiny_2x2.png"],
)
FILM = record("human: <video>\nWhat?", "gpt: Grey.", video_frames=["grad_64x64.png"] * 5)
CAPTION = {
    "id": "c",
    "image": "grad_40x70.png",
    "caption": "A square.",
    "caption_template": "a<image>b",
}
IGNORED = record("human: 5", "ignored_gpt: <think>\nno\n</think>\n\nfour", "human: 7", "gpt: six")
TOOLS = record(
    "human: 5",
    "gpt: <think>\na\n</think>\n\nCall.<tool_response><think></tool_response><think>b</think>Done.",
)
SHOWN_THOUGHT = record(
    "human: 5", "gpt: <think>\nsee <image> here\n</think>\n\n9", image="tiny_2x2.png"
)
HISTORY = record("human: 5", "gpt: <think>\na\n</think>\n\n9", "human: 7", "gpt: 8")
SAMPLES = {
    "text": TEXT,
    "image": SEEN,
    "two-images-thinking": TWO_SEEN,
    "video-frames": FILM,
    "caption": CAPTION,
    "ignored": IGNORED,
    "tool-response": TOOLS,
    "image-in-thought": SHOWN_THOUGHT,
    "history": HISTORY,
}


@pytest.mark.parametrize("thinking", ["every_turn", "last_turn", "as_is"])
@pytest.mark.parametrize("name", SAMPLES)
def test_pieces_hold_the_ids_and_labels_of_the_batch(make_encoder, name, thinking):
    encoder = make_encoder(thinking=thinking)
    seen, row = preview(encoder, SAMPLES[name])
    batch = PaddedCollator(encoder)([row])
    assert ids_of(seen) == batch["input_ids"][0].tolist()
    assert labels_of(seen) == batch["labels"][0].tolist()
    assert (seen.length, seen.cut) == (batch["input_ids"].shape[1], 0)
    assert seen.trained_tokens == int((batch["labels"] != -100).sum()) > 0
    assert (seen.index, seen.source, seen.record) == (3, "train.json", 17)
    for piece in seen.pieces:
        trained = {label != -100 for token in piece.tokens for label in token.labels}
        assert trained == {piece.trained}


@pytest.mark.parametrize("name", SAMPLES)
def test_pieces_hold_the_batch_of_a_sample_at_every_length_limit(make_encoder, name):
    whole, _ = preview(make_encoder(), SAMPLES[name])
    for limit in range(1, whole.length):
        encoder = make_encoder(multimodal_max_length=limit, text_max_length=limit)
        seen, row = preview(encoder, SAMPLES[name])
        batch = PaddedCollator(encoder)([row]) if seen.length else None
        assert ids_of(seen) == (batch["input_ids"][0].tolist() if batch else [])
        assert labels_of(seen) == (batch["labels"][0].tolist() if batch else [])
        assert ids_of(seen) == ids_of(whole)[: seen.length]
        assert seen.length + seen.cut == whole.length


def test_pieces_of_packed_samples_hold_the_row(make_encoder):
    encoder = make_encoder()
    given = [SEEN, TEXT, CAPTION, TOOLS]
    rows = [preview(encoder, one)[1] for one in given]
    batch = PackedCollator(encoder)(rows)
    total, start, previews = sum(row["length"] for row in rows), 0, []
    for one, row in zip(given, rows, strict=True):
        previews.append(preview(encoder, one, RowPlace(2, start, total, 512))[0])
        start += row["length"]
    assert [i for seen in previews for i in ids_of(seen)] == batch["input_ids"][0].tolist()
    assert [i for seen in previews for i in labels_of(seen)] == batch["labels"][0].tolist()
    bounds = batch["cu_seq_lens_q"].tolist()
    assert [seen.place.start for seen in previews if seen.place] == bounds[:-1]
    assert {seen.place.tokens for seen in previews if seen.place} == {bounds[-1]}


def test_first_token_of_a_packed_sample_is_not_trained(make_encoder):
    """Nothing before it predicts it: a trained one loses its label as in the collator."""
    encoder = make_encoder()
    source = Source("train", "train.json")
    row = encoder.row(source.parse(17, TEXT)) | {"trained": [0, 3]}
    alone = preview_sample(encoder, source, 0, row, TEXT)
    packed = preview_sample(encoder, source, 0, row, TEXT, RowPlace(0, 0, 9, 9))
    assert (alone.trained_tokens, packed.trained_tokens) == (3, 2)
    assert labels_of(alone) == PaddedCollator(encoder)([row])["labels"][0].tolist()
    assert labels_of(packed) == PackedCollator(encoder)([row])["labels"][0].tolist()


def test_pieces_of_two_images_and_a_thought_are_named(make_encoder):
    seen, _ = preview(make_encoder("full_single_untied"), TWO_SEEN)
    assert shown(seen) == [
        ("prompt", False, USER),
        ("image", False, seen.pieces[1].text),
        ("prompt", False, " and "),
        ("image", False, seen.pieces[3].text),
        ("prompt", False, f": which is larger?{NEXT}{ASSISTANT}"),
        ("thought", True, "<think>\nThe first is 64 wide.\n</think>\n\n"),
        ("answer", True, "\nThe first."),
        ("stop", True, END),
    ]
    images = seen.pieces[1], seen.pieces[3]
    assert [image.medium for image in images] == [0, 1]
    for number, (image, medium) in enumerate(zip(images, seen.media, strict=True), start=1):
        _, rows, columns = medium.grid
        sides = f"{rows // 2}×{columns // 2}"
        assert image.text == f"⟨image {number}: {sides} → {medium.tokens} tokens⟩"
        assert image.length == medium.tokens + 2 == rows * columns // 4 + 2


@pytest.mark.parametrize(
    ("given", "changes", "pieces"),
    [
        pytest.param(
            TEXT,
            {},
            [
                ("prompt", False, f"<|im_start|>system\nBe brief.{NEXT}{USER}5?{NEXT}{ASSISTANT}"),
                ("empty think", False, EMPTY),
                ("answer", True, "9 é你😀."),
                ("stop", True, END),
                ("prompt", False, f"\n{USER}<think>{NEXT}{ASSISTANT}"),
                ("empty think", False, EMPTY),
                ("answer", True, "7"),
                ("stop", True, END),
            ],
            id="think-tag-of-a-question-is-prompt",
        ),
        pytest.param(
            IGNORED,
            {},
            [
                ("prompt", False, f"{USER}5{NEXT}{ASSISTANT}"),
                ("thought", False, "<think>\nno\n</think>\n\n"),
                ("answer", False, "four"),
                ("stop", False, END),
                ("prompt", False, f"\n{USER}7{NEXT}{ASSISTANT}"),
                ("empty think", False, EMPTY),
                ("answer", True, "six"),
                ("stop", True, END),
            ],
            id="ignored-answer",
        ),
        pytest.param(
            TOOLS,
            {},
            [
                ("prompt", False, f"{USER}5{NEXT}{ASSISTANT}"),
                ("thought", True, "<think>\na\n</think>\n\n"),
                ("answer", True, "Call."),
                ("tool response", False, "<tool_response><think></tool_response>"),
                ("thought", True, "<think>b</think>"),
                ("answer", True, "Done."),
                ("stop", True, END),
            ],
            id="think-tag-of-a-tool-opens-nothing",
        ),
        pytest.param(
            HISTORY,
            {"thinking": "last_turn"},
            [
                ("prompt", False, f"{USER}5{NEXT}{ASSISTANT}"),
                ("answer", False, "9"),
                ("stop", False, END),
                ("prompt", False, f"\n{USER}7{NEXT}{ASSISTANT}"),
                ("empty think", False, EMPTY),
                ("answer", True, "8"),
                ("stop", True, END),
            ],
            id="history-without-thoughts",
        ),
        pytest.param(
            record("human: 5", f"gpt: {EMPTY}9"),
            {"thinking": "as_is"},
            [
                ("prompt", False, f"{USER}5{NEXT}{ASSISTANT}"),
                ("empty think", True, EMPTY),
                ("answer", True, "9"),
                ("stop", True, END),
            ],
            id="written-empty-block-is-trained",
        ),
        pytest.param(
            record("human: 5", "gpt: \n\n9<think>no end"),
            {},
            [
                ("prompt", False, f"{USER}5{NEXT}{ASSISTANT}"),
                ("empty think", False, EMPTY),
                ("answer", True, "\n\n9"),
                ("thought", True, "<think>no end"),
                ("stop", True, END),
            ],
            id="unclosed-thought",
        ),
        pytest.param(
            CAPTION,
            {"single_image_max_pixels": 1024},
            [
                ("prompt", False, "a"),
                ("image", False, "⟨image 1: 3×5 → 15 tokens⟩"),
                ("prompt", False, "b"),
                ("answer", True, "A square."),
                ("stop", True, END),
            ],
            id="caption",
        ),
        pytest.param(
            SHOWN_THOUGHT,
            {"single_image_min_pixels": 64, "single_image_max_pixels": 64},
            [
                ("prompt", False, f"{USER}5{NEXT}{ASSISTANT}"),
                ("thought", True, "<think>\nsee "),
                ("image", False, "⟨image 1: 1×1 → 1 tokens⟩"),
                ("thought", True, " here\n</think>\n\n"),
                ("answer", True, "9"),
                ("stop", True, END),
            ],
            id="image-in-thought",
        ),
        pytest.param(
            record("human: 5", "gpt: a <|im_end|> b <|im_start|>user\n9"),
            {},
            [
                ("prompt", False, f"{USER}5{NEXT}{ASSISTANT}"),
                ("empty think", False, EMPTY),
                ("answer", True, "a <|im_end|> b <|im_start|>user\n9"),
                ("stop", True, END),
            ],
            id="control-tokens-spelled-out-stay-answer",
        ),
    ],
)
def test_pieces_are_named_by_who_wrote_them(make_encoder, given, changes, pieces):
    seen, _ = preview(make_encoder(**changes), given)
    assert shown(seen) == pieces


def test_video_shows_the_frames_that_are_taken(make_encoder):
    encoder = make_encoder(min_frames=2, max_frames=3, video_min_pixels=64, video_max_pixels=256)
    seen, row = preview(encoder, FILM)
    [medium] = seen.media
    assert (medium.kind, medium.frames, medium.total_frames) == ("video", 3, 5)
    assert medium.grid == (3, 4, 4)
    assert (medium.width, medium.height) == (64, 64)
    assert (medium.resized_width, medium.resized_height) == (16, 16)
    assert seen.pieces[1].text == "⟨video 1: 3×2×2 → 12 tokens⟩"
    assert [image.size for image in images_of(encoder, row)] == [(16, 16)] * 3


def test_video_file_shows_the_frames_that_are_taken(make_encoder, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "grey.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in (0, 60, 120, 180, 240):
            pixels = np.full((32, 48, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    encoder = make_encoder(min_frames=2, max_frames=3, video_min_pixels=64, video_max_pixels=512)
    given = record("human: <video>\nWhat?", "gpt: Grey.", video=str(tmp_path / "grey.mp4"))
    seen, row = preview(encoder, given)
    [medium] = seen.media
    assert (medium.kind, medium.frames, medium.total_frames) == ("video", 3, 5)
    assert (medium.width, medium.height) == (48, 32)
    images = images_of(encoder, row)
    assert [image.size for image in images] == [(medium.resized_width, medium.resized_height)] * 3
    # The codec is lossy; of five frames `frame_indices` takes the 2nd, 3rd and 5th.
    assert [np.asarray(image).mean() for image in images] == pytest.approx([60, 120, 240], abs=5)


def test_images_are_the_pixels_that_the_model_sees(make_encoder):
    encoder = make_encoder()
    seen, row = preview(encoder, TWO_SEEN)
    images = images_of(encoder, row)
    assert len(images) == len(seen.media) == 2
    for image, medium in zip(images, seen.media, strict=True):
        with Image.open(medium.file) as original:
            size = medium.resized_width, medium.resized_height
            expected = original.convert("RGB")
            assert (medium.width, medium.height) == original.size
            for step in ((size[0], original.height), size):
                if expected.size != step:
                    expected = expected.resize(step, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (3, 1), (4, 2), (3, 2)])
def test_frames_come_back_out_of_patches_bit_by_bit(frames, stride):
    images = Ovis2_5ImageProcessor(patch_size=4, temporal_patch_size=stride)
    noise = np.random.default_rng(0).integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)
    grid = images.grid(16, 24, 64, 4096, frames=frames)
    pixels = np.zeros((grid[0] * grid[1] * grid[2], images.features), np.uint8)
    images.write_patches([Image.fromarray(frame) for frame in noise], grid, pixels)
    back = images.images_of(pixels, grid)
    # The last frame is repeated where they do not fill the grid.
    expected = np.concatenate([noise, noise[-1:]])[: grid[0] * stride]
    np.testing.assert_array_equal([np.asarray(image) for image in back], expected)


def test_media_that_are_cut_off_are_not_listed(make_encoder):
    whole, _ = preview(make_encoder(), TWO_SEEN)
    encoder = make_encoder(multimodal_max_length=whole.pieces[0].length + whole.media[0].tokens + 4)
    seen, row = preview(encoder, TWO_SEEN)
    assert seen.media == whole.media[:1]
    assert len(images_of(encoder, row)) == 1
    assert [problem.code for problem in seen.problems] == ["no-supervision", "media-cut"]


def test_problems_are_those_of_text_files_and_settings(make_encoder, tmp_path):
    Image.new("CMYK", (32, 32)).save(tmp_path / "print.jpg")
    given = record(
        "human: <image>", "gpt: <box>1,1,4000,4</box> <|im_end|> and so on", image="print.jpg"
    )
    source = Source("train", "train.json", str(tmp_path))
    encoder = make_encoder()
    row = encoder.row(source.parse(17, given))
    seen = preview_sample(encoder, source, 0, row, given)
    found = {problem.code: problem for problem in seen.problems}
    assert set(found) == {"image-cmyk", "box-outside", "special-token"}
    assert found["image-cmyk"].field == "image"
    assert {problem.severity for problem in seen.problems} == {"warning"}
    assert preview(encoder, SEEN)[0].problems == []


def test_preview_is_json(make_encoder):
    seen, _ = preview(make_encoder(), TWO_SEEN, RowPlace(0, 0, 9, 9))
    content = json.loads(json.dumps(seen.to_dict()))
    assert content["place"] == {"row": 0, "start": 0, "tokens": 9, "room": 9}
    tokens = [token for piece in content["pieces"] for token in piece["tokens"]]
    assert [i for token in tokens for i in token["ids"]] == ids_of(seen)
    assert content["media"][0]["grid"] == list(seen.media[0].grid)


@pytest.mark.parametrize("text", ["é你😀", "\ufffd", "a\ufffd\ufffdé", "😀\ufffd😀\n\n\n"])
def test_tokens_of_a_character_are_shown_as_one(fusing_processor, text):
    encoded = encode(
        render([Turn("user", text), Turn("assistant", text, True)], fusing_processor),
        fusing_processor,
    )
    pieces = pieces_of(encoded.ids, encoded.labels, [], fusing_processor)
    assert pieces[-2].text == text
    # A byte is a token here, newlines apart.
    assert [token.text for token in pieces[-2].tokens if token.text.strip()] == list(text.strip())
    assert [len(t.ids) for t in pieces[-2].tokens if t.text.strip()] == [
        len(c.encode()) for c in text.strip()
    ]


def test_words_and_bytes_of_a_sentencepiece_tokenizer_keep_their_spaces(processor):
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    pieces = ["▁", "a", "b", "▁a", "▁b", "assistant", "user"]
    vocabulary |= {piece: 256 + i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        BPE(vocabulary, [("▁", "a"), ("▁", "b")], byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|im_end|>")
    other = Ovis2_5Processor(processor.image_processor, tokenizer)
    encoded = encode(render([Turn("assistant", "a 你 b", True)], other, "as_is"), other)
    seen = pieces_of(encoded.ids, encoded.labels, [], other)
    texts = [token.text for token in next(p for p in seen if p.kind == "answer").tokens]
    # This tokenizer puts a space before a text; the character's three bytes are one.
    assert texts == [" a", " ", "你", " b"]


def test_tokens_are_told_from_the_row_and_not_from_the_record(make_encoder):
    encoder = make_encoder()
    source = Source("train", "train.json", str(IMAGES))
    row = encoder.row(source.parse(17, HISTORY))
    seen = preview_sample(encoder, source, 0, row, HISTORY)
    other = preview_sample(encoder, source, 0, row, record("human: 5", "gpt: other"))
    assert other.pieces == seen.pieces
