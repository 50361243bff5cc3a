"""Whether a merged model is its base with its adapters: by files, weights and logits."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, ModelError
from ..core.logging import say
from .adapter import Adapter, check_fits
from .checkpoint import Checkpoint
from .integrity import integrity_problems, read_merge_file
from .measure import (
    ROUNDOFF,
    Difference,
    Logits,
    Runner,
    Weights,
    add_adapters,
    compare_weights,
    release,
    scale,
    share,
)
from .samples import Sample, file_samples, load_processor, made_samples, tokenizer_problems

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MEAN, LARGEST = 8, 1024
"""How far the logits of merged may be from those of base + adapters, in roundings of the merged
dtype times the scale of the logits. Measured for right merges in bf16, fp16 and fp32 of random
models of 2 and 12 layers and a trained one: 0.2 to 1.4 in the mean, 2.6 when run in bf16; 1 to 207
at most, the latter where rounding tips a visual word. Besides, weights are compared one by one."""

SHARE = 0.1, 0.2
"""How far the share of the adapters' effect may be from 1: a constant, and a part of the ratio of
the mean difference to the mean effect. Right merges are off by about 0.1 of that ratio, half an
adapter by all of it."""


@dataclass
class Verification:
    """What was measured; without logits where the merged folder is not whole.

    Attributes:
        dtype, compute_dtype: Of the merged weights, and what the models ran in.
        samples, seen, positions: How many were run, those of them with an image or video, and
            positions whose logits were compared.
        effect: Base + adapters against base.
        rest: Merged against base + adapters.
        trained: Merged against what was trained, where that was adapters on quantised weights.
        share: Of the effect on the logits that the merged model has.
        scale: Standard deviation of the logits of base + adapters over the vocabulary.
        problems: What is wrong, a sentence each; empty when the merged model is right.
    """

    dtype: torch.dtype
    compute_dtype: torch.dtype
    samples: int = 0
    seen: int = 0
    positions: int = 0
    effect: Difference | None = None
    rest: Difference | None = None
    trained: Difference | None = None
    bits: int = 0
    share: float | None = None
    scale: float = 0.0
    weights: Weights | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def allowed(self) -> tuple[float, float]:
        unit = max(ROUNDOFF[self.dtype], ROUNDOFF[self.compute_dtype]) * self.scale
        return MEAN * unit, LARGEST * unit

    @property
    def share_is_right(self) -> bool:
        if self.share is None or self.effect is None or self.rest is None:
            return True
        fixed, noise = SHARE
        return abs(self.share - 1) <= fixed + noise * min(1, self.rest.mean / self.effect.mean)

    def report(self) -> str:
        """The table that `vlmtune verify` prints."""
        return "\n".join(_lines(self))

    def check(self) -> None:
        """Raises ModelError naming the first problem, when there is one."""
        if self.problems:
            more = len(self.problems) - 1
            raise ModelError(
                "merged model",
                self.problems[0] + (f"; and {more} more, see the report" if more else ""),
                "mend what the report names, and merge again",
            )


def verify(
    base: str,
    adapters: Sequence[tuple[str, float]],
    merged: str,
    *,
    data: str | None = None,
    image_folder: str | None = None,
    samples: int = 8,
    compute_dtype: str = "float32",
    device: str | None = None,
) -> Verification:
    """Compare a merged folder with its base and the adapters that it should hold.

    Files, config and tensors are checked first, and only when nothing is missing or broken are
    base, base + adapters (by PEFT) and merged run on the same samples, one after another. Never
    is more than one model in memory, and of its logits at most 128 MiB are kept.

    Where the merge file says that a QLoRA adapter was merged onto the dequantised weights, these
    are the base; else the original ones.

    Args:
        adapters: Folder or Hub name, and weight, of each.
        data: Conversations to run; without it, made ones with images of noise.
        image_folder: Of `data`; without it, that of the run that made the first adapter.
        samples: How many are run: the first ones of `data`.
        compute_dtype: In float32 only the rounding of the merged weights is between the models.
        device: By its torch name; without it the first GPU, else the CPU.

    Raises:
        ModelError: a folder cannot be read, or an adapter does not fit the base.
        DataError: `data` is bad.
    """
    if samples < 1:
        raise ConfigError("samples", f"{samples} is below 1", "give 1 or more")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            "device", f'"{device}" cannot be used here', "give cpu, or cuda where there is a GPU"
        ) from None
    original, result = Checkpoint.open(base), Checkpoint.open(merged, whole=False)
    added = [Adapter.open(source, weight) for source, weight in adapters]
    for adapter in added:
        check_fits(adapter, original)
    found = Verification(_main_dtype(result), DTYPES[compute_dtype])
    say("verify: files and tensors")
    found.problems += integrity_problems(original, result)
    if found.problems:
        return found

    inputs = _samples(original, added[0], data, image_folder, samples)
    found.problems += tokenizer_problems(original.folder, result.folder)
    found.samples = len(inputs)
    found.seen = sum("pixel_values" in sample for sample in inputs)
    runner = Runner(inputs, found.compute_dtype, device)
    try:
        reference = _run_reference(runner, original, added, result)
        release()
        say("verify: merged")
        merged_logits = runner.logits(runner.load(result))
    except torch.OutOfMemoryError:
        raise ModelError(
            f"verify on {device}",
            f"a model in {compute_dtype} does not fit into its memory",
            "give --compute_dtype bfloat16, or --device cpu",
        ) from None

    found.weights = reference.weights
    found.positions = sum(map(len, merged_logits))
    found.effect = Difference.of(reference.adapted, reference.base)
    found.rest = Difference.of(merged_logits, reference.adapted)
    if reference.trained and reference.bits:
        found.bits = reference.bits
        found.trained = Difference.of(merged_logits, reference.trained)
    found.share = share(reference.base, reference.adapted, merged_logits)
    found.scale = scale(reference.adapted)
    found.problems += _problems(found)
    return found


@dataclass
class _Reference:
    base: Logits
    adapted: Logits
    trained: Logits | None
    bits: int
    weights: Weights


@torch.no_grad()
def _run_reference(
    runner: Runner, base: Checkpoint, adapters: Sequence[Adapter], merged: Checkpoint
) -> _Reference:
    """Everything that base and adapters are loaded for; PEFT merges in place, so that is last."""
    quantization = next((a.quantization for a in adapters if a.quantization), None)
    modules = quantization.modules if quantization else []
    names = frozenset(base.parameter(f"{module}.weight") for module in modules)
    onto = names if read_merge_file(merged.folder).get("onto") == "dequantized" else frozenset()

    def weight(name: str, dequantized: Collection[str]) -> Tensor:
        tensor = base.read(name)
        return quantization.round_trip(tensor) if quantization and name in dequantized else tensor

    def put(dequantized: Collection[str]) -> None:
        for name in names:
            parameters[name].copy_(weight(name, dequantized))

    say("verify: base")
    model = runner.load(base)
    parameters = dict(model.named_parameters())
    put(onto)
    base_logits = runner.logits(model)
    say("verify: base + adapter")
    model = add_adapters(model, adapters, runner.device)
    adapted = runner.logits(model)
    trained = adapted if names else None
    if names and not onto:
        put(names)
        trained = runner.logits(model)
        put(onto)
    expected: Any = model.merge_and_unload()
    weights = compare_weights(expected, base, merged, lambda name: weight(name, onto), onto)
    bits = quantization.bits if quantization else 0
    return _Reference(base_logits, adapted, trained, bits, weights)


def _samples(
    base: Checkpoint, adapter: Adapter, data: str | None, image_folder: str | None, count: int
) -> list[Sample]:
    processor = load_processor(base.folder)
    if data is None:
        return made_samples(processor, count)
    return file_samples(processor, data, count, adapter.folder, image_folder)


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of most of the numbers."""
    sizes: Counter[torch.dtype] = Counter()
    for place in checkpoint.places.values():
        sizes[place.dtype] += math.prod(place.shape)
    return sizes.most_common(1)[0][0]


