"""Previews as lines of a terminal, with and without colours."""

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from ..collators.pieces import Piece
from ..collators.preview import Medium, Preview
from .page import VISIBLE

LONGEST = 1200
"""Characters of a piece that are shown; of a longer one its middle is left out."""

COLOURS = {
    "prompt": "",
    "image": "36",
    "video": "36",
    "empty think": "90",
    "thought": "35",
    "answer": "32",
    "tool response": "34",
    "stop": "33",
}
"""SGR codes that every terminal knows; trained text is bold too."""

# What would move the cursor, hide text or turn its direction is shown as a picture.
_VISIBLE = VISIBLE | {ord("\n"): "⏎", ord("\t"): "⇥"}
_COLUMNS = f"   {'tokens':>8}  {'kind':13}  "


def in_colour() -> bool:
    """Whether stdout is a terminal that is to have colours (no-color.org)."""
    dumb = os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not dumb


def lines(previews: Sequence[Preview], width: int, colour: bool) -> Iterator[str]:
    """The samples one after another, then a legend and the tokens of all by kind."""
    rows = [preview.place and preview.place.row for preview in previews]
    for i, preview in enumerate(previews):
        place = preview.place
        if place and (i == 0 or rows[i - 1] != place.row):
            count = rows.count(place.row)
            yield _bold(
                f"row {place.row}: {count} sample{'' if count == 1 else 's'}, {place.tokens:,} of "
                f"{place.room:,} tokens ({place.tokens / place.room:.1%})",
                colour,
            )
        yield from _sample(preview, width, colour)
        yield ""
    yield "+ trained   - not trained   ⏎ newline   ␣ space at an end   ⟨ ⟩ with its two end tokens"
    if len(previews) > 1:
        yield f"all {len(previews)}: {_by_kind([piece for p in previews for piece in p.pieces])}"


def _sample(preview: Preview, width: int, colour: bool) -> Iterator[str]:
    source = f'{preview.source}, record {preview.record} (id "{preview.id}")'
    yield _bold(_visible(f"sample {preview.index}: {source}"), colour)
    share = preview.trained_tokens / preview.length if preview.length else 0
    counts = f"  {preview.length:,} tokens, {preview.trained_tokens:,} trained ({share:.1%})"
    if preview.cut:
        counts += f", {preview.cut:,} more cut off"
    if place := preview.place:
        counts += f"; {preview.length / place.tokens:.1%} of the row, from token {place.start:,} on"
    yield counts
    for problem in preview.problems:
        where = f", {problem.field}" if problem.field else ""
        yield _painted(f"  {problem.severity} [{problem.code}]{_visible(where)}:", "31", colour)
        yield _visible(f"    {problem.what}")
        yield _visible(f"    Fix: {problem.fix}")
    yield _COLUMNS + "text"
    for piece in preview.pieces:
        medium = None if piece.medium is None else preview.media[piece.medium]
        yield from _piece(piece, medium, width, colour)
    yield f"  {_by_kind(preview.pieces)}"


def _piece(piece: Piece, medium: Medium | None, width: int, colour: bool) -> Iterator[str]:
    text = f"{piece.text} {_described(medium)}" if medium else piece.text
    ends = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    text = "␣" * ends[0] + text[ends[0] : ends[1]] + "␣" * (len(text) - ends[1])
    text = _visible(_shortened(text))
    sign = "+" if piece.trained else "-"
    before = f" {sign} {piece.length:>8,}  {piece.kind:13}  "
    code = COLOURS[piece.kind]
    if piece.trained:
        code = f"1;{code}"
    for line in _wrapped(text, max(20, width - len(before))):
        yield before + _painted(line, code, colour)
        before = " " * len(before)


def _described(medium: Medium) -> str:
    sizes = (
        f"{medium.width} x {medium.height} -> "
        f"{medium.resized_width} x {medium.resized_height} pixels"
    )
    if medium.kind == "video":
        sizes = f"{medium.frames} of {medium.total_frames} frames, {sizes}"
    return f"{medium.file}, {sizes}"


def _by_kind(pieces: Sequence[Piece]) -> str:
    """Tokens of each kind, and how many of them are trained."""
    counts, trained = Counter(), Counter()
    for piece in pieces:
        counts[piece.kind] += piece.length
        trained[piece.kind] += piece.length if piece.trained else 0
    return ", ".join(
        f"{kind} {count:,}" + (f" (+{trained[kind]:,})" if trained[kind] else "")
        for kind, count in counts.items()
    )


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _visible(text: str) -> str:
    return text.translate(_VISIBLE)


def _wrapped(text: str, width: int) -> Iterator[str]:
    """Lines of at most `width` cells, broken behind a space where there is one."""
    start, cells, space = 0, 0, 0
    at = 0
    while at < len(text):
        cells += _cells(text[at])
        if cells > width:
            stop = space if space > start else at
            yield text[start:stop]
            start = at = stop
            cells = 0
            continue
        at += 1
        if text[at - 1] == " ":
            space = at
    yield text[start:]


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _bold(text: str, colour: bool) -> str:
    return _painted(text, "1", colour)


def _painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code.strip(";") else text
