"""Prompts as the published template writes them, and ids the model reads."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AddedToken, AutoProcessor, ByT5Tokenizer

from vlmtune.core.errors import ModelError
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.build import chat_tokenizer
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor
from vlmtune.models.ovis2_5.processing_ovis2_5 import CONTENT_TAGS

GOLDENS = Path(__file__).parents[2] / "goldens" / "ovis2_5"
IMAGES = GOLDENS / "preprocess" / "images"
CONVERSATIONS = json.loads((GOLDENS / "conversation" / "conversations.json").read_text("utf-8"))
TEMPLATES: dict[str, Any] = CONVERSATIONS["hub_chat_template"]
PROMPTS: dict[str, Any] = CONVERSATIONS["generation_prompts"]
MODES = {
    "add_generation_prompt,enable_thinking=False": {
        "add_generation_prompt": True,
        "enable_thinking": False,
    },
    "add_generation_prompt,enable_thinking=True": {
        "add_generation_prompt": True,
        "enable_thinking": True,
    },
    "add_generation_prompt,enable_thinking unset": {"add_generation_prompt": True},
    "no generation prompt": {},
}
LIMITS = {"min_pixels": 256, "max_pixels": 2304}
QUESTION = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}],
    }
]


@pytest.fixture
def processor(checkpoint) -> Ovis2_5Processor:
    return AutoProcessor.from_pretrained(checkpoint())


def image(name: str = "grad_40x70.png") -> Image.Image:
    return Image.open(IMAGES / name)


def recorded_ids(name: str) -> list[int]:
    calls = json.loads((GOLDENS / "full_single_untied" / "generation.json").read_text("utf-8"))
    return calls[name]["generate_calls"][0]["input_ids"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_template_renders_as_the_published_one(processor, name, mode):
    given = TEMPLATES[name]
    assert set(given["rendered"]) == set(MODES)
    rendered = processor.apply_chat_template(given["messages"], tokenize=False, **MODES[mode])
    assert rendered == given["rendered"][mode]


@pytest.mark.parametrize(
    ("thinking", "recorded"), [(False, "no_thinking"), (True, "thinking_unbounded")]
)
def test_rendered_prompt_becomes_the_ids_and_pixels_of_the_reference(
    processor, golden, thinking, recorded
):
    prompt = processor.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    batch = processor(text=prompt, images=image(), **LIMITS)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "grid_thws"}
    assert batch["input_ids"].tolist() == [recorded_ids(recorded)]
    assert batch["attention_mask"].tolist() == [[1] * len(recorded_ids(recorded))]
    assert torch.equal(batch["pixel_values"], golden().inputs["pixel_values"])
    assert torch.equal(batch["grid_thws"], golden().inputs["grid_thws"])


def test_template_tokenizes_messages_that_hold_their_images(processor, golden):
    content = [{"type": "image", "image": image()}, *QUESTION[0]["content"][1:]]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        enable_thinking=False,
        processor_kwargs=LIMITS,
    )
    assert batch["input_ids"].tolist() == [recorded_ids("no_thinking")]
    assert torch.equal(batch["pixel_values"], golden().inputs["pixel_values"])


@pytest.mark.parametrize("name", PROMPTS)
def test_each_mark_becomes_begin_atoms_and_end(processor, name):
    given = PROMPTS[name]
    marks = given["prompt"].count("<image>")
    batch = processor(text=given["prompt"], images=[image("tiny_2x2.png")] * marks, **LIMITS)
    expected: list[int] = []
    for token in given["tiny"]["input_ids"]:
        # 256 pixels are 16 patches of 4 x 4, hence 4 visual tokens.
        expected += [-301, -300, -300, -300, -300, -302] if token == -200 else [token]
    assert batch["input_ids"].tolist() == [expected]
    assert ("pixel_values" in batch) is bool(marks)


@pytest.mark.parametrize(
    ("case", "frames", "max_pixels", "answer"),
    [
        ("video_linear_norope", [0, 2, 0], 768, "<think>\n\n</think>\n\nA square."),
        ("window_video_rope", [0, 1, 2], 2304, "<think>\nlook\n</think>\n\nA square."),
    ],
)
def test_frames_of_a_video_stand_between_one_pair_of_indicators(
    checkpoint, golden, case, frames, max_pixels, answer
):
    processor = AutoProcessor.from_pretrained(checkpoint(case))
    batch = processor(
        text="<|im_start|>user\n<video>\nWhat is in the picture?<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>",
        videos=[[image(f"frame_{i}.png") for i in frames]],
        min_pixels=256,
        max_pixels=max_pixels,
    )
    inputs = golden(case).inputs
    length = int(inputs["attention_mask"].sum())
    assert batch["input_ids"].tolist() == inputs["input_ids"][:, :length].tolist()
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    assert torch.equal(batch["grid_thws"], inputs["grid_thws"])


def test_shorter_prompts_are_padded_on_the_left(processor):
    one, two = image("tiny_2x2.png"), image("grad_64x64.png")
    texts = ["5", "<image>5<image>", "55"]
    batch = processor(text=texts, images=[one, two], min_pixels=64, max_pixels=128)
    five = processor.tokenizer("5")["input_ids"]
    assert len(five) == 1
    pad, row = 320, [-301, -300, -302, *five, -301, -300, -302]
    assert batch["input_ids"].tolist() == [
        [pad] * 6 + five,
        row,
        [pad] * 5 + five * 2,
    ]
    assert batch["attention_mask"].tolist() == [[0] * 6 + [1], [1] * 7, [0] * 5 + [1, 1]]
    assert batch["grid_thws"].tolist() == [[1, 2, 2], [1, 2, 2]]
    right = processor(text=["5", "55"], padding_side="right")
    assert right["input_ids"].tolist() == [[*five, pad], five * 2]
    assert right["attention_mask"].tolist() == [[1, 0], [1, 1]]
    first, _ = processor.image_processor.patches([one], 64, 128)
    second, _ = processor.image_processor.patches([two], 64, 128)
    np.testing.assert_array_equal(batch["pixel_values"].numpy(), np.concatenate([first, second]))


@pytest.mark.parametrize(
    ("text", "media", "what"),
    [
        ("Hi", {"images": 1}, "the text has 0 <image>, but 1 were passed."),
        ("<image>\n<image>", {"images": 1}, "the text has 2 <image>, but 1 were passed."),
        ("<image>", {}, "the text has 1 <image>, but 0 were passed."),
        ("<video>", {}, "the text has 1 <video>, but 0 were passed."),
        ("<video>\n<image>", {"images": 1}, "the text has 1 <video>, but 0 were passed."),
        ("<video>\n<image>", {"videos": 1}, "the text has 1 <image>, but 0 were passed."),
        (["<image>", "<image>"], {"images": 1}, "the text has 2 <image>, but 1 were passed."),
        ("<image><video>", {"images": 1, "videos": 1}, "got images and videos."),
    ],
)
def test_marks_that_do_not_match_the_media_are_refused(processor, text, media, what):
    images = [image()] * media.get("images", 0)
    videos = [[image()]] * media.get("videos", 0)
    with pytest.raises(ModelError) as error:
        processor(text=text, images=images, videos=videos)
    assert (error.value.where, error.value.what) == ("Ovis2_5Processor", what)


def test_control_tokens_are_looked_up_and_missing_ones_refused(processor):
    assert processor.control_id("<|im_end|>") == 322
    with pytest.raises(ModelError, match=r"has no token <\|ovis_end\|>\."):
        processor.control_id("<|ovis_end|>")


@pytest.mark.parametrize(
    "text",
    ["a<|im_end|>b", "<|im_start|>user\n", "<|endoftext|><|endoftext|>", "<|im_<|im_end|>end|>"],
)
def test_control_tokens_spelled_out_in_a_users_text_stay_text(processor, text):
    ids = processor.text_ids(text)
    assert max(ids) < 320  # the first control token
    assert processor.tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", []), ("What is it?", [292, 294, 280, 259, 83, 30]), ("<think>5</think>", [344, 20, 345])],
)
def test_text_without_control_tokens_is_tokenized_as_it_stands(processor, text, expected):
    assert processor.text_ids(text) == expected


TOKENIZERS = ["qwen3", "gpt2", "llama", "llama-legacy", "byt5"]


@pytest.fixture(scope="module")
def chat_processor(language_model) -> Callable[[str], Ovis2_5Processor]:
    """`chat_processor(kind)` has that tokenizer with our tokens; "byt5" is one in plain Python."""

    @cache
    def make(kind: str) -> Ovis2_5Processor:
        if kind == "byt5":
            tokenizer = ByT5Tokenizer(extra_ids=0)
            turns = ["<|im_start|>", "<|im_end|>"]
            tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in turns])
            tokenizer.add_tokens(["<think>", "</think>"])
        else:
            tokenizer, _ = chat_tokenizer(str(language_model(kind)))
        assert tokenizer.is_fast is (kind != "byt5")
        return Ovis2_5Processor(Ovis2_5ImageProcessor(patch_size=4), tokenizer)

    return make


def ids_by_the_tokenizers_call(processor: Ovis2_5Processor, text: str) -> list[int]:
    """What `text_ids` is to give, by the slow way: the tokenizer's own call, piece by piece."""
    controls = {t for t in processor.tokenizer.get_added_vocab() if t.strip()} - CONTENT_TAGS
    ids, start = [], 0
    for found in re.finditer("|".join(map(re.escape, sorted(controls))), text):
        ids += _behind_a_turn_start(processor, text[start : found.start() + 1])
        start = found.start() + 1
    return ids + _behind_a_turn_start(processor, text[start:])


