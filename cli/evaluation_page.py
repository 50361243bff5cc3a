"""The page of `vlmtune evaluate`: each answer beside its images, question and references."""

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.errors import DataError
from ..data.conversation import IMAGE_MARK
from ..data.images import decode, open_image
from ..inference.reply import parse_reply
from .page import document, facts, percent, table, text, write

ROWS = 1000
"""Answers on the page, the worst ones: it must stay one to open."""

THUMBNAIL, THUMBNAILS = 160, 4
"""Longest side in pixels, and images of an answer that are shown."""

VERDICTS = ("exact_match", "vqa_accuracy", "anls", "relaxed_accuracy")
"""Metrics by which an answer is right or wrong; the first one that there is decides."""

FILTERS = {
    "error": "errors",
    "wrong": "wrong",
    "right": "right",
    "unfinished": "thought unfinished",
    "cut": "ended by length",
}
"""Class of a row -> what it is called."""

LEADING_MARKS = re.compile(rf"^({re.escape(IMAGE_MARK)}\s*)+")
"""Of images, which stand beside the question."""

Row = dict[str, Any]


def write_page(path: Path, result: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the page whole or not at all.

    Args:
        result: As `evaluation.run.evaluate` returns it.
        rows: Those of `predictions.jsonl`, with their scores.

    Raises:
        ConfigError: the file exists, or its folder cannot be written.
    """
    model = " + ".join([result["model"], *result["adapter"]])
    title = f"Evaluation of {model} on {', '.join(result['data'])}"
    write(path, document(title, "\n".join(_body(title, result, rows)), "evaluation"))


def _body(title: str, result: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    yield f"<header><h1>{text(title)}</h1>{facts(_facts(result))}{_metrics(result)}"
    yield _folded("Left out", {text(k): text(v) for k, v in result["left_out"].items()})
    yield _folded("Errors", {f"record {e['record']}": text(e["error"]) for e in result["errors"]})
    settings = {
        name: text(value) for name, value in {**result["settings"], **result["versions"]}.items()
    }
    yield f"<details><summary>Settings and versions</summary>{facts(settings)}</details></header>"
    if rows:
        yield from _answers(sorted(rows, key=_badness))


def _folded(name: str, entries: dict[str, str]) -> str:
    """Entries as HTML; nothing where there are none."""
    if not entries:
        return ""
    listed = "".join(f"<li><b>{key}</b>: {value}</li>" for key, value in entries.items())
    return f"<details><summary>{name} ({len(entries):,})</summary><ul>{listed}</ul></details>"


def _facts(result: dict[str, Any]) -> dict[str, str]:
    found = {"records": f"{result['records']:,}"}
    for name in ("split", "stage"):
        if result[name] is not None:
            found[name] = text(result[name])
    if shares := result["answers"]:
        found["with a thought"] = percent(shares["thoughts"])
        if "unfinished_thoughts" in shares:
            found["unfinished where asked for"] = percent(shares["unfinished_thoughts"])
        found |= {
            "ended by length": percent(shares["ended_by_length"]),
            "without a reference": percent(shares["without_reference"]),
            "tokens per answer": f"{shares['tokens']:,.1f}",
        }
    return {**found, "errors": f"{len(result['errors']):,}"}


def _metrics(result: dict[str, Any]) -> str:
    lines = [
        [
            text(name),
            f"{found['value']:.4f}",
            f"{found['low']:.4f} to {found['high']:.4f}",
            f"{found['n']:,}",
            text(_about(found)),
        ]
        for name, found in result["metrics"].items()
    ]
    return table(["metric", "#value", "#95 % interval", "#n", ""], lines)


def _about(found: dict[str, Any]) -> str:
    facts = {
        "tokenizer": "tokenizer {}",
        "tokens": "{:,} tokens",
        "images": "{:,} images",
        "texts": "{:,} texts",
        "cut_to_the_length_limit": "{:,} cut to the length limit",
    }
    return ", ".join(form.format(found[key]) for key, form in facts.items() if key in found)


def _badness(row: Row) -> tuple[Any, ...]:
    """Errors first, then by score, the worst first, and answers that nothing is known of last."""
    scores = row.get("scores", {})
    compared = tuple(value for name, value in scores.items() if name != "loss")
    return row["error"] is None, not compared, compared, -scores.get("loss", 0), row["record"]


def _classes(row: Row) -> list[str]:
    if row["error"]:
        return ["error"]
    scores = row.get("scores", {})
    verdict = next((scores[name] for name in VERDICTS if name in scores), None)
    found = [] if verdict is None else ["right" if verdict >= 0.5 else "wrong"]
    found += ["unfinished"] if row["unfinished_thought"] else []
    return found + (["cut"] if row["ended"] == "length" else [])


def _answers(rows: Sequence[Row]) -> Iterator[str]:
    shown = rows[:ROWS]
    counts = Counter(name for row in shown for name in _classes(row))
    choices = [("all", "all", len(shown))]
    choices += [(name, label, counts[name]) for name, label in FILTERS.items() if counts[name]]
    radios = "".join(
        f'<label><input type="radio" name="show" id="show-{name}"{" checked" * (name == "all")}> '
        f"{label} ({count:,})</label>"
        for name, label, count in choices
    )
    more = "" if shown == rows else f" <span>The worst {ROWS:,} of {len(rows):,} answers.</span>"
    yield f'<main><fieldset class="tools"><legend>Show</legend>{radios}{more}</fieldset>'
    yield '<table class="answers"><thead><tr><th>Images</th><th>Question</th><th>Reference</th>'
    yield "<th>Answer</th><th>Scores</th></tr></thead><tbody>"
    yield from (_row(row) for row in shown)
    yield "</tbody></table></main>"


def _row(row: Row) -> str:
    question = LEADING_MARKS.sub("", row["prompt"], count=1)
    where = f"record {row['record']}" + (f" · {row['id']}" if row["id"] else "")
    answer = f'<p class="said">{text(row["answer"])}</p>'
    if row["error"]:
        answer = f'<p class="error">{text(row["error"])}</p>'
    elif row["unfinished_thought"]:
        answer = '<p class="warning">no answer: the thought was not finished</p>'
    answer += _thought(row["thinking"])
    if row["ended"] == "length":
        answer += f'<p class="warning">ended by length, at {row["tokens"]:,} tokens</p>'
    scores = "".join(
        f"<div><dt>{text(name)}</dt><dd>{value:.3g}</dd></div>"
        for name, value in row.get("scores", {}).items()
    )
    cells = {
        "Images": "".join(_images(row)),
        "Question": f'<p>{text(question)}</p><p class="muted">{text(where)}</p>',
        "Reference": _references(row["references"]) or '<p class="muted">none</p>',
        "Answer": answer,
        "Scores": f"<dl>{scores}</dl>",
    }
    columns = "".join(f'<td data-head="{name}">{cell}</td>' for name, cell in cells.items())
    return f'<tr class="{" ".join(_classes(row))}">{columns}</tr>'


def _references(references: Sequence[str]) -> str:
    """Each once, with how often it is there."""
    entries = []
    for reference, count in Counter(references).items():
        thought, answer, _ = parse_reply(reference)
        times = f' <span class="muted">× {count}</span>' if count > 1 else ""
        entries.append(f"<p>{text(answer)}{times}</p>{_thought(thought)}")
    return "".join(entries)


def _thought(thought: str) -> str:
    if not thought:
        return ""
    return f"<details><summary>Thought</summary><p>{text(thought)}</p></details>"


def _images(row: Row) -> Iterator[str]:
    for path in row["images"][:THUMBNAILS]:
        try:
            with decode(open_image(path, "image"), path, "image").convert("RGB") as image:
                yield f'<img src="{_jpeg(image)}" alt="{text(path)}" title="{text(path)}">'
        except DataError:
            yield f'<span class="muted">{text(path)}</span>'
    more = len(row["images"]) - THUMBNAILS
    if more > 0:
        yield f'<span class="muted">and {more} more</span>'
    if row["video"]:
        yield f'<span class="muted">{text(row["video"])}</span>'


def _jpeg(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
