"""CPU time per sample and pixel bytes of a batch: ours against TRL's vision collator.

    python benchmarks/collation.py

The same JPEG files of a folder, batches of 8, one thread, process time, both sides on every batch
in turn. TRL's collator (1.16) reads a `datasets.Dataset` with an image column, as its users have
it; ours reads its prepared Arrow dataset and the files.

- `qwen2_5_vl`: TRL's collator on transformers' Qwen2.5-VL processor; ours with an image processor
  of that family's constants. Photos need a resize to multiples of 28, `aligned` ones do not: in
  Pillow it costs both sides the same.
- `ovis2_5`: TRL's collator on our own processor, whose pixel code is already the lean one.

`messages` is TRL's default, `prompt_completion` and `assistant_only` train the answers as ours
does. Before any time counts ids, labels, grids and normalised pixels of all batches are compared.
Left out: labels of the prompt with `messages`, which TRL trains on. Our ids of an image's begin,
place and end are read as Qwen's. `device_ms` is what normalising takes, here on the CPU, and is not
in our times: it is the device's work, where TRL's loader processes do it.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import torch
from measuring import environment, summary
from PIL import Image
from synthetic import (
    PHOTO_SIZES,
    SEED,
    save_photos,
    sentence,
    train_tokenizer,
    vocabulary,
)
from transformers import ProcessorMixin, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vlmtune.collators import sample as sample_module
from vlmtune.collators.padded import PaddedCollator
from vlmtune.collators.sample import SampleEncoder
from vlmtune.data.conversation import Conversation, Turn
from vlmtune.data.dataset import FEATURES, ArrowRows
from vlmtune.data.images import PixelLimits
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.configuration_ovis2_5 import (
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    VISUAL_ATOM_ID,
)
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

SAMPLES, BATCH, ROUNDS = 16, 8, 3
IGNORED = -100
ALIGNED_SIZES = ((644, 476), (476, 644), (644, 420), (504, 364))
GOALS = {
    "with_decode": 5,
    "without_decode": 9,
    "assistant_only": 20,
    "bytes": {"qwen2_5_vl": 1 / 8, "ovis2_5": 1 / 4},
}
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}\
{% generation %}{{ message.content[0].text }}<|im_end|>{% endgeneration %}\
{% else %}\
{% for part in message.content %}{{ 'IMAGE' if part.type == 'image' else part.text }}{% endfor %}\
<|im_end|>\
{% endif %}{{ '\\n' if not loop.last }}{% endfor %}\
{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"""
"""ChatML, which ends with the last turn, as a training sample of ours does."""


class QwenProcessor(Qwen2_5_VLProcessor):
    """Without a video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        assert tokenizer is not None
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class QwenPatches(Ovis2_5ImageProcessor):
    """Qwen's constants. The two frames that its patches have of a still are equal: one is written,
    the device repeats it. Resized in one call, whose order of passes is Pillow's choice, as there.
    """

    def __init__(self):
        source = Qwen2VLImageProcessorPil()
        super().__init__(
            patch_size=source.patch_size,
            hidden_stride=source.merge_size,
            temporal_patch_size=1,
            resample=source.resample,
            image_mean=source.image_mean,
            image_std=source.image_std,
        )

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.size == (width, height):
            return image
        return image.resize((width, height), resample=self.resample)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        values = super().normalise(pixels).view(len(pixels), 3, 1, -1)
        return values.expand(-1, -1, 2, -1).reshape(len(pixels), -1)


class Family:
    """Both sides' processors for one family."""

    def __init__(self, name: str, tokenizer: Any):
        self.name = name
        if name == "qwen2_5_vl":
            template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
            theirs = Qwen2VLImageProcessorPil()
            self.theirs: Any = QwenProcessor(theirs, tokenizer, template)
            ours = Ovis2_5Processor(QwenPatches(), tokenizer)
            low, high = theirs.size["shortest_edge"], theirs.size["longest_edge"]
            marks = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
            names = (IMAGE_BEGIN_ID, VISUAL_ATOM_ID, IMAGE_END_ID)
            self.renamed = dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True))
        else:
            template = TEMPLATE.replace("IMAGE", "<image>")
            ours = Ovis2_5Processor(Ovis2_5ImageProcessor(), tokenizer)
            self.theirs = Ovis2_5Processor(Ovis2_5ImageProcessor(), tokenizer, template)
            low, high, self.renamed = 448**2, 1792**2, {}
        limits = PixelLimits(low, high, low, high, low, high, 1, 1)
        self.encoder = SampleEncoder(ours, limits, 8192, 8192, "as_is")


def main() -> None:
    torch.set_num_threads(1)
    draw = np.random.default_rng(SEED)
    words = vocabulary(draw)
    tokenizer = train_tokenizer(draw, words)
    qwen, ovis = Family("qwen2_5_vl", tokenizer), Family("ovis2_5", tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        talks = [questions_and_answers(draw, words) for _ in range(SAMPLES)]
        photos = save_photos(folder, draw, PHOTO_SIZES, SAMPLES)
        (folder / "aligned").mkdir()
        aligned = save_photos(folder / "aligned", draw, ALIGNED_SIZES, SAMPLES)
        result = {
            "benchmark": "collation",
            "goal": GOALS,
            "samples": SAMPLES,
            "batch": BATCH,
            "rounds": ROUNDS,
            "decode_ms": decode_ms(photos),
            "cases": {
                f"{family.name} {sizes} {mode}": compare(family, mode, files, talks)
                for family, sizes, files, modes in (
                    (qwen, "photos", photos, ("messages", "prompt_completion", "assistant_only")),
                    (qwen, "aligned", aligned, ("messages", "prompt_completion", "assistant_only")),
                    (ovis, "photos", photos, ("messages",)),
                )
                for mode in modes
            },
        }
    libraries = ("torch", "transformers", "trl", "datasets", "pillow", "numpy")
    print(json.dumps({**result, **environment(*libraries)}))


def questions_and_answers(draw: np.random.Generator, words: list[str]) -> list[tuple[str, str]]:
    """As LLaVA's 665k has them: five in the mean, most answers short."""
    return [
        (
            sentence(draw, words, int(draw.integers(8, 20))),
            sentence(draw, words, int(draw.integers(4, 24))),
        )
        for _ in range(draw.integers(1, 10))
    ]


def compare(family: Family, mode: str, files: list[str], talks: list) -> dict[str, Any]:
    """Times of both sides with and without decoding, after a look whether they agree."""
    collate = DataCollatorForVisionLanguageModeling(
        family.theirs,
        completion_only_loss=mode == "prompt_completion",
        assistant_only_loss=mode == "assistant_only",
    )
    pairs = list(zip(files, talks, strict=True))
    features = [example(mode, file, talk) for file, talk in pairs]
    table = datasets.Dataset.from_list(features).cast_column(
        "images", datasets.List(datasets.Image())
    )
    rows = [family.encoder.row(conversation(mode, file, talk)) for file, talk in pairs]
    prepared = ArrowRows(datasets.Dataset.from_list(rows, features=FEATURES))
    ours_collate = PaddedCollator(family.encoder)
    starts = range(0, SAMPLES, BATCH)

    def theirs(start: int) -> dict[str, Any]:
        return collate(table.__getitems__(list(range(start, start + BATCH))))

    def ours(start: int) -> dict[str, Any]:
        return ours_collate([prepared[i] for i in range(start, start + BATCH)])

    bytes_of_both, device = [0, 0], []
    for start in starts:
        one, other = theirs(start), ours(start)
        began = time.process_time()
        pixels = family.encoder.processor.image_processor.normalise(other["pixel_values"])
        device.append((time.process_time() - began) / BATCH * 1000)
        check_equal(family, mode, one, other, pixels)
        for i, batch in enumerate((one, other)):
            bytes_of_both[i] += batch["pixel_values"].nbytes
    found: dict[str, Any] = {"equal": True, **interleaved(starts, theirs, ours, "with_decode")}
    loaded = [table.__getitems__(list(range(start, start + BATCH))) for start in starts]
    in_memory = [[prepared[i] for i in range(start, start + BATCH)] for start in starts]
    with decoded(files):
        found |= interleaved(
            starts,
            lambda start: collate([dict(e) for e in loaded[start // BATCH]]),
            lambda start: ours_collate(in_memory[start // BATCH]),
            "without_decode",
        )
    found["device_ms"] = round(float(np.median(device)), 2)
    found["bytes_ratio"] = round(bytes_of_both[1] / bytes_of_both[0], 4)
    return found


def interleaved(
    starts: range, theirs: Callable[[int], Any], ours: Callable[[int], Any], name: str
) -> dict[str, Any]:
    """Milliseconds per sample of each round; who goes first changes from batch to batch."""
    rounds = {"trl": [], "ours": []}
    for _ in range(ROUNDS):
        spent = {"trl": 0.0, "ours": 0.0}
        for turn, start in enumerate(starts):
            sides = [("trl", theirs), ("ours", ours)]
            for side, call in sides[:: 1 if turn % 2 else -1]:
                began = time.process_time()
                call(start)
                spent[side] += time.process_time() - began
        for side, seconds in spent.items():
            rounds[side].append(seconds / SAMPLES * 1000)
    both = {side: summary(values) for side, values in rounds.items()}
    ratio = both["trl"]["median"] / both["ours"]["median"]
    return {name: {"trl_ms": both["trl"], "ours_ms": both["ours"], "ratio": round(ratio, 2)}}


def check_equal(
    family: Family, mode: str, theirs: dict[str, Any], ours: dict[str, Any], pixels: torch.Tensor
) -> None:
    """Raises AssertionError for the first difference."""
    ids = ours["input_ids"].clone()
    for name, renamed in family.renamed.items():
        ids[ours["input_ids"] == name] = renamed
    for i in range(BATCH):
        theirs_kept, ours_kept = (b["attention_mask"][i].bool() for b in (theirs, ours))
        assert torch.equal(theirs["input_ids"][i][theirs_kept], ids[i][ours_kept])
        expected, labels = theirs["labels"][i][theirs_kept], ours["labels"][i][ours_kept]
        if mode == "messages":
            expected[labels == IGNORED] = IGNORED
        assert torch.equal(expected, labels) and (labels != IGNORED).any()
    grids = theirs["image_grid_thw" if "image_grid_thw" in theirs else "grid_thws"]
    assert torch.equal(grids, ours["grid_thws"])
    assert torch.equal(theirs["pixel_values"], pixels)


def example(mode: str, file: str, talk: list[tuple[str, str]]) -> dict[str, Any]:
    """A row of TRL's dataset."""
    turns = [
        {"role": role, "content": text}
        for pair in talk
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if mode == "prompt_completion":
        return {"images": [file], "prompt": turns[:-1], "completion": turns[-1:]}
    return {"images": [file], "messages": turns}


def conversation(mode: str, file: str, talk: list[tuple[str, str]]) -> Conversation:
    turns = []
    for i, (asked, said) in enumerate(talk):
        last = i == len(talk) - 1
        turns.append(Turn("user", asked if i else f"<image>{asked}"))
        turns.append(Turn("assistant", said, trained=last or mode != "prompt_completion"))
    return Conversation(id=file, turns=turns, images=[file])


@contextmanager
def decoded(files: list[str]) -> Iterator[None]:
    """Opens images that are decoded already, and does not close them."""
    known = {file: Image.open(file).convert("RGB") for file in files}
    with (
        patch.object(Image.Image, "close", lambda image: None),
        patch.object(sample_module, "open_image", lambda path, where: known[path]),
    ):
        yield


def decode_ms(files: list[str]) -> float:
    began = time.process_time()
    for file in files:
        Image.open(file).load()
    return round((time.process_time() - began) / len(files) * 1000, 2)


if __name__ == "__main__":
    main()
