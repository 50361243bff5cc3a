"""Memory of one training run per GPU, by arithmetic on its model without weights.

Every term is a number of bytes. docs/zero.md explains the terms and names their sources; the tests
compare them with tensors that really live in tiny runs.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from ..configs.schema import RunConfig
from ..lora.checkpoint import empty_model
from ..lora.quantization import Quantization
from .activations import DTYPES, Batch, activation_bytes, base_of
from .adapters import apply_adapters, plan_adapters
from .modules import TrainedModule, apply_train_modules
from .traced_layers import packed_bits

# deepspeed 0.19.8: runtime/zero/config.py; the bucket is also what runtime/engine.py takes for the
# all-reduce of stage 0.
DEFAULT_BUCKET = 500_000_000
DEFAULT_PIECE = 1_000_000_000
"""Of `stage3_max_live_parameters` and `sub_group_size`."""

OPTIMIZERS = {
    "adamw_torch": (2, 32),
    "adamw_torch_fused": (2, 32),
    "adagrad": (1, 32),
    "rmsprop": (1, 32),
    "sgd": (0, 32),
    "adamw_bnb_8bit": (2, 8),
    "adamw_8bit": (2, 8),
    "paged_adamw_8bit": (2, 8),
    "paged_adamw_32bit": (2, 32),
    "lion_8bit": (1, 8),
    "lion_32bit": (1, 32),
    "paged_lion_8bit": (1, 8),
    "paged_lion_32bit": (1, 32),
}
"""`optim` to its states per parameter and their bits; any other counts as adamw_torch. Paged states
count as if none had left the GPU."""
IN_PLACE = OPTIMIZERS.keys() - {"adamw_torch", "adagrad", "rmsprop"}
"""Those whose step makes no tensor as large as the gradients."""

# bitsandbytes 0.50, optim/optimizer.py and functional.py.
SMALLEST_8BIT = 4096
STATE_BLOCK = 256
WEIGHT_BLOCK = 64


@dataclass(frozen=True)
class Counts:
    """Elements of a model's parameters.

    Attributes:
        total: All but quantised weights.
        trained: Of each trained tensor.
        largest: The largest tensor of `total`.
        hidden_size: The width of the language model.
        kept: Bytes of `total` as they are loaded, without DeepSpeed.
        packed: Bytes of quantised weights.
        tied: Of the output head, where it is the embedding.
    """

    total: int
    trained: tuple[int, ...]
    largest: int
    hidden_size: int
    kept: int
    packed: int = 0
    tied: int = 0


def meta_model(
    config: RunConfig, precision: str = "bf16", learning_rate: float = 0.0
) -> tuple[PreTrainedModel | PeftModel, list[TrainedModule]]:
    """The model as a run would train it, on the meta device: `train_modules` or adapters applied,
    layers of 4 or 8 bits in place, dtypes as they are without DeepSpeed. Reads config.json alone,
    and of an adapter to train on its own config.

    Args:
        precision: What the run computes in: "bf16", "fp16" or "fp32".
        learning_rate: Of entries without one of their own, for `module_table`.

    Raises:
        ConfigError, ModelError: as training would, for what no weights are needed to see.
    """
    path = config.model.model_path
    model = empty_model(AutoConfig.from_pretrained(path), f"model_path {path}")
    if config.model.attn_implementation == "eager":
        model.set_attn_implementation("eager")
    if not config.adapter.use_lora:
        return model, apply_train_modules(model, config.model, learning_rate)
    dtype = DTYPES[precision]
    plan = plan_adapters(model, config, str(dtype).removeprefix("torch."))
    model.to(dtype=dtype)  # type: ignore[call-issue]
    if plan.quantization:
        _quantise(model, plan.quantization, config.adapter.bnb_4bit_compute_dtype)
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT (0.21) copies the values of an adapter to train on, which have no place here, and
        # asks by a name that transformers 5.23 warns of.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated")
        return apply_adapters(model, config, plan, learning_rate)


def _quantise(model: PreTrainedModel, quantization: Quantization, compute: str | None) -> None:
    """Put bitsandbytes' layers in place, as loading does; their weights are not packed yet."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = quantization.host_config(model, compute or quantization.dtype)
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    setattr(model, f"is_loaded_in_{quantization.bits}bit", True)  # asked by PEFT