def _problems(found: Verification) -> Iterator[str]:
    effect, rest, weights = found.effect, found.rest, found.weights
    assert effect and rest and weights
    dtype = _name(found.dtype)
    if effect.mean <= ROUNDOFF[found.compute_dtype] * found.scale:
        if found.compute_dtype != torch.float32:
            yield (
                f"the adapter changes the logits by less than {_name(found.compute_dtype)} can "
                "show; run with --compute_dtype float32"
            )
            return
        unseen = "" if found.seen else "; no sample had an image, --data gives others"
        yield f"the adapter does nothing: base + adapter has the logits of the base{unseen}"
    lost, changed = len(weights.lost), len(weights.changed)
    if lost and lost == changed:
        yield f"the merge lost the adapter: all {lost} tensors that it changes are as in the base"
        return
    if lost:
        yield (
            f"{lost} of the {changed} tensors that the adapter changes are as in the base, the "
            f"first is {weights.lost[0]}"
        )
    if weights.wrong:
        yield (
            f"{len(weights.wrong)} tensors are further from base + adapter than rounding to "
            f"{dtype} can be, the first is {weights.wrong[0]}"
        )
    left = weights.share
    if not lost and not weights.wrong and left is not None and abs(left - 1) > SHARE[0]:
        yield (
            f"rounding to {dtype} swallowed the adapter: {left:.2f} of its change is left in the "
            "weights; merge with --dtype float32"
        )
    elif not found.share_is_right:
        yield (
            f"the merged model has {found.share:.2f} of the adapter's effect on the logits, not 1; "
            "0 is an adapter that is lost, 2 one that was merged twice"
        )
    mean, largest = found.allowed
    if not rest.mean <= mean or not rest.largest <= largest:
        yield (
            f"the logits of merged and base + adapter differ by {rest.mean:.2g} in the mean and "
            f"{rest.largest:.2g} at most; rounding to {dtype} allows {mean:.2g} and {largest:.2g}"
        )