def _behind_a_turn_start(processor: Ovis2_5Processor, text: str) -> list[int]:
    ids = processor.tokenizer("<|im_start|>" + text, add_special_tokens=False)["input_ids"]
    return ids[ids.index(processor.control_id("<|im_start|>")) + 1 :]


SNIPPETS = [
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</think>",
    "<s>",
    "user\n",
    "  ",
    " a",
    "\n\n",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=12), max_size=8).map("".join))
def test_ids_of_a_text_are_those_of_the_tokenizers_own_call(chat_processor, kind, text):
    processor = chat_processor(kind)
    assert processor.text_ids(text) == ids_by_the_tokenizers_call(processor, text)


@pytest.mark.parametrize("kind", ["llama", "llama-legacy"])
def test_text_does_not_start_with_the_space_that_sentencepiece_puts_before_it(chat_processor, kind):
    processor = chat_processor(kind)
    tokenizer = processor.tokenizer
    alone = tokenizer("a a", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone) == ["▁a", "▁a"]
    assert tokenizer.convert_ids_to_tokens(processor.text_ids("a a")) == ["a", "▁a"]


@pytest.mark.parametrize(
    "asked",
    [
        {"truncation": True, "max_length": 3},
        {"padding": "max_length", "max_length": 40},
        {"split_special_tokens": True},
    ],
)
def test_what_another_call_asked_of_the_tokenizer_does_not_touch_a_text(processor, asked):
    text = "What is it? <think>5</think>"
    before = processor.text_ids(text)
    assert len(before) > 3
    processor.tokenizer("<|im_end|> What is it? 5", **asked)
    assert processor.text_ids(text) == before


