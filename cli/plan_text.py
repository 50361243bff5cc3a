"""A forecast as text: the verdict first, tables after it, and what is doubted at the end."""

import json
import textwrap
from collections.abc import Iterator, Sequence

from ..sft.forecast import EngineMemory, Forecast, Histogram, Layout, SampleRef

GB = 10**9
LINES = 10
"""Of a histogram, at most."""
BAR = 40
"""Characters of its longest line."""
WIDTH = 100
LONGEST_VALUE = 48

TERMS = {
    "weights": "weights",
    "master": "fp32 copy",
    "moments": "moments",
    "gradients": "gradients",
    "backward": "buffers",
    "activations": "activations",
    "step": "optimizer step",
}
"""Terms of memory -> their names, in the order in which they are shown."""

SHORT = {"activations": "activ.", "step": "step"}
"""Of those too long for the head of a column."""


def plan_text(f: Forecast) -> str:
    """Every part of a forecast, in lines of about `WIDTH` characters."""
    parts = {
        f"Plan of {f.config}: {f.model} on {_count_of(f.gpus, 'GPU')} of "
        f"{f.gpu_memory / GB:g} GB": _summary(f),
        "Settings that are not the defaults": _settings(f),
        "Data": _data(f),
        "Batches of an epoch (* is yours)": _batches(f),
        "What is trained": _parameters(f),
        f"Memory of one GPU in GB, at the costliest batch, {f.precision} (* is yours)": _memory(f),
        "Operations, time and disk": _cost(f),
        f"Doubts: {len(f.doubts) or 'none'}": _doubts(f),
    }
    blocks = [
        "\n".join([title, *(f"  {line}".rstrip() for line in lines)])
        for title, lines in parts.items()
    ]
    return "\n\n".join(blocks)


def _summary(f: Forecast) -> Iterator[str]:
    used = _used(f)
    usable = f.gpu_memory * (1 - f.reserve)
    engine = "a run without DeepSpeed" if used.name == "none" else used.name
    verdict = "fits" if used.fits and not used.refused else "does not fit"
    if used.refused:
        verdict = f"is refused: {used.refused}"
    steps, compute, disk = f.steps, f.compute, f.disk
    drawn = f.train.per_epoch
    epochs = "1 epoch" if steps.epochs == 1 else f"{steps.epochs:.4g} epochs"
    unit = "rows" if _layout(f).name == "packing" else "samples"
    yield from _facts(
        {
            "memory": f"{engine} {verdict}: {_gb(used.peak)} of {_gb(usable)} GB per GPU "
            f"({_gb(f.gpu_memory)} less {f.reserve:.0%}), most of it {TERMS[used.dominant]}",
            "time": f"{duration(compute.hours)}, {compute.gpu_hours:,.1f} GPU hours, at "
            f"{compute.mfu:.0%} of {compute.tflops:g} TFLOP/s, which are assumed (--mfu, --tflops)",
            "steps": f"{steps.total:,} in {epochs}, {steps.warmup:,} of them warmup; each of "
            f"{steps.global_batch:,} {unit} = {steps.per_device} per GPU x {steps.accumulation} "
            f"accumulation x {_count_of(steps.gpus, 'GPU')}",
            "data": f"{f.train.samples:,} samples, {f.train.tokens:,} tokens"
            + (f"; an epoch draws {drawn:,} samples" if drawn != f.train.samples else ""),
            "trained": f"{f.parameters.trained:,} of {f.parameters.total:,} parameters "
            f"({f.parameters.trained / f.parameters.total:.1%})",
            "disk": f"at most {_gb(disk.most)} GB in {f.output_dir}",
            "doubts": f"{len(f.doubts)}, at the end" if f.doubts else "none",
        }
    )


def _settings(f: Forecast) -> Iterator[str]:
    widths = [0, 0]
    rows: dict[str, list[list[str]]] = {}
    for s in f.settings:
        row = [s.key, _value(s.value), _value(s.default)]
        rows.setdefault(s.source, []).append(row)
        widths = [max(width, len(cell)) for width, cell in zip(widths, row, strict=False)]
    for source, own in rows.items():
        yield f"{source}:"
        for key, value, default in own:
            yield f"  {key:{widths[0]}}  {value:{widths[1]}}  (default {default})"


