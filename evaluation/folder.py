"""The folder of an evaluation: `predictions.jsonl`, each record's answer with its scores,
`losses.jsonl`, `metrics.json`, the result, and `report.html`. Without torch."""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from ..data.sources import Source
from ..inference.files import check_output
from ..inference.parts import Parts
from ..inference.sampling import Sampling

PREDICTIONS, LOSSES, RESULT = "predictions.jsonl", "losses.jsonl", "metrics.json"
PAGE = "report.html"


def check_folder(
    output: Path, sources: Sequence[Source], settings: dict[str, Any], limit: int | None
) -> None:
    """See that an output folder is new, or holds the same evaluation, finished or begun.

    Raises:
        ConfigError: it is no folder, or holds something else.
        DataError: a source is missing or broken.
    """
    where = f"output {output}"
    if output.exists() and not output.is_dir():
        raise ConfigError(where, "is a file", "name a folder")
    if not output.exists():
        return
    check_output(sources, output / PREDICTIONS, settings, limit)
    Parts(output / LOSSES, loss_settings(settings)).is_complete()
    then, now = read_result(output).get("settings"), json.loads(json.dumps(settings))
    if then is not None and then != now:
        changed = [key for key in then | now if then.get(key) != now.get(key)]
        raise ConfigError(
            where,
            f"holds an evaluation with other settings: {', '.join(changed)}",
            "give those settings or another output",
        )
    foreign = [name for name in (RESULT, PAGE) if then is None and (output / name).exists()]
    if foreign:
        raise ConfigError(where, f"holds a {foreign[0]} of something else", "give another output")


def make_folder(output: Path) -> None:
    """Raises ConfigError where it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what, fix = f"cannot be made: {error.strerror}", "give --output with another folder"
        raise ConfigError(f"output {output}", what, fix) from None


def loss_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a loss depends on."""
    of_answers = {"thinking", *(f.name for f in fields(Sampling))}
    return {key: value for key, value in settings.items() if key not in of_answers}


def read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def read_result(output: Path) -> dict[str, Any]:
    """What an earlier evaluation found; empty without one."""
    try:
        return json.loads((output / RESULT).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def write(file: Path, text: str) -> None:
    """Raises DataError where it cannot be written."""
    partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
    try:
        partial.write_text(text, "utf-8", errors="backslashreplace")
        partial.rename(file)
    except OSError as error:
        fix = "check the folder and its free space"
        raise DataError(str(file), f"cannot be written: {error.strerror}", fix) from None
    finally:
        partial.unlink(missing_ok=True)