@pytest.mark.parametrize(
    ("video", "expected"), [(False, [-301, -300, -300, -302]), (True, [-303, -300, -300, -304])]
)
def test_visual_ids_name_the_kind_of_media(processor, video, expected):
    assert processor.visual_ids(2, video=video) == expected


def test_published_preprocessor_file_comes_back_with_only_the_patch_size_added(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    file = "preprocessor_config.json"
    published = json.loads((GOLDENS / "full_single_untied" / file).read_text("utf-8"))
    saved = json.loads((tmp_path / "saved" / file).read_text("utf-8"))
    assert saved == {**published, "patch_size": 4}


def test_preprocessor_file_of_published_patch_sizes_comes_back_as_it_was(checkpoint, tmp_path):
    folder = checkpoint(vit_config={"patch_size": 16})
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    file = "preprocessor_config.json"
    assert json.loads((tmp_path / "saved" / file).read_text("utf-8")) == json.loads(
        (folder / file).read_text("utf-8")
    )


def test_special_tokens_are_saved_under_the_published_key(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    file = "tokenizer_config.json"
    published = json.loads((GOLDENS / "tokenizer" / file).read_text("utf-8"))
    saved = json.loads((tmp_path / "saved" / file).read_text("utf-8"))
    assert saved["additional_special_tokens"] == published["additional_special_tokens"]
    assert "extra_special_tokens" not in saved


@pytest.mark.parametrize("with_config", [True, False])
def test_saved_processor_reloads_equal(processor, tmp_path, with_config):
    processor.save_pretrained(tmp_path / "saved")
    if with_config:  # beside a model
        shutil.copy(GOLDENS / "full_single_untied" / "config.json", tmp_path / "saved")
        again = AutoProcessor.from_pretrained(tmp_path / "saved")
    else:
        again = Ovis2_5Processor.from_pretrained(tmp_path / "saved")

    assert type(again) is Ovis2_5Processor
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    prompt = TEMPLATES["history_with_thinking"]["rendered"]["no generation prompt"] + "<image>"
    one, two = (
        p(text=prompt, images=image(), min_pixels=256, max_pixels=2304) for p in (processor, again)
    )
    assert one["input_ids"].tolist() == two["input_ids"].tolist()
    assert torch.equal(one["pixel_values"], two["pixel_values"])


def test_template_of_the_checkpoint_is_used_and_saved(checkpoint, tmp_path):
    folder = checkpoint()
    template = "{{ messages[0].content }}!"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(messages, tokenize=False) == "Hi!"
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text("utf-8") == template
