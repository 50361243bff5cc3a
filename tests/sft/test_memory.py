"""The estimate of a run's memory against the bytes that live in real steps of a tiny model."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from vlmtune.configs.load import load_config
from vlmtune.configs.recompute import parse_recompute
from vlmtune.configs.schema import RunConfig
from vlmtune.core.errors import ConfigError
from vlmtune.lora.checkpoint import Checkpoint
from vlmtune.models import Ovis2_5, Ovis2_5Config, supervised_head
from vlmtune.models.ovis2_5.configuration_ovis2_5 import (
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    VISUAL_ATOM_ID,
)
from vlmtune.sft.activations import _activation_bytes, activation_bytes
from vlmtune.sft.adapters import apply_adapters, plan_adapters
from vlmtune.sft.heads import use_supervised_head
from vlmtune.sft.memory import (
    OPTIMIZERS,
    Batch,
    checkpoint_bytes,
    count,
    estimate,
    meta_model,
    moment_bytes,
)
from vlmtune.sft.modules import TrainedModule, apply_train_modules
from vlmtune.sft.recompute import apply_recompute
from vlmtune.sft.traced_layers import LiveMemory
from vlmtune.sft.train import load_model

WORDS, SIDE, TEXT, LAYERS = 512, 16, 300, 4
TOKENS = TEXT + SIDE**2 // 4 + 2
LORA = {"use_lora": "true", "lora_r": "8"}
KINDS: dict[str, dict[str, str]] = {
    "full": {},
    "stage 1": {"train_modules": "visual_tokenizer"},
    "last layers": {"train_modules": "llm.model.layers.2-3"},
    "lora": {**LORA, "lora_parts": "llm|visual_tokenizer.vit", "lora_dropout": "0.1"},
    "lora and head": {**LORA, "train_modules": "llm.lm_head|vte"},
    "dora": {**LORA, "use_dora": "true"},
    "4 bits": {**LORA, "load_in_4bit": "true"},
    "4 bits, plain scales": {
        **LORA,
        "load_in_4bit": "true",
        "bnb_4bit_use_double_quant": "false",
    },
    "8 bits": {**LORA, "load_in_8bit": "true"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    Ovis2_5(
        Ovis2_5Config(
            llm_config={
                "model_type": "qwen3",
                "vocab_size": WORDS,
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "tie_word_embeddings": False,
            },
            vit_config={
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 2,
                "patch_size": 8,
                "image_size": 64,
            },
            visual_vocab_size=260,
        )
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(folder) -> Checkpoint:
    return Checkpoint.open(str(folder))


@pytest.fixture
def small_chunks(monkeypatch):
    """Heads work on 64 rows at a time, on the CPU as on a GPU."""
    monkeypatch.setattr(supervised_head, "CHUNK_BYTES", {})
    monkeypatch.setattr(supervised_head, "DEVICE_CHUNK_BYTES", 64 * 4 * WORDS)


def config_of(folder: Path, kind: str) -> RunConfig:
    given = {"model_path": str(folder), "data_path": "d", "output_dir": "out", **KINDS[kind]}
    return load_config([word for key, value in given.items() for word in (f"--{key}", value)])


def trained(base: Checkpoint, config: RunConfig) -> tuple[Any, list[TrainedModule]]:
    """A real model as `vlmtune train` makes it in bf16."""
    if not config.adapter.use_lora:
        model = load_model(config, "float32")
        return model, apply_train_modules(model, config.model, 1e-4)
    plan = plan_adapters(base, config, "bfloat16")
    bits = {}
    if plan.quantization:
        settings = plan.quantization.host_config(base.model, "bfloat16")
        bits = {"quantization_config": settings, "device_map": {"": "cpu"}}
    return apply_adapters(load_model(config, "bfloat16", **bits), config, plan, 1e-4)


def stored(model: nn.Module) -> Iterator[Tensor]:
    """Everything that the weights of a model are kept in."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
        weight: Any = getattr(module, "weight", None)
        if state := getattr(weight, "quant_state", None):
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.state2.absmax, state.offset)
        eight = getattr(module, "state", None)
        owners = [owner for owner in (weight, eight) if getattr(owner, "SCB", None) is not None]
        yield from (owner.SCB for owner in owners)


