"""Self-contained HTML pages: one file without scripts, styles or pictures from elsewhere."""

import os
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path

from .. import __version__
from ..core.errors import ConfigError

ASSETS = Path(__file__).parent / "assets"

# Control characters as their pictures, except tab and newline: HTML would drop or change them.
# What turns the direction of the text around it, or has no picture, as a replacement character.
VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {
        code: 0xFFFD
        for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    }
    | {0x7F: 0x2421}
)


def text(value: object) -> str:
    """What is shown of a value, also between quotes: nothing in it is read as HTML."""
    return escape(str(value).translate(VISIBLE))


def document(title: str, body: str, name: str) -> str:
    """The page of `assets/NAME.css` and, where there is one, `assets/NAME.js`.

    Its content security policy lets only these two run and asks for nothing over the network, so
    that what stands in data stays text.

    Args:
        title: Unescaped.
        body: HTML.
    """
    style = "".join((ASSETS / f"{n}.css").read_text("utf-8") for n in ("page", name))
    script_file = ASSETS / f"{name}.js"
    script = script_file.read_text("utf-8") if script_file.exists() else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; "
        f"script-src {_source(script)}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="vlmtune {__version__}">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Heads as text, with a "#" before those of numbers; cells as HTML."""
    css = [' class="number"' if head.startswith("#") else "" for head in heads]
    names = [text(head.removeprefix("#")) for head in heads]
    top = "".join(f"<th{c}>{name}</th>" for c, name in zip(css, names, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{c}>{cell}</td>' for c, cell in zip(css, row, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(entries: Mapping[str, str]) -> str:
    """Figures as HTML with what they are as text."""
    pairs = "".join(f"<div><dt>{text(k)}</dt><dd>{v}</dd></div>" for k, v in entries.items())
    return f'<dl class="facts">{pairs}</dl>'


def remark(css: str, head: str, what: str, fix: str) -> str:
    """An entry of a list of problems.

    Args:
        css: Its class, "error" or "warning".
        head: What it is about, as HTML; the others are text.
    """
    what, fix = (s if s.endswith((".", "?")) else f"{s}." for s in (what, fix))
    return f'<li class="{css}">{head}<p>{text(what)}</p><p><b>Fix:</b> {text(fix)}</p></li>'


def percent(part: float, whole: float = 1) -> str:
    return f"{part / whole:.1%}" if whole else "0%"


def check_target(path: Path) -> None:
    """See that a page can be written there, before the work for it.

    Raises:
        ConfigError: the file exists, or its folder does not.
    """
    if path.exists():
        raise ConfigError(f"--html {path}", "exists already", "give another name, or move it")
    if not path.absolute().parent.is_dir():
        what = f"there is no folder {path.parent}"
        raise ConfigError(f"--html {path}", what, "make it first")


def write(path: Path, page: str) -> None:
    """Write a page whole or not at all.

    Raises:
        ConfigError: it cannot be written, or exists.
    """
    check_target(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        # A lone surrogate, which JSON can hold and UTF-8 cannot, is U+FFFD in the browser.
        partial.write_text(page, "utf-8", errors="xmlcharrefreplace")
        partial.rename(path)
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise ConfigError(f"--html {path}", what, "check the folder and its free space") from None
    finally:
        partial.unlink(missing_ok=True)


def _source(code: str) -> str:
    return f"'sha256-{b64encode(sha256(code.encode()).digest()).decode()}'" if code else "'none'"
