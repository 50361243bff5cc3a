"""A tiny CLIP on disk."""

import string
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A CLIP of random weights for images of 16 x 16 pixels and texts of up to 14 small letters."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, model_max_length=16)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, **ends, **tower}
    vision = {"image_size": 16, "patch_size": 8, **tower}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder
