"""A new model: what is taken over bit for bit, how the rest starts, and that it trains."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from vlmtune.collators.rendering import encode, render
from vlmtune.core.errors import ModelError
from vlmtune.data.conversation import Turn
from vlmtune.models import Ovis2_5, Ovis2_5Processor
from vlmtune.models.ovis2_5 import build
from vlmtune.models.ovis2_5.build import build_ovis2_5, ensure_base, rms

LLMS = ["qwen3", "llama", "gpt2"]
VISION = "visual_tokenizer.vit.vision_model."
NEW = {"visual_tokenizer.head.0.weight", "visual_tokenizer.head.1.weight"} | {
    "visual_tokenizer.head.1.bias",
    "vte.weight",
}
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def load(folder: Path, **kwargs) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def settings(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text("utf-8"))


def edit(folder: Path, name: str = "config.json", **changes) -> None:
    (folder / name).write_text(json.dumps({**settings(folder, name), **changes}), "utf-8")


def picture(side: int) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("llm", "added"), [("qwen3", 0), ("llama", 5), ("llama-tied", 5), ("gpt2", 4)]
)
def test_language_model_is_taken_over_bit_for_bit(language_model, built, llm, added):
    source = tensors(language_model(llm))
    found = {n.removeprefix("llm."): t for n, t in tensors(built(llm)).items() if "llm." in n}
    assert found.keys() == source.keys()
    assert ("lm_head.weight" in found) is (llm not in ("gpt2", "llama-tied"))
    for name, tensor in source.items():
        assert len(found[name]) - len(tensor) == (added if name in EMBEDDINGS else 0), name
        assert torch.equal(found[name][: len(tensor)], tensor), name

    model = load(built(llm))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is ("lm_head.weight" not in found)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(language_model(llm))(ids).logits
        ours = model(input_ids=ids).logits[..., : theirs.shape[-1]]
    assert theirs.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_embeddings_of_added_tokens_start_near_the_mean_of_the_others(built):
    rows = tensors(built("gpt2"))["llm.transformer.wte.weight"]
    assert len(rows) == 303
    mean = rows[:299].mean(dim=0)
    assert (rows[299:] - mean).abs().max() < 1e-2 * mean.abs().max()


def test_matrices_that_differ_stay_two_though_the_config_says_one(language_model, tower, tmp_path):
    shutil.copytree(language_model("llama"), tmp_path / "llm")
    edit(tmp_path / "llm", tie_word_embeddings=True)
    source = tensors(tmp_path / "llm")
    sources = str(tmp_path / "llm"), str(tower("conv"))
    build_ovis2_5(*sources, tmp_path / "out", visual_vocab_size=68)
    found = load(tmp_path / "out").llm
    rows = len(source["lm_head.weight"])
    assert torch.equal(found.lm_head.weight[:rows], source["lm_head.weight"])
    assert torch.equal(found.model.embed_tokens.weight[:rows], source["model.embed_tokens.weight"])


def test_tower_is_taken_over_without_its_pooling_head(tower, built):
    source = tensors(tower("conv"))
    found = {n.removeprefix(VISION): t for n, t in tensors(built("gpt2")).items() if VISION in n}
    assert found.keys() == {name for name in source if not name.startswith("head.")}
    assert {"post_layernorm.weight", "post_layernorm.bias"} <= found.keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", ["conv", "naflex"])
def test_tower_gives_the_features_of_its_own_code_on_its_own_grid(tower, built, kind):
    processor = AutoProcessor.from_pretrained(built("gpt2", kind))
    size = {"conv": 14, "naflex": 8}[kind]
    assert processor.image_processor.patch_size == size
    image = picture(4 * size)
    limits = {"min_pixels": (4 * size) ** 2, "max_pixels": (4 * size) ** 2}
    patches, grid = processor.image_processor.patches([image], **limits)
    assert grid == (1, 4, 4)
    vit = load(built("gpt2", kind)).visual_tokenizer.vit
    vit.vision_model.encoder.config.use_rope = False
    with torch.no_grad():
        merged = vit(torch.from_numpy(patches), [grid])
    # Blocks of 2 x 2 patches, rows of blocks first, back to rows of patches.
    ours = merged.reshape(2, 2, 2, 2, 32).transpose(1, 2).reshape(16, 32)

    pixels = torch.from_numpy(np.asarray(image).copy()) / 127.5 - 1
    model = AutoModel.from_pretrained(tower(kind))
    theirs = getattr(model, "vision_model", model)
    seen: list[Tensor] = []
    theirs.encoder.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    with torch.no_grad():
        if kind == "conv":
            theirs(pixels.permute(2, 0, 1)[None])
        else:
            by_pixel = pixels.reshape(4, 8, 4, 8, 3).transpose(1, 2).reshape(1, 16, -1)
            theirs(by_pixel, torch.ones(1, 16, dtype=torch.int64), torch.tensor([[4, 4]]))
    assert seen[0].std() > 0.1
    assert torch.allclose(ours, seen[0][0], atol=1e-5)


@pytest.mark.parametrize("llm", LLMS)
def test_visual_tokens_start_at_the_scale_of_text_tokens(built, llm):
    model = load(built(llm))
    processor = AutoProcessor.from_pretrained(built(llm))
    patches, grid = processor.image_processor.patches([picture(100)], 56**2, 112**2)
    with torch.no_grad():
        visual = rms(model.embed_images(torch.from_numpy(patches), [grid]))
        text = rms(model.get_input_embeddings().weight)
        indicators = rms(model.vte.weight[64:])
    assert text > 0.05
    assert text / 3 < visual < text * 3
    assert text / 1.5 < indicators < text * 1.5


def test_scale_of_visual_tokens_holds_for_a_large_visual_vocabulary(
    language_model, tower, tmp_path
):
    sources = str(language_model("gpt2")), str(tower("conv"))
    build_ovis2_5(*sources, tmp_path, visual_vocab_size=8192)
    model = load(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    patches, grid = processor.image_processor.patches([picture(56)], 56**2, 56**2)
    with torch.no_grad():
        visual = rms(model.embed_images(torch.from_numpy(patches), [grid]))
        text = rms(model.get_input_embeddings().weight)
    assert text / 3 < visual < text * 3
    assert model.visual_tokenizer.head[0].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert torch.equal(model.visual_tokenizer.head[1].weight, torch.ones(8188))
    assert torch.equal(model.visual_tokenizer.head[1].bias, torch.zeros(8188))


def test_same_seed_writes_the_same_bytes_and_another_one_other_new_parts(
    language_model, tower, built, tmp_path
):
    sources = str(language_model("gpt2")), str(tower("conv"))
    before = torch.get_rng_state()
    build_ovis2_5(*sources, tmp_path / "gpt2-conv", visual_vocab_size=68)
    assert torch.equal(torch.get_rng_state(), before)
    files = {file.name for file in built("gpt2").iterdir()}
    assert {file.name for file in (tmp_path / "gpt2-conv").iterdir()} == files
    assert files == {
        *("README.md", "build.json", "chat_template.jinja", "config.json"),
        *("generation_config.json", "model.safetensors", "preprocessor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for name in files:
        again = (tmp_path / "gpt2-conv" / name).read_bytes()
        assert again == (built("gpt2") / name).read_bytes(), name

    build_ovis2_5(*sources, tmp_path / "other", visual_vocab_size=68, seed=1)
    first, other = tensors(built("gpt2")), tensors(tmp_path / "other")
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, other[name])}
    assert changed - {"llm.transformer.wte.weight"} == NEW - {
        "visual_tokenizer.head.1.weight",
        "visual_tokenizer.head.1.bias",
    }


def test_each_part_keeps_its_own_precision(language_model, tower, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(language_model("qwen3"), dtype=torch.bfloat16)
    shutil.copytree(language_model("qwen3"), tmp_path / "llm")
    half.save_pretrained(tmp_path / "llm")
    sources = str(tmp_path / "llm"), str(tower("conv"))
    build_ovis2_5(*sources, tmp_path / "out", visual_vocab_size=68)
    kinds = {n: t.dtype for n, t in tensors(tmp_path / "out").items()}
    assert {d for n, d in kinds.items() if n.startswith(VISION)} == {torch.float32}
    assert {d for n, d in kinds.items() if not n.startswith(VISION)} == {torch.bfloat16}
    assert settings(tmp_path / "out")["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in load(tmp_path / "out").parameters()} == {torch.bfloat16}
    full = load(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in tensors(tower("conv")).items():
        assert name.startswith("head.") or torch.equal(full[VISION + name], tensor)


def test_config_has_the_published_layout(built):
    config = settings(built("gpt2", "naflex"))
    assert config["model_type"] == "ovis2_5"
    assert config["architectures"] == ["Ovis2_5"]
    assert config["visual_vocab_size"] == 68
    assert (config["vocab_size"], config["llm_config"]["vocab_size"]) == (303, 303)
    assert (config["num_attention_heads"], config["max_position_embeddings"]) == (4, 256)
    assert (config["llm_config"]["model_type"], config["llm_config"]["n_embd"]) == ("gpt2", 32)
    vit = config["vit_config"]
    assert vit["model_type"] == "siglip2_navit"
    assert (vit["num_patches"], vit["patch_size"], vit["image_size"]) == (16, 8, 32)
    assert settings(built("gpt2"))["vit_config"]["num_patches"] == -1
    assert settings(built("llama"))["llm_config"]["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize(
    ("llm", "layer"),
    [("qwen3", "Qwen3DecoderLayer"), ("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")],
)
def test_layers_of_both_parts_are_kept_whole_by_parallel_plans(built, llm, layer):
    assert set(load(built(llm))._no_split_modules) == {"Siglip2EncoderLayer", layer}


@pytest.mark.parametrize("llm", LLMS)
def test_built_model_answers_and_learns(built, llm):
    folder = built(llm)
    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is Ovis2_5
    assert type(processor) is Ovis2_5Processor
    turns = [Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A square.", True)]
    patches, grid = processor.image_processor.patches([picture(60)], 56**2, 56**2)
    sample = encode(render(turns, processor), processor, [4])
    inputs = {
        "input_ids": torch.tensor([sample.ids]),
        "labels": torch.tensor([sample.labels]),
        "pixel_values": torch.from_numpy(patches),
        "grid_thws": torch.tensor([grid]),
    }
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Keys' biases cancel in the softmax, up to rounding.
    assert {n for n in still if "k_proj.bias" not in n} == {
        f"{VISION}post_layernorm.weight",
        f"{VISION}post_layernorm.bias",
    }

    prompt = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    batch = processor(
        text=prompt, images=picture(60), min_pixels=56**2, max_pixels=56**2, return_tensors="pt"
    )
    new = model.eval().generate(**batch, do_sample=False, max_new_tokens=5)
    with torch.no_grad():
        first = model(**batch).logits[0, -1].argmax()
    assert new[0, 0] == first
    assert 1 <= new.shape[1] <= 5


def test_saved_again_it_reloads_equal(built, tmp_path):
    model = load(built("gpt2"))
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert tensors(tmp_path).keys() == tensors(built("gpt2")).keys()
    again = load(tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("llm", "eos", "pad"),
    [
        ("qwen3", ["<|im_end|>"], "<|endoftext|>"),
        ("llama", ["<|im_end|>", "</s>"], "<|endoftext|>"),
        ("gpt2", ["<|im_end|>", "<|endoftext|>"], "<|endoftext|>"),
    ],
)
def test_generation_ends_at_the_end_of_a_turn_and_where_it_ended_before(built, llm, eos, pad):
    tokenizer = AutoProcessor.from_pretrained(built(llm)).tokenizer
    found = GenerationConfig.from_pretrained(built(llm))
    ids = tokenizer.convert_tokens_to_ids([*eos, pad])
    assert [found.eos_token_id, found.pad_token_id] == [ids[:-1], ids[-1]]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"do_sample": True, "temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"do_sample": False, "temperature": 0.5}, {}),  # refused by transformers when it saves
        (None, {}),
    ],
    ids=["kept", "contradictory", "none"],
)
def test_sampling_settings_of_the_language_model(language_model, tower, tmp_path, given, kept):
    shutil.copytree(language_model("gpt2"), tmp_path / "llm")
    file = tmp_path / "llm" / "generation_config.json"
    file.unlink()
    if given is not None:
        file.write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 8, **given}), "utf-8")
    sources = str(tmp_path / "llm"), str(tower("conv"))
    build_ovis2_5(*sources, tmp_path / "out", visual_vocab_size=68)
    found = settings(tmp_path / "out", "generation_config.json")
    found.pop("transformers_version")
    ids = {"bos_token_id": 8, "eos_token_id": [300, 7, 298]}
    if given is None:
        ids = {"bos_token_id": 298, "eos_token_id": [300, 298]}
    assert found == {**ids, "pad_token_id": 298, **kept}


def config_folder(folder: Path, **keys) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys), "utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"model_type": "t5"}, "is an encoder-decoder model (t5)"),
        ({"model_type": "siglip"}, "is a siglip model, not a language model alone"),
        ({"model_type": "gemma3"}, "is a gemma3 model, not a language model alone"),
        ({"model_type": "ovis2_5"}, "is a ovis2_5 model, not a language model alone"),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "gptq"}}, "is quantized"),
        ({"model_type": "nothing_known"}, "cannot be read"),
        ({"model_type": "qwen3"}, "has no words"),
    ],
)
def test_language_model_that_does_not_fit_is_refused(tower, tmp_path, keys, what):
    llm = config_folder(tmp_path / "llm", **keys)
    with pytest.raises(ModelError) as error:
        build_ovis2_5(llm, str(tower("conv")), tmp_path / "out")
    assert llm in error.value.where
    assert what in error.value.what
    assert not (tmp_path / "out").exists()


VISION_KEYS = {"model_type": "siglip_vision_model"}
LINEAR_KEYS = {"model_type": "siglip2_vision_model"}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"model_type": "clip"}, "is a clip model"),
        ({"model_type": "qwen3"}, "is a qwen3 model"),
        ({**VISION_KEYS, "hidden_size": 24, "num_attention_heads": 4}, "heads have 6 elements"),
        ({**VISION_KEYS, "num_channels": 1}, "num_channels is 1"),
        ({**VISION_KEYS, "patch_size": [16, 8]}, "patch_size [16, 8] is not a number"),
        ({**VISION_KEYS, "image_size": [224, 448]}, "image_size [224, 448] is not a number"),
        ({**LINEAR_KEYS, "num_patches": 15}, "num_patches 15 is not a square"),
        ({**VISION_KEYS, "quantization_config": {"quant_method": "gptq"}}, "is quantized"),
    ],
)
def test_tower_that_does_not_fit_is_refused(language_model, tmp_path, keys, what):
    vit = config_folder(tmp_path / "vit", **keys)
    with pytest.raises(ModelError) as error:
        build_ovis2_5(str(language_model("gpt2")), vit, tmp_path / "out")
    assert error.value.where == f"vision tower {vit}"
    assert what in error.value.what


def test_missing_folders_are_named(language_model, tower, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"language model .*gone.*:\n  cannot be read"):
        build_ovis2_5(gone, str(tower("conv")), tmp_path / "out")
    with pytest.raises(ModelError, match=r"vision tower .*gone.*:\n  cannot be read"):
        build_ovis2_5(str(language_model("gpt2")), gone, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "name"),
    [("llm", "transformer.h.1.ln_1.weight"), ("vit", "encoder.layers.1.layer_norm1.bias")],
)
def test_checkpoint_with_a_tensor_missing_is_refused(language_model, tower, tmp_path, part, name):
    sources = {"llm": language_model("gpt2"), "vit": tower("conv")}
    broken = shutil.copytree(sources[part], tmp_path / part)
    rest = {n: t for n, t in tensors(broken).items() if n != name}
    save_file(rest, broken / "model.safetensors", metadata={"format": "pt"})
    words = {key: str(value) for key, value in {**sources, part: broken}.items()}
    with pytest.raises(ModelError, match=f"lacks 1 tensors, the first is {name}"):
        build_ovis2_5(words["llm"], words["vit"], tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (
            lambda: GraniteForCausalLM(
                GraniteConfig(
                    vocab_size=305,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    logits_scaling=8.0,
                )
            ),
            "scales or caps its logits (granite)",
        ),
        (
            lambda: OPTForCausalLM(
                OPTConfig(
                    vocab_size=305,
                    hidden_size=32,
                    ffn_dim=48,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    word_embed_proj_dim=16,
                    max_position_embeddings=64,
                )
            ),
            "has embeddings of 16 elements for a hidden size of 32",
        ),
    ],
)
def test_language_model_that_would_train_as_another_is_refused(
    language_model, tower, tmp_path, model, what
):
    shutil.copytree(language_model("gpt2"), tmp_path / "llm")
    model().save_pretrained(tmp_path / "llm")
    with pytest.raises(ModelError) as error:
        build_ovis2_5(
            str(tmp_path / "llm"), str(tower("conv")), tmp_path / "out", visual_vocab_size=68
        )
    assert what in error.value.what
    assert not (tmp_path / "out").exists()


def test_too_small_a_visual_vocabulary_is_refused(language_model, tower, tmp_path):
    with pytest.raises(ModelError, match="is 4, but 4 rows are indicators"):
        build_ovis2_5(
            str(language_model("gpt2")), str(tower("conv")), tmp_path, visual_vocab_size=4
        )


def test_folder_with_a_model_is_not_written_over(built, language_model, tower):
    before = (built("gpt2") / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"already holds a model\.\n  Fix: name another folder"):
        build_ovis2_5(str(language_model("gpt2")), str(tower("conv")), built("gpt2"), seed=5)
    assert (built("gpt2") / "model.safetensors").read_bytes() == before


def test_file_in_the_place_of_the_output_is_named(language_model, tower, tmp_path):
    (tmp_path / "out").write_text("", "utf-8")
    with pytest.raises(ModelError, match=r"output .*out:\n  cannot be made"):
        ensure_base(str(language_model("gpt2")), str(tower("conv")), tmp_path / "out")


def test_build_killed_while_writing_leaves_no_model_and_can_be_repeated(
    language_model, tower, built, tmp_path, monkeypatch
):
    sources = str(language_model("gpt2")), str(tower("conv"))
    output = tmp_path / "gpt2-conv"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "model_card", killed)
        build_ovis2_5(*sources, output, visual_vocab_size=68)
    assert [file.name for file in output.iterdir()] == [".partial"]
    build_ovis2_5(*sources, output, visual_vocab_size=68)
    for file in built("gpt2").iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert not (output / ".partial").exists()


def test_base_is_built_once_however_many_ask(language_model, tower, tmp_path, monkeypatch):
    sources = str(language_model("gpt2")), str(tower("conv"))
    built, results = [], []

    def slow(*arguments, **keys):
        built.append(arguments)
        time.sleep(0.2)
        build_ovis2_5(*arguments, **keys)

    def ask():
        results.append(ensure_base(*sources, tmp_path / "base", visual_vocab_size=68))

    monkeypatch.setattr(build, "build_ovis2_5", slow)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "base"] * 3
    assert built == [(*sources, tmp_path / "base")]
    assert settings(tmp_path / "base", "build.json")["llm"] == sources[0]


def test_base_is_whole_though_the_run_is_to_be_partitioned(language_model, tower, built, tmp_path):
    run = HfDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    )
    assert is_deepspeed_zero3_enabled()
    base = tmp_path / "gpt2-conv"
    ensure_base(str(language_model("gpt2")), str(tower("conv")), base, visual_vocab_size=68)
    assert is_deepspeed_zero3_enabled()
    assert run.is_zero3()
    expected = (built("gpt2") / "model.safetensors").read_bytes()
    assert (base / "model.safetensors").read_bytes() == expected


def test_base_built_from_other_sources_is_refused(language_model, tower, built, monkeypatch):
    llm, vit = language_model("gpt2"), tower("conv")
    assert ensure_base(str(llm), str(vit), built("gpt2"), visual_vocab_size=68) == built("gpt2")
    monkeypatch.chdir(llm.parent)  # the same folder, named from elsewhere
    assert ensure_base(llm.name, str(vit), built("gpt2"), visual_vocab_size=68) == built("gpt2")
    with pytest.raises(ModelError, match=r"was built with llm .*, not Qwen/Qwen3-1\.7B"):
        ensure_base("Qwen/Qwen3-1.7B", str(vit), built("gpt2"), visual_vocab_size=68)
    with pytest.raises(ModelError, match="was built with visual_vocab_size 68, not 65536"):
        ensure_base(str(llm), str(vit), built("gpt2"))


def test_base_that_is_someone_elses_model_is_refused(checkpoint):
    with pytest.raises(ModelError, match=r"has no build\.json: it was not built from a and b"):
        ensure_base("a", "b", checkpoint())


def test_gpt2_layout_of_the_source_is_read_as_transformers_reads_it(
    language_model, tower, built, tmp_path
):
    """Files of the Hub's gpt2 hold the backbone alone, without the prefix."""
    shutil.copytree(language_model("gpt2"), tmp_path / "llm")
    bare = {n.removeprefix("transformer."): t for n, t in tensors(tmp_path / "llm").items()}
    save_file(bare, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "llm"), GPT2LMHeadModel)
    sources = str(tmp_path / "llm"), str(tower("conv"))
    build_ovis2_5(*sources, tmp_path / "out", visual_vocab_size=68)
    expected = tensors(built("gpt2"))
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
