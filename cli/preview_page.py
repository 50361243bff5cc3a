"""The page of `vlmtune preview --html`: every token of the samples, with its id and its label."""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image

from ..collators.pieces import Piece, Token
from ..collators.preview import Medium, Preview
from .charts import Part, bar, key
from .page import document, facts, percent, remark, table, text, write

MAX_PIXELS = 1024 * 1024
"""An image of more is shown smaller, and its caption says so: a page must stay one to open."""


def write_page(
    path: Path, previews: Sequence[Preview], images: Sequence[Sequence[Image.Image]], title: str
) -> None:
    """Write the page whole or not at all.

    Args:
        previews: Samples of one packed row follow one another.
        images: For each sample the resized images in the order of its media, a video's frames one
            after another.

    Raises:
        ConfigError: the file exists, or its folder cannot be written.
    """
    write(path, document(title, "\n".join(_body(previews, images, title)), "preview_page"))


def _body(
    previews: Sequence[Preview], images: Sequence[Sequence[Image.Image]], title: str
) -> Iterator[str]:
    yield f"<header><h1>{text(title)}</h1>"
    if len(previews) > 1:
        tokens = sum(p.length for p in previews)
        trained = sum(p.trained_tokens for p in previews)
        share = f"{trained:,} <small>({percent(trained, tokens)})</small>"
        yield facts({"samples": f"{len(previews):,}", "tokens": f"{tokens:,}", "trained": share})
        yield _kinds([piece for preview in previews for piece in preview.pieces])
        yield _contents(previews)
    yield f"</header>{_tools(previews)}<main>"
    numbered = list(enumerate(zip(previews, images, strict=True)))
    for row, group in groupby(numbered, lambda entry: _row(entry[1][0])):
        samples = list(group)
        if row is not None:
            yield f'<section class="row">{_row_header([p for _, (p, _) in samples])}'
        for number, (preview, pictures) in samples:
            yield from _sample(number, preview, pictures)
        if row is not None:
            yield "</section>"
    yield '</main><div id="tip" role="status" hidden></div>'


def _row(preview: Preview) -> int | None:
    return preview.place.row if preview.place else None


def _contents(previews: Sequence[Preview]) -> str:
    return table(
        ["#index", "id", "#tokens", "#trained", "problems"],
        [
            [
                f"{p.index}",
                f'<a href="#sample-{i}">{text(p.id) or "no id"}</a>',
                f"{p.length:,}",
                f"{p.trained_tokens:,}",
                _codes(p).replace(" ", ", "),
            ]
            for i, p in enumerate(previews)
        ],
    )


def _tools(previews: Sequence[Preview]) -> str:
    counts = Counter(code for preview in previews for code in _codes(preview).split())
    clean = sum(not preview.problems for preview in previews)
    options = [("all", "all samples", len(previews))]
    options += [("any", "any problem", len(previews) - clean), ("none", "no problem", clean)]
    options += [(f"code {code}", code, count) for code, count in sorted(counts.items())]
    choices = "".join(f'<option value="{v}">{name} ({n})</option>' for v, name, n in options)
    chooser = f'<label>Problem <select name="problem">{choices}</select></label>'
    return (
        f'<fieldset class="tools" hidden>{chooser if counts else "<span>No problems found</span>"}'
        '<label><input type="checkbox" name="trained"> only trained</label>'
        '<span><span class="sample-trained">underlined</span> = trained</span>'
        f"{'<output></output>' if len(previews) > 1 else ''}</fieldset>"
    )


def _row_header(previews: Sequence[Preview]) -> str:
    place = previews[0].place
    assert place
    samples = "1 sample" if len(previews) == 1 else f"{len(previews)} samples"
    parts = [Part(p.length, f"{p.id}: {_count(p.length)}", "part") for p in previews]
    return (
        f'<h2>Row {place.row} <span class="muted">· {samples} · {place.tokens:,} of '
        f"{place.room:,} tokens ({percent(place.tokens, place.room)} full)</span></h2>"
        f"{bar(parts, place.room, 'Share of each sample in the row')}"
    )


