"""A merged model against its base and adapters: right merges pass, each way to be wrong fails.

Merges here are PEFT's own, saved with transformers: for `verify` merges by another tool.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)

import vlmtune.models  # noqa: F401, registers Ovis2.5 with the Auto classes
from vlmtune.core.errors import ConfigError, DataError, ModelError
from vlmtune.lora.checkpoint import Checkpoint, fingerprint
from vlmtune.lora.integrity import integrity_problems
from vlmtune.lora.merge import merge
from vlmtune.lora.quantization import Quantization, keep_unpacked
from vlmtune.lora.samples import made_samples
from vlmtune.lora.verify import verify

GOLDENS = Path(__file__).parents[1] / "goldens" / "ovis2_5"
LINEAR = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
LLM_LINEAR = rf"llm{LINEAR}"
WEIGHTS = "model.safetensors"
Q_PROJ = "llm.model.layers.0.self_attn.q_proj.weight"


def save_base(case: str, folder: Path, dtype: torch.dtype) -> Path:
    golden = folder.parent / f"golden-{folder.name}"
    shutil.copytree(GOLDENS / "tokenizer", golden)
    for name in ("config.json", WEIGHTS, "preprocessor_config.json"):
        shutil.copy(GOLDENS / case / name, golden)
    load_model(golden).to(dtype).save_pretrained(folder)
    AutoProcessor.from_pretrained(golden).save_pretrained(folder)
    return folder


def load_model(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """`verify` collects garbage; without what the imports left it takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base("full_single_untied", tmp_path_factory.mktemp("base") / "m", torch.bfloat16)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory) -> Path:
    return save_base("full_multi_tied", tmp_path_factory.mktemp("tied") / "m", torch.bfloat16)


def save_adapter(base: Path, folder: Path, std: float = 0.05, seed: int = 0, **config) -> Path:
    """A LoRA whose B is normal with that deviation."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **config}
    model = get_peft_model(load_model(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=std)
        elif "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * std)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "a")


def save_merged(
    base: Path,
    model,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    **saving,
) -> Path:
    model.to(dtype).save_pretrained(folder, **saving)
    for file in base.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


def peft_merge(base: Path, adapter: Path):
    return PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()


@pytest.fixture
def merged(base, adapter, tmp_path) -> Path:
    return save_merged(base, peft_merge(base, adapter), tmp_path / "merged")


def run(base: Path, adapter: Path | list[tuple[Path, float]], merged: Path, **keys):
    adapters = adapter if isinstance(adapter, list) else [(adapter, 1.0)]
    given = [(str(folder), weight) for folder, weight in adapters]
    return verify(str(base), given, str(merged), **{"samples": 4, "device": "cpu", **keys})


def edit(merged: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(merged / WEIGHTS)
    change(tensors)
    save_file(tensors, merged / WEIGHTS, metadata={"format": "pt"})


# Right merges.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_right_merge_passes_in_every_dtype(base, adapter, tmp_path, dtype):
    folder = save_merged(base, peft_merge(base, adapter), tmp_path / "m", getattr(torch, dtype))
    found = run(base, adapter, folder)
    assert found.problems == []
    assert found.dtype == getattr(torch, dtype)
    assert found.effect and found.rest and found.weights
    assert found.effect.mean > 0.05 * found.scale
    roundoff = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-20}[dtype]
    assert found.rest.mean < 2 * roundoff * found.scale
    assert found.share == pytest.approx(1, abs=0.02 if dtype == "bfloat16" else 0.002)
    assert found.weights.share == pytest.approx(1, abs=1e-3)
    assert len(found.weights.changed) == 3 * 6 + 2 * 7
    found.check()


def test_the_numbers_are_those_of_plain_peft(base, adapter, merged):
    found = run(base, adapter, merged)
    samples = made_samples(AutoProcessor.from_pretrained(base), 4)

    @torch.no_grad()
    def logits(model):
        return torch.cat([model(**sample).logits[0] for sample in samples])

    plain, ours = logits(load_model(base)), logits(load_model(merged))
    adapted = logits(PeftModel.from_pretrained(load_model(base), adapter))
    assert found.positions == len(plain) == sum(s["input_ids"].shape[1] for s in samples)
    assert (found.samples, found.seen) == (4, 2)
    for difference, a, b in ((found.effect, adapted, plain), (found.rest, ours, adapted)):
        assert difference.largest == pytest.approx(float((a - b).abs().max()), rel=1e-4)
        assert difference.mean == pytest.approx(float((a - b).abs().mean()), rel=1e-4)
        same = (a.argmax(-1) == b.argmax(-1)).float().mean()
        assert difference.agreement == pytest.approx(float(same), abs=1e-6)
    effect = adapted - plain
    share = float(((ours - plain) * effect).sum() / (effect * effect).sum())
    assert found.share == pytest.approx(share, rel=1e-4)
    assert found.scale == pytest.approx(float(adapted.std(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_may_run_in_half_precision(base, adapter, merged, dtype):
    found = run(base, adapter, merged, compute_dtype=dtype)
    assert found.problems == []
    assert found.compute_dtype == getattr(torch, dtype)
    assert found.share == pytest.approx(1, abs=0.05)
    lost = run(base, adapter, base, compute_dtype=dtype)
    assert lost.problems[0].startswith("the merge lost the adapter: all 32 tensors")


def test_kept_logits_are_bounded(base, adapter, merged, monkeypatch):
    monkeypatch.setattr("vlmtune.lora.measure.KEPT_BYTES", 40 * 352 * 4)
    found = run(base, adapter, merged)
    assert found.positions == 40
    assert found.problems == []


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": LLM_LINEAR, "modules_to_save": ["vte", "visual_tokenizer.head"]},
        {"target_modules": [*"qkv"], "bias": "lora_only"},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=["dora", "rslora", "full-parts", "bias", "embeddings"],
)
def test_every_kind_of_adapter_passes(base, tmp_path, config):
    if config.get("target_modules") == [*"qkv"]:
        config = {**config, "target_modules": r".*\.(k_proj|fc1)"}
    adapter = save_adapter(base, tmp_path / "a", **config)
    found = run(base, adapter, save_merged(base, peft_merge(base, adapter), tmp_path / "m"))
    assert found.problems == []
    assert found.share == pytest.approx(1, abs=0.05)


def test_adapters_are_weighted_and_added(base, adapter, tmp_path):
    other = save_adapter(base, tmp_path / "b", seed=1, r=2, target_modules=LLM_LINEAR)
    model = load_model(base)
    deltas: dict[str, torch.Tensor] = {}
    plain = {name: p.clone() for name, p in model.state_dict().items()}
    for folder, weight in ((adapter, 0.5), (other, -1.5)):
        for name, value in peft_merge(base, folder).state_dict().items():
            deltas[name] = deltas.get(name, 0) + weight * (value - plain[name])
    model.load_state_dict({name: plain[name] + deltas[name] for name in plain})
    folder = save_merged(base, model, tmp_path / "m")
    assert run(base, [(adapter, 0.5), (other, -1.5)], folder).problems == []
    swapped = run(base, [(adapter, -1.5), (other, 0.5)], folder)
    assert any("further from base + adapter" in problem for problem in swapped.problems)


def test_a_head_that_the_merge_untied_may_be_extra(tied_base, tmp_path):
    adapter = save_adapter(tied_base, tmp_path / "a", target_modules=["embed_tokens"])
    model = load_model(tied_base)
    head = model.llm.lm_head.weight.detach().clone()
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.llm.lm_head.weight = torch.nn.Parameter(head)
    merged.config.llm_config.tie_word_embeddings = False
    merged.llm.config.tie_word_embeddings = False
    folder = save_merged(tied_base, merged, tmp_path / "untied")
    assert "llm.lm_head.weight" in load_file(folder / WEIGHTS)
    assert run(tied_base, adapter, folder).problems == []


def test_an_embedding_merged_into_its_tied_head_fails(tied_base, tmp_path):
    adapter = save_adapter(tied_base, tmp_path / "a", target_modules=["embed_tokens"], std=0.5)
    folder = save_merged(tied_base, peft_merge(tied_base, adapter), tmp_path / "tied")
    assert "llm.lm_head.weight" not in load_file(folder / WEIGHTS)
    [*_, problem] = run(tied_base, adapter, folder).problems
    assert problem.startswith("the logits of merged and base + adapter differ by ")


def test_an_untied_head_that_is_not_stored_is_missing(tied_base, tmp_path):
    adapter = save_adapter(tied_base, tmp_path / "a")
    folder = save_merged(tied_base, peft_merge(tied_base, adapter), tmp_path / "m")
    assert run(tied_base, adapter, folder).problems == []
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["tie_word_embeddings"] = config["llm_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    found = run(tied_base, adapter, folder)
    assert found.problems == ["tensor llm.lm_head.weight is missing"]


# Wrong merges.


def test_a_folder_that_is_the_base_has_lost_the_adapter(base, adapter, tmp_path):
    folder = shutil.copytree(base, tmp_path / "m")
    found = run(base, adapter, folder)
    assert found.problems[0] == (
        "the merge lost the adapter: all 32 tensors that it changes are as in the base"
    )
    assert found.share == 0
    assert found.rest == found.effect
    with pytest.raises(ModelError, match="the merge lost the adapter"):
        found.check()


def test_an_adapter_without_effect_fails(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "a", std=0.0)
    found = run(base, adapter, save_merged(base, peft_merge(base, adapter), tmp_path / "m"))
    assert found.problems == ["the adapter does nothing: base + adapter has the logits of the base"]
    assert found.effect and found.effect.largest == 0 and found.share is None
    assert "carried over: no effect" in found.report()


def test_a_vision_adapter_on_text_alone_asks_for_images(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "a", target_modules=r"visual_tokenizer.*fc1")
    merged = save_merged(base, peft_merge(base, adapter), tmp_path / "m")
    assert run(base, adapter, merged).problems == []
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    data = tmp_path / "text.json"
    data.write_text(json.dumps([{"id": "t", "conversations": text}]), "utf-8")
    [problem] = run(base, adapter, merged, data=str(data)).problems
    assert problem.endswith("; no sample had an image, --data gives others")


@pytest.mark.parametrize("times", [2.0, 0.5, -1.0])
def test_an_adapter_merged_at_another_scale_fails(base, tmp_path, times):
    adapter = save_adapter(base, tmp_path / "a", std=0.01)
    model, plain = peft_merge(base, adapter), load_model(base).state_dict()
    for name, parameter in model.named_parameters():
        parameter.data = plain[name] + times * (parameter.data - plain[name])
    found = run(base, adapter, save_merged(base, model, tmp_path / "m"))
    # Nearly: logits are not linear in the weights.
    assert found.share == pytest.approx(times, abs=0.1)
    assert found.problems[0].startswith("32 tensors are further from base + adapter than rounding")
    assert found.problems[1].startswith(f"the merged model has {found.share:.2f} of the adapter's")


def test_one_layer_that_was_not_merged_fails(base, adapter, merged):
    plain = load_file(base / WEIGHTS)[Q_PROJ]
    edit(merged, lambda tensors: tensors.update({Q_PROJ: plain}))
    found = run(base, adapter, merged)
    assert found.problems[0] == (
        f"1 of the 32 tensors that the adapter changes are as in the base, the first is {Q_PROJ}"
    )


def test_one_layer_of_a_weak_adapter_fails_though_the_logits_are_near(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "a", std=0.01)
    merged = save_merged(base, peft_merge(base, adapter), tmp_path / "m")
    assert run(base, adapter, merged).problems == []
    plain = load_file(base / WEIGHTS)[Q_PROJ]
    edit(merged, lambda tensors: tensors.update({Q_PROJ: plain}))
    found = run(base, adapter, merged)
    assert found.share_is_right and found.rest and found.rest.mean < found.allowed[0]
    assert len(found.problems) == 1 and Q_PROJ in found.problems[0]


def test_a_tensor_that_no_adapter_changes_must_be_the_bases(base, adapter, merged):
    def nudge(tensors):
        tensors["llm.model.norm.weight"][0] *= 1.01

    edit(merged, nudge)
    [problem] = run(base, adapter, merged).problems
    assert problem.startswith("1 tensors are further from base + adapter")
    assert problem.endswith("the first is llm.model.norm.weight")


def test_what_rounding_swallowed_asks_for_float32(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "a", std=1e-4)
    folder = save_merged(base, peft_merge(base, adapter), tmp_path / "m")
    found = run(base, adapter, folder)
    assert found.weights and found.weights.share is not None and found.weights.share < 0.5
    assert found.problems == [
        f"rounding to bfloat16 swallowed the adapter: {found.weights.share:.2f} of its change is "
        "left in the weights; merge with --dtype float32"
    ]
    exact = save_merged(base, peft_merge(base, adapter), tmp_path / "f", torch.float32)
    assert run(base, adapter, exact).problems == []


# Folders that are not whole; no model is run.


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
        (
            lambda t: t.update({"llm.model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            None,
        ),
        (
            lambda t: t.update({"vte.weight": t["vte.weight"][:-1].clone()}),
            "tensor vte.weight has the shape [63, 32], in the base [64, 32]",
        ),
        (
            lambda t: t[Q_PROJ].view(-1)[7:9].copy_(torch.tensor([float("nan"), float("inf")])),
            f"tensor {Q_PROJ} holds 2 NaN or Inf",
        ),
    ],
    ids=["missing", "extra", "shape", "nan"],
)
def test_tensors_are_checked_before_a_model_is_loaded(base, adapter, merged, change, problem):
    edit(merged, change)
    found = run(base, adapter, merged)
    wanted = problem or "tensor llm.model.layers.0.self_attn.q_proj.bias is not in the base"
    assert found.problems == [wanted]
    assert found.effect is None
    assert found.report().endswith(f"  - {wanted}")


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_a_file_that_loading_reads_is_missing(base, adapter, merged, name):
    (merged / name).unlink()
    assert run(base, adapter, merged).problems == [f"{name} is missing"]
    (merged / name).touch()
    assert run(base, adapter, merged).problems == [f"{name} is empty"]


def test_a_config_that_computes_something_else_fails(base, adapter, merged):
    config = json.loads((merged / "config.json").read_text("utf-8"))
    config["llm_config"]["rope_theta"] = 10000
    config["use_cache"] = False
    (merged / "config.json").write_text(json.dumps(config), "utf-8")
    [problem] = run(base, adapter, merged).problems
    assert problem == (
        "config.json: llm_config.rope_parameters.rope_theta is 10000, in the base 1000000"
    )


def in_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def test_a_class_that_engines_choose_by_must_be_the_bases(base, adapter, merged):
    in_json(merged / "config.json", lambda config: config.update(architectures=["Other"]))
    assert run(base, adapter, merged).problems == [
        "config.json: architectures is ['Other'], in the base ['Ovis2_5']"
    ]


def test_what_our_own_merge_copied_must_be_the_bases_to_the_byte(base, adapter, tmp_path):
    folder = tmp_path / "merged"
    merge(str(base), [(str(adapter), 1.0)], folder)
    assert run(base, adapter, folder, samples=1).problems == []
    names = ["chat_template.jinja", "generation_config.json", "preprocessor_config.json"]
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    wanted = [f"{name} differs from the base's" for name in names]
    assert run(base, adapter, folder).problems == wanted


def swap_two_tokens(tokenizer: dict) -> None:
    vocab = tokenizer["model"]["vocab"]
    one, other, *_ = sorted(vocab, key=vocab.get)
    vocab[one], vocab[other] = vocab[other], vocab[one]


def test_a_vocabulary_in_another_order_fails(base, adapter, merged):
    in_json(merged / "tokenizer.json", swap_two_tokens)
    found = run(base, adapter, merged, samples=1)
    assert found.problems == ["the vocabulary of its tokenizer is not the base's"]


def test_another_chat_template_fails(base, adapter, merged):
    (merged / "chat_template.jinja").write_text("{{ messages[0].role }}", "utf-8")
    found = run(base, adapter, merged, samples=1)
    assert found.problems == ["the chat template of its tokenizer is not the base's"]


def test_buffers_and_tensors_stored_in_parts_must_be_the_bases(tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8}
    heads |= {"q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 32}
    config = DeepseekV3Config(**sizes, **heads, **experts, **layers)
    DeepseekV3ForCausalLM(config).save_pretrained(base)
    shutil.copytree(base, merged)
    assert integrity_problems(Checkpoint.open(str(base)), Checkpoint.open(str(merged))) == []
    names = [
        "model.layers.1.mlp.experts.2.down_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ]

    def change(tensors):
        for name in names:
            tensors[name].view(-1)[3] += 1

    edit(merged, change)
    found = integrity_problems(Checkpoint.open(str(base)), Checkpoint.open(str(merged)))
    assert sorted(found) == [
        f"tensor {name} differs from the base's, and no adapter can change it" for name in names
    ]


def test_a_device_that_is_not_there_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError) as caught:
        verify("no base", [("no adapter", 1.0)], "no model", device="nonsense")
    assert (caught.value.where, caught.value.what) == ("device", '"nonsense" cannot be used here')


def test_a_merge_onto_another_base_fails(base, adapter, merged):
    of = {"source": "other", "fingerprint": fingerprint(Checkpoint.open(str(base)))}
    file = merged / "vlmtune_merge.json"
    file.write_text(json.dumps({"base": of, "onto": "original"}), "utf-8")
    assert run(base, adapter, merged).problems == []
    file.write_text(json.dumps({"base": {**of, "fingerprint": "sha256:0"}}), "utf-8")
    assert run(base, adapter, merged).problems == [
        f"it was merged onto other, whose weights are not those of {base}"
    ]
    file.write_text("{", "utf-8")
    with pytest.raises(ModelError, match=r"vlmtune_merge.json:\n  is not JSON"):
        run(base, adapter, merged)


def test_a_shard_that_is_missing_or_cut_short_is_named(base, adapter, tmp_path):
    model = peft_merge(base, adapter)
    folder = save_merged(base, model, tmp_path / "m", max_shard_size="60KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    assert run(base, adapter, folder).problems == []
    os.truncate(first, first.stat().st_size - 100)
    with pytest.raises(ModelError, match=rf"{first.name}:\n  is cut short"):
        run(base, adapter, folder)
    second.unlink()
    with pytest.raises(ModelError, match=second.name):
        run(base, adapter, folder)


# Adapters trained on quantised weights.


@pytest.fixture(scope="module", params=[4, 8])
def qlora(request, base, tmp_path_factory) -> tuple[Path, Quantization]:
    pytest.importorskip("bitsandbytes")
    folder = save_adapter(base, tmp_path_factory.mktemp("qlora") / "a", target_modules=LLM_LINEAR)
    linear = [
        name
        for name, module in load_model(base).named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("llm.model")
    ]
    quantization = Quantization(request.param, "nf4", True, "bfloat16", linear)
    run = {"config": {}, "quantization": quantization.to_dict()}
    (folder / "vlmtune_run.json").write_text(json.dumps(run), "utf-8")
    return folder, quantization


def dequantized(base: Path, quantization: Quantization, folder: Path) -> Path:
    model = load_model(base)
    for name in quantization.modules:
        weight = model.get_submodule(name).weight
        weight.data = quantization.round_trip(weight.data.bfloat16()).float()
    return save_merged(base, model, folder, torch.float32)


def test_a_qlora_merge_onto_the_original_weights_says_what_training_had(base, qlora, tmp_path):
    adapter, quantization = qlora
    folder = save_merged(base, peft_merge(base, adapter), tmp_path / "m")
    found = run(base, adapter, folder)
    assert found.problems == []
    assert found.trained and found.rest and found.bits == quantization.bits
    assert found.trained.mean > 2 * found.rest.mean
    line = f"  as trained on {quantization.bits}-bit weights: max {found.trained.largest:.2e}"
    assert line in found.report()


def test_a_qlora_merge_onto_the_dequantized_weights_is_what_was_trained(base, qlora, tmp_path):
    adapter, quantization = qlora
    onto = dequantized(base, quantization, tmp_path / "d")
    folder = save_merged(base, peft_merge(onto, adapter), tmp_path / "m", torch.float32)
    wrong = run(base, adapter, folder)
    assert any("further from base + adapter" in problem for problem in wrong.problems)
    (folder / "vlmtune_merge.json").write_text(json.dumps({"onto": "dequantized"}), "utf-8")
    found = run(base, adapter, folder)
    assert found.problems == []
    assert found.trained == found.rest
    assert found.share == pytest.approx(1, abs=1e-3)


# LLM.int8 rounds the inputs of a layer too.
@pytest.mark.parametrize("qlora", [4], indirect=True)
def test_what_was_trained_is_what_bitsandbytes_computes(base, qlora, tmp_path):
    adapter, quantization = qlora
    folder = save_merged(base, peft_merge(base, adapter), tmp_path / "m", torch.float32)
    found = run(base, adapter, folder)
    config = quantization.host_config(load_model(base), "float32")
    quantized = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    keep_unpacked(quantized)
    for module in quantized.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.bfloat16:
                setattr(module, name, torch.nn.Parameter(parameter.float()))
    trained = PeftModel.from_pretrained(quantized, adapter).eval()
    ours = load_model(folder)
    samples = made_samples(AutoProcessor.from_pretrained(base), 4)
    with torch.no_grad():
        gaps = [(ours(**s).logits - trained(**s).logits).abs() for s in samples]
    mean = sum(float(gap.sum()) for gap in gaps) / sum(gap.numel() for gap in gaps)
    assert found.trained and found.trained.mean == pytest.approx(mean, rel=0.02)


# Data.


def test_data_is_read_as_the_adapters_run_read_it(base, adapter, merged, tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nWhich digit is this?"},
        {"from": "gpt", "value": "8"},
    ]
    images = Path(__file__).parents[2] / "sample_data/images"
    image = sorted(images.iterdir())[0].name
    records = [{"id": str(i), "image": image, "conversations": turns} for i in range(3)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records), "utf-8")
    trained = shutil.copytree(adapter, tmp_path / "trained")
    pixels = 32 * 32
    settings = {
        "single_image_min_pixels": pixels,
        "single_image_max_pixels": pixels,
        "image_folder": str(images),
        "thinking": "as_is",
        "learning_rate": 1e-4,
    }
    (trained / "vlmtune_run.json").write_text(json.dumps({"config": settings}), "utf-8")
    found = run(base, trained, merged, data=str(data), samples=2)
    assert (found.samples, found.seen, found.problems) == (2, 2, [])
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    before = "<|im_start|>user\n"
    after = "\nWhich digit is this?<|im_end|>\n<|im_start|>assistant\n8<|im_end|>"
    words = sum(len(tokenizer(text)["input_ids"]) for text in (before, after))
    # 4 x 4 visual tokens of 8 x 8 pixels, and two indicators.
    assert found.positions == 2 * (words + 16 + 2)
    with pytest.raises(DataError, match="does not exist"):
        run(base, trained, merged, data=str(data), image_folder=str(tmp_path))


def test_a_language_model_is_verified_on_text(base, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    plain = tmp_path / "base"
    config = AutoConfig.from_pretrained(base).llm_config
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(plain), LoraConfig(init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "a")
    merged = save_merged(plain, model.merge_and_unload(), tmp_path / "m", torch.float32)
    found = run(plain, tmp_path / "a", merged)
    assert (found.problems, found.samples, found.seen) == ([], 4, 0)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "a", "conversations": turns}]), "utf-8")
    found = run(plain, tmp_path / "a", merged, data=str(data))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert found.positions == len(tokenizer(text)["input_ids"])


def test_a_family_of_transformers_is_verified_with_its_images(base, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    size = {"height": 16, "width": 16}
    pixels = CLIPImageProcessorPil(size=size, crop_size=size)
    processor = LlavaProcessor(
        pixels, tokenizer, 4, "default", template, num_additional_image_tokens=1
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes["num_hidden_layers"] = 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=4, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    plain = tmp_path / "base"
    AutoModelForImageTextToText.from_config(config).save_pretrained(plain)
    processor.save_pretrained(plain)
    adapter = save_adapter(plain, tmp_path / "a", std=0.3)
    merged = save_merged(plain, peft_merge(plain, adapter), tmp_path / "m", torch.float32)
    found = run(plain, adapter, merged)
    assert (found.problems, found.seen) == ([], 2)
    stored = load_file(merged / WEIGHTS)
    name = next(name for name in stored if "vision" in name and "q_proj.weight" in name)
    plain_weight = load_file(plain / WEIGHTS)[name]
    edit(merged, lambda tensors: tensors.update({name: plain_weight}))
    assert len(run(plain, adapter, merged).problems) > 0
    image = Image.new("RGB", (20, 30), "red")
    image.save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red."}]
    data = tmp_path / "data.json"
    record = {"id": "a", "image": "red.png", "conversations": turns}
    data.write_text(json.dumps([record]), "utf-8")
    found = run(plain, adapter, merged, data=str(data), image_folder=str(tmp_path))
    assert (found.samples, found.seen) == (1, 1)


def test_data_without_a_record_and_no_samples_are_errors(base, adapter, merged, tmp_path):
    data = tmp_path / "none.json"
    data.write_text("[]", "utf-8")
    with pytest.raises(DataError, match="there is no record"):
        run(base, adapter, merged, data=str(data))
    with pytest.raises(ConfigError, match="samples"):
        run(base, adapter, merged, samples=0)


def test_made_samples_are_the_same_at_every_call_and_have_images(base):
    processor = AutoProcessor.from_pretrained(base)
    first, again = made_samples(processor, 6), made_samples(processor, 6)
    for a, b in zip(first, again, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert [len(s.get("grid_thws", ())) for s in first] == [1, 0, 2, 0, 1, 0]
    assert len({s["input_ids"].shape[1] for s in first}) == 6


# Memory.

PEAK = """
import sys, threading, time
from vlmtune.lora.verify import verify

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

base, adapter, small_base, small_adapter, small_merged, merged = sys.argv[1:]
verify(small_base, [(small_adapter, 1.0)], small_merged, samples=2)
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
found = verify(base, [(adapter, 1.0)], merged, samples=2)
print(found.report())
print(peak - before)
"""


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(base, adapter, merged, tmp_path):
    config = load_model(base).config
    config.llm_config.update({"hidden_size": 512, "intermediate_size": 2048})
    config.llm_config.update({"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8})
    config.hidden_size = 512
    torch.manual_seed(0)
    large = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    size = 4 * sum(p.numel() for p in large.parameters())
    assert size > 90e6
    folder = save_merged(base, large, tmp_path / "large")
    added = save_adapter(folder, tmp_path / "added")
    result = save_merged(folder, peft_merge(folder, added), tmp_path / "result")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, (folder, added, base, adapter, merged, result))],
        capture_output=True,
        text=True,
        check=True,
    )
    *_, verdict, peak = done.stdout.splitlines()
    assert verdict == "the merged model is base + adapter"
    # Activations, the adapter and the allocator's remains do not grow with the model.
    assert int(peak) < size + 45e6
