"""Checkpoints, adapters and weights in 4 bits are loaded as they were trained, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlmtune.core.errors import ConfigError, ModelError, VLMTuneError
from vlmtune.inference.generation import Sampling, generate
from vlmtune.inference.loading import load
from vlmtune.lora.merge import merge
from vlmtune.models import Ovis2_5, Ovis2_5Processor

RUN = {"thinking": "last_turn", "single_image_max_pixels": 4096}


def new_tokens(model: Any, processor: Any, text: str = "What is it?", most: int = 12) -> list[int]:
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sampling = Sampling(max_new_tokens=most)
    [found] = generate(model, inputs, processor.tokenizer, sampling, thinking=False)
    return found.ids


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.fixture
def folder(tiny_ovis, tmp_path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(tiny_ovis, tmp_path / "model")


@pytest.fixture(scope="module")
def make_adapter(tiny_ovis, tmp_path_factory) -> Callable[..., Path]:
    """`make_adapter(seed, **run)` is an adapter of `tiny_ovis` with noise on its values, `run`
    in its run file."""

    def make(seed: int = 0, **run) -> Path:
        model: Any = AutoModelForImageTextToText.from_pretrained(tiny_ovis)
        layers = r"llm.*\.(q_proj|v_proj|up_proj)"
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=layers))
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        path = tmp_path_factory.mktemp("adapter") / "adapter"
        adapted.save_pretrained(path)
        if run:
            (path / "vlmtune_run.json").write_text(json.dumps(run), "utf-8")
        return path

    return make


@pytest.fixture(scope="module")
def adapter(make_adapter) -> Path:
    return make_adapter(config=RUN)


# Models.


def test_a_folder_is_loaded_at_rest_in_float32_on_a_cpu_with_its_run(folder):
    (folder / "vlmtune_run.json").write_text(json.dumps({"config": RUN, "step": 5}), "utf-8")
    loaded = load(str(folder), device="cpu")
    assert isinstance(loaded.model, Ovis2_5) and isinstance(loaded.processor, Ovis2_5Processor)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.run == RUN
    again = load(str(folder), dtype="bfloat16", attn_implementation="packed", device="cpu")
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert again.model.llm.config._attn_implementation == "packed"


def test_a_folder_without_a_run_has_none(tiny_ovis):
    assert load(str(tiny_ovis), device="cpu").run == {}


@pytest.mark.parametrize("quantized", [False, True])
def test_another_family_is_loaded_with_its_processor(tiny_ovis, tmp_path, quantized):
    tokenizer = Ovis2_5Processor.from_pretrained(tiny_ovis).tokenizer
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"height": 16, "width": 16}
    pixels = CLIPImageProcessorPil(size=size, crop_size=size)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=4, num_hidden_layers=2, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    LlavaProcessor(pixels, tokenizer, 4, "default", num_additional_image_tokens=1).save_pretrained(
        tmp_path
    )
    loaded = load(str(tmp_path), device="cpu", load_in_4bit=quantized)
    assert isinstance(loaded.processor, LlavaProcessor)
    packed = [name for name, m in loaded.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert any("vision" in name for name in packed) == quantized
    assert len(new_tokens(loaded.model, loaded.processor)) == 12


def refused(**given) -> VLMTuneError:
    with pytest.raises(VLMTuneError) as error:
        load(**{"device": "cpu", **given})
    return error.value


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        (
            ["preprocessor_config.json"],
            "its processor cannot be loaded: Can't load image processor",
        ),
        (["tokenizer.json", "tokenizer_config.json"], "its processor cannot be loaded: "),
        (["tokenizer.json"], "its tokenizer has no vocabulary"),
    ],
)
def test_a_folder_without_a_processor_says_what_to_copy(folder, missing, what):
    for name in missing:
        (folder / name).unlink()
    error = refused(model=str(folder))
    assert error.where == f"model {folder}"
    assert error.what.startswith(what)
    assert "copy the tokenizer's files and preprocessor_config.json there" in error.fix


def test_a_language_model_is_refused(folder):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=40, num_attention_heads=2, num_key_value_heads=1, **sizes)
    ).save_pretrained(folder)
    assert 'its model_type "qwen3" is no vision language model' in str(refused(model=str(folder)))


def test_broken_weights_and_a_folder_that_is_not_there_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "complete .safetensors files" in refused(model=str(folder)).fix
    weights.unlink()
    assert "no file named model.safetensors" in str(refused(model=str(folder)))
    (folder / "config.json").unlink()
    assert "cannot be loaded" in str(refused(model=str(folder)))
    assert "there is no such folder" in str(refused(model=str(folder / "none")))


@pytest.mark.parametrize(
    ("settings", "kind", "what"),
    [
        ({"dtype": "int8"}, ConfigError, '"int8" is unknown'),
        ({"device": "cuda:99"}, ConfigError, '"cuda:99" cannot be used here'),
        ({"attn_implementation": "none"}, ModelError, "Fix: leave that setting out"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_ovis, settings, kind, what):
    error = refused(model=str(tiny_ovis), **settings)
    assert type(error) is kind and what in str(error)


# Adapters.


def test_an_adapter_is_put_on_its_base_and_gives_the_tokens_of_the_merged_model(tiny_ovis, adapter):
    plain = load(str(tiny_ovis), device="cpu")
    loaded = load(str(tiny_ovis), [str(adapter)], device="cpu")
    assert isinstance(loaded.model, PeftModel) and loaded.run == RUN
    assert not any(p.requires_grad for p in loaded.model.parameters())
    found = new_tokens(loaded.model, loaded.processor)
    merged: Any = loaded.model.merge_and_unload()
    assert found == new_tokens(merged, loaded.processor)
    assert found != new_tokens(plain.model, plain.processor)


def test_an_adapters_folder_stands_for_its_base_with_it(tiny_ovis, adapter):
    named = load(str(adapter), device="cpu")
    assert named.run == RUN and isinstance(named.processor, Ovis2_5Processor)
    expected = logits(load(str(tiny_ovis), [str(adapter)], device="cpu").model)
    assert torch.equal(logits(named.model), expected)


def test_adapters_are_added_with_their_weights_and_the_last_run_counts(
    tiny_ovis, adapter, make_adapter
):
    other = make_adapter(seed=1, config={"thinking": "as_is"})
    loaded = load(str(adapter), [f"{other}:0.5"], device="cpu")
    assert loaded.run == {"thinking": "as_is"}
    name = "llm.model.layers.0.self_attn.q_proj"
    expected = load(str(tiny_ovis), device="cpu").model.get_submodule(name).weight.clone()
    for path, weight in ((adapter, 1.0), (other, 0.5)):
        layer = load(str(tiny_ovis), [str(path)], device="cpu").model.base_model.model
        expected += weight * layer.get_submodule(name).get_delta_weight("adapter0")
    merged: Any = loaded.model.merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_an_adapter_of_another_model_is_refused(folder, adapter):
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings["llm_config"]["intermediate_size"] = 192
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)
    assert "which needs" in str(refused(model=str(folder), adapters=[str(adapter)]))


def test_an_adapter_whose_base_is_gone_or_not_named_asks_for_it(adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    file = copy / "adapter_config.json"
    settings = json.loads(file.read_text("utf-8"))
    for base, what in (
        (f"{tmp_path}/gone", "gone is not there"),
        (None, "does not name the model"),
    ):
        file.write_text(json.dumps({**settings, "base_model_name_or_path": base}), "utf-8")
        error = refused(model=str(copy))
        assert error.where == f"adapter {copy}" and what in error.what
        assert "give its base as the model, and this folder as the adapter" in error.fix


def test_a_broken_run_file_is_named(folder):
    (folder / "vlmtune_run.json").write_text("{", "utf-8")
    assert refused(model=str(folder)).where == str(folder / "vlmtune_run.json")


# 4 bits.


def layers_in_4bit(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in layers_in_4bit(model).items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4bit_weights_stay_as_they_were_while_the_model_generates(tiny_ovis, dtype):
    loaded = load(str(tiny_ovis), device="cpu", load_in_4bit=True, dtype=dtype)
    weights = dequantized(loaded.model)
    # Of the language model, all but its head.
    assert len(weights) == 14 and all(name.startswith("llm.model") for name in weights)
    before = logits(loaded.model)
    found = new_tokens(loaded.model, loaded.processor)
    assert torch.equal(logits(loaded.model), before)
    for name, weight in dequantized(loaded.model).items():
        assert torch.equal(weight, weights[name]), name
    plain = load(str(tiny_ovis), device="cpu", dtype=dtype).model
    assert not torch.equal(logits(plain), before)
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data.copy_(weight)
    tolerance = {"float32": 1e-4, "bfloat16": 0.05}[dtype]
    torch.testing.assert_close(logits(plain), before, rtol=0, atol=tolerance)
    if dtype == "float32":
        assert new_tokens(plain, loaded.processor) == found


def test_an_adapter_gets_the_weights_it_was_trained_on(tiny_ovis, make_adapter):
    module = "llm.model.layers.0.self_attn.q_proj"
    facts = {"bits": 4, "quant_type": "fp4", "double_quant": False, "dtype": "bfloat16"}
    adapter = make_adapter(config=RUN, quantization={**facts, "modules": [module]})
    loaded = load(str(adapter), device="cpu")
    [(name, layer)] = layers_in_4bit(loaded.model).items()
    assert name == f"base_model.model.{module}.base_layer"
    assert layer.weight.quant_state.quant_type == "fp4" and not layer.weight.quant_state.nested
    assert loaded.model.get_input_embeddings().weight.dtype == torch.bfloat16
    before = logits(loaded.model)
    assert len(new_tokens(loaded.model, loaded.processor)) == 12
    assert torch.equal(logits(loaded.model), before)
    error = refused(model=str(adapter), dtype="float32")
    assert error.where == "dtype" and "4-bit weights that were bfloat16" in error.what


def test_an_adapter_of_plain_weights_can_be_put_on_weights_in_4_bits(tiny_ovis, adapter):
    loaded = load(str(tiny_ovis), [str(adapter)], device="cpu", load_in_4bit=True)
    assert len(layers_in_4bit(loaded.model)) == 14
    bare = load(str(tiny_ovis), device="cpu", load_in_4bit=True)
    difference = (logits(loaded.model) - logits(bare.model)).abs().max()
    assert difference > 0.01


def test_4_bits_without_bitsandbytes_are_refused(tiny_ovis, make_adapter, monkeypatch):
    facts = {"bits": 4, "quant_type": "nf4", "double_quant": True, "dtype": "float32"}
    adapter = make_adapter(quantization={**facts, "modules": ["llm.model.layers.0.mlp.up_proj"]})
    for module in ("inference.loading", "lora.quantization"):
        monkeypatch.setattr(f"vlmtune.{module}.find_spec", lambda name: None)
    for given in ({"model": str(tiny_ovis), "load_in_4bit": True}, {"model": str(adapter)}):
        error = refused(**given)
        assert type(error) is ModelError and "need bitsandbytes" in error.what


def test_a_merged_model_has_the_settings_of_its_adapter_s_run(tiny_ovis, make_adapter, tmp_path):
    merge(None, [(str(make_adapter(1, config=RUN)), 1.0)], tmp_path / "merged")
    assert load(str(tmp_path / "merged")).run == RUN