def _sample(number: int, preview: Preview, images: Sequence[Image.Image]) -> Iterator[str]:
    about = [
        f"{preview.length:,} tokens",
        f"{preview.trained_tokens:,} trained ({percent(preview.trained_tokens, preview.length)})",
    ]
    if preview.place:
        about.append(f"{percent(preview.length, preview.place.tokens)} of row {preview.place.row}")
    if preview.cut:
        about.append(f'<span class="error">{preview.cut:,} cut away by the length limit</span>')
    yield (
        f'<article id="sample-{number}" data-problems="{_codes(preview)}"><div>'
        f'<h2><span class="index">Sample {preview.index}</span> {text(preview.id) or "no id"}</h2>'
        f'<p class="muted">{text(preview.source)}, record {preview.record}</p></div>'
        f"<p>{' · '.join(about)}</p>"
    )
    if preview.problems:
        yield '<ul class="problems">'
        for p in preview.problems:
            field = f' <span class="muted">{text(p.field)}</span>' if p.field else ""
            head = f"<code>{text(p.code)}</code> {text(p.severity)}{field}"
            yield remark(text(p.severity), head, p.what, p.fix)
        yield "</ul>"
    yield _kinds(preview.pieces)
    if preview.media:
        yield '<div class="media">'
        start, numbers = 0, Counter()
        for medium in preview.media:
            numbers[medium.kind] += 1
            stop = start + medium.frames
            name = f"{medium.kind} {numbers[medium.kind]}"
            yield _figure(name, medium, images[start:stop])
            start = stop
        yield "</div>"
    yield (
        f'<div class="pieces" tabindex="0" role="group" aria-label="Tokens of sample '
        f'{preview.index}; left and right arrow keys go from token to token">'
    )
    position = 0
    for piece in preview.pieces:
        yield _piece(piece, position)
        position += piece.length
    if not preview.trained_tokens:
        yield '<p class="nothing">Nothing of it is trained.</p>'
    yield "</div></article>"


def _figure(name: str, medium: Medium, images: Sequence[Image.Image]) -> str:
    frames, rows, columns = medium.grid
    sizes = f"{medium.width}×{medium.height} → {medium.resized_width}×{medium.resized_height} px"
    if medium.kind == "video":
        sizes = f"{medium.frames} of {medium.total_frames} frames, {sizes}"
    patches = f"{frames}×{rows}×{columns}" if frames > 1 else f"{rows}×{columns}"
    shown = [_shrunk(image) for image in images]
    smaller = (
        f"<br>shown at {shown[0].width}×{shown[0].height}" if shown[0] is not images[0] else ""
    )
    pictures = "".join(
        f'<img src="{_data_uri(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{name}{f", frame {i}" if len(shown) > 1 else ""} as the model sees it">'
        for i, image in enumerate(shown, start=1)
    )
    if len(shown) > 1:
        pictures = f'<div class="frames" tabindex="0">{pictures}</div>'
    else:
        pictures = f'<button type="button" aria-expanded="false">{pictures}</button>'
    return (
        f"<figure>{pictures}<figcaption><b>{name}</b> {text(medium.file)}<br>{sizes}<br>"
        f"{patches} patches → {medium.tokens:,} tokens{smaller}</figcaption></figure>"
    )


def _shrunk(image: Image.Image) -> Image.Image:
    scale = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def _data_uri(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


def _piece(piece: Piece, position: int) -> str:
    tokens = []
    for token in piece.tokens:
        tokens.append(_token(token, position))
        position += len(token.ids)
    trained = " · <em>trained</em>" if piece.trained else ""
    return (
        f'<div class="piece {_class(piece.kind)}{" trained" if piece.trained else ""}">'
        f'<div class="kind"><b>{piece.kind}</b><span>{_count(piece.length)}{trained}</span></div>'
        f'<div class="text">{"".join(tokens)}</div></div>'
    )


def _token(token: Token, position: int) -> str:
    # The mark is an element without text, so that copied text is the true one.
    shown = text(token.text).replace("\n", "<b></b>\n")
    last = position + len(token.ids) - 1
    place = str(position) if last == position else f"{position} to {last}"
    values = f'data-i="{_runs(token.ids)}" data-l="{_runs(token.labels)}" data-p="{place}"'
    return f"<i {values}>{shown}</i>"


def _runs(values: Sequence[int]) -> str:
    """Example: [-301, -300, -300, -302] becomes "-301, -300 × 2, -302"."""
    runs = [(value, len(list(run))) for value, run in groupby(values)]
    return ", ".join(f"{value} × {n}" if n > 1 else str(value) for value, n in runs)


def _kinds(pieces: Sequence[Piece]) -> str:
    """Tokens by kind."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts[piece.kind] += piece.length
    parts = [Part(n, f"{kind}: {_count(n)}", _class(kind)) for kind, n in counts.items()]
    names = [
        (_class(kind), f'{kind} <span class="muted">{n:,}</span>') for kind, n in counts.items()
    ]
    return f"<div>{bar(parts, counts.total(), 'Tokens by kind')}{key(names)}</div>"


def _class(kind: str) -> str:
    return kind.replace(" ", "-")


def _codes(preview: Preview) -> str:
    return " ".join(sorted({problem.code for problem in preview.problems}))


def _count(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens:,} tokens"
