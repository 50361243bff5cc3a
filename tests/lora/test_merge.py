"""Merged weights against PEFT's own merge, bit by bit; and what else is in a merged folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlmtune.cli.main import main
from vlmtune.core.errors import ModelError
from vlmtune.lora import merged_weights
from vlmtune.lora.checkpoint import Checkpoint, fingerprint
from vlmtune.lora.merge import merge

ROOT = Path(__file__).parents[2]
HEAD, EMBEDDING = "llm.lm_head.weight", "llm.model.embed_tokens.weight"

ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {".*layers.0.*q_proj": 3, "v_proj": 20},
        "use_rslora": True,
    },
    "dora": {"use_dora": True},
    "modules_to_save": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["vte", "visual_tokenizer.head"],
    },
    "bias_all": {"target_modules": r".*vit.*(fc1|out_proj)", "bias": "all"},
    "bias_lora_only": {"target_modules": r".*vit.*(fc1|out_proj)", "bias": "lora_only"},
    "lora_bias": {"target_modules": r".*vit.*(fc1|out_proj)", "lora_bias": True},
    "everything": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["q_proj", "fc1"],
        "rank_pattern": {"q_proj": 3},
        "modules_to_save": ["visual_tokenizer.head"],
        "bias": "all",
    },
}
EMBEDDINGS = {
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora_embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "trained_embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained_both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    different = [
        name
        for name in ours
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]
    assert not different


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_tensor_has_the_bits_of_pefts_merge(
    base, adapter, merged_by_peft, tmp_path, kind, dtype
):
    model = base(dtype)
    trained = adapter(model, **ADAPTERS[kind])
    report = merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    ours = weights(tmp_path / "merged")
    assert ours.keys() == weights(model).keys()
    assert_same(ours, merged_by_peft(model, trained))
    assert report.changed == report.adapted > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_and_an_untied_head_have_the_bits_of_pefts_merge(
    base, adapter, merged_by_peft, tmp_path, kind, dtype
):
    model = base(dtype, tied=False)
    trained = adapter(model, **EMBEDDINGS[kind])
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    assert_same(weights(tmp_path / "merged"), merged_by_peft(model, trained))


def test_an_adapter_stored_in_16_bits_is_added_in_float32_as_peft_loads_it(
    base, adapter, merged_by_peft, tmp_path
):
    model = base("bfloat16")
    trained = adapter(model, dtype=torch.bfloat16, use_dora=True)
    assert load_file(trained / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    assert_same(weights(tmp_path / "merged"), merged_by_peft(model, trained))


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_that_store_their_weight_transposed_have_the_bits_of_pefts_merge(
    adapter, merged_by_peft, tmp_path, use_dora
):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=300, n_positions=32)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    targets = ["c_attn", "c_proj", "c_fc"]
    trained = adapter(
        tmp_path / "gpt2", target_modules=targets, use_dora=use_dora, fan_in_fan_out=True
    )
    merge(str(tmp_path / "gpt2"), [(str(trained), 1.0)], tmp_path / "merged")
    assert_same(weights(tmp_path / "merged"), merged_by_peft(tmp_path / "gpt2", trained))


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "dora_embedding"])
def test_a_tensor_computed_in_blocks_has_the_bits_of_one_computed_at_once(
    base, adapter, merged_by_peft, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(merged_weights, "PIECE", 1000)
    model = base("bfloat16", tied=False)
    trained = adapter(model, **(ADAPTERS | EMBEDDINGS)[kind])
    init = merged_weights.WeightWriter.__init__

    def small_blocks(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.limit = 128 * 128

    monkeypatch.setattr(merged_weights.WeightWriter, "__init__", small_blocks)
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    assert_same(weights(tmp_path / "merged"), merged_by_peft(model, trained))


def qwen(tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    text = {**sizes, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 200}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied},
            vision_config={**vision, "out_hidden_size": 64},
            tie_word_embeddings=tied,
        )
    )


def llava() -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    text = {**sizes, "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 200}
    vision = {**sizes, "model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": 28}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config={**vision, "patch_size": 14})
    )


@pytest.mark.parametrize("build", [qwen, llava])
@pytest.mark.parametrize("names", ["published", "as ZeRO-3 saves"])
def test_files_may_have_other_names_than_the_modules(
    adapter, merged_by_peft, tmp_path, build, names
):
    torch.manual_seed(0)
    model, folder = build().to(torch.bfloat16), tmp_path / "base"
    model.save_pretrained(folder, save_original_format=names == "published", max_shard_size="99KB")
    stored = weights(folder)
    assert (stored.keys() <= model.state_dict().keys()) == (names != "published")
    trained = adapter(folder)
    merge(str(folder), [(str(trained), 1.0)], tmp_path / "merged")
    ours = weights(tmp_path / "merged")
    assert ours.keys() == stored.keys()
    theirs = merged_by_peft(folder, trained)
    result = Checkpoint.open(str(tmp_path / "merged"))
    assert len(result.places) == len(stored) == len(theirs)
    assert_same({name: result.read(name) for name in result.places}, theirs)


def test_files_and_names_and_their_order_are_those_of_the_base(base, adapter, tmp_path):
    model = base("bfloat16")
    trained = adapter(model, target_modules=["layers.0.self_attn.q_proj"])
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    files = sorted(file.name for file in model.glob("*.safetensors*"))
    assert files == sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors*"))
    changed = []
    for name in files:
        old, new = (model / name).read_bytes(), (tmp_path / "merged" / name).read_bytes()
        header = int.from_bytes(old[:8], "little") + 8
        assert old[:header] == new[:header] and len(old) == len(new)
        changed += [name] if old != new else []
    assert len(changed) == 2  # the file of the language model's layer and that of the tower's
    index = "model.safetensors.index.json"
    before, after = (
        json.loads((f / index).read_text("utf-8")) for f in (model, tmp_path / "merged")
    )
    assert before == after


@pytest.mark.slow
def test_the_merged_folder_loads_like_its_base_and_computes_base_and_adapter(
    base, adapter, tmp_path, load_model
):
    model = base("float32")
    trained = adapter(model, modules_to_save=["vte"])
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load_model(model), trained)
        wanted, unchanged = adapted(input_ids=ids).logits, load_model(model)(input_ids=ids).logits
    torch.save({"ids": ids, "wanted": wanted}, tmp_path / "logits.pt")
    assert (wanted - unchanged).abs().max() > 0.1
    lines = [
        "import sys, torch, vlmtune.models",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()",
        "print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)",
        "saved = torch.load(sys.argv[2])",
        "found = model(input_ids=saved['ids']).logits",
        "print(float((found - saved['wanted']).abs().max()))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), tmp_path / "merged", tmp_path / "logits.pt"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    kind, difference = done.stdout.splitlines()[-2:]
    assert kind == "Ovis2_5Processor"
    assert float(difference) < 1e-5


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_side_of_a_tied_pair_unties_it(
    base, adapter, tmp_path, load_model, target
):
    model = base("float32")
    trained = adapter(model, target_modules=[target, "q_proj"])
    report = merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    assert report.untied
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(load_model(model), trained)(input_ids=ids).logits
        found = load_model(tmp_path / "merged")(input_ids=ids).logits
    assert (found - wanted).abs().max() < 1e-5
    ours, before = weights(tmp_path / "merged"), weights(model)[EMBEDDING]
    assert torch.equal(ours[EMBEDDING], before) == (target == "lm_head")
    assert torch.equal(ours[HEAD], before) == (target == "embed_tokens")
    settings = json.loads((tmp_path / "merged/config.json").read_text("utf-8"))
    assert settings["llm_config"]["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text("utf-8"))
    assert index["weight_map"][HEAD] == index["weight_map"][EMBEDDING]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())


def test_an_untied_head_is_stored_under_the_name_the_other_files_use(adapter, tmp_path):
    model = llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    type(model)(model.config).save_pretrained(tmp_path / "base")
    assert "language_model.model.embed_tokens.weight" in weights(tmp_path / "base")
    assert "language_model.lm_head.weight" not in weights(tmp_path / "base")
    trained = adapter(tmp_path / "base", target_modules=["lm_head"])
    merge(str(tmp_path / "base"), [(str(trained), 1.0)], tmp_path / "merged")
    assert "language_model.lm_head.weight" in weights(tmp_path / "merged")
    assert Checkpoint.open(str(tmp_path / "merged")).tied == {}


@pytest.mark.parametrize("saved", ["once", "twice"])
def test_tied_embeddings_trained_as_one_stay_tied(adapter, tmp_path, saved):
    model = tmp_path / "base"
    torch.manual_seed(0)
    qwen(tied=True).save_pretrained(model)
    trained = adapter(
        model,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    file = trained / "adapter_model.safetensors"
    values = load_file(file)
    name = "base_model.model.model.language_model.embed_tokens.weight"
    head = "base_model.model.lm_head.weight"
    assert torch.equal(values[name], values[head])
    if saved == "once":
        save_file({k: v for k, v in values.items() if k != head}, file)
    report = merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    ours = weights(tmp_path / "merged")
    assert not report.untied and ours.keys() == weights(model).keys()
    assert torch.equal(ours["model.embed_tokens.weight"], values[name])
    assert not torch.equal(values[name], weights(model)["model.embed_tokens.weight"])


def test_a_tied_pair_saved_with_equal_values_stays_tied(base, adapter, tmp_path):
    model = base("bfloat16")
    parts = ["llm.model.embed_tokens", "llm.lm_head"]
    source = adapter(model, target_modules=["q_proj"], modules_to_save=parts)
    values = load_file(source / "adapter_model.safetensors")
    one, other = f"base_model.model.{EMBEDDING}", f"base_model.model.{HEAD}"
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    file = trained / "adapter_model.safetensors"
    save_file({**values, other: values[one].clone()}, file)
    report = merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    assert not report.untied and HEAD not in weights(tmp_path / "merged")
    assert torch.equal(weights(tmp_path / "merged")[EMBEDDING], values[one])
    save_file(values, file)
    report = merge(str(model), [(str(trained), 1.0)], tmp_path / "merged", overwrite=True)
    ours = weights(tmp_path / "merged")
    assert report.untied
    assert torch.equal(ours[EMBEDDING], values[one]) and torch.equal(ours[HEAD], values[other])


def test_a_base_that_stores_its_tied_head_too_gets_both(base, adapter, tmp_path):
    model = base("bfloat16")
    both = tmp_path / "both"
    both.mkdir()
    tensors = weights(model)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, both / "model.safetensors")
    (both / "config.json").write_bytes((model / "config.json").read_bytes())
    trained = adapter(model, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    report = merge(str(both), [(str(trained), 1.0)], tmp_path / "merged")
    ours = weights(tmp_path / "merged")
    assert report.untied and torch.equal(ours[HEAD], tensors[EMBEDDING])
    assert not torch.equal(ours[EMBEDDING], tensors[EMBEDDING])


def test_several_adapters_are_summed_in_float32_and_rounded_once(base, adapter, tmp_path):
    model = base("bfloat16")
    one, two = adapter(model), adapter(model, seed=1, r=3, target_modules=["q_proj", "fc1"])
    merge(str(model), [(str(one), 0.75), (str(two), -2.0)], tmp_path / "merged")
    ours, before = weights(tmp_path / "merged"), weights(model)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    for name, old in before.items():
        total = torch.zeros_like(old, dtype=torch.float32)
        for values, weight, rank in zip(tensors, (0.75, -2.0), (4, 3), strict=True):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in values:
                delta = values[f"{module}.lora_B.weight"] @ values[f"{module}.lora_A.weight"]
                total += delta * (8 / rank) * weight
        assert torch.equal(ours[name], (old.float() + total).bfloat16()), name


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["dora", "modules_to_save"])
def test_only_plain_lora_can_be_weighted_or_added(base, adapter, tmp_path, kind, weight):
    model = base("bfloat16")
    adapters = [(str(adapter(model, **ADAPTERS[kind])), weight)]
    if weight == 1:
        adapters.append((str(adapter(model, seed=1, **ADAPTERS[kind])), 1.0))
    with pytest.raises(ModelError, match=r"cannot be (added|weighted)"):
        merge(str(model), adapters, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_rounds_the_sum_once_and_stands_in_the_config(
    base, adapter, tmp_path, stored, wanted
):
    model = base(stored)
    trained = adapter(model, target_modules=["q_proj"], lora_alpha=4)
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged", dtype=wanted)
    ours, before = weights(tmp_path / "merged"), weights(model)
    values = load_file(trained / "adapter_model.safetensors")
    target = getattr(torch, wanted)
    for name, old in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        total = old.float()
        if f"{module}.lora_A.weight" in values:
            total += values[f"{module}.lora_B.weight"] @ values[f"{module}.lora_A.weight"]
        assert torch.equal(ours[name], total.to(target)), name
    assert json.loads((tmp_path / "merged/config.json").read_text("utf-8"))["torch_dtype"] == wanted
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def quantized(folder: Path, trained: Path, modules: list[str], **changes) -> Path:
    """The adapter with a run file that says its base was quantised."""
    copy = folder / "qlora"
    copy.mkdir()
    for file in trained.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    settings = {"bits": 4, "quant_type": "nf4", "double_quant": True, "dtype": "bfloat16"}
    run = {"quantization": {**settings, "modules": modules, **changes}}
    (copy / "vlmtune_run.json").write_text(json.dumps(run), "utf-8")
    return copy


QUANTIZED = ["llm.model.layers.0.self_attn.q_proj", "llm.model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("changes", [{}, {"double_quant": False}, {"bits": 8}])
@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_an_adapter_trained_on_quantised_weights_goes_onto_either_kind(
    base, adapter, tmp_path, onto, changes
):
    from vlmtune.lora.adapter import Adapter

    model = base("bfloat16")
    trained = quantized(
        tmp_path, adapter(model, target_modules=["layers.0.self_attn.q_proj"]), QUANTIZED, **changes
    )
    report = merge(str(model), [(str(trained), 1.0)], tmp_path / "merged", onto=onto)
    ours, before = weights(tmp_path / "merged"), weights(model)
    quantization = Adapter.open(str(trained)).quantization
    values = load_file(trained / "adapter_model.safetensors")
    differences, norms = [], []
    for name, old in before.items():
        module, start = name.removesuffix(".weight"), old.float()
        if module in QUANTIZED:
            rounded = quantization.round_trip(old).float()
            differences.append(rounded - start)
            norms.append(start)
            start = rounded if onto == "dequantized" else start
        lora = f"base_model.model.{module}.lora_"
        if f"{lora}A.weight" in values:
            start = start + values[f"{lora}B.weight"] @ values[f"{lora}A.weight"] * 2
        assert torch.equal(ours[name], start.bfloat16()), name
    change = torch.cat([d.flatten() for d in differences]).double()
    norm = torch.cat([n.flatten() for n in norms]).double().norm()
    assert report.rounding.largest == pytest.approx(float(change.abs().max()))
    assert report.rounding.mean == pytest.approx(float(change.abs().mean()))
    assert report.rounding.relative == pytest.approx(float(change.norm() / norm))
    assert report.rounding.relative > 0.003


def test_dequantised_weights_need_an_adapter_that_says_how_they_were_quantised(
    base, adapter, tmp_path
):
    model = base("bfloat16")
    with pytest.raises(ModelError, match="does not say that and how its base was quantised"):
        merge(str(model), [(str(adapter(model)), 1.0)], tmp_path / "merged", onto="dequantized")


def test_every_other_file_of_the_base_is_kept_but_not_what_tells_of_its_making(
    base, adapter, tmp_path
):
    model = base("bfloat16")
    folder = tmp_path / "base"
    kept = {"modeling_x.py": "code", "LICENSE": "text", "assets/a.txt": "a", "merges.model": "m"}
    gone = {
        **{
            "pytorch_model.bin": "w",
            "optimizer.pt": "w",
            "old.gguf": "w",
            "training_args.bin": "w",
        },
        **{"trainer_state.json": "{}", "checkpoint-3/config.json": "{}", "runs/x/events": "e"},
        **{"log.jsonl": "", "loss.png": "", "score.json": "{}", "vlmtune_run.json": "{}"},
        **{"base/config.json": "{}", ".cache/x": "x", "global_step3/zero.bin": "w"},
    }
    card = "---\nlicense: cc-by-4.0\nlicense_link: LICENSE\nbase_model: x/y\n---\n\n# Base\n"
    for file in model.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    for name, text in {**kept, **gone, "README.md": card}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    trained = adapter(model)
    merge(str(folder), [(str(trained), 1.0)], tmp_path / "merged")
    merged = tmp_path / "merged"
    found = {str(file.relative_to(merged)) for file in merged.rglob("*") if file.is_file()}
    own = {file.name for file in model.iterdir()} | {"README.md", "vlmtune_merge.json"}
    assert found == own | kept.keys()
    for name in [*kept, "config.json", "tokenizer.json", "preprocessor_config.json"]:
        assert (merged / name).read_bytes() == (folder / name).read_bytes()
    text = (merged / "README.md").read_text("utf-8")
    assert text.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\nlicense: cc-by-4.0\n"
        "license_link: LICENSE\ntags:\n- vlmtune\n- merge\n---\n\n# merged\n"
    )
    assert f"- `{trained}`, weight 1\n" in text
    origin = json.loads((merged / "vlmtune_merge.json").read_text("utf-8"))
    versions = origin.pop("versions")
    assert versions["torch"] == torch.__version__
    assert origin == {
        "base": {"source": str(folder), "fingerprint": fingerprint(Checkpoint.open(str(model)))},
        "adapters": [{"source": str(trained), "weight": 1.0}],
        "dtype": None,
        "onto": "original",
        "run": {},
    }


def test_the_command_takes_the_base_from_the_adapter_and_says_what_it_did(
    base, adapter, tmp_path, capsys
):
    model = base("bfloat16")
    trained = quantized(tmp_path, adapter(model), QUANTIZED)
    assert main(["merge", "--adapter", f"{trained}:0.5", "--output", str(tmp_path / "merged")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'merged'}: {model} + 0.5 x {trained}"
    assert lines[1].startswith("  1.3 MB of weights in 5 files, ")
    assert lines[2].startswith("  27 of 27 adapted tensors changed, by at most 0.")
    assert "merged onto the original weights; quantising them for training changed" in lines[3]
    assert lines[3].endswith("% of their norm (--onto dequantized takes the others)")


@pytest.mark.slow
def test_a_merge_needs_no_more_memory_than_the_largest_file(adapter, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    config = Qwen3Config(**sizes, **heads, vocab_size=20000, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size="110MB")
    shutil.copytree(adapter(tmp_path / "base"), tmp_path / "adapter")
    measure = [sys.executable, ROOT / "benchmarks/merge_memory.py", "--part", "ours"]
    done = subprocess.run(
        [*measure, "--folder", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    files = [file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors")]
    assert len(files) == 3 and sum(files) > 230e6
    assert json.loads(done.stdout.splitlines()[-1])["peak_mb"] < 1.1 * max(files) / 1e6


def test_on_a_terminal_the_command_asks_onto_which_weights(
    base, adapter, tmp_path, capsys, monkeypatch
):
    trained = quantized(tmp_path, adapter(base("bfloat16")), QUANTIZED)
    keyboard, terminal = os.openpty()
    with os.fdopen(terminal) as stdin, os.fdopen(keyboard, "w") as typed:
        monkeypatch.setattr(sys, "stdin", stdin)
        typed.write("both\ndequantized\n")
        typed.flush()
        assert main(["merge", "--adapter", str(trained), "--output", str(tmp_path / "merged")]) == 0
    told = capsys.readouterr().out
    assert told.count("The adapter was trained on weights quantised to 4 bits.") == 2
    assert "merged onto the dequantized weights" in told
    origin = json.loads((tmp_path / "merged/vlmtune_merge.json").read_text("utf-8"))
    assert origin["onto"] == "dequantized"


def test_a_closed_terminal_means_the_original_weights(base, adapter, tmp_path, monkeypatch):
    trained = quantized(tmp_path, adapter(base("bfloat16")), QUANTIZED)
    keyboard, terminal = os.openpty()
    with os.fdopen(terminal) as stdin, os.fdopen(keyboard, "w") as typed:
        monkeypatch.setattr(sys, "stdin", stdin)
        typed.write("\x04")
        typed.flush()
        assert main(["merge", "--adapter", str(trained), "--output", str(tmp_path / "merged")]) == 0
    origin = json.loads((tmp_path / "merged/vlmtune_merge.json").read_text("utf-8"))
    assert origin["onto"] == "original"


@pytest.mark.parametrize("flag", ["--data", "--image_folder", "--compute_dtype", "--device"])
def test_flags_of_verify_need_it(flag, capsys):
    value = "float32" if flag == "--compute_dtype" else "x"
    with pytest.raises(SystemExit) as ended:
        main(["merge", "--adapter", "a", "--output", "o", flag, value])
    assert ended.value.code == 2
    assert "need --verify" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_takes_its_own_names_of_the_flags(base, adapter, tmp_path):
    model = base("bfloat16")
    words = ["--adapter_path", adapter(model), "--output_path", tmp_path / "merged"]
    script = [sys.executable, ROOT / "scripts/merge_lora_adapters.py", *words, "--dtype", "float16"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {tensor.dtype for tensor in weights(tmp_path / "merged").values()} == {torch.float16}


def test_an_adapter_that_does_nothing_is_said_to(base, adapter, tmp_path, capsys):
    model = base("bfloat16")
    trained = tmp_path / "idle"
    trained.mkdir()
    source = adapter(model)
    values = load_file(source / "adapter_model.safetensors")
    save_file(
        {k: v * 0 if "lora_B" in k else v for k, v in values.items()},
        trained / "adapter_model.safetensors",
    )
    (trained / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    assert main(["merge", "--adapter", str(trained), "--output", str(tmp_path / "merged")]) == 0
    told = capsys.readouterr()
    assert "  0 of 27 adapted tensors changed" in told.out
    assert "note: no value differs from the base" in told.err
