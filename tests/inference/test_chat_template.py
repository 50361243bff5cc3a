"""Other families: a tiny random Llava, asked through its processor's chat template."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    LlavaProcessor,
)

from vlmtune.core.errors import ConfigError, DataError, ModelError
from vlmtune.data.conversation import PLAIN, Turn
from vlmtune.inference.chat_template import TemplatePrompts
from vlmtune.inference.request import Request, ask_about
from vlmtune.inference.sampling import Sampling
from vlmtune.inference.vlm import Ovis25Inference, VLMInference

IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
    for i in range(3)
]
EIGHT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def llava(tiny_llava) -> VLMInference:
    return VLMInference(str(tiny_llava))


@pytest.fixture(scope="module")
def prompts(llava) -> Any:
    return llava.prompts


def text_of(prompts: TemplatePrompts, request: Request, **given) -> str:
    """The prompt's tokens as text, an image as <image> once for each of its tokens."""
    batch = prompts.batch([prompts.encode(request, **given)])
    return prompts.processor.tokenizer.decode(batch["input_ids"][0])


def test_images_are_placed_by_the_template(prompts):
    request = ask_about("Same <image> as <image>?", IMAGES[:2])
    seen = "<image>" * 4  # 2 x 2 patches
    written = f"<|im_start|>user\nSame {seen} as {seen}?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(prompts, request) == written
    batch = prompts.batch([prompts.encode(request)])
    alone = [prompts.processor.image_processor(i, return_tensors="pt") for i in IMAGES[:2]]
    assert torch.equal(batch["pixel_values"], torch.cat([i["pixel_values"] for i in alone]))


def test_history_and_thinking_are_written_by_the_template(prompts):
    history = [Turn("user", "Hi"), Turn("assistant", "Hello.", True)]
    written = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )
    request = ask_about("So?", history=history)
    assert text_of(prompts, request) == written
    assert text_of(prompts, request, enable_thinking=True) == f"{written}<think>\n"
    assert not prompts.encode(request).opened
    assert prompts.encode(request, enable_thinking=True).opened


def test_begun_answer_is_gone_on_with(prompts):
    begun = "I look.<tool_response><image></tool_response>"
    written = f"<|im_start|>assistant\n{begun.replace('<image>', '<image>' * 4)}"
    assert text_of(prompts, ask_about("So?", IMAGES[:1]), begun="A ").endswith("assistant\nA ")
    turns = Request([Turn("user", "So?")], IMAGES[:1])
    assert text_of(prompts, turns, begun=begun).endswith(written)


def test_batch_is_padded_on_the_left(prompts):
    encoded = [prompts.encode(ask_about("?" * n, IMAGES[:n])) for n in (2, 0, 1)]
    batch, alone = prompts.batch(encoded), [prompts.batch([prompt]) for prompt in encoded]
    assert [prompt.length for prompt in encoded] == [n["input_ids"].shape[1] for n in alone]
    for row, one in enumerate(alone):
        padding = batch["input_ids"].shape[1] - encoded[row].length
        assert batch["attention_mask"][row].tolist() == [0] * padding + [1] * encoded[row].length
        assert batch["input_ids"][row, padding:].tolist() == one["input_ids"][0].tolist()


def test_batched_tokens_are_those_of_each_request_alone(llava):
    requests = [ask_about("Which is larger?" * n, IMAGES[:n]) for n in (2, 0, 1, 3)]
    requests.insert(2, ask_about("?", ["gone.png"]))
    together = llava.answer(requests, EIGHT, enable_thinking=[False, True, False, True, False])
    alone = [
        llava.answer([request], EIGHT, enable_thinking=i in (1, 3))[0]
        for i, request in enumerate(requests)
    ]
    assert together == alone
    assert [reply.ended for reply in together] == ["length", "length", "error", "length", "length"]
    assert len({tuple(reply.tokens) for reply in together}) == 5


def test_thought_that_the_prompt_opens_is_the_thinking(llava):
    reply = llava.text_only_inference("Hi", enable_thinking=True, max_new_tokens=8)
    assert (reply.thinking, reply.answer) == (reply.text.strip(), "")
    assert reply.unfinished_thought
    reply = llava.text_only_inference(
        "Hi", enable_thinking=True, thinking_budget=4, max_new_tokens=200 - 40
    )
    assert "</think>" in reply.text and not reply.unfinished_thought


def test_pieces_and_turns_are_those_of_single_replies(llava):
    chat = llava.chat()
    stream = chat.stream("This?", IMAGES[:1], max_new_tokens=8)
    assert "".join(stream) == stream.reply.text
    first = llava.single_image_inference(IMAGES[0], "This?", max_new_tokens=8)
    assert stream.reply == first
    second = chat.send("And <image>?", IMAGES[1:2], max_new_tokens=8)
    history = [Turn("user", "<image>\nThis?"), Turn("assistant", first.text, True)]
    request = ask_about("And <image>?", IMAGES[:2], history=history)
    assert llava.answer([request], EIGHT) == [second]


def test_context_that_is_too_long_is_told_of_each_request(llava):
    replies = llava.answer([ask_about("Hi" * 150), ask_about("Hi")], EIGHT)
    assert [reply.ended for reply in replies] == ["error", "length"]
    assert replies[0].error.startswith("request: its ")
    assert "more than the 200 positions" in replies[0].error


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (ask_about("?", video=IMAGES), "has a video, which Ovis2.5 alone is given."),
        (Request([Turn(PLAIN, "It is ")]), "is a caption, which has no place in a chat."),
        (
            ask_about("?", system="Be short."),
            "the chat template of the model does not take it: There is no system turn.",
        ),
        (ask_about("?", ["gone.png"]), "gone.png does not exist."),
        (ask_about("<image>?"), '1 "<image>" placeholder, but 0 given.'),
    ],
)
def test_request_that_the_family_does_not_take_is_refused(prompts, request_, what):
    with pytest.raises(DataError) as error:
        prompts.encode(request_)
    assert error.value.what == what


def test_processor_without_a_chat_template_is_refused(llava):
    processor = LlavaProcessor(llava.processor.image_processor, llava.tokenizer, patch_size=8)
    with pytest.raises(ModelError, match="processor LlavaProcessor:\n  has no chat template"):
        TemplatePrompts(processor)


def test_what_is_for_ovis_alone_is_refused_before_the_weights_are_read(llava, tiny_llava, tmp_path):
    bare = shutil.copytree(tiny_llava, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="max_pixels:\n  is for Ovis2"):
        VLMInference(str(bare), max_pixels=10_000)
    with pytest.raises(ModelError, match="its processor is LlavaProcessor, and not of"):
        Ovis25Inference(str(bare))
    with pytest.raises(ConfigError, match=r"unit:\n  pixels is for Ovis2\.5"):
        llava.grounding_inference("gone.png", "Where?", unit="pixels")
