"""What a model is run on to be compared with another: conversations of a file, or made ones."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from ..collators.rendering import Thinking
from ..collators.sample import SampleEncoder, grids_of
from ..configs.schema import DataConfig
from ..core.checkpoints import RUN_FILE
from ..core.errors import DataError, ModelError
from ..data.conversation import IMAGE_MARK, Conversation
from ..data.images import PixelLimits, decode, open_image
from ..data.sources import resolve_sources
from ..models import Ovis2_5Processor

Sample = dict[str, Any]
"""Keyword arguments of a model's forward for one conversation, `input_ids` int64 `[1, T]`."""

LIKE_THE_RUN = ("image_folder", "multimodal_max_length", "text_max_length", "thinking")
SIDES = (32, 96)
"""Shortest and longest side of a made image, in pixels."""


def file_samples(
    processor: Any, data: str, count: int, adapter: Path, image_folder: str | None
) -> list[Sample]:
    """The first `count` conversations of a file, as the adapter's run would read them: its run
    file, where there is one, says the pixel limits, the lengths and `thinking`.

    Raises:
        DataError: the file, one of these conversations or an image of it is bad.
    """
    settings = run_settings(data, adapter, image_folder)
    [source] = resolve_sources([data], settings.image_folder)
    first = [source.parse(i, record) for i, record in islice(source.records(), count)]
    if not first:
        raise DataError(data, "there is no record.", "add records, or leave --data out.")
    if not isinstance(processor, Ovis2_5Processor):
        return [_by_template(processor, *_messages(c)) for c in first]
    limits = {f.name: getattr(settings, f.name) for f in fields(PixelLimits)}
    encoder = SampleEncoder(
        processor,
        PixelLimits(**limits),
        settings.multimodal_max_length,
        settings.text_max_length,
        cast(Thinking, settings.thinking),
    )
    return [_inputs(encoder, conversation) for conversation in first]


def made_samples(processor: Any, count: int) -> list[Sample]:
    """Conversations of different lengths, the same at every call; where the processor takes
    images, every second one has one or two of random pixels, so that every part runs."""
    random = np.random.default_rng(0)
    sees = getattr(processor, "image_processor", None) is not None
    samples = []
    for i in range(count):
        sizes = random.integers(*SIDES, (1 + i % 4 // 2, 2)) if sees and i % 2 == 0 else []
        pixels = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        turns = []
        for turn in range(1 + i % 3):
            question = "What is shown here, and what follows from it? " * (1 + i % 4)
            turns.append({"role": "user", "content": [{"type": "text", "text": question}]})
            answer = f"Answer {turn + 1}: there are {i + 2} things, and 17 * 3 = 51."
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        turns[0]["content"] = [{"type": "image"}] * len(pixels) + turns[0]["content"]
        samples.append(_by_template(processor, turns, [Image.fromarray(p) for p in pixels]))
    return samples


def load_processor(folder: Path) -> Any:
    """The processor of a model folder; of a language model its tokenizer.

    Raises:
        ModelError: there is none that transformers can read.
    """
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            str(folder), f"its processor cannot be loaded: {reason}", "put the files of one there"
        ) from error


def tokenizer_problems(base: Path, merged: Path) -> Iterator[str]:
    """What the merged folder's processor would do to a conversation that the base's would not."""
    ours, theirs = load_processor(base), load_processor(merged)
    for what, read in {
        "the vocabulary": lambda p: getattr(p, "tokenizer", p).get_vocab(),
        "the chat template": lambda p: p.chat_template,
    }.items():
        if read(ours) != read(theirs):
            yield f"{what} of its tokenizer is not the base's"


def run_settings(data: str, adapter: Path, image_folder: str | None) -> DataConfig:
    """Data settings of the run that made an adapter, or the defaults."""
    file = adapter / RUN_FILE
    run = json.loads(file.read_text("utf-8"))["config"] if file.exists() else {}
    names = [*LIKE_THE_RUN, *(f.name for f in fields(PixelLimits))]
    settings = {name: run[name] for name in names if name in run}
    if image_folder:
        settings["image_folder"] = image_folder
    return DataConfig(data_path=[data], **settings)


def _inputs(encoder: SampleEncoder, conversation: Conversation) -> Sample:
    row = encoder.row(conversation)
    ids, _ = encoder.ids_and_labels(row)
    inputs: Sample = {"input_ids": torch.from_numpy(ids)[None]}
    if row["patches"]:
        images = encoder.processor.image_processor
        pixels = np.empty((row["patches"], images.features), np.uint8)
        encoder.write_pixels(row, pixels)
        inputs["pixel_values"] = images.normalise(torch.from_numpy(pixels))
        inputs["grid_thws"] = torch.tensor(grids_of(row))
    return inputs


def _by_template(
    processor: Any, turns: list[dict[str, Any]], images: Sequence[Image.Image]
) -> Sample:
    """Through the chat template, as people prompt the model; turns joined by newlines without."""
    if getattr(processor, "image_processor", None) is None:
        turns = [{**t, "content": "".join(p["text"] for p in t["content"])} for t in turns]
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        else:
            text = "\n".join(turn["content"] for turn in turns)
        return dict(tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    if not processor.chat_template:
        raise ModelError(
            "processor of the base",
            "has no chat template, which conversations are written with",
            "put its chat_template.jinja into the base",
        )
    text = processor.apply_chat_template(turns, tokenize=False)
    given: dict[str, Any] = {"images": list(images)} if images else {}
    if isinstance(processor, Ovis2_5Processor):
        given.update(min_pixels=SIDES[0] ** 2, max_pixels=SIDES[1] ** 2)
    return dict(processor(text=[text], **given, return_tensors="pt"))


def _messages(conversation: Conversation) -> tuple[list[dict], list[Image.Image]]:
    """For a family other than Ovis2.5, in the form its chat template takes."""
    if conversation.video or conversation.frames:
        raise DataError(
            conversation.where("video"),
            "is a video, which is run with Ovis2.5 alone.",
            "give images or text.",
        )
    turns = []
    for turn in conversation.turns:
        content: list[dict[str, str]] = []
        for i, text in enumerate(turn.text.split(IMAGE_MARK)):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": text}] if text else []
        turns.append({"role": turn.role, "content": content})
    where = conversation.where("image")
    images = [decode(open_image(f, where), f, where).convert("RGB") for f in conversation.images]
    return turns, images
