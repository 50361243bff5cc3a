"""The page of `vlmtune plan --html`: a forecast with its plots."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..sft.forecast import DataForecast, EngineMemory, Forecast, Histogram, Layout, SampleRef
from .charts import Line, Part, bars, columns, key
from .page import document, facts, percent, remark, table, text, write
from .plan_text import TERMS, duration

GB = 10**9


def write_page(path: Path, forecast: Forecast) -> None:
    """Write the page whole or not at all.

    Raises:
        ConfigError: it cannot be written, or exists.
    """
    title = f"Plan of {forecast.config}"
    write(path, document(title, "\n".join(_body(forecast, title)), "plan_page"))


def _body(f: Forecast, title: str) -> Iterator[str]:
    used = next((engine for engine in f.engines if engine.configured), None)
    yield f"<header><h1>{text(title)}</h1>"
    yield (
        f'<p class="muted">{text(f.model)} · {text(f.precision)} · {_gpus(f.gpus)} of '
        f"{f.gpu_memory / GB:g} GB · into {text(f.output_dir)}</p>"
    )
    figures = {
        "samples per epoch": _short(f.train.per_epoch),
        "optimizer steps": f"{f.steps.total:,}",
        "parameters trained": f"{_short(f.parameters.trained)} of {_short(f.parameters.total)}",
        "expected time": duration(f.compute.hours),
    }
    if used:
        figures["memory per GPU"] = f"{_gigabytes(used.peak)} <small>{_fits(used)}</small>"
    yield f"{facts(figures)}</header><main>"
    yield from _doubts(f)
    yield from _data(f)
    yield from _batches(f)
    yield from _memory(f)
    yield from _work(f)
    yield from _settings(f)
    yield "</main>"


def _doubts(f: Forecast) -> Iterator[str]:
    if not f.doubts:
        return
    yield '<section id="doubts"><h2>Look at this first</h2><ul class="problems">'
    for doubt in f.doubts:
        yield remark("warning", f"<code>{text(doubt.key)}</code>", doubt.what, doubt.fix)
    yield "</ul></section>"


def _data(f: Forecast) -> Iterator[str]:
    sets = [f.train, *f.evaluation]
    yield '<section id="data"><h2>Data</h2>'
    yield table(
        ["set", "#samples", "#per epoch", "#with media", "#tokens", "#trained", "#visual",
         "#truncated", "#tokens cut", "#left out"],
        [
            [text(d.name), f"{d.samples:,}", f"{d.per_epoch:,}", f"{d.with_media:,}",
             f"{d.tokens:,}", percent(d.trained_tokens, d.tokens),
             percent(d.visual_tokens, d.tokens), f"{d.truncated:,}", f"{d.cut_tokens:,}",
             f"{sum(d.left_out.values()):,}"]
            for d in sets
        ],
    )  # fmt: skip
    for data in sets:
        plots = "".join(_histograms(data))
        if data is f.train:
            yield f'<div class="plots">{plots}</div>'
        else:
            yield (
                f"<details><summary>Plots of {text(data.name)}</summary>"
                f'<div class="plots">{plots}</div></details>'
            )
    if len(f.train.sources) > 1:
        yield "<h3>What an epoch draws from</h3>"
        yield table(
            ["file or set", "#samples", "#passes", "#per epoch"],
            [
                [text(s.name), f"{s.samples:,}", f"{s.passes:.3g}", f"{s.per_epoch:,}"]
                for s in f.train.sources
            ],
        )
    left_out = [(d.name, *entry) for d in sets for entry in d.left_out.items()]
    if left_out:
        yield "<h3>Left out</h3>"
        yield table(
            ["set", "#samples", "why"],
            [[text(name), f"{count:,}", text(why)] for name, why, count in left_out],
        )
    yield f"<h3>Longest samples</h3>{_samples(f.train.longest)}</section>"


def _histograms(data: DataForecast) -> Iterator[str]:
    def whole(value: float) -> str:
        return f"{value:,.0f}"

    def share(value: float) -> str:
        return f"{value:.0%}"

    yield _histogram("Tokens per sample", data.lengths, whole)
    yield _histogram("Visual tokens per sample with media", data.visual, whole)
    yield _histogram("Supervised share of a sample", data.supervised, share)


def _histogram(title: str, h: Histogram, form: Callable[[float], str]) -> str:
    if not h.counts:
        return ""
    bounds = list(zip(h.edges, h.edges[1:], strict=False))
    titles = [
        f"{form(low)} to {form(high)}: {count:,}"
        for (low, high), count in zip(bounds, h.counts, strict=True)
    ]
    about = f"mean {form(h.mean)}, median {form(h.median)}, largest {form(h.largest)}"
    middle = form((h.edges[0] + h.edges[-1]) / 2)
    return (
        f'<figure><figcaption><b>{title}</b> <span class="muted">{about}</span></figcaption>'
        f'<p class="top">{max(h.counts):,} samples</p>'
        f"{columns(h.counts, titles, f'{title}: {about}')}"
        f'<p class="axis"><span>{form(h.edges[0])}</span><span>{middle}</span>'
        f"<span>{form(h.edges[-1])}</span></p></figure>"
    )


def _samples(samples: Sequence[SampleRef]) -> str:
    rows = table(
        ["#index", "file", "#record", "id", "#tokens", "#patches", "#cut"],
        [
            [f"{s.index}", text(s.file), f"{s.record}", text(s.id), f"{s.tokens:,}",
             f"{s.patches:,}", f"{s.cut:,}"]
            for s in samples
        ],
    )  # fmt: skip
    return f'<div class="long">{rows}</div>'


def _batches(f: Forecast) -> Iterator[str]:
    steps, costliest = f.steps, f.costliest
    unit = "rows" if any(x.name == "packing" and x.configured for x in f.layouts) else "samples"
    yield '<section id="batches"><h2>Batches</h2>'
    yield (
        f"<p>{steps.global_batch:,} {unit} a step ({steps.per_device} per GPU × {steps.gpus} × "
        f"{steps.accumulation} accumulated), {steps.per_epoch:,} steps an epoch, "
        f"{steps.total:,} in {steps.epochs:g} epoch{'' if steps.epochs == 1 else 's'}, "
        f"{steps.warmup:,} of them warmup.</p>"
        "<h3>Tokens computed in an epoch, and padding</h3>"
    )
    yield bars([_layout(x) for x in f.layouts], max(x.tokens for x in f.layouts))
    yield key([("used", "tokens of samples"), ("padding", "padding")])
    yield table(
        ["order", "#tokens", "#micro-batches", "#steps", "#longest GPU over mean"],
        [
            [_named(x), f"{x.tokens:,}", f"{x.micro_batches:,}",
             f"{x.steps:,}", f"{x.waiting:.2f}"]
            for x in f.layouts
        ],
    )  # fmt: skip
    yield (
        f"<h3>Costliest micro-batch</h3><p>Step {costliest.step:,}, process {costliest.process}: "
        f"{costliest.tokens:,} tokens{' with padding' if costliest.padded else ''}, "
        f"{costliest.trained_tokens:,} trained ones, and {costliest.patches:,} patches at once.</p>"
        f"{_samples(costliest.samples)}</section>"
    )


def _layout(layout: Layout) -> Line:
    # The rows of packing are not computed where they are empty.
    packed = layout.name == "packing"
    padding = 0 if packed else layout.tokens * layout.padding
    parts = [Part(layout.tokens - padding, f"{layout.tokens - padding:,.0f} tokens", "used")]
    if padding:
        parts.append(Part(padding, f"{padding:,.0f} of padding", "padding"))
    behind = "empty, not computed" if packed else "padding"
    return Line(_named(layout), parts, f"{percent(layout.padding)} {behind}")


def _memory(f: Forecast) -> Iterator[str]:
    terms = [term for term in TERMS if any(engine.terms.get(term) for engine in f.engines)]
    colours = {term: f"t{i}" for i, term in enumerate(TERMS)}
    limit = f.gpu_memory * (1 - f.reserve)
    peak = max(engine.peak for engine in f.engines)
    # Next to a GPU that is far larger nothing would be seen of a small model.
    marks = [limit, f.gpu_memory] if peak > limit / 20 else []
    about = "lines are" if marks else "scale ends far below"

    def line(engine: EngineMemory) -> Line:
        parts = [
            Part(size, f"{TERMS[term]}: {_gigabytes(size)}", colours[term])
            for term in terms
            if (size := engine.terms.get(term))
        ]
        return Line(_named(engine), parts, f"{_gigabytes(engine.peak)} {_fits(engine)}")

    yield '<section id="memory"><h2>Memory per GPU</h2>'
    yield (
        f"<p>At the costliest micro-batch. The {about} the {f.gpu_memory / GB:g} GB of a GPU and "
        f"what the plan would use of it, {_gigabytes(limit)}.</p>"
    )
    yield bars([line(engine) for engine in f.engines], 1.02 * max([peak, *marks]), marks)
    yield key((colours[term], TERMS[term]) for term in terms)
    yield table(
        [
            "engine",
            *(f"#{TERMS[term]}" for term in terms),
            "#peak",
            "largest",
            "moment",
            "#host",
            "",
        ],
        [
            [
                _named(engine),
                *(_gigabytes(engine.terms.get(term, 0)) for term in terms),
                _gigabytes(engine.peak),
                TERMS[engine.dominant],
                text(engine.moment),
                _gigabytes(engine.host),
                text(engine.refused),
            ]
            for engine in f.engines
        ],
    )
    if f.left_out_of_memory:
        yield f'<p class="muted">Not counted: {text("; ".join(f.left_out_of_memory))}.</p>'
    yield "</section>"


def _work(f: Forecast) -> Iterator[str]:
    compute, disk = f.compute, f.disk
    yield '<section id="work"><h2>Parameters, time and disk</h2>'
    yield table(
        ["module", "#parameters", "#of all", "#learning rate"],
        [
            [text(m.name), f"{m.parameters:,}", percent(m.share), f"{m.learning_rate:g}"]
            for m in f.parameters.modules
        ],
    )
    times = {
        f"at an MFU of {compute.mfu:g} of {compute.tflops:g} TFLOPS": duration(compute.hours),
        "GPU hours": f"{compute.gpu_hours:,.1f}",
        "tokens a second": f"{compute.tokens_per_second:,.0f}",
    }
    operations = {
        "operations of an epoch": _flops(compute.flops_per_epoch),
        "of the run": _flops(compute.flops),
        "on padding, on top": _flops(compute.padded),
        "computed again, on top": _flops(compute.recomputed),
    }
    if compute.evaluations:
        times[f"{compute.evaluations} evaluations on top"] = duration(compute.evaluation_hours)
        operations["of evaluations, on top"] = _flops(compute.evaluated)
    yield facts(times)
    yield facts(operations)
    yield facts(
        {
            "disk at most": _gigabytes(disk.most),
            "a checkpoint": f"{_gigabytes(disk.weights)} + {_gigabytes(disk.optimizer)} optimizer",
            "checkpoints": f"{disk.saves:,}, of which {disk.kept:,} stay",
            "finished model": _gigabytes(disk.final),
        }
    )
    yield "</section>"


def _settings(f: Forecast) -> Iterator[str]:
    yield '<section id="settings"><h2>Settings that are not the default</h2>'
    yield table(
        ["key", "value", "default", "from"],
        [
            [f"<code>{text(s.key)}</code>", _value(s.value), _value(s.default), text(s.source)]
            for s in f.settings
        ],
    )
    if f.notes:
        yield f"<ul>{''.join(f'<li>{text(note)}</li>' for note in f.notes)}</ul>"
    yield "</section>"


def _named(entry: Layout | EngineMemory) -> str:
    name = text(entry.name)
    return f'<b>{name}</b> <span class="muted">this run</span>' if entry.configured else name


def _fits(engine: EngineMemory) -> str:
    if engine.fits and not engine.refused:
        return '<span class="good">fits</span>'
    return f'<span class="error">{"refused" if engine.refused else "too much"}</span>'


def _value(value: object) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"<code>{text(shown)}</code>" if value is not None else ""


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _gigabytes(size: float) -> str:
    if not size:
        return "0"
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 10**6:,.1f} MB"


def _flops(count: float) -> str:
    return f"{count / 1e15:,.4g} PFLOP"


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
