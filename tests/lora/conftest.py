"""Tiny models in several files, adapters with random values on them, and PEFT's own merge."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import vlmtune.models  # noqa: F401


@pytest.fixture(scope="session")
def base(tiny_ovis, tmp_path_factory):
    """`base(dtype, tied)` is a tiny Ovis2.5 in five files or more, complete with its processor."""
    made: dict[tuple, Path] = {}

    def build(dtype: str = "bfloat16", tied: bool = True) -> Path:
        if (dtype, tied) not in made:
            folder = (
                tmp_path_factory.mktemp("base") / f"ovis-{dtype}-{'tied' if tied else 'untied'}"
            )
            model = load(tiny_ovis)
            if not tied:
                head = model.get_output_embeddings()
                head.weight = torch.nn.Parameter(head.weight.detach().flip(0))
                model.config.llm_config.tie_word_embeddings = False
                model.all_tied_weights_keys = {}
            model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="300KB")
            AutoProcessor.from_pretrained(tiny_ovis).save_pretrained(folder)
            made[dtype, tied] = folder
        return made[dtype, tied]

    return build


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """`adapter(base, seed=0, dtype=None, **lora)` is the folder of an adapter with noise on every
    trained value, saved in that dtype."""
    made: dict[str, Path] = {}

    def build(base: Path, seed: int = 0, dtype=None, **lora) -> Path:
        key = repr((base, seed, dtype, sorted(lora.items())))
        if key not in made:
            settings = {"r": 4, "target_modules": "all-linear", **lora}
            adapted = get_peft_model(load(base), LoraConfig(**settings))
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.05)
            made[key] = tmp_path_factory.mktemp("adapter") / "adapter"
            adapted.to(dtype).save_pretrained(made[key])
        return made[key]

    return build


@pytest.fixture(scope="session")
def merged_by_peft():
    """`merged_by_peft(base, adapter)` are the tensors of PEFT's merge_and_unload."""

    def build(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
        return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()

    return build


@pytest.fixture(scope="session")
def load_model():
    return load


def load(folder: Path):
    """In the dtype of its files."""
    text = "ovis" not in (folder / "config.json").read_text("utf-8")
    vision = "vision_config" in (folder / "config.json").read_text("utf-8")
    auto = AutoModelForCausalLM if text and not vision else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype="auto").eval()
