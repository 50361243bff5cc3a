"""Bars as inline SVG in percent of their box, so that they fit every width and colour scheme."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .page import text


@dataclass(frozen=True)
class Part:
    """Part of a bar: its size, its tooltip, and the class that colours it."""

    size: float
    title: str
    colour: str


@dataclass(frozen=True)
class Line:
    """A bar of `bars` with what is written before and behind it, as HTML."""

    name: str
    parts: Sequence[Part]
    value: str


def bar(parts: Iterable[Part], whole: float, label: str, marks: Sequence[float] = ()) -> str:
    """Parts one after another, and vertical lines at `marks`.

    Args:
        whole: What the full width stands for.
        label: Read to those who do not see it.
    """
    drawn, start = [], 0.0
    for part in parts:
        drawn.append(
            f'<rect class="{part.colour}" x="{_percent(start, whole)}" '
            f'width="{_percent(part.size, whole)}" height="100%"><title>{text(part.title)}</title>'
            "</rect>"
        )
        start += part.size
    for mark in marks:
        place = _percent(mark, whole)
        drawn.append(f'<line x1="{place}" x2="{place}" y1="-35%" y2="135%"/>')
    return f'<svg class="bar" role="img" aria-label="{text(label)}">{"".join(drawn)}</svg>'


def bars(lines: Sequence[Line], whole: float, marks: Sequence[float] = ()) -> str:
    """Bars to one scale, under one another."""
    rows = "".join(
        f'<div class="name">{line.name}</div>'
        f"{bar(line.parts, whole, ', '.join(part.title for part in line.parts), marks)}"
        f'<div class="value">{line.value}</div>'
        for line in lines
    )
    return f'<div class="bars">{rows}</div>'


def key(names: Iterable[tuple[str, str]]) -> str:
    """What the colours stand for: pairs of a class and HTML."""
    return f'<ul class="key">{"".join(f"<li class={c!r}>{name}</li>" for c, name in names)}</ul>'


def columns(counts: Sequence[int], titles: Sequence[str], label: str) -> str:
    """A histogram: columns of equal width, the highest of full height."""
    highest, width = max(counts), 100 / len(counts)
    drawn = "".join(
        f'<rect x="{i * width:.3f}%" width="{width:.3f}%" y="{100 - 100 * count / highest:.3f}%" '
        f'height="{_percent(count, highest)}"><title>{text(title)}</title></rect>'
        for i, (count, title) in enumerate(zip(counts, titles, strict=True))
    )
    return f'<svg class="columns" role="img" aria-label="{text(label)}">{drawn}</svg>'


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%" if whole else "0%"
