"""Bytes that really live in two steps of a tiny Ovis2.5 under DeepSpeed, one JSON line per engine.

    torchrun --nproc_per_node 2 tests/benchmarks/zero_states.py FOLDER zero1 zero2+accumulation ...

Beside `accumulation` over two micro-batches an engine may be followed by `float32`, and by what is
trained instead of all: `visual` (its tokenizer) or `lora`. Tensors of a CPU run stand for those of
GPU and host together. FOLDER takes the checkpoints.
"""

import gc
import json
import logging
import sys
from importlib.resources import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vlmtune.models import Ovis2_5, Ovis2_5Config
from vlmtune.sft.traced_layers import LiveMemory

BUCKET = 100_000  # elements, for ZeRO-1; DeepSpeed's default would be larger than the model


def tiny_config() -> Ovis2_5Config:
    return Ovis2_5Config(
        llm_config={
            "model_type": "qwen3",
            "vocab_size": 401,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
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


def build(words: list[str]) -> nn.Module:
    model = Ovis2_5(tiny_config()).train()
    if "visual" in words:
        for name, parameter in model.named_parameters():
            trained = name.startswith("visual_tokenizer.") and parameter.requires_grad
            parameter.requires_grad_(trained)
    if "lora" in words:
        return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
    return model


def settings(engine: str, accumulation: int, half: bool) -> dict:
    """The shipped file with its "auto" values filled in as transformers fills them."""
    config = json.loads((files("vlmtune.configs") / "zero" / f"{engine}.json").read_text())
    config |= {
        "train_batch_size": 2 * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": half},
        # torch's own Adam instead of a compiled one; its states are the same.
        "zero_force_ds_cpu_optimizer": False,
    }
    width, zero = tiny_config().llm_config.hidden_size, config["zero_optimization"]
    automatic = {
        "reduce_bucket_size": width**2,
        "stage3_prefetch_bucket_size": int(0.9 * width**2),
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero |= {key: value for key, value in automatic.items() if zero.get(key) == "auto"}
    if zero["stage"] == 1:
        zero["reduce_bucket_size"] = BUCKET
    return config


def measure(engine: str, words: list[str], folder: Path) -> dict:
    accumulation = 2 if "accumulation" in words else 1
    config = settings(engine, accumulation, half="float32" not in words)
    offload = "offload_optimizer" in config["zero_optimization"]
    ids = torch.arange(8)[None]
    with LiveMemory() as memory:
        model = build(words)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], foreach=not offload, fused=offload
        )
        ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(2):
            backward = 0
            for _ in range(accumulation):
                before = memory.live
                loss = ds(input_ids=ids, labels=ids, use_cache=False).loss
                activations = memory.live - before
                memory.reset()
                ds.backward(loss)
                del loss
                backward = max(backward, memory.peak)
                memory.reset()
                ds.step()
            gc.collect()
        found = {
            "run": "+".join([engine, *words]),
            "words": words,
            "zero": config["zero_optimization"],
            "settled": memory.live,
            "activations": activations,
            "backward": backward,
            "step": memory.peak,
        }
    states = getattr(ds.optimizer, "optimizer", ds.optimizer).state.values()
    found["adam_steps"] = int(next(iter(states))["step"])
    place = folder / found["run"]
    # As the host does for adapters.
    ds.save_checkpoint(str(place), exclude_frozen_parameters="lora" in words)
    torch.distributed.barrier()
    found["disk"] = sum(f.stat().st_size for f in place.rglob("*.pt"))
    ds.destroy()
    return found


if __name__ == "__main__":
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    for word in sys.argv[2:]:
        name, *chosen = word.split("+")
        line = measure(name, chosen, Path(sys.argv[1]))
        if torch.distributed.get_rank() == 0:
            print(json.dumps(line), flush=True)
        gc.collect()
    torch.distributed.destroy_process_group()
