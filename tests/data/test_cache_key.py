"""What a prepared dataset depends on: a change of any of it makes it anew."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlmtune.collators.sample import SampleEncoder
from vlmtune.configs.load import load_config
from vlmtune.data.images import PixelLimits
from vlmtune.data.sources import Source
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor
from vlmtune.sft.data import prepare


@pytest.fixture
def made(tmp_path, ovis_goldens, monkeypatch):
    """`made(change)`: folders in the cache after a second preparation with what `change` returns
    in place of the encoder, or with what it does to the file."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("vlmtune.data.dataset.HF_DATASETS_CACHE", str(cache))
    words = ["--model_path", "none", "--data_path", "d.json", "--output_dir", "out"]
    config = load_config(words)
    tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
    processor = Ovis2_5Processor(Ovis2_5ImageProcessor(patch_size=4), tokenizer)
    limits = PixelLimits(64, 1024, 64, 1024, 64, 1024, 2, 8)
    file = tmp_path / "d.json"
    turns = [{"from": "human", "value": "5"}, {"from": "gpt", "value": "9"}]
    file.write_text(json.dumps([{"id": 1, "conversations": turns}]))

    def run(change) -> int:
        encoder = SampleEncoder(processor, limits, 512, 512)
        prepare(config, [Source("d", str(file))], encoder)
        prepare(config, [Source("d", str(file))], change(encoder, file) or encoder)
        return len(list((cache / "vlmtune").iterdir()))

    return run


def other_tokenizer(encoder: SampleEncoder, file: Path) -> None:
    encoder.processor.tokenizer.add_tokens(["colon"])


def other_image_processor(encoder: SampleEncoder, file: Path) -> None:
    encoder.processor.image_processor.patch_size = 8


def other_content(encoder: SampleEncoder, file: Path) -> None:
    file.write_text(file.read_text().replace('"9"', '"7"'))


def other(**changes):
    return lambda encoder, file: replace(encoder, **changes)


def other_limit(name: str):
    return lambda encoder, file: replace(encoder, limits=replace(encoder.limits, **{name: 3}))


@pytest.mark.parametrize(
    "change",
    [
        other_tokenizer,
        other_image_processor,
        other_content,
        other(multimodal_max_length=511),
        other(text_max_length=511),
        other(thinking="last_turn"),
        other(thinking="as_is"),
        *map(other_limit, PixelLimits.__annotations__),
    ],
)
def test_change_makes_the_data_anew(made, change):
    assert made(change) == 2


def test_change_of_the_format_makes_the_data_anew(made, monkeypatch):
    def change(encoder: SampleEncoder, file: Path) -> None:
        monkeypatch.setattr("vlmtune.data.dataset.FORMAT", -1)

    assert made(change) == 2


def test_special_tokens_read_as_text_make_the_data_anew(made):
    def change(encoder: SampleEncoder, split: bool) -> SampleEncoder:
        # Markers that are not special can be read either way.
        state = json.loads(encoder.processor.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] = False
        backend = Tokenizer.from_str(json.dumps(state))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")
        tokenizer.split_special_tokens = split
        processor = Ovis2_5Processor(encoder.processor.image_processor, tokenizer)
        return replace(encoder, processor=processor)

    assert made(lambda encoder, file: change(encoder, False)) == 2
    assert made(lambda encoder, file: change(encoder, True)) == 3


def padded_call(encoder: SampleEncoder, file: Path) -> None:
    encoder.processor.tokenizer("5 9", padding="max_length", max_length=1, truncation=True)
    assert encoder.processor.tokenizer.backend_tokenizer.padding is not None
    assert encoder.processor.tokenizer.backend_tokenizer.truncation is not None


@pytest.mark.parametrize(
    "change", [lambda encoder, file: None, other(jpeg_draft=True), padded_call]
)
def test_what_rows_do_not_depend_on_keeps_them(made, change):
    assert made(change) == 1
