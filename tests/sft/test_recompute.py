"""What the backward pass computes again: the same numbers from less memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmtune.configs.load import load_config
from vlmtune.configs.recompute import POLICIES, parse_recompute
from vlmtune.configs.schema import RunConfig
from vlmtune.core.errors import ConfigError
from vlmtune.models import Ovis2_5
from vlmtune.models.ovis2_5.configuration_ovis2_5 import (
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    VISUAL_ATOM_ID,
)
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.recompute import apply_recompute, describe_recompute, recompute_line

ROOT = Path(__file__).parents[2]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]


def inputs(model: Any, text: int) -> dict[str, Tensor]:
    """One image of four visual tokens, then `text` tokens."""
    vit = model.config.vit_config
    side = 2 * vit.hidden_stride
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 300, (text,), generator=generator).tolist()
    ids = torch.tensor([[IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * 4, IMAGE_END_ID, *words]])
    patches = torch.randn(side**2, 3 * vit.patch_size**2, generator=generator)
    return {
        "input_ids": ids,
        "labels": ids.where(ids >= 0, -100),
        "pixel_values": patches,
        "grid_thws": torch.tensor([[1, side, side]]),
    }


def plain(folder: Path) -> Any:
    return Ovis2_5.from_pretrained(folder, dtype=torch.float32)


def with_lora(folder: Path) -> Any:
    settings = LoraConfig(r=4, lora_dropout=0.1, init_lora_weights=False, target_modules=LINEAR)
    return get_peft_model(plain(folder), settings)


def with_frozen_lower_layers(folder: Path) -> Any:
    model = plain(folder).requires_grad_(False)
    model.get_decoder().layers[-1].requires_grad_(True)
    return model


def in_four_bits(folder: Path, compute: torch.dtype = torch.bfloat16) -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    base = Ovis2_5.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    return get_peft_model(
        base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    )


def step(model: Any, policy: str, text: int = 40, autocast: bool = False):
    """Loss and gradients of one batch."""
    apply_recompute(model, parse_recompute(policy))
    batch = inputs(model, text)
    model.train().zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def in_four_bits_multiplied_in_float32(folder: Path) -> Any:
    return in_four_bits(folder, torch.float32)


@pytest.mark.parametrize(
    ("build", "autocast"),
    [
        (plain, False),
        (plain, True),
        (with_lora, False),
        (with_lora, True),
        (with_frozen_lower_layers, False),
        (with_frozen_lower_layers, True),
        (in_four_bits, False),
        (in_four_bits, True),
        # Not under autocast: refused, see below.
        (in_four_bits_multiplied_in_float32, False),
    ],
)
def test_no_policy_changes_a_bit_of_loss_or_gradients(tiny_ovis, build, autocast):
    torch.manual_seed(0)
    model = build(tiny_ovis)
    loss, gradients = step(model, "none", autocast=autocast)
    assert sum(bool(g.abs().max() > 0) for g in gradients.values()) > 5
    for policy in ("selective", "full", "llm:full|visual_tokenizer:selective"):
        found, own = step(model, policy, autocast=autocast)
        assert found == loss
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(own[name], gradient), (policy, name)


def config_of(**keys: str) -> RunConfig:
    given = {"model_path": "m", "data_path": "d", "output_dir": "out", "use_cpu": "true"} | keys
    return load_config([word for key, value in given.items() for word in (f"--{key}", value)])


FOUR_BITS = {"use_lora": "true", "load_in_4bit": "true", "bf16": "true"}


@pytest.mark.parametrize(
    "keys",
    [
        {"recompute": "selective"},
        {"recompute": "llm:selective"},
        {"torch_compile": "true"},
        {"torch_compile_backend": "aot_eager"},
    ],
)
def test_four_bits_multiplied_in_another_type_than_the_run_are_refused(keys):
    with pytest.raises(ConfigError) as caught:
        training_arguments(config_of(**FOUR_BITS, bnb_4bit_compute_dtype="float32", **keys))
    assert caught.value.where == "bnb_4bit_compute_dtype"
    assert "float32 in a bfloat16 run" in caught.value.what


@pytest.mark.parametrize(
    "keys",
    [
        {"recompute": "selective"},
        {"recompute": "selective", "bnb_4bit_compute_dtype": "bfloat16"},
        {"recompute": "full", "bnb_4bit_compute_dtype": "float32"},
        {"recompute": "selective", "bnb_4bit_compute_dtype": "bfloat16", "bf16": "false"},
    ],
)
def test_four_bits_multiplied_in_one_type_under_every_policy_are_not(keys):
    training_arguments(config_of(**{**FOUR_BITS, **keys}))


def test_layers_split_by_zero_are_not_compiled():
    split = {"deepspeed": str(ROOT / "configs/zero/zero3.json")}
    with pytest.raises(ConfigError, match="torch_compile would compile each layer in pieces"):
        training_arguments(config_of(**split, torch_compile="true"))


def test_each_tower_gets_its_own_policy_and_can_lose_it(tiny_ovis):
    model = with_lora(tiny_ovis)

    def recomputed(part: str) -> set[bool]:
        below = model.get_base_model().get_submodule(part).modules()
        return {
            m.gradient_checkpointing for m in below if isinstance(m, GradientCheckpointingLayer)
        }

    apply_recompute(model, parse_recompute("visual_tokenizer:selective"))
    assert (recomputed("llm"), recomputed("visual_tokenizer")) == ({False}, {True})
    apply_recompute(model, parse_recompute("llm:full"))
    assert (recomputed("llm"), recomputed("visual_tokenizer")) == ({True}, {False})


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products and attention calls, forward and backward."""

    def __init__(self):
        super().__init__()
        self.count = {"product": 0, "attention": 0, "activation": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        kinds = {"product": ("aten.mm.", "aten.addmm."), "activation": ("aten.silu.",)}
        kinds["attention"] = ("aten._scaled_dot_product_flash_attention_for_cpu.",)
        for kind, starts in kinds.items():
            self.count[kind] += name.startswith(starts)
        return func(*args, **(kwargs or {}))


def test_selective_computes_activations_again_but_neither_products_nor_attention(tiny_ovis):
    model, counts = plain(tiny_ovis), {}
    for policy in POLICIES:
        with Products() as mode:
            step(model, f"llm:{policy}")
        counts[policy] = mode.count
    layers = model.config.llm_config.num_hidden_layers
    none, selective, full = (counts[policy] for policy in POLICIES)
    assert selective["product"] == none["product"]
    assert selective["attention"] == none["attention"]
    assert selective["activation"] == none["activation"] + layers
    assert full["product"] >= none["product"] + 6 * layers
    assert full["attention"] == none["attention"] + layers


def test_a_description_names_every_tower():
    policies = parse_recompute("llm:selective")
    assert describe_recompute(policies) == "llm selective, visual_tokenizer none"


def test_the_line_at_the_end_has_median_speed_and_highest_memory():
    history = [
        {"loss": 2.0, "tokens_per_second": 100.0, "peak_memory_gib": 3.1},
        {"loss": 1.5, "tokens_per_second": 12345.4, "peak_memory_gib": 3.214},
        {"eval_loss": 1.2},
        {"loss": 1.0, "tokens_per_second": 20000.0, "peak_memory_gib": 3.2},
    ]
    line = recompute_line(parse_recompute("llm:selective"), history)
    expected = "recompute llm selective, visual_tokenizer none: 12,345 tokens/s, peak 3.21 GiB"
    assert line == expected
    assert (
        recompute_line(parse_recompute("full"), []) == "recompute llm full, visual_tokenizer full"
    )


def logged(folder: Path) -> list[tuple[float, float]]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(e["loss"], e["grad_norm"]) for e in entries if "loss" in e]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "lora"),
    [
        ("ddp", False),
        pytest.param("ddp", True, marks=pytest.mark.long),
        pytest.param("zero3", False, marks=pytest.mark.long),
        ("zero3", True),
    ],
)
def test_two_processes_train_with_the_same_numbers(forked, mixed, tmp_path, engine, lora):
    settings = json.loads((ROOT / "configs/zero/zero3.json").read_text("utf-8"))
    # Otherwise every parameter of so small a model would stay whole on both.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = tmp_path / "split.json"
    file.write_text(json.dumps(settings), "utf-8")
    found = {}
    for policy in POLICIES:
        done, folder = forked(
            2,
            data_path=mixed,
            max_steps=2,
            per_device_train_batch_size=2,
            recompute=policy,
            use_lora=str(lora).lower(),
            deepspeed=file if engine == "zero3" else None,
        )
        assert done.returncode == 0, done.stderr
        found[policy] = logged(folder)
    assert len(found["none"]) == 2
    assert found["selective"] == found["full"] == found["none"]
