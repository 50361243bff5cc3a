"""Build a tiny Ovis2.5 with random weights and a small tokenizer of its own.

    python scripts/make_tiny_ovis2_5.py --data sample_data/train.json --output outputs/tiny_ovis2_5

The architecture, the file layout and the tensor names are the published ones; the sizes are not.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, Qwen2Tokenizer

from vlmtune.models import Ovis2_5, Ovis2_5Config, Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

# Word pattern and added tokens of the Qwen3 tokenizer, in its order.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


def train_tokenizer(texts: list[str], vocab_size: int = 384) -> Qwen2Tokenizer:
    """Byte-level BPE on `texts`, then the added tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token=None,
        pad_token=None,
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def tiny_config(tokenizer: Qwen2Tokenizer) -> Ovis2_5Config:
    eos, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return Ovis2_5Config(
        llm_config={
            "model_type": "qwen3",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
            "bos_token_id": pad,
            "eos_token_id": eos,
        },
        vit_config={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "image_size": 64,
        },
        visual_vocab_size=256,
    )


def build(data: Path, output: Path, seed: int = 0) -> None:
    records = json.loads(data.read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(seed)
    config = tiny_config(tokenizer)
    model = Ovis2_5(config)
    # An image is a mean of many rows: at the usual 0.02 it would be all but invisible.
    torch.nn.init.normal_(model.vte.weight, std=1.0)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[config.llm_config.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output)
    image_processor = Ovis2_5ImageProcessor(patch_size=config.vit_config.patch_size)
    Ovis2_5Processor(image_processor, tokenizer).save_pretrained(output)
    count = sum(p.numel() for p in model.parameters())
    print(f"{output}: {count:,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("sample_data/train.json"))
    parser.add_argument("--output", type=Path, default=Path("outputs/tiny_ovis2_5"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.data, arguments.output, arguments.seed)
