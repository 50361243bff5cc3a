"""Weights in 4 and 8 bits: which ones, what they become, and that an evaluation leaves them so."""

import json

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor, nn

from vlmtune.configs.adapter import AdapterConfig
from vlmtune.configs.schema import ModelConfig
from vlmtune.core.errors import ConfigError
from vlmtune.lora.quantization import PIECE, Quantization, keep_unpacked, quantization_for
from vlmtune.lora.settings import add_adapter, full_parts
from vlmtune.lora.targets import target_modules
from vlmtune.models import Ovis2_5, Ovis2_5Config

PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"]
PROJECTIONS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
ENCODER = "visual_tokenizer.vit.vision_model.encoder.layers"
LLM = [f"llm.model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]
VIT = [f"{ENCODER}.0.self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
VIT += [f"{ENCODER}.0.mlp.{name}" for name in ("fc1", "fc2")]
HEAD = "visual_tokenizer.head.0"

packs = pytest.mark.skipif(not has_avx512bf16(), reason="this CPU does not repack 4-bit weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model whose layers have the shapes that bitsandbytes repacks."""
    llm = {"model_type": "qwen3", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 128}
    llm |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm |= {"head_dim": 32, "tie_word_embeddings": True}
    vit = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    vit |= {"num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    torch.manual_seed(0)
    model = Ovis2_5(Ovis2_5Config(llm_config=llm, vit_config=vit, visual_vocab_size=16))
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


def planned(folder, dtype: str = "float32", full: tuple[str, ...] = (), **keys) -> Quantization:
    with torch.device("meta"):
        skeleton = Ovis2_5(Ovis2_5Config.from_pretrained(folder))
    found = quantization_for(skeleton, AdapterConfig(use_lora=True, **keys), full, dtype)
    assert found
    return found


def load(folder, quantization: Quantization) -> Ovis2_5:
    with torch.device("meta"):
        skeleton = Ovis2_5(Ovis2_5Config.from_pretrained(folder))
    return Ovis2_5.from_pretrained(
        folder,
        dtype=quantization.dtype,
        quantization_config=quantization.host_config(skeleton, quantization.dtype),
        device_map={"": "cpu"},
    )


def packed(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def unpacked(module: nn.Module) -> Tensor:
    """What a layer computes with, by bitsandbytes' own account."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb_functional.dequantize_4bit(weight.data, weight.quant_state)
    return bnb_functional.int8_vectorwise_dequant(weight.data, weight.SCB)


@pytest.mark.parametrize(
    ("keys", "full", "expected"),
    [
        ({}, (), LLM),
        ({"unquantized_parts": ""}, (), [*LLM, *VIT, HEAD]),
        ({"unquantized_parts": "visual_tokenizer.vit"}, (), [*LLM, HEAD]),
        ({"unquantized_parts": "visual_tokenizer|llm.model.layers.0"}, (), LLM[7:]),
        ({"unquantized_parts": "llm"}, (), [*VIT, HEAD]),
        ({}, ("llm.model.layers.1.mlp",), LLM[:11]),
        ({"unquantized_parts": ""}, ("visual_tokenizer.head", "vte"), [*LLM, *VIT]),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_linear_layers_that_are_quantised_are_those_planned(folder, bits, keys, full, expected):
    plan = planned(folder, full=full, **{f"load_in_{bits}bit": True}, **keys)
    assert sorted(plan.modules) == sorted(expected)
    assert plan.bits == bits
    model = load(folder, plan)
    assert sorted(packed(model)) == sorted(expected)
    plain = {p.dtype for p in model.llm.get_input_embeddings().parameters()}
    assert plain == {torch.float32}


def test_layers_whose_inputs_are_no_whole_blocks_are_quantised_in_8_bits_alone(tiny_ovis):
    four = planned(tiny_ovis, load_in_4bit=True, unquantized_parts="").modules
    eight = planned(tiny_ovis, load_in_8bit=True, unquantized_parts="").modules
    assert set(eight) - set(four) == {
        f"{ENCODER}.{i}.{name}"
        for i in range(2)
        for name in [*(f"self_attn.{x}_proj" for x in ("k", "v", "q", "out")), "mlp.fc1"]
    }
    assert {name for name in four if name.startswith(ENCODER)} == {
        f"{ENCODER}.{i}.mlp.fc2" for i in range(2)
    }
    assert set(four) < set(eight)


def test_without_a_key_nothing_is_quantised(folder):
    assert (
        quantization_for(Ovis2_5(Ovis2_5Config.from_pretrained(folder)), AdapterConfig(), (), "")
        is None
    )


@pytest.mark.parametrize(
    ("parts", "where", "what", "fix"),
    [
        ("llm|visual_tokenizer", "unquantized_parts", "leaves no layer to quantise", "name fewer"),
        ("lm", "unquantized_parts", 'the model has no module "lm"', "did you mean llm"),
        ("all", "unquantized_parts", '"all" is no module', "name modules"),
    ],
)
def test_parts_that_leave_nothing_or_are_unknown_are_refused(folder, parts, where, what, fix):
    with pytest.raises(ConfigError) as error:
        planned(folder, load_in_4bit=True, unquantized_parts=parts)
    assert (error.value.where, error.value.what) == (where, what)
    assert error.value.fix.startswith(fix)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "keys",
    [
        {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
        for kind in ("nf4", "fp4")
        for double in (True, False)
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_round_trip_in_4_bits_is_bit_for_bit_what_the_loaded_model_computes_with(
    folder, keys, dtype
):
    plan = planned(folder, dtype, load_in_4bit=True, unquantized_parts="", **keys)
    assert (plan.quant_type, plan.double_quant) == tuple(keys.values())
    layers = packed(load(folder, plan))
    plain = Ovis2_5.from_pretrained(folder, dtype=dtype)
    assert layers.keys() == set(plan.modules)
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        again = plan.round_trip(weight)
        assert (again.dtype, again.shape) == (weight.dtype, weight.shape)
        assert torch.equal(again, unpacked(layer)), name
        assert not torch.equal(again, weight), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_in_8_bits_is_what_the_loaded_model_computes_with(folder, dtype):
    plan = planned(folder, dtype, load_in_8bit=True, unquantized_parts="")
    layers = packed(load(folder, plan))
    plain = Ovis2_5.from_pretrained(folder, dtype=dtype)
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        again = plan.round_trip(weight)
        assert (again.dtype, again.shape) == (weight.dtype, weight.shape)
        assert torch.equal(again, unpacked(layer).to(weight.dtype)), name
        steps = weight.float().abs().amax(dim=1, keepdim=True) / 127
        assert ((again - weight).abs().float() <= 0.51 * steps + 0.004 * weight.abs()).all(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1100, 1024), (11000, 96)], ids=["pieces", "no whole blocks"])
@pytest.mark.parametrize(
    ("kind", "double"),
    [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)],
)
def test_round_trip_of_a_large_matrix_is_bit_for_bit_that_of_bitsandbytes_at_once(
    kind, double, shape, dtype
):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(getattr(torch, dtype))
    assert weight.numel() > PIECE
    if kind == "int8":
        rows, scales, _ = bnb_functional.int8_vectorwise_quant(weight.half())
        expected = bnb_functional.int8_vectorwise_dequant(rows, scales)
    else:
        kinds = {"quant_type": kind, "compress_statistics": double}
        expected = bnb_functional.dequantize_4bit(*bnb_functional.quantize_4bit(weight, **kinds))
    plan = Quantization(8 if kind == "int8" else 4, kind, double, dtype, ["a"])
    again = plan.round_trip(weight)
    assert again.dtype == weight.dtype
    assert torch.equal(again, expected.to(weight.dtype))
    assert not torch.equal(again, weight)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_round_trip_starts_from_the_dtype_of_the_run_and_ends_in_that_of_the_weight(folder, stored):
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=getattr(torch, stored))
    for bits in (4, 8):
        plan = Quantization(bits, "nf4", True, "bfloat16", ["a"])
        again = plan.round_trip(weight)
        assert again.dtype == weight.dtype
        assert torch.equal(again.bfloat16(), plan.round_trip(weight.bfloat16()))
        assert not torch.equal(again.bfloat16(), weight.bfloat16())


def test_a_run_file_gives_the_same_quantization_again(folder):
    plan = planned(folder, "bfloat16", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    assert plan.to_dict() == {
        "bits": 4,
        "quant_type": "fp4",
        "double_quant": True,
        "dtype": "bfloat16",
        "modules": LLM,
    }
    run = json.loads(json.dumps({"quantization": plan.to_dict()}))
    assert Quantization.from_run(run) == plan
    assert Quantization.from_run({"quantization": None}) is None
    assert Quantization.from_run({}) is None


# -- an evaluation between training steps ----------------------------------------------------------

IDS = torch.arange(12).view(2, 6)


def evaluate(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.data.clone() for name, layer in packed(model).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_leaves_bytes_and_weights_as_they_were(folder, dtype):
    plan = planned(folder, dtype, load_in_4bit=True, unquantized_parts="")
    model = load(folder, plan)
    keep_unpacked(model)
    before = bytes_of(model)
    weights = {name: unpacked(layer) for name, layer in packed(model).items()}
    first, second = evaluate(model), evaluate(model)
    assert torch.equal(first, second)
    for name, layer in packed(model).items():
        assert torch.equal(layer.weight.data, before[name]), name
        assert torch.equal(unpacked(layer), weights[name]), name


@packs
def test_without_the_guard_an_evaluation_changes_them(folder):
    plan = planned(folder, "bfloat16", load_in_4bit=True)
    model = load(folder, plan)
    before = bytes_of(model)
    evaluate(model)
    changed = [
        name
        for name, layer in packed(model).items()
        if layer.weight.data.shape != before[name].shape
        or not torch.equal(layer.weight.data, before[name])
    ]
    assert changed == LLM


def trained(folder, evaluations: bool) -> tuple[list[float], list[Tensor], nn.Module]:
    """Losses and adapters of four steps, maybe with an evaluation after each."""
    plan = planned(folder, "float32", load_in_4bit=True)
    model = load(folder, plan)
    keep_unpacked(model)
    settings = AdapterConfig(use_lora=True, lora_r=4)
    full = full_parts(model, ModelConfig("m"), settings)
    assert full == []
    targets = target_modules(model, ModelConfig("m"), settings, [], "trl")
    torch.manual_seed(0)
    adapted = add_adapter(model, settings, targets, [])
    own = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    losses = []
    for _ in range(4):
        adapted.train()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad is not None for p in own)
        if losses:  # in the first step B is zero, and so is the gradient of A
            assert all(p.grad.abs().max() > 0 for p in own)
        optimizer.step()
        losses.append(loss.item())
        if evaluations:
            evaluate(adapted)
    return losses, own, adapted


def test_training_goes_on_after_an_evaluation_as_if_there_had_been_none(folder):
    losses, adapters, model = trained(folder, evaluations=True)
    expected, theirs, _ = trained(folder, evaluations=False)
    assert losses == expected
    assert losses[-1] < losses[0]
    for ours, other in zip(adapters, theirs, strict=True):
        assert torch.equal(ours, other)
    fresh = load(folder, planned(folder, "float32", load_in_4bit=True))
    keep_unpacked(fresh)
    layers = {name.replace(".base_layer", ""): m for name, m in packed(model).items()}
    for name, layer in packed(fresh).items():
        assert torch.equal(layer.weight.data, layers[f"base_model.model.{name}"].weight.data), name
