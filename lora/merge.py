"""Adapters into the weights below them, tensor by tensor, file by file.

What is not changed is copied as bytes; of what is, one tensor at a time is in memory, or part of
one where it is large. The values are those of PEFT's merge_and_unload (PEFT 0.21) with the adapter
in float32, bit by bit.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..core.checkpoints import run_config
from ..core.errors import ModelError
from .adapter import Adapter, Change, check_fits
from .checkpoint import Checkpoint, fingerprint
from .merged_folder import (
    change_config,
    check_output,
    check_space,
    complete_folder,
    copy_files,
    kept_files,
    libraries,
    model_card,
    write_index,
    write_origin,
)
from .merged_weights import Part, Parts, Rounding, WeightWriter
from .quantization import Quantization
from .tensor_files import Entry, Header


@dataclass(frozen=True)
class MergeReport:
    """Attributes:
    adapted: Tensors that the adapters say they change.
    changed: Those with another value than in the base.
    largest: The largest change of a value.
    untied: Whether embeddings and head, tied in the base, are two tensors now.
    rounding: Of QLoRA adapters, what quantisation changed in the base.
    size: Bytes of the weights.
    """

    base: str
    adapters: list[tuple[str, float]]
    output: Path
    onto: str
    dtype: str | None
    adapted: int
    changed: int
    largest: float
    untied: bool
    rounding: Rounding | None
    shards: int
    size: int
    seconds: float


def merge(
    base: str | None,
    adapters: Sequence[tuple[str, float]],
    output: str | Path,
    *,
    dtype: str | None = None,
    onto: str = "original",
    overwrite: bool = False,
    check: Callable[[str, Path], None] | None = None,
) -> MergeReport:
    """Write base + sum of weight * adapter as a model folder like the base's.

    Args:
        base: Folder or Hub name of the model; without it, the one the adapters were trained on.
        adapters: Folders or Hub names with their weights.
        output: Folder to write.
        dtype: Of all floating tensors, by its torch name; None keeps each as it is.
        onto: "original" weights, or "dequantized": quantised and dequantised again as they were
            when the adapter was trained on them.
        overwrite: Whether to replace a model in `output`.
        check: Called with the base and the finished folder before that gets its name; if it
            raises, there is no output.

    Raises:
        ModelError: base, adapters and options do not fit together, a value is not finite, or the
            output cannot be written. Nothing is left under the output's name then.
    """
    started = time.monotonic()
    named, output = Path(output), Path(output).resolve()  # what a link points to is replaced
    if not adapters:
        raise ModelError("adapters", "are none", "give one or more")
    opened = [Adapter.open(source, weight) for source, weight in adapters]
    checkpoint = Checkpoint.open(base) if base else _own_base(opened)
    check_output(output, [checkpoint.folder, *(a.folder for a in opened)], overwrite)
    parts: Parts = {}
    for adapter in opened:
        for name, change in check_fits(adapter, checkpoint).items():
            parts.setdefault(name, []).append(Part(adapter, change))
    _check_sums(parts)
    quantization, quantized = _quantization(opened, checkpoint, onto)
    untied = _share_or_untie(parts, checkpoint)
    layouts = _layouts(checkpoint, untied, getattr(torch, dtype) if dtype else None)
    size = sum(header.size for header in layouts.values())
    files = kept_files(checkpoint.folder)
    writer = WeightWriter(checkpoint, parts, quantization, quantized, onto == "dequantized")
    with complete_folder(output) as partial:
        sources = [checkpoint.folder / file for file in files]
        others = sum(file.stat().st_size for file in sources if file.exists())
        check_space(partial, size + others)
        copy_files(checkpoint.folder, files, partial)
        if dtype or untied:
            change_config(partial, dtype, untied)
        with tqdm(total=size, unit="B", unit_scale=True, desc="merge", disable=None) as progress:
            for shard, header in layouts.items():
                writer.write(shard, header, partial / shard.name, progress.update)
        stored = [entry for header in layouts.values() for entry in header.tensors.values()]
        sizes = {
            "total_size": sum(entry.stop - entry.start for entry in stored),
            "total_parameters": sum(math.prod(entry.shape) for entry in stored),
        }
        added = {
            name: shard.name
            for shard, header in layouts.items()
            for name in header.tensors.keys() - checkpoint.headers[shard].tensors.keys()
        }
        write_index(checkpoint.folder, partial, sizes, added)
        origin = {
            "base": {"source": checkpoint.source, "fingerprint": fingerprint(checkpoint)},
            "adapters": [{"source": source, "weight": weight} for source, weight in adapters],
            "dtype": dtype,
            "onto": onto,
            "run": run_config(opened[0].folder),
            "versions": libraries(),
        }
        write_origin(partial, origin)
        card = model_card(named.absolute().name, checkpoint.folder, origin)
        (partial / "README.md").write_text(card, "utf-8")
        if check:
            check(checkpoint.source, partial)
    return MergeReport(
        checkpoint.source,
        list(adapters),
        named,
        onto,
        dtype,
        writer.adapted,
        writer.changed,
        writer.largest,
        untied,
        writer.rounding,
        len(layouts),
        size,
        time.monotonic() - started,
    )


def _own_base(adapters: Sequence[Adapter]) -> Checkpoint:
    """The model that the adapters say they were trained on."""
    first, fix = adapters[0], "give the model it was trained on as --base"
    for adapter in adapters:
        if adapter.base is None:
            raise ModelError(f"adapter {adapter.source}", "does not name its base", fix)
        if adapter.base != first.base:
            raise ModelError(
                f"adapter {adapter.source}",
                f"names another base, {adapter.base}, than {first.source}, {first.base}",
                "give the model to merge them into as --base",
            )
    try:
        return Checkpoint.open(str(first.base))
    except ModelError as error:
        raise ModelError(f"adapter {first.source}, base {first.base}", error.what, fix) from None


def _check_sums(parts: Parts) -> None:
    """Refuse to weight or to add what is no sum with the base."""
    for name, found in parts.items():
        for part in found:
            if part.change.is_sum or (part.adapter.weight == 1 and len(found) == 1):
                continue
            kind = "trains all values of" if part.change.full else "is a DoRA on"
            others = [p.adapter.source for p in found if p is not part]
            raise ModelError(
                f"adapter {part.adapter.source}",
                f"{kind} {name}, which cannot be "
                + (f"added to {others[0]}" if others else f"weighted with {part.adapter.weight:g}"),
                "give it alone on that module and with weight 1; only plain LoRA can be weighted",
            )


def _quantization(
    adapters: Sequence[Adapter], checkpoint: Checkpoint, onto: str
) -> tuple[Quantization | None, frozenset[str]]:
    """How the base was quantised at training, and the parameters that were."""
    if onto not in ("original", "dequantized"):
        raise ModelError("onto", f'is "{onto}"', 'write "original" or "dequantized"')
    known = [adapter for adapter in adapters if adapter.quantization]
    if onto == "dequantized":
        for adapter in adapters:
            if adapter.quantization is None:
                raise ModelError(
                    f"adapter {adapter.source}",
                    "does not say that and how its base was quantised",
                    "merge it onto the original weights",
                )
            if adapter.quantization != known[0].quantization:
                raise ModelError(
                    f"adapter {adapter.source}",
                    f"was trained on a base quantised in another way than {known[0].source}",
                    "merge them onto the original weights",
                )
    if not known:
        return None, frozenset()
    quantization = known[0].quantization
    assert quantization
    names = frozenset(checkpoint.parameter(f"{m}.weight") for m in quantization.modules)
    for name in sorted(names - checkpoint.places.keys()):
        raise ModelError(
            f"adapter {known[0].source}",
            f"was trained on a base with the quantised {name}, which {checkpoint.source} does not "
            "have",
            "give the model it was trained on as --base",
        )
    return quantization, names


def _share_or_untie(parts: Parts, checkpoint: Checkpoint) -> bool:
    """Give parameters that share their values the changes they share.

    PEFT merges a LoRA on one of them into both; base + adapter computes with it in one alone.

    Returns:
        Whether any of them differ from then on.
    """
    apart = False
    for name, source in checkpoint.tied.items():
        ours, theirs = parts.get(name, []), parts.get(source, [])
        for part in [p for p in (*ours, *theirs) if p.change.shared]:
            trained = Part(part.adapter, Change(part.change.full, shared=True))
            for one in (name, source):
                if not any(p.change.full for p in parts.get(one, [])):
                    parts.setdefault(one, []).append(trained)
        ours, theirs = parts.get(name, []), parts.get(source, [])
        apart |= ours != theirs and not _same_values(ours, theirs)
    return apart


def _same_values(ours: list[Part], theirs: list[Part]) -> bool:
    """Whether both are the same trained values, saved twice."""
    if len(ours) != 1 or len(theirs) != 1:
        return False
    (one,), (other,) = ours, theirs
    if not one.change.full or not other.change.full or one.change.low_rank or other.change.low_rank:
        return False
    return torch.equal(one.adapter.read(one.change.full), other.adapter.read(other.change.full))


def _layouts(
    checkpoint: Checkpoint, untied: bool, target: torch.dtype | None
) -> dict[Path, Header]:
    """The header of each file to write: the base's, with other dtypes and what is untied."""
    layouts = {}
    for shard, header in checkpoint.headers.items():
        entries = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
        for name, source in checkpoint.tied.items() if untied else ():
            place = checkpoint.places[source]
            if name not in checkpoint.places and place.shard == shard:
                entries[checkpoint.file_name(name)] = place.dtype, place.shape
        if target:
            entries = {
                name: (target if dtype.is_floating_point else dtype, shape)
                for name, (dtype, shape) in entries.items()
            }
        if entries == {name: (e.dtype, e.shape) for name, e in header.tensors.items()}:
            layouts[shard] = header
            continue
        # Wide types first, as safetensors does, so that every tensor begins aligned.
        order, end, placed = sorted(entries, key=lambda n: -entries[n][0].itemsize), 0, {}
        for name in order:
            dtype, shape = entries[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            placed[name] = Entry(dtype, shape, start, end)
        layout = Header(0, header.metadata, {name: placed[name] for name in entries})
        layouts[shard] = Header(len(layout.serialized()), header.metadata, layout.tensors)
    return layouts
