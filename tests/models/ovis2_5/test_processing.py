"""Prompts as the published template writes them, and ids the model reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vlmtune.core.errors import ModelError
from vlmtune.models import Ovis2_5Processor

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
