"""Logits and weights of base, base + adapters and merged model, one model in memory at a time."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ..core.errors import ModelError
from .adapter import Adapter
from .checkpoint import Checkpoint
from .integrity import pieces, untied
from .samples import Sample

KEPT_BYTES = 128 << 20
"""Of float32 logits kept of each model: positions of the whole vocabulary, shared evenly among
the samples and spread evenly over each."""

ROUNDOFF = {torch.float32: 2**-18, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Largest relative error of one rounding; of float32, what sums in another order leave."""

Logits = list[Tensor]
"""Of each sample float32 `[kept positions, V]`, on the CPU."""


@dataclass(frozen=True)
class Difference:
    """Of two models' logits: largest and mean, and the share of positions with the same argmax."""

    largest: float
    mean: float
    agreement: float

    @classmethod
    def of(cls, ours: Logits, theirs: Logits) -> "Difference":
        largest, total, same = 0.0, 0.0, 0
        for a, b in zip(ours, theirs, strict=True):
            gap = (a - b).abs_()
            largest, total = max(largest, float(gap.max())), total + float(gap.sum())
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
        return cls(largest, total / sum(map(torch.numel, ours)), same / sum(map(len, ours)))


def share(base: Logits, adapted: Logits, merged: Logits) -> float | None:
    """Of an adapter's effect that a merged model has, <merged - base, adapted - base> / <adapted -
    base, adapted - base>: 1 where it is right, 0 where the adapter is lost, 2 where it was merged
    twice; None without an effect."""
    have = wanted = 0.0
    for b, a, m in zip(base, adapted, merged, strict=True):
        effect = a - b
        have += float(((m - b) * effect).sum())
        wanted += float(effect.square().sum())
    return have / wanted if wanted else None


def scale(logits: Logits) -> float:
    """Standard deviation over the vocabulary, a mean over positions."""
    spread = torch.cat([rows.std(-1) for rows in logits])
    return float(spread.mean())


@dataclass(frozen=True)
class Runner:
    """Runs models on the same samples, one sample at a time."""

    samples: Sequence[Sample]
    dtype: torch.dtype
    device: str

    def load(self, checkpoint: Checkpoint) -> Any:
        kind = type(checkpoint.config)
        auto: Any = AutoModelForCausalLM
        if kind in AutoModelForImageTextToText._model_mapping:
            auto = AutoModelForImageTextToText
        model = auto.from_pretrained(checkpoint.folder, dtype=self.dtype)
        return model.to(self.device).eval()

    @torch.no_grad()
    def logits(self, model: Any) -> Logits:
        head = model.get_output_embeddings()
        rows = KEPT_BYTES // (4 * model.config.get_text_config().vocab_size)
        each = max(1, rows // len(self.samples))
        found = []
        for sample in self.samples:
            length = sample["input_ids"].shape[1]
            kept = torch.linspace(0, length - 1, min(length, each)).round().long()
            # The head sees the kept positions alone: all of them would be gigabytes of logits.
            hook = head.register_forward_pre_hook(
                lambda _, given, kept=kept: (given[0][:, kept.to(given[0].device)],)
            )
            inputs = {name: self._placed(value) for name, value in sample.items()}
            try:
                found.append(model(**inputs, use_cache=False).logits[0].float().cpu())
            finally:
                hook.remove()
        return found

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


def add_adapters(model: Any, adapters: Sequence[Adapter], device: str) -> PeftModel:
    """The adapters as PEFT loads them, all active, each scaled by its weight.

    Raises:
        ModelError: PEFT refuses one, or two together.
    """
    names = [f"adapter{i}" for i in range(len(adapters))]
    try:
        wrapped: Any = model
        for name, adapter in zip(names, adapters, strict=True):
            if wrapped is model:
                wrapped = PeftModel.from_pretrained(
                    model, adapter.folder, adapter_name=name, torch_device=device
                )
            else:
                wrapped.load_adapter(adapter.folder, adapter_name=name, torch_device=device)
        wrapped.base_model.set_adapter(names, inference_mode=True)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"adapter {', '.join(a.source for a in adapters)}",
            f"PEFT cannot load it onto the base: {' '.join(str(error).split())}",
            "give the base it was trained on, and adapters that go together",
        ) from error
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            for name, adapter in zip(names, adapters, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= adapter.weight
    return wrapped.eval()


@dataclass
class Weights:
    """Merged tensors against the adapters merged by PEFT in the dtype that is computed in.

    Attributes:
        changed: Names of the tensors that the adapters change.
        lost: Those of them that are as in the base although rounding leaves a change.
        wrong: Tensors that are further off than rounding, others than `lost`.
        share: Of the adapters' changes that is in the merged tensors; None without changes.
    """

    changed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    share: float | None = None


@torch.no_grad()
def compare_weights(
    expected: nn.Module,
    base: Checkpoint,
    merged: Checkpoint,
    reference: Callable[[str], Tensor],
    dequantized: frozenset[str] = frozenset(),
) -> Weights:
    """Each parameter of `expected` against the merged folder's tensor.

    A merged element may be two roundings off, and four of the change made to it: a merge by
    another tool may have rounded the change before it was added. A tensor without a change must
    be the base's. A head that the merge untied is left to the logits: PEFT's merge changes what
    shares its memory.

    Args:
        reference: Name to the base's tensor, quantised and dequantised where merged onto that.
        dequantized: The names that are.
    """
    found, have, wanted = Weights(), 0.0, 0.0
    left_out = untied(base, merged)
    for name, parameter in expected.named_parameters():
        if name not in merged.places or name in left_out:
            continue
        tensor, before = merged.read(name), reference(name)
        roundoff = max(ROUNDOFF[tensor.dtype], ROUNDOFF[parameter.dtype])
        tiny = max(torch.finfo(d).smallest_normal for d in (tensor.dtype, parameter.dtype))
        changed = off = moved = False
        for e, m, b in zip(pieces(parameter), pieces(tensor), pieces(before), strict=True):
            same = torch.equal(m, b.to(m.dtype))
            moved |= not same
            if not torch.equal(e, b.to(e.device, e.dtype)):
                changed = True
            elif name not in dequantized:
                off |= not same
                continue
            e, m, b = (x.to(e.device, torch.float32) for x in (e, m, b))
            change = e - b
            size = change.abs() + change.square().mean().sqrt()
            allowed = roundoff * (2 * (e.abs() + tiny) + 4 * size)
            off |= bool(((m - e).abs() > allowed).any())
            have += float(((m - b) * change).sum())
            wanted += float(change.square().sum())
        if changed:
            found.changed.append(name)
        if off:
            (found.wrong if moved or not changed else found.lost).append(name)
    found.share = have / wanted if wanted else None
    return found


def release() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
