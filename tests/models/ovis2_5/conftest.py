"""The golden model cases: what went into the reference and what came out; and tiny language models
and vision towers to build new models from."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2Config,
    Siglip2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmtune.models.ovis2_5.build import build_ovis2_5


@dataclass
class Golden:
    """One run of the reference; `suffix` tells apart the runs of one folder."""

    folder: Path
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [(t, h, w) for t, h, w in self.inputs["grid_thws"].tolist()]

    def model(self, **kwargs) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.folder, **kwargs)


@pytest.fixture(scope="session")
def golden(ovis_goldens):
    """`golden(case, suffix)`, read afresh at each call, so no test can spoil another's numbers."""

    def read(case: str = "full_single_untied", suffix: str = "") -> Golden:
        folder = ovis_goldens / case
        return Golden(
            folder=folder,
            inputs=load_file(folder / f"inputs{suffix}.safetensors"),
            outputs=load_file(folder / f"outputs{suffix}.safetensors"),
            meta=json.loads((folder / f"meta{suffix}.json").read_text("utf-8")),
        )

    return read


SENTENCES = ["user\nWhat is it?", "assistant\nA square and a circle.", "The answer is five: 5."] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def trained(backend: Tokenizer, **settings) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Vocabulary and merges learned from the sentences."""
    backend.train_from_iterator(SENTENCES, BpeTrainer(show_progress=False, **settings))
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def gpt2_tokenizer() -> GPT2Tokenizer:
    """Byte-level BPE with `<|endoftext|>` alone, and a template of its own as DialoGPT has it."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary, merges = trained(backend, vocab_size=300, initial_alphabet=alphabet)
    return GPT2Tokenizer(
        vocab=vocabulary | {"<|endoftext|>": len(vocabulary)},
        merges=merges,
        chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    )


def llama_tokenizer(legacy: bool) -> LlamaTokenizer:
    """SentencePiece-like BPE: bytes for unknown letters, a space before the text (if `legacy`,
    before each piece of it between added tokens), `<s>` in front of everything."""
    backend = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *BYTES]
    vocabulary, merges = trained(backend, vocab_size=330, special_tokens=special)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)


@pytest.fixture(scope="session")
def language_model(ovis_goldens, tmp_path_factory) -> Callable[[str], Path]:
    """`language_model(kind)` is a folder with a random model of about 30,000 parameters; Qwen3 has
    spare rows, GPT-2 and "llama-tied" tied heads."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(1)
        if kind == "qwen3":
            tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
            config = Qwen3Config(vocab_size=352, head_dim=8, **LAYERS, **HEADS)
            model = Qwen3ForCausalLM(config)
        elif kind == "gpt2":
            tokenizer = gpt2_tokenizer()
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(tokenizer),
                    n_positions=256,
                    n_embd=32,
                    n_layer=2,
                    n_head=4,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            )
        else:
            tokenizer = llama_tokenizer(legacy=kind == "llama-legacy")
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    max_position_embeddings=512,
                    rope_parameters=ROPE,
                    tie_word_embeddings=kind == "llama-tied",
                    **LAYERS,
                    **HEADS,
                )
            )
        # Larger than at random, so that logits and losses differ visibly between positions.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 5
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tower(tmp_path_factory) -> Callable[[str], Path]:
    """`tower(kind)` is a folder with a random vision tower: "conv" a SigLIP one alone, of 4 x 4
    patches of 14 pixels; "naflex" a whole SigLIP2, of 4 x 4 patches of 8 pixels."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(2)
        if kind == "conv":
            config = SiglipVisionConfig(
                **LAYERS, num_attention_heads=4, patch_size=14, image_size=56
            )
            model = SiglipVisionModel(config)
        else:
            vision = {**LAYERS, "num_attention_heads": 4, "patch_size": 8, "num_patches": 16}
            text = {**LAYERS, "num_attention_heads": 4, "vocab_size": 16, "eos_token_id": 1}
            model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def built(language_model, tower, tmp_path_factory) -> Callable[[str, str], Path]:
    """`built(llm, vit)` is the folder built from two of them, with 64 visual words."""

    @cache
    def make(llm: str, vit: str = "conv") -> Path:
        folder = tmp_path_factory.mktemp("built") / f"{llm}-{vit}"
        sources = str(language_model(llm)), str(tower(vit))
        build_ovis2_5(*sources, folder, visual_vocab_size=68)
        return folder

    return make
