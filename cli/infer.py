"""`vlmtune infer`: one question about images or a video, or a whole data file."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.load import COMMAND_LINE
from ..core.errors import ConfigError
from ..core.logging import note, say
from ..data.sources import resolve_sources
from ..inference.files import Summary, answer_file, check_output
from .answer_text import AnswerPrinter, how_it_ended, parts_so_far
from .inference_flags import (
    add_model_flags,
    add_sampling_flags,
    add_tools_flag,
    answer_settings,
    check_budget,
    check_model,
    load_inference,
    sampling_of,
    tools_of,
)

if TYPE_CHECKING:
    from ..inference import Reply, Stream
    from ..inference.media import ImageSource

OF_ONE = ("image", "video", "prompt", "system", "json")
OF_FILES = ("output", "image_folder", "datainfo", "batch_size", "limit")
BATCH_SIZE = 8


def main(argv: Sequence[str]) -> int:
    """Answer what the words after `infer` ask.

    Returns:
        0; 1 where a record of the data could not be answered.

    Raises:
        VLMTuneError: flags exclude each other, or model, data or media cannot be read.
        SystemExit: 0 after `--help`, 2 for an unknown flag or one without a proper value.
    """
    given = _parser().parse_args(argv)
    _check_flags(given)
    check_model(given)
    if given.data:
        return _answer_data(given)
    _answer_one(given)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmtune infer",
        usage="vlmtune infer --model M [--adapter A] [--image X ... | --video V] --prompt P "
        "[flags]\n       vlmtune infer --model M [--adapter A] --data FILE --output OUT.jsonl "
        "[flags]",
        description="Answer one question, with the thought before the answer on stdout, or the "
        "last question of each record of data files. The second can be stopped and started again, "
        "and run under torchrun.",
        epilog="Exit code: 0; 1 after an error, also of one record. More: docs/inference.md",
        allow_abbrev=False,
    )
    one = parser.add_argument_group("one question")
    one.add_argument(
        "--image",
        nargs="+",
        action="extend",
        metavar="X",
        help="files or URLs; <image> in the prompt says where each stands (default: before it)",
    )
    one.add_argument("--video", metavar="V", help="file")
    one.add_argument("--prompt", metavar="P", help="question")
    one.add_argument("--system", metavar="S", help="system prompt")
    one.add_argument(
        "--json",
        action="store_true",
        default=None,
        help="print one object, with thinking, answer, boxes in pixels, tokens and seconds",
    )
    many = parser.add_argument_group("data files")
    many.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="JSON, JSON lines, parquet, datasets folder, Hub dataset, or a set of --datainfo; "
        "without --thinking and --no_thinking the model thinks where the record's answer does",
    )
    many.add_argument(
        "--output", type=Path, metavar="OUT", help="JSON lines, one for each record, in order"
    )
    many.add_argument("--image_folder", metavar="D", help="what relative media paths start from")
    many.add_argument("--datainfo", metavar="F", help="file that names sets")
    many.add_argument(
        "--batch_size",
        type=_count,
        metavar="N",
        help=f"records answered together (default: {BATCH_SIZE})",
    )
    many.add_argument("--limit", type=_count, metavar="N", help="only the first N records")
    add_tools_flag(parser)
    add_model_flags(parser)
    add_sampling_flags(parser)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'"{text}" is not a number above 0')
    return int(text)


def _check_flags(given: argparse.Namespace) -> None:
    """Raises ConfigError for flags that contradict each other or have no effect."""
    told = [key for key in (*OF_ONE, *OF_FILES) if getattr(given, key) is not None]
    useless = [key for key in told if key in (OF_ONE if given.data else OF_FILES)]
    if useless:
        kind = "with --data" if given.data else "without --data"
        raise _refused(useless[0], f"has no effect {kind}", "leave one of them out")
    if given.data:
        if given.output is None:
            raise _refused("output", "is not given", "name the file to write, OUT.jsonl")
        if given.image_folder and not Path(given.image_folder).expanduser().is_dir():
            what = f"there is no folder {given.image_folder}"
            raise _refused("image_folder", what, "check the path")
    elif not given.prompt:
        raise _refused("prompt", "is not given", "give a question, or --data and --output")
    elif given.image and given.video:
        raise _refused("video", "cannot be given with --image", "keep one of them")
    elif given.thinking_budget and not given.thinking:
        raise _refused("thinking_budget", "has no effect without --thinking", "give both")
    check_budget(given)


def _refused(flag: str, what: str, fix: str) -> ConfigError:
    return ConfigError(f"{COMMAND_LINE}, {flag}", what, fix)


def _answer_data(given: argparse.Namespace) -> int:
    """Answer the records, and say what came of it."""
    sampling = sampling_of(given)
    sources = resolve_sources(given.data, given.image_folder, given.datainfo)
    settings = answer_settings(given, sources)
    settings |= {"tools": given.tools, "limit": given.limit}
    finished = check_output(sources, given.output, settings, given.limit)
    if finished:
        say(f"{given.output} is there already, made with these settings")
        return _told(finished)
    inference = load_inference(given)
    return _told(
        answer_file(
            inference,
            sources,
            given.output,
            sampling=sampling,
            enable_thinking=given.thinking,
            batch_size=given.batch_size or BATCH_SIZE,
            limit=given.limit,
            tools=tools_of(given),
            settings=settings,
        )
    )


def _told(summary: Summary) -> int:
    records, errors = summary.records, summary.errors
    say(f"{summary.output}: {records:,} record{'' if records == 1 else 's'}")
    if errors:
        say(f"{errors:,} could not be answered, the first: {summary.first_error}")
    return 1 if errors else 0


def _answer_one(given: argparse.Namespace) -> None:
    """Print the answer to one question, on a terminal while it is written."""
    sampling = sampling_of(given)
    images = _checked_images(given)
    inference = load_inference(given)
    from ..inference import ask_about  # imported late, as torch is

    settings: Any = {"enable_thinking": bool(given.thinking), "tools": tools_of(given)}
    if given.json and len(images) == 1:
        started = time.monotonic()
        found = inference.grounding_inference(
            images[0], given.prompt, system=given.system, **settings, **asdict(sampling)
        )
        for fault in found.faults:
            note(f"{fault.where}: {fault.what}")
        _print_json(found.reply, started, {"boxes": found.boxes, "points": found.points})
        return
    request = ask_about(given.prompt, images, given.video, system=given.system)
    if given.json:
        started = time.monotonic()
        _print_json(inference.respond(request, sampling, **settings), started)
        return
    cut = how_it_ended(_print(inference.stream(request, sampling, **settings)), sampling)
    if cut:
        note(cut)


def _checked_images(given: argparse.Namespace) -> "list[ImageSource]":
    """The images, downloaded where that is needed.

    Raises:
        DataError: one of them, or the video, cannot be read.
    """
    from ..data.image_checks import inspect_video
    from ..inference.media import fetched, open_picture

    if given.video:
        _, faults = inspect_video(given.video, f"{COMMAND_LINE}, video")
        for fault in faults:
            raise fault
    images = []
    for source in given.image or ():
        images.append(fetched(source, f"{COMMAND_LINE}, image"))
        open_picture(images[-1], f"{COMMAND_LINE}, image")
    return images


def _print_json(reply: "Reply", started: float, places: dict[str, Any] | None = None) -> None:
    seconds = round(time.monotonic() - started, 3)
    print(json.dumps({**reply.to_dict(), **(places or {}), "seconds": seconds}))


def _print(stream: "Stream") -> "Reply":
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    from .preview_text import in_colour  # imported late, as torch is

    printer, text = AnswerPrinter(sys.stdout, in_colour()), ""
    try:
        for piece in stream:
            text += piece
            printer.show(*parts_so_far(text))
        printer.show(stream.reply.thinking, stream.reply.answer)
    finally:
        stream.close()
        if text:
            printer.end()
    return stream.reply
