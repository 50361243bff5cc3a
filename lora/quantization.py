"""Weights kept in 4 or 8 bits while adapters are trained on them (QLoRA, arXiv:2305.14314)."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..configs.adapter import AdapterConfig
from ..configs.train_modules import parse_train_modules
from ..core.errors import ConfigError
from ..models.parts import is_under, modules_at

BLOCK = 64
"""Elements that share a scale in 4 bits."""

PIECE = 1 << 20
"""Elements that are quantised at once: whole blocks."""
ROWS = 256


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights of a run were quantised.

    Attributes:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4"; of 4 bits alone.
        double_quant: Whether the scales of 4-bit blocks are quantised too.
        dtype: Of the weights when they were quantised, by its torch name.
        modules: Paths of the quantised linear layers.
    """

    bits: int
    quant_type: str
    double_quant: bool
    dtype: str
    modules: list[str]

    @classmethod
    def from_run(cls, run: dict[str, Any]) -> "Quantization | None":
        """As `to_dict` left it in a run file; None for a run on plain weights."""
        return cls(**run["quantization"]) if run.get("quantization") else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def host_config(self, model: nn.Module, compute_dtype: str) -> BitsAndBytesConfig:
        """For `from_pretrained`, of a model with the modules of `model`."""
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        # It matches beginnings and ends of paths (transformers 5.23), so whole ones are given.
        left_out = [name for name in linear if name not in set(self.modules)]
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
            llm_int8_skip_modules=left_out,
        )

    @torch.no_grad()
    def round_trip(self, weight: Tensor) -> Tensor:
        """What training computed with instead of `weight`: quantised and dequantised again, in the
        dtype and shape of `weight`, `[out, in]`."""
        import bitsandbytes.functional as bnb

        result, dtype = torch.empty_like(weight), getattr(torch, self.dtype)
        if self.bits == 8:
            for old, new in zip(weight.split(ROWS), result.split(ROWS), strict=True):
                rows, scales, _ = bnb.int8_vectorwise_quant(old.to(dtype).to(torch.float16))
                new.copy_(bnb.int8_vectorwise_dequant(rows, scales))
            return result
        if weight.shape[-1] % BLOCK:
            # On a CPU (bitsandbytes 0.50) the shape then counts for what comes back.
            kinds = {"quant_type": self.quant_type, "compress_statistics": self.double_quant}
            packed, state = bnb.quantize_4bit(weight.to(dtype), **kinds)
            return result.copy_(bnb.dequantize_4bit(packed, state))
        # In pieces, whose temporaries are small; only the scales' own quantisation sees them all.
        made = [
            bnb.quantize_4bit(piece.to(dtype), quant_type=self.quant_type)
            for piece in weight.reshape(-1).split(PIECE)
        ]
        if self.double_quant:
            scales = torch.cat([state.absmax for _, state in made])
            offset = scales.mean()
            coarse, state_of_scales = bnb.quantize_blockwise(scales - offset, blocksize=256)
            scales = bnb.dequantize_blockwise(coarse, state_of_scales) + offset
            counts = [len(state.absmax) for _, state in made]
            for (_, state), part in zip(made, scales.split(counts), strict=True):
                state.absmax = part
        for new, (packed, state) in zip(result.view(-1).split(PIECE), made, strict=True):
            new.copy_(bnb.dequantize_4bit(packed, state).view(-1))
        return result


def quantization_for(
    model: PreTrainedModel, adapter: AdapterConfig, full: Collection[str], dtype: str
) -> Quantization | None:
    """What a run quantises: linear layers outside of `unquantized_parts`, of fully trained modules
    and of the output head; in 4 bits those whose inputs are whole blocks. None where no key asks
    for it.

    Args:
        model: Its structure alone counts; it may have no weights.
        full: Paths of the fully trained modules.

    Raises:
        ConfigError: nothing is left to quantise.
    """
    if not adapter.load_in_4bit and not adapter.load_in_8bit:
        return None
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "load_in_4bit, load_in_8bit",
            "need bitsandbytes, which is not installed",
            "pip install bitsandbytes, or leave them out",
        )
    plain = [*full]
    if adapter.unquantized_parts:
        for entry in parse_train_modules(adapter.unquantized_parts, "unquantized_parts"):
            plain += modules_at(entry.name, model, "unquantized_parts")
    head = model.get_output_embeddings()
    modules = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and not any(is_under(name, path) for path in plain)
    ]
    bits = 4 if adapter.load_in_4bit else 8
    if bits == 4:
        # Whole blocks alone: of others a CPU (bitsandbytes 0.50) computes with a fourth of error.
        modules = [name for name in modules if _in_features(model, name) % BLOCK == 0]
    if not modules:
        raise ConfigError(
            "unquantized_parts", "leaves no layer to quantise", "name fewer parts, or none"
        )
    quant_type, double = adapter.bnb_4bit_quant_type, adapter.bnb_4bit_use_double_quant
    return Quantization(bits, quant_type, double, dtype, modules)


def _in_features(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module.in_features


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes (0.50) from rearranging 4-bit weights for good at the first evaluation, as
    it does on CPUs with avx512_bf16: what is trained, merged or saved afterwards is wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
