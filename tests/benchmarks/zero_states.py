"""Bytes that really live in two steps of a tiny Ovis2.5 under DeepSpeed, one JSON line per engine.

    torchrun --nproc_per_node 2 tests/benchmarks/zero_states.py FOLDER zero1 zero2+accumulation ...

Tensors of a CPU run stand for those of GPU and host together. FOLDER takes the checkpoints.
"""

import gc
import json
import logging
import sys
import weakref
from importlib.resources import files
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmtune.models import Ovis2_5, Ovis2_5Config

BUCKET = 100_000  # elements, for ZeRO-1; DeepSpeed's default would be larger than the model


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages made inside it: `live` now, and the `peak` since `reset`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def reset(self):
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._sizes:
                    weakref.finalize(storage, self._freed, key)
                self.live += size - self._sizes.get(key, 0)
                self._sizes[key] = size
                self.peak = max(self.peak, self.live)
        return made

    def _freed(self, key: int):
        self.live -= self._sizes.pop(key)


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


def settings(engine: str, accumulation: int) -> dict:
    """The shipped file with its "auto" values filled in as transformers fills them."""
    config = json.loads((files("vlmtune.configs") / "zero" / f"{engine}.json").read_text())
    config |= {
        "train_batch_size": 2 * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
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


def measure(engine: str, accumulation: int, folder: Path) -> dict:
    config = settings(engine, accumulation)
    offload = "offload_optimizer" in config["zero_optimization"]
    ids = torch.arange(8)[None]
    with LiveMemory() as memory:
        model = Ovis2_5(tiny_config()).train()
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
            "engine": engine,
            "accumulation": accumulation,
            "zero": config["zero_optimization"],
            "settled": memory.live,
            "activations": activations,
            "backward": backward,
            "step": memory.peak,
        }
    states = getattr(ds.optimizer, "optimizer", ds.optimizer).state.values()
    found["adam_steps"] = int(next(iter(states))["step"])
    ds.save_checkpoint(str(folder / engine))
    torch.distributed.barrier()
    found["disk"] = sum(f.stat().st_size for f in (folder / engine).rglob("*.pt"))
    ds.destroy()
    return found


if __name__ == "__main__":
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    for word in sys.argv[2:]:
        name, _, accumulated = word.partition("+")
        line = measure(name, 2 if accumulated else 1, Path(sys.argv[1]))
        if torch.distributed.get_rank() == 0:
            print(json.dumps(line), flush=True)
        gc.collect()
    torch.distributed.destroy_process_group()