def _data(f: Forecast) -> Iterator[str]:
    sets = [f.train, *f.evaluation]
    head = ("set", "samples", "tokens", "trained", "visual", "with media", "cut", "tokens cut")
    rows = [[*head, "left out"]]
    for d in sets:
        shares = (f"{part / d.tokens:.1%}" for part in (d.trained_tokens, d.visual_tokens))
        counts = (d.with_media, d.truncated, d.cut_tokens, sum(d.left_out.values()))
        rows.append([d.name, *map(_count, (d.samples, d.tokens)), *shares, *map(_count, counts)])
    yield from _table(rows)
    if len(f.train.sources) > 1:
        yield ""
        numbers = [
            (s.name, _count(s.samples), f"{s.passes:g}", _count(s.per_epoch))
            for s in f.train.sources
        ]
        yield from _table([("source", "samples", "passes", "per epoch"), *numbers])
    for d in sets:
        for reason, count in list(d.left_out.items())[:5]:
            yield f"{d.name}: {count:,} left out, because: {reason}"
    yield ""
    yield "Longest samples"
    yield from _samples(f.train.longest)
    yield from _histogram("Tokens of a sample", f.train.lengths)
    yield from _histogram("Visual tokens of a sample with media", f.train.visual)
    yield from _histogram("Share of a sample that is trained", f.train.supervised, percent=True)