def count(model: PreTrainedModel | PeftModel) -> Counts:
    """Counts the model of `meta_model`."""
    base = base_of(model)
    packed = {m.weight: _packed_bytes(m) for m in base.modules() if packed_bits(m)}
    named = {name: p for name, p in model.named_parameters() if p not in packed}
    words = base.get_output_embeddings().weight
    return Counts(
        total=sum(p.numel() for p in named.values()),
        trained=tuple(p.numel() for p in named.values() if p.requires_grad),
        largest=max(p.numel() for p in named.values()),
        hidden_size=base.config.get_text_config().hidden_size,
        kept=sum(p.nbytes for p in named.values()),
        packed=sum(packed.values()),
        tied=words.numel() if words is base.get_input_embeddings().weight else 0,
    )


def _packed_bytes(layer: Any) -> int:
    """Of a weight of bitsandbytes with its scales."""
    size = layer.in_features * layer.out_features
    if packed_bits(layer) == 8:
        return size + 4 * layer.out_features
    scales = -(-size // WEIGHT_BLOCK)
    levels = 4 * 16
    if layer.weight.compress_statistics:
        # Scales of one byte, theirs in float32, and an offset.
        return size // 2 + scales + 4 * -(-scales // STATE_BLOCK) + 4 + levels
    return size // 2 + 4 * scales + levels


def moment_bytes(sizes: Sequence[int], optimizer: str) -> int:
    """Bytes of an optimizer's states of tensors of these sizes."""
    states, bits = OPTIMIZERS.get(optimizer, (2, 32))
    if bits == 32:
        return 4 * states * sum(sizes)
    return states * sum(
        4 * size if size < SMALLEST_8BIT else size + 4 * -(-size // STATE_BLOCK) for size in sizes
    )


def state_bytes(
    counts: Counts,
    zero: Mapping[str, Any],
    gpus: int,
    *,
    precision: str = "bf16",
    optimizer: str = "adamw_torch",
    accumulation: bool = False,
) -> dict[str, int]:
    """Bytes of one GPU by term, and of the host's memory for all of its `gpus` GPUs together.

    `weights`, `master` and `moments` always live. `gradients` and `backward` (buffers, gathered
    weights) come on top while the activations live; `step` comes on top inside the optimizer step,
    when those are gone.

    Args:
        zero: The `zero_optimization` block of a DeepSpeed config, {} without DeepSpeed.
        gpus: Processes, one to a GPU.
        precision: "bf16", "fp16" or "fp32".
        optimizer: The host's `optim`.
        accumulation: Whether `gradient_accumulation_steps` is above 1.
    """
    total, trained, largest = counts.total, sum(counts.trained), counts.largest
    temporary = 0 if optimizer in IN_PLACE else 4
    width = DTYPES[precision].itemsize
    if not zero:
        gradients = 4 * trained * (2 if gpus > 1 else 1)
        return {
            "weights": counts.kept + counts.packed,
            "master": 0,
            "moments": moment_bytes(counts.trained, optimizer),
            "gradients": gradients,
            "backward": 0,
            "step": gradients + temporary * trained,
            "host": 0,
        }
    stage, offload = zero.get("stage", 0), _offloads(zero, "offload_optimizer")
    own = trained if stage == 0 else -(-trained // gpus)
    shard = -(-total // gpus) if stage == 3 else total
    twice = 2 if accumulation and stage == 2 else 1
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if bucket == "auto":
        bucket = counts.hidden_size**2
    if stage == 0:
        bucket = min(trained, bucket)
    backward = width * bucket * (2 if stage == 2 and zero.get("overlap_comm") else 1)
    if stage >= 2:
        backward += 2 * width * max(counts.trained)
    if stage == 3:
        live = zero.get("stage3_max_live_parameters", DEFAULT_PIECE)
        backward += width * min(total, live + largest)
    gradients = {0: trained, 1: trained + own}.get(stage, own * twice)
    terms = {
        "weights": width * shard + counts.packed,
        # At stage 0 float32 weights are their own.
        "master": 4 * own if stage or width == 2 else 0,
        "moments": moment_bytes([own], optimizer),
        "gradients": width * gradients,
        "backward": backward,
        "step": (4 + temporary) * own,
        "host": 0,
    }
    if stage == 0:
        terms["step"] += terms["gradients"] - (0 if width == 2 else 4 * own)
    if stage == 3:
        piece = min(own, zero.get("sub_group_size", DEFAULT_PIECE))
        terms["step"] = terms["gradients"] + (4 + temporary) * piece
    if offload:
        host = 8 * trained + moment_bytes([trained], optimizer) + width * trained
        terms.update(master=0, moments=0, step=0, gradients=width * own * (twice - 1), host=host)
        if stage == 2:
            moved = width * max(counts.trained)
            terms["backward"] += moved
            terms["host"] += moved * gpus + width * trained * (twice - 1)
    if _offloads(zero, "offload_param"):
        terms["weights"] = 0
        terms["host"] += width * total
    return terms


def _offloads(zero: Mapping[str, Any], block: str) -> bool:
    return (zero.get(block) or {}).get("device", "none") != "none"


def peak(terms: Mapping[str, int], activation_bytes: int) -> int:
    """The larger of the two worst moments: in backward, and in the optimizer step."""
    backward = terms["gradients"] + terms["backward"] + activation_bytes
    return terms["weights"] + terms["master"] + terms["moments"] + max(backward, terms["step"])


def estimate(
    model: PreTrainedModel | PeftModel,
    batch: Batch,
    *,
    zero: Mapping[str, Any],
    gpus: int,
    recompute: Mapping[str, str],
    precision: str = "bf16",
    optimizer: str = "adamw_torch_fused",
    accumulation: bool = False,
) -> dict[str, int]:
    """The terms of `state_bytes` with `activations` and `peak`, the larger of the moments in
    backward and in the optimizer step.

    Args:
        model: Of `meta_model`.
        recompute: Of `parse_recompute`: the policy of each tower.
        zero, gpus, precision, optimizer, accumulation: As of `state_bytes`.
    """
    terms = state_bytes(
        count(model),
        zero,
        gpus,
        precision=precision,
        optimizer=optimizer,
        accumulation=accumulation,
    )
    active_bytes = activation_bytes(
        model, batch, recompute, precision=precision, deepspeed=bool(zero)
    )
    return {**terms, "activations": active_bytes, "peak": peak(terms, active_bytes)}


def checkpoint_bytes(
    counts: Counts,
    zero: Mapping[str, Any],
    *,
    adapters: bool = False,
    precision: str = "bf16",
    optimizer: str = "adamw_torch",
) -> tuple[int, int]:
    """Bytes on disk of the model or adapter, which a finished run leaves too, and of the
    optimizer's files, of one checkpoint of all ranks."""
    trained = sum(counts.trained)
    width = DTYPES[precision].itemsize if zero else 4
    model = width * (trained if adapters else counts.total)
    if not zero:
        return model, moment_bytes(counts.trained, optimizer)
    stage = zero.get("stage", 0)
    # Of adapters DeepSpeed leaves frozen weights out, but not under a second name.
    second = width * counts.tied if adapters else 0
    frozen = 0 if adapters else width * (counts.total - trained)
    weights_again = frozen if stage == 3 else model + second
    master = 4 * trained if stage or width == 2 else 0
    return model, master + moment_bytes([trained], optimizer) + weights_again