def batch_of(rows: int, padded: bool) -> dict[str, Any]:
    image = [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * (SIDE**2 // 4), IMAGE_END_ID]
    text = torch.randint(0, WORDS, (rows, TEXT))
    ids = torch.cat([torch.tensor([image] * rows), text], dim=1)
    mask = torch.ones_like(ids)
    mask[0, TOKENS - 5 :] = 0
    return {
        "input_ids": ids,
        "labels": ids.where(ids >= 0, -100),
        "pixel_values": torch.randn(rows * SIDE**2, 3 * 8**2),
        "grid_thws": torch.tensor([[1, SIDE, SIDE]] * rows),
        "use_cache": False,
        **({"attention_mask": mask} if padded else {}),
    }


def measured(
    model: Any, policy: str, rows: int = 1, padded: bool = False, autocast: bool = True
) -> SimpleNamespace:
    """Peaks of the second micro-batch of a step, with the gradients of the first and Adam's
    moments in place, and of the optimizer step behind it."""
    model.train()
    use_supervised_head(model)
    apply_recompute(model, parse_recompute(policy))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    inputs = batch_of(rows, padded)
    with LiveMemory() as memory:
        for tensor in stored(model):
            memory.count(tensor.untyped_storage())
        weights = memory.live
        for _ in range(2):
            memory.reset()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**inputs).loss
            loss.backward()
            del loss
            backward = memory.peak
            memory.reset()
            optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    moments = sum(t.nbytes for t in states)
    return SimpleNamespace(weights=weights, moments=moments, backward=backward, step=memory.peak)


def estimated(config: RunConfig, policy: str, rows: int = 1, padded: bool = False, **keys):
    model, _ = meta_model(config)
    batch = Batch(rows, rows * TOKENS, rows * TEXT, rows * SIDE**2, padded)
    terms = estimate(
        model,
        batch,
        zero={},
        gpus=1,
        recompute=parse_recompute(policy),
        optimizer="adamw_torch",
        **keys,
    )
    states = terms["weights"] + terms["moments"]
    backward = states + terms["gradients"] + terms["backward"] + terms["activations"]
    assert terms["peak"] == max(backward, states + terms["step"])
    return SimpleNamespace(**terms, in_backward=backward, in_step=states + terms["step"])


def described(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every parameter; of a packed one only that it is there."""
    return {
        name: () if isinstance(p, bnb.nn.Params4bit | bnb.nn.Int8Params) else (p.shape, p.dtype)
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_without_weights_is_the_one_that_trains(folder, base, kind):
    config = config_of(folder, kind)
    model, modules = meta_model(config, learning_rate=1e-4)
    real, real_modules = trained(base, config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert described(model) == described(real)
    assert [type(m) for m in model.modules()] == [type(m) for m in real.modules()]
    assert [(m.name, m.learning_rate, list(m.parameters)) for m in modules] == [
        (m.name, m.learning_rate, list(m.parameters)) for m in real_modules
    ]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in real.named_parameters() if p.requires_grad
    ]


def test_a_model_without_weights_needs_no_files_of_weights(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    _, modules = meta_model(config_of(tmp_path, "4 bits"))
    assert [module.name for module in modules] == ["lora llm"]
    config = config_of(tmp_path, "lora")
    config.adapter.lora_target_modules = ["nothing"]
    with pytest.raises(ConfigError, match="no layer is"):
        meta_model(config)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(
    ("kind", "policy", "tolerance"),
    [
        ("full", "none", 0.04),
        pytest.param("full", "selective", 0.04, marks=pytest.mark.long),
        ("full", "llm:full|visual_tokenizer:none", 0.04),
        pytest.param("full", "full", 0.04, marks=pytest.mark.long),
        ("stage 1", "none", 0.04),
        pytest.param("stage 1", "full", 0.04, marks=pytest.mark.long),
        pytest.param("last layers", "none", 0.04, marks=pytest.mark.long),
        pytest.param("lora", "none", 0.06, marks=pytest.mark.long),
        ("lora", "selective", 0.04),
        pytest.param("lora and head", "full", 0.04, marks=pytest.mark.long),
        ("dora", "none", 0.04),
        pytest.param("4 bits", "none", 0.06, marks=pytest.mark.long),
        ("4 bits", "selective", 0.04),
        ("4 bits, plain scales", "full", 0.04),
        pytest.param("8 bits", "none", 0.06, marks=pytest.mark.long),
        ("8 bits", "full", 0.04),
    ],
)
def test_a_step_takes_the_memory_of_the_estimate(folder, base, kind, policy, tolerance):
    config = config_of(folder, kind)
    model, _ = trained(base, config)
    expected = estimated(config, policy)
    # As on a GPU, where PEFT finds its autocast and casts no inputs of adapters on packed layers.
    torch.set_autocast_enabled("cuda", True)
    try:
        found = measured(model, policy)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert found.weights == expected.weights
    assert found.moments == expected.moments
    assert expected.in_backward == pytest.approx(found.backward, rel=tolerance)
    assert expected.in_step == pytest.approx(found.step, rel=0.01)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("padded", [True, False])
def test_rows_with_padding_keep_a_mask_in_every_layer(folder, base, padded):
    config = config_of(folder, "full")
    model, _ = trained(base, config)
    found = measured(model, "none", rows=2, padded=padded)
    expected = estimated(config, "none", rows=2, padded=padded)
    assert expected.in_backward == pytest.approx(found.backward, rel=0.04)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_without_autocast_everything_is_in_one_precision(folder, base, precision):
    """As under DeepSpeed, but with Adam on the weights themselves."""
    config = config_of(folder, "full")
    model, _ = trained(base, config)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    found = measured(model.to(dtype), "none", autocast=False)
    batch = Batch(1, TOKENS, TEXT, SIDE**2)
    activations = activation_bytes(
        meta_model(config)[0], batch, parse_recompute("none"), precision=precision, deepspeed=True
    )
    states = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
    assert states + activations == pytest.approx(found.backward, rel=0.04)


def test_attention_with_scores_keeps_them(folder, base):
    config = config_of(folder, "full")
    fused = estimated(config, "none").activations
    config.model.attn_implementation = "eager"
    scores = LAYERS * 4 * TOKENS**2
    assert estimated(config, "none").activations > fused + 4 * scores


def test_what_no_gradient_reaches_keeps_nothing(folder):
    kept = {
        kind: estimated(config_of(folder, kind), "none").activations
        for kind in ("full", "stage 1", "last layers")
    }
    assert kept["last layers"] < kept["full"] / 2
    assert kept["full"] / 2 < kept["stage 1"] < kept["full"]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "lion_32bit"])
def test_states_of_bitsandbytes_have_the_bytes_of_the_formula(name):
    sizes = (4095, 4096, 4097, 70_000)
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    kind = bnb.optim.Lion if "lion" in name else bnb.optim.AdamW
    optimizer = kind(parameters, optim_bits=OPTIMIZERS[name][1])
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    kept = ("state1", "state2", "absmax1", "absmax2")
    found = sum(s[key].nbytes for s in optimizer.state.values() for key in kept if key in s)
    assert moment_bytes(sizes, name) == found


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
        ("sgd", torch.optim.SGD),
    ],
)
def test_states_of_torch_have_the_bytes_of_the_formula(name, make):
    parameters = [nn.Parameter(torch.randn(size)) for size in (10, 5000)]
    optimizer = make(parameters, lr=1e-3)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    assert moment_bytes([10, 5000], name) == sum(t.nbytes for t in tensors if t.dim())


def test_an_unknown_optimizer_counts_as_adam():
    assert moment_bytes([10], "galore_adamw") == moment_bytes([10], "adamw_torch") == 80


@pytest.mark.parametrize("kind", ["full", "lora", "4 bits"])
def test_a_checkpoint_takes_the_space_of_the_formula(folder, base, tmp_path, kind):
    config = config_of(folder, kind)
    model, _ = trained(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    lora = config.adapter.use_lora
    weights, states = checkpoint_bytes(count(meta_model(config)[0]), {}, adapters=bool(lora))
    file = tmp_path / ("adapter_model.safetensors" if lora else "model.safetensors")
    assert file.stat().st_size == pytest.approx(weights, rel=0.04)
    assert (tmp_path / "optimizer.pt").stat().st_size == pytest.approx(states, rel=0.1)


def test_layers_are_traced_once_for_all_engines(folder):
    config = config_of(folder, "full")
    model, _ = meta_model(config)
    batch, policies = Batch(1, TOKENS, TEXT, SIDE**2), parse_recompute("none")
    zero = {"stage": 2, "overlap_comm": True}
    one, two = (estimate(model, batch, zero=zero, gpus=gpus, recompute=policies) for gpus in (1, 2))
    assert one["activations"] == two["activations"]
    assert (one["moments"], one["master"]) == (2 * two["moments"], 2 * two["master"])
    assert _activation_bytes.cache_info().hits > 0


def test_a_trace_leaves_the_model_and_the_autocast_as_they_were(folder):
    config = config_of(folder, "4 bits")
    model, _ = meta_model(config)
    before = described(model)
    estimated_again = [
        activation_bytes(model, Batch(1, 100, 50, 16), parse_recompute(policy))
        for policy in ("none", "full", "none")
    ]
    assert estimated_again[0] == estimated_again[2] > estimated_again[1]
    assert described(model) == before
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize("kind", ["lora", "4 bits"])
def test_an_adapter_to_train_on_is_read_from_its_config(folder, base, tmp_path, kind):
    begun, _ = trained(base, config_of(folder, "lora and head"))
    begun.save_pretrained(tmp_path)
    config = config_of(folder, kind)
    config.adapter.adapter_path = str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, modules = meta_model(config)
    real, real_modules = trained(base, config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert described(model) == described(real)
    assert [(m.name, m.size) for m in modules] == [(m.name, m.size) for m in real_modules]