def _histogram(title: str, h: Histogram, percent: bool = False) -> Iterator[str]:
    if not h.counts:
        return

    def form(value: float) -> str:
        return f"{value:.0%}" if percent else f"{value:,.0f}"

    together = -(-len(h.counts) // LINES)
    counts = [sum(h.counts[i : i + together]) for i in range(0, len(h.counts), together)]
    edges = [*h.edges[:-1:together], h.edges[-1]]
    yield ""
    yield f"{title}: mean {form(h.mean)}, median {form(h.median)}, largest {form(h.largest)}"
    bounds = [form(edge) for edge in edges]
    width, numbers = max(map(len, bounds)), max(len(_count(count)) for count in counts)
    for low, high, count in zip(bounds, bounds[1:], counts, strict=False):
        bar = "█" * round(BAR * count / max(counts)) or ("▏" if count else "")
        yield f"{low:>{width}} - {high:>{width}}  {_count(count):>{numbers}}  {bar}".rstrip()


def _batches(f: Forecast) -> Iterator[str]:
    rows = [["order", "padding", "computed tokens", "micro-batches", "steps", "slowest / mean GPU"]]
    for layout in f.layouts:
        padding = "none" if layout.name == "packing" else f"{layout.padding:.1%}"
        counts = map(_count, (layout.tokens, layout.micro_batches, layout.steps))
        rows.append([_named(layout), padding, *counts, f"{layout.waiting:.3f}"])
    yield from _table(rows)
    for layout in f.layouts:
        if layout.name == "packing":
            each = "" if layout.configured else ", one to a GPU,"
            yield f"Packed rows{each} are {1 - layout.padding:.1%} full; the rest is not computed."
    worst = f.costliest
    yield ""
    yield (
        f"Costliest batch: step {worst.step:,}, GPU {worst.process}: {len(worst.samples)} samples, "
        f"{worst.tokens:,} tokens{' with padding' if worst.padded else ''}, "
        f"{worst.patches:,} patches"
    )
    yield from _samples(worst.samples[:5])
    if len(worst.samples) > 5:
        yield f"... and {len(worst.samples) - 5} more"


def _samples(samples: Sequence[SampleRef]) -> Iterator[str]:
    rows = [["tokens", "patches", "cut", "index", "record", "id", "file"]]
    for s in samples:
        numbers = map(_count, (s.tokens, s.patches, s.cut, s.index, s.record))
        rows.append([*numbers, _short(s.id, 24), _short(s.file, 60)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        numbers = map(str.rjust, row[:5], widths)
        yield "  ".join([*numbers, row[5].ljust(widths[5]), row[6]]).rstrip()


def _parameters(f: Forecast) -> Iterator[str]:
    rows = [("module", "parameters", "of all", "learning rate")]
    for m in f.parameters.modules:
        rows.append((m.name, _count(m.parameters), f"{m.share:.2%}", f"{m.learning_rate:g}"))
    yield from _table(rows)


def _memory(f: Forecast) -> Iterator[str]:
    terms = [term for term in TERMS if any(term in engine.terms for engine in f.engines)]
    rows = [["engine", *(SHORT.get(t, TERMS[t]) for t in terms), "peak", "", "most of it", "host"]]
    for engine in f.engines:
        cells = (_gb(engine.terms[t]) if t in engine.terms else "-" for t in terms)
        fits = "refused" if engine.refused else "fits" if engine.fits else "too much"
        host = _gb(engine.host) if engine.host else "-"
        told = (_gb(engine.peak), fits, TERMS[engine.dominant], host)
        rows.append([_named(engine), *cells, *told])
    yield from _table(rows)
    yield from _wrapped(
        f"A GPU has {_gb(f.gpu_memory)} GB, {_gb(f.gpu_memory * (1 - f.reserve))} to plan with. "
        "The peak is in the backward pass or, where its column is filled, in the optimizer's step. "
        "Host is the machine's memory for all its GPUs. The engine none is a run without DeepSpeed."
    )
    if refused := {engine.name: engine.refused for engine in f.engines if engine.refused}:
        yield from _wrapped(f"Refused: {', '.join(refused)}; {next(iter(refused.values()))}.")
    yield from _wrapped(f"Not counted: {'; '.join(f.left_out_of_memory)}.")


def _cost(f: Forecast) -> Iterator[str]:
    compute, disk = f.compute, f.disk
    on_top = {"padding": compute.padded, "recomputation": compute.recomputed}
    more = (f"{name} {flops / compute.flops:+.1%}" for name, flops in on_top.items())
    lines = {
        "operations": f"{_flops(compute.flops_per_epoch)} per epoch, {_flops(compute.flops)} in "
        f"the run; on top of it {', '.join(more)}",
        "time": f"{duration(compute.hours)} of training, {compute.tokens_per_second:,.0f} tokens/s "
        "of all GPUs; padding is counted, recomputation is not, as in MFU",
    }
    if compute.evaluations:
        lines["evaluation"] = (
            f"{compute.evaluations:,} times, {duration(compute.evaluation_hours)} in all, on top"
        )
    lines["checkpoints"] = (
        f"{disk.saves:,} written, {disk.kept:,} kept, each {_gb(disk.weights)} GB of weights and "
        f"{_gb(disk.optimizer)} of optimizer states"
        if disk.saves
        else "none"
    )
    lines["finished"] = f"{_gb(disk.final)} GB; at most {_gb(disk.most)} GB are taken at a time"
    yield from _facts(lines)


def _doubts(f: Forecast) -> Iterator[str]:
    for doubt in f.doubts:
        yield from _wrapped(f"{doubt.key}: {doubt.what}.")
        yield from _wrapped(f"  Fix: {doubt.fix}.")


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, WIDTH - 2, subsequent_indent=indent, break_on_hyphens=False)


def _facts(lines: dict[str, str]) -> Iterator[str]:
    width = max(map(len, lines)) + 2
    for key, line in lines.items():
        first, *more = textwrap.wrap(line, WIDTH - 2 - width, break_on_hyphens=False)
        yield f"{key:{width}}{first}"
        yield from (" " * width + part for part in more)


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Columns as wide as their widest cell, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _used(f: Forecast) -> EngineMemory:
    return next(engine for engine in f.engines if engine.configured)


def _layout(f: Forecast) -> Layout:
    return next(layout for layout in f.layouts if layout.configured)


def _named(entry: Layout | EngineMemory) -> str:
    return f"{'*' if entry.configured else ' '} {entry.name}"


def _count_of(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _value(value: object) -> str:
    if value in (None, ""):
        return "none"
    return _short(
        value if isinstance(value, str) else json.dumps(value, default=str), LONGEST_VALUE
    )


def _short(line: str, length: int) -> str:
    """Its beginning and end, where it is longer."""
    if len(line) <= length:
        return line
    half = (length - 1) // 2
    return f"{line[:half]}…{line[-half:]}"


def _count(count: int) -> str:
    return f"{count:,}"


def _gb(size: float) -> str:
    """Of bytes; small ones keep two digits that say something."""
    gigabytes = size / GB
    return f"{gigabytes:,.1f}" if gigabytes >= 1 or not size else f"{gigabytes:.2g}"


def _flops(count: float) -> str:
    return f"{count:.3g} FLOP"


def duration(hours: float) -> str:
    """In words, never more exact than it can be."""
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    if hours * 60 >= 1:
        return f"{hours * 60:.1f} min"
    return f"{hours * 3600:.0f} s" if hours * 3600 >= 1 else "under 1 s"
