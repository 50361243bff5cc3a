"""transformers' Auto classes after `import vlmtune.models`: ours found, others untouched."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    SiglipProcessor,
)

from vlmtune.models import Ovis2_5, Ovis2_5Config, Ovis2_5Processor


@pytest.mark.parametrize("model_type", ["ovis2_5", "ovis"])
def test_auto_classes_build_ours_from_a_published_folder(checkpoint, model_type):
    folder = checkpoint(model_type=model_type)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    assert preprocessor["processor_class"] == "SiglipProcessor"
    assert type(AutoConfig.from_pretrained(folder)) is Ovis2_5Config
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is Ovis2_5
    assert type(AutoProcessor.from_pretrained(folder)) is Ovis2_5Processor
    assert type(AutoProcessor.from_pretrained(str(folder), use_fast=True)) is Ovis2_5Processor


def test_patch_sizes_come_from_the_models_config(checkpoint):
    vision = {"patch_size": 8, "hidden_stride": 4}
    processor = AutoProcessor.from_pretrained(checkpoint(vit_config=vision))
    image_processor = processor.image_processor
    assert (image_processor.patch_size, image_processor.hidden_stride) == (8, 4)


def adapted(base: Path, folder: Path, mapping: dict | None) -> Path:
    """The processor of a base as an adapter folder has it, with this auto_mapping."""
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"auto_mapping": mapping}), "utf-8")
    return folder


OURS = {"base_model_class": "Ovis2_5", "parent_library": "vlmtune.models.ovis2_5"}


def test_an_adapter_folder_gives_the_processor_of_its_base(checkpoint, tmp_path):
    base = checkpoint(vit_config={"patch_size": 8, "hidden_stride": 4})
    ours = AutoProcessor.from_pretrained(adapted(base, tmp_path / "adapter", OURS))
    assert type(ours) is Ovis2_5Processor
    theirs = AutoProcessor.from_pretrained(base)
    assert ours.image_processor.patch_size == theirs.image_processor.patch_size == 8
    assert ours.image_processor.hidden_stride == theirs.image_processor.hidden_stride == 4
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("mapping", [None, {"base_model_class": "LlamaForCausalLM"}])
def test_adapter_folders_of_other_models_load_as_before(checkpoint, tmp_path, mapping):
    folder = adapted(checkpoint(), tmp_path / "adapter", mapping)
    # Their preprocessor_config.json names the class, as ours does in published folders.
    settings = folder / "preprocessor_config.json"
    named = json.loads(settings.read_text("utf-8")) | {"processor_class": "SiglipProcessor"}
    settings.write_text(json.dumps(named), "utf-8")
    assert type(AutoProcessor.from_pretrained(folder)) is not Ovis2_5Processor


def clip(folder: Path):
    letters = {letter: i for i, letter in enumerate("abc")}
    words = {f"{letter}</w>": i + 3 for letter, i in letters.items()}
    ends = {"<|startoftext|>": 6, "<|endoftext|>": 7}
    tokenizer = CLIPTokenizer(vocab=letters | words | ends, merges=[])
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


def siglip(folder: Path):
    """The same preprocessor_config.json as ours, with another model's config.json."""
    goldens = Path(__file__).parents[1] / "goldens" / "ovis2_5"
    shutil.copytree(goldens / "tokenizer", folder)
    shutil.copy(goldens / "full_single_untied" / "preprocessor_config.json", folder)
    (folder / "config.json").write_text('{"model_type": "siglip"}', "utf-8")


@pytest.mark.parametrize(("build", "kind"), [(clip, CLIPProcessor), (siglip, SiglipProcessor)])
def test_processors_of_other_models_load_as_before(tmp_path, build, kind):
    build(tmp_path / "other")
    assert type(AutoProcessor.from_pretrained(tmp_path / "other")) is kind


def test_folder_with_a_tokenizer_alone_gives_the_tokenizer_as_before(ovis_goldens, tmp_path):
    AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer").save_pretrained(tmp_path)
    found = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(found, PreTrainedTokenizerBase)
    assert found("What is it?<|im_end|>")["input_ids"] == [292, 294, 280, 259, 83, 30, 322]


def test_missing_folder_is_reported_as_before(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        AutoProcessor.from_pretrained(tmp_path / "nowhere")
