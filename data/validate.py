"""`python -m vlmtune.data.validate DATA ...`, and what `vlmtune validate` shares with it."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..configs.schema import DataConfig
from ..core.distributed import usable_cores
from ..core.errors import ConfigError, VLMTuneError
from ..core.signals import handling, interrupted, terminate
from .findings import CODES, Finding
from .record_inspection import CheckSample
from .sources import resolve_sources
from .validation_run import Summary, counted, validate

SHOWN = 400
"""Characters of a finding's line on the terminal; the report has all of them."""


def arguments(prog: str) -> argparse.ArgumentParser:
    """The flags of both commands."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Check every record, image and video of data files, and tell what to do.",
        epilog="Exit code: 0 no error, 1 errors found, 2 could not check. More: docs/check.md",
        allow_abbrev=False,
    )
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="data files, as in data_path; a folder at the end is the image folder",
    )
    parser.add_argument("--image_folder", metavar="D", help="what relative media paths start from")
    parser.add_argument("--config", metavar="C", help="config of a run: also check lengths by it")
    parser.add_argument(
        "--eval_data_path",
        metavar="F",
        action="append",
        help="data that is evaluated on, which no sample of DATA should be in; again for several",
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode images and videos to their end"
    )
    parser.add_argument(
        "--fix", type=Path, metavar="OUT", help="write a copy with what has one sure fix mended"
    )
    parser.add_argument(
        "--quarantine",
        type=Path,
        metavar="OUT",
        help="write the records that have errors there, and not into the copy",
    )
    parser.add_argument("--report", type=Path, metavar="OUT.json", help="write every finding")
    parser.add_argument(
        "--jobs", type=_jobs, default=usable_cores(), metavar="N", help="processes (default: cores)"
    )
    return parser


def _jobs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("python -m vlmtune.data.validate")
    given = parser.parse_args(argv)
    if given.config:
        parser.error("--config needs the whole package: vlmtune validate --config C")
    return exit_code(lambda: run(given))


def exit_code(check: Callable[[], Summary]) -> int:
    """Print what was found, or why nothing could be.

    Returns:
        0 without errors, 1 with errors, 2 if it could not be checked, 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    try:
        with handling(terminate, (signal.SIGTERM,)):
            summary = check()
    except VLMTuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("Stopped; nothing was written.", file=sys.stderr)
        return interrupted(stop)
    try:
        print(text_of(summary), flush=True)
    except BrokenPipeError:  # as under `| head`; the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"stdout: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 1 if summary.number_of("error") else 0


def run(
    given: argparse.Namespace,
    config: DataConfig | None = None,
    check_sample: CheckSample | None = None,
) -> Summary:
    """Check what the flags name, and of `config` what they do not.

    Raises:
        ConfigError, DataError: it cannot be checked.
    """
    config = config or DataConfig([])
    data, folder = list(given.data), given.image_folder
    if len(data) > 1 and _is_image_folder(data[-1]):
        if folder:
            what = f"{data[-1]} and --image_folder {folder} are both folders of images"
            raise ConfigError("DATA", what, "give one of them")
        folder = data.pop()
    folder = folder and os.path.expanduser(folder)
    if folder and not os.path.isdir(folder):
        raise ConfigError(f"image_folder {folder}", "there is no such folder", "check the path")
    folder = folder or config.image_folder
    sources = resolve_sources(data or config.data_path, folder, config.datainfo)
    if not sources:
        raise ConfigError("DATA", "there is nothing to check", "name a data file, or --config")
    held_out = given.eval_data_path or [p for paths in config.eval_sets.values() for p in paths]
    evaluation = resolve_sources(held_out, folder, config.datainfo)
    return validate(
        sources,
        evaluation,
        decode=given.decode,
        jobs=given.jobs,
        check_sample=check_sample,
        fix=given.fix,
        quarantine=given.quarantine,
        report=given.report,
    )


def _is_image_folder(path: str) -> bool:
    files = ("dataset_info.json", "dataset_dict.json")
    return os.path.isdir(path) and not any(os.path.exists(f"{path}/{file}") for file in files)


def text_of(summary: Summary) -> str:
    """The first findings of each code, a table by code, and what was checked."""
    codes = [code for code in CODES if code in summary.counts]
    codes.sort(key=lambda code: CODES[code].severity)  # "error" before "warning"
    lines = []
    for code in codes:
        examples = summary.examples[code]
        lines += [line for finding in examples for line in _lines(finding)]
        if more := summary.counts[code] - len(examples):
            lines.append(f"... and {more:,} more [{code}]")
        lines.append("")
    if codes:
        width = max(map(len, codes))
        lines.append(f"{'code':{width}}  severity    found  --fix mends  meaning")
    for code in codes:
        count, mends = summary.counts[code], summary.mendable[code]
        kind = CODES[code]
        lines.append(
            f"{code:{width}}  {kind.severity:8} {count:>8,} {mends or '-':>12}  {kind.meaning}"
        )
    found = ", ".join(
        counted(number, severity)
        for severity in ("error", "warning")
        if (number := summary.number_of(severity))
    )
    checked = f"{counted(summary.records, 'record')} of {counted(len(summary.files), 'file')}"
    lines.append(f"{checked}, {summary.seconds:.1f} s: {found or 'nothing found'}")
    return "\n".join(map(_printable, lines + summary.notes))


def _lines(finding: Finding) -> list[str]:
    place = finding.file
    if finding.record is not None:
        place += f', record {finding.record} (id "{finding.id}")'
    if finding.field:
        place += f", {finding.field}"
    found = [f"{place}: [{finding.code}]", f"  {finding.what}", f"  Fix: {finding.fix}"]
    return [line if len(line) <= SHOWN else f"{line[:SHOWN]}..." for line in found]


def _printable(text: str) -> str:
    """A line without what would end it, steer the terminal or cannot be written to it."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding if sys.stdout else "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    sys.exit(main())
