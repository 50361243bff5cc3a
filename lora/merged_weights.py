"""The weight files of a merge, in bounded memory and with PEFT's bits."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import ModelError
from .adapter import Adapter, Change, LowRank
from .checkpoint import Checkpoint
from .quantization import Quantization
from .tensor_files import Header

MIN_ELEMENTS = 1 << 22
"""Of a tensor that are always computed at once."""

PIECE = 1 << 20
"""Elements of a computed tensor that are rounded and written at once."""

BUFFER = 1 << 22
"""Bytes that are copied at once."""


@dataclass
class Rounding:
    """What quantising the base's weights for training changed in them.

    Attributes:
        relative: Frobenius norm of the change over that of the weights.
    """

    largest: float = 0.0
    mean: float = 0.0
    relative: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])

    def add(self, before: Tensor, after: Tensor) -> None:
        sums = self._sums
        for old, new in zip(_pieces(before), _pieces(after), strict=True):
            change, old = new.double().sub_(old), old.double()
            sums[0] += change.numel()
            sums[1] += float(change.abs().sum())
            sums[2] += float(change.square().sum())
            sums[3] += float(old.square().sum())
            self.largest = max(self.largest, float(change.abs().max()))
        self.mean = sums[1] / sums[0]
        self.relative = (sums[2] / sums[3]) ** 0.5 if sums[3] else 0.0


@dataclass(frozen=True)
class Part:
    """What one adapter does to one parameter."""

    adapter: Adapter
    change: Change


Parts = dict[str, list[Part]]


class WeightWriter:
    """Writes the weight files of a merge.

    Attributes:
        adapted: Tensors that the adapters say they change, so far.
        changed: Those with another value than in the base.
        largest: The largest change of a value, so far.
        rounding: What quantisation changed, of the weights in `quantized`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: Parts,
        quantization: Quantization | None = None,
        quantized: frozenset[str] = frozenset(),
        dequantize: bool = False,
    ):
        """Args:
        quantized: Parameters that were quantised at training.
        dequantize: Whether to add to what they were then, not to the base's values.
        """
        self.checkpoint, self.parts = checkpoint, parts
        self.quantization, self.quantized, self.dequantize = quantization, quantized, dequantize
        self.adapted, self.changed, self.largest = 0, 0, 0.0
        self.rounding = Rounding() if quantization else None
        self.parameters = {(p.shard, p.name): name for name, p in checkpoint.places.items()}
        for name, source in checkpoint.tied.items():
            if name not in checkpoint.places:
                shard = checkpoint.places[source].shard
                self.parameters[shard, checkpoint.file_name(name)] = name
        largest = max(header.size for header in checkpoint.headers.values())
        # Of float32, so that with everything else it stays below the size of the largest file.
        self.limit = max(MIN_ELEMENTS, int(0.8 * largest) // 4)

    def write(
        self, shard: Path, header: Header, file: Path, progress: Callable[[int], object]
    ) -> None:
        """One file, at its full size from the beginning.

        Raises:
            ModelError: a value is not finite.
            OSError: it cannot be written.
        """
        old = self.checkpoint.headers[shard]
        with shard.open("rb") as source, file.open("wb") as target:
            os.posix_fallocate(target.fileno(), 0, header.size)
            if header is old:
                _copy(source.fileno(), 0, target.fileno(), 0, header.begin)
            else:
                target.write(header.serialized())
                target.flush()
            for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
                parameter = self.parameters.get((shard, name), "")
                place, length = header.begin + entry.start, entry.stop - entry.start
                before = old.tensors.get(name)
                rounds = self.dequantize and parameter in self.quantized
                if self.parts.get(parameter) or rounds or not before or before.dtype != entry.dtype:
                    self._compute(shard, name, parameter, entry.dtype, target.fileno(), place)
                else:
                    start = old.begin + before.start
                    _copy(source.fileno(), start, target.fileno(), place, length)
                    self._measure(parameter)
                progress(length)

    def _compute(
        self, shard: Path, name: str, parameter: str, dtype: torch.dtype, file: int, place: int
    ) -> None:
        stored = name in self.checkpoint.headers[shard].tensors
        twin = self.checkpoint.tied.get(parameter, "")
        before = self.checkpoint.read_entry(shard, name) if stored else self.checkpoint.read(twin)
        parts, source = self.parts.get(parameter, []), before
        after = self._measure(parameter)
        if after is not None and self.dequantize:
            source = after
        del after
        changed = False
        for new, old in new_values(source, before, parts, dtype, self.limit):
            for values, base in zip(_pieces(new), _pieces(old, like=new), strict=True):
                values = values.to(dtype).contiguous()
                if dtype.is_floating_point and not torch.isfinite(values).all():
                    raise ModelError(
                        f"tensor {name}",
                        f"has NaN or Inf after the merge in {str(dtype).removeprefix('torch.')}",
                        "look for a run that diverged, or merge with --dtype bfloat16 or float32, "
                        "which hold larger numbers than float16",
                    )
                if parts or source is not before:
                    change = float((values.float() - base).abs().max())
                    self.largest = max(self.largest, change)
                    changed |= change > 0
                place += _write(file, values, place)
            del new, old, values, base  # views of a block that the next one would stand beside
        self.adapted += bool(parts)
        self.changed += bool(parts) and changed

    def _measure(self, parameter: str) -> Tensor | None:
        """A weight as training had it, if it was quantised then; the difference is noted."""
        if parameter not in self.quantized:
            return None
        assert self.quantization and self.rounding
        before = self.checkpoint.read(parameter)
        after = self.quantization.round_trip(before)
        self.rounding.add(before, after)
        return after


def new_values(
    source: Tensor, before: Tensor, parts: Sequence[Part], dtype: torch.dtype, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A parameter with its changes, some rows at a time, wider than it will be written.

    Args:
        source: What the changes are added to.
        before: The base's values; yielded beside the new ones.
        dtype: What trained values are rounded to, as in a model of that dtype.
        limit: Elements that may be computed at once.

    Yields:
        New and old values of the same rows.
    """
    full = [part for part in parts if part.change.full]
    low_rank = [(part, part.change.low_rank) for part in parts if part.change.low_rank]
    biases = [(part, part.change.bias) for part in parts if part.change.bias]
    if full:
        source = full[0].adapter.read(full[0].change.full or "")
    if biases:
        total = torch.zeros(source.shape, dtype=_wide(source.dtype))
        for part, name in biases:
            scaling = part.change.scaling * part.adapter.weight
            total += part.adapter.read(name).float() * scaling
        yield total.add_(source.to(dtype) if full else source), before
    elif not low_rank:
        yield source, before
    else:
        whole = any(low.magnitude and low.transposed for _, low in low_rank)
        height, width = source.shape
        for rows in _blocks(height, width, height * width if whole else limit):
            base = source[rows].to(dtype) if full else source[rows]
            yield _add(base, rows, low_rank, dtype), before[rows]


def _add(
    base: Tensor, rows: slice, low_rank: Sequence[tuple[Part, LowRank]], dtype: torch.dtype
) -> Tensor:
    """Rows of a weight with what adapters add to them. The order of operations is PEFT's
    (PEFT 0.21, `get_delta_weight`, `DoraLinearVariant.merge_unsafe`): it decides the last bits."""
    total = None
    for part, low in low_rank:
        a, b = part.adapter.read(low.a).float(), part.adapter.read(low.b).float()
        delta = (b @ a[:, rows]).T if low.transposed else b[rows] @ a
        delta *= low.scaling
        if part.adapter.weight != 1:
            delta *= part.adapter.weight
        total = delta if total is None else total.add_(delta)
    assert total is not None
    part, low = low_rank[0]
    if low.embedding and not low.magnitude and len(low_rank) == 1 and base.dtype == dtype:
        total = total.to(dtype)  # PEFT rounds the sum of an embedding twice
    total = total.to(_wide(base.dtype))
    if not low.magnitude:
        return _add_in_place(total, base)
    magnitude = part.adapter.read(low.magnitude).float()
    if low.transposed:
        norms = [
            torch.linalg.norm(base[:, columns].T + total.T[columns], dim=1)
            for columns in _blocks(total.shape[1], len(total), PIECE)
        ]
        return _add_in_place(total, base).mul_(magnitude / torch.cat(norms))
    _add_in_place(total, base)
    return total.mul_((magnitude[rows] / torch.linalg.norm(total, dim=1)).view(-1, 1))


def _add_in_place(total: Tensor, base: Tensor) -> Tensor:
    """In pieces, because torch first makes a copy of `base` in the dtype of `total`."""
    for sums, values in zip(_pieces(total), _pieces(base, like=total), strict=True):
        sums.add_(values)
    return total


def _blocks(rows: int, width: int, limit: int) -> Iterator[slice]:
    """Rows of about equal number, of at most `limit` elements; multiples of 64, because a matrix
    product of a few rows alone takes another path to other last bits."""
    size = -(-rows // -(-rows * width // limit))
    size = max(64, -(-size // 64) * 64)
    yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _pieces(values: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """Parts of at most `PIECE` elements, in order; cut where those of `like` are."""
    if (values if like is None else like).is_contiguous():
        yield from values.view(-1).split(PIECE)
    else:
        yield from values.split(max(1, PIECE // values.shape[1]))


def _copy(source: int, start: int, target: int, place: int, length: int) -> None:
    buffer = memoryview(bytearray(min(BUFFER, length)))
    while length > 0:
        read = os.preadv(source, [buffer[: min(len(buffer), length)]], start)
        if not read:
            raise ModelError("base", "one of its files became shorter", "merge again")
        _write_all(target, buffer[:read], place)
        start, place, length = start + read, place + read, length - read


def _write(file: int, values: Tensor, place: int) -> int:
    content = values.view(-1).view(torch.uint8).numpy().data
    _write_all(file, content, place)
    return len(content)


def _write_all(file: int, content: memoryview, place: int) -> None:
    while content:
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