def _lines(found: Verification) -> Iterator[str]:
    dtypes = f"computed in {_name(found.compute_dtype)}, merged weights in {_name(found.dtype)}"
    if found.effect and found.rest and found.weights:
        yield (
            f"{found.samples} samples, {found.seen} with images, logits at {found.positions} "
            f"positions; {dtypes}"
        )
        yield f"  {'logits':36}{'largest':>11}{'mean':>11}{'same token':>12}"
        yield _row("adapter vs base", found.effect)
        yield _row("merged vs base + adapter", found.rest)
        mean, largest = found.allowed
        yield f"  {'  allowed':36}{largest:>11.2e}{mean:>11.2e}"
        if found.trained:
            yield (
                f"  as trained on {found.bits}-bit weights: max {found.trained.largest:.2e}, mean "
                f"{found.trained.mean:.2e}, agreement {found.trained.agreement:.2%}"
            )
        carried, left = found.share, found.weights.share
        yield (
            "  share of the adapter's effect carried over: "
            f"{'no effect' if carried is None else f'{carried:.4f}'}"
        )
        if left is not None:
            tensors = len(found.weights.changed)
            yield f"  share of its change in the weights: {left:.4f}, in {tensors} tensors"
    if found.problems:
        yield "the merged model is wrong:"
        yield from (f"  - {problem}" for problem in found.problems)
    else:
        yield "the merged model is base + adapter"


def _row(name: str, of: Difference) -> str:
    return f"  {name:36}{of.largest:>11.2e}{of.mean:>11.2e}{of.agreement:>12.2%}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
