"""`vlmtune chat`: talk to a model in the terminal."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from io import TextIOWrapper
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, DataError, VLMTuneError
from ..core.logging import note, say
from ..core.signals import Terminated
from .answer_text import AnswerPrinter, how_it_ended, parts_so_far
from .inference_flags import (
    add_model_flags,
    add_sampling_flags,
    add_tools_flag,
    check_model,
    load_inference,
    sampling_of,
    tools_of,
)

if TYPE_CHECKING:
    from ..inference import Sampling, VLMInference
    from ..inference.media import ImageSource
    from ..inference.tools import Tool

COMMANDS = {
    "image": ("[PATH ...]", "attach images to the next question, files or URLs; alone: detach"),
    "video": ("[PATH]", "attach a video to it; alone: detach"),
    "think": ("on|off", "let the model think before it answers"),
    "budget": ("N|off", "end a thought after N tokens"),
    "system": ("[TEXT]", "start over, with this system prompt"),
    "clear": ("", "start over"),
    "help": ("", "show this"),
    "exit": ("", "leave, as Ctrl-D does"),
}
HELP = "\n".join(
    [
        *(f"/{name} {words}".ljust(19) + what for name, (words, what) in COMMANDS.items()),
        "Ctrl-C stops an answer. Quote a path with spaces. A line that ends in \\ goes on in the",
        "next one, and one that begins with a space is no command.",
    ]
)


def main(argv: Sequence[str]) -> int:
    """Talk until the input ends.

    Returns:
        0; 1 where a line that did not come from a terminal failed.

    Raises:
        VLMTuneError: the model or the first images cannot be loaded, or the flags are wrong.
        SystemExit: 0 after `--help`, 2 for an unknown flag or one without a proper value.
    """
    given = _parser().parse_args(argv)
    check_model(given)
    sampling = sampling_of(given)
    images = [_readable(path) for path in given.image]
    inference = load_inference(given)
    tools = tools_of(given)
    say(f"{' + '.join([given.model, *given.adapter])}: /help lists the commands, Ctrl-D leaves")
    return TerminalChat(inference, sampling, bool(given.thinking), tools, images).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmtune chat",
        usage="vlmtune chat --model M [--adapter A] [--image X ...] [flags]",
        description="Talk to a model in the terminal: answers appear while they are written, a\n"
        "thought dimmed. Questions are read line by line, from a pipe too.",
        epilog="In the chat:\n\n" + HELP + "\n\nMore: docs/inference.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="X",
        help="files or URLs for the first question",
    )
    add_tools_flag(parser)
    return parser


class TerminalChat:
    """A chat, what is attached to its next question, and how that is answered."""

    def __init__(
        self,
        inference: "VLMInference",
        sampling: "Sampling",
        thinking: bool = False,
        tools: "Sequence[Tool]" = (),
        images: "Sequence[ImageSource]" = (),
    ):
        self.inference, self.sampling = inference, sampling
        self.thinking, self.tools = thinking, tools
        self.chat = inference.chat()
        self.images = list(images)
        self.video: str | None = None

    def run(self) -> int:
        """Answer the lines of the input; the exit code is that of `main`."""
        from .preview_text import in_colour

        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")
        colour, typed, failed = in_colour(), sys.stdin.isatty(), False
        if typed:
            with suppress(ImportError):
                import readline  # noqa: F401 (gives input() a history)
        while True:
            try:
                line = _line("> " if typed else "")
            except EOFError:
                if typed:
                    say()
                break
            if line.strip() == "/exit":
                break
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line.strip():
                    self.ask(line, AnswerPrinter(sys.stdout, colour))
            except Terminated:
                raise
            except KeyboardInterrupt:
                say("Stopped; the question is not part of the chat.")
            except VLMTuneError as error:
                failed = True
                say(f"{type(error).__name__}: {error}")
        return int(failed and not typed)

    def ask(self, prompt: str, printer: AnswerPrinter) -> None:
        """Print the answer. What is attached stays so until there is one.

        Raises:
            DataError, ModelError: as `Chat.stream`.
        """
        stream = self.chat.stream(
            prompt,
            self.images,
            self.video,
            enable_thinking=self.thinking,
            tools=self.tools,
            **asdict(self.sampling),
        )
        text = ""
        try:
            for piece in stream:
                text += piece
                printer.show(*parts_so_far(text))
            reply = stream.reply
        except BaseException:
            if text:
                printer.end()
            raise
        finally:
            stream.close()
        printer.show(reply.thinking, reply.answer)
        printer.end()
        self.images, self.video = [], None
        if cut := how_it_ended(reply, self.sampling):
            note(cut)

    def command(self, line: str) -> None:
        """Raises VLMTuneError for what cannot be followed, and nothing has changed then."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        match name:
            case "image":
                more = [_readable(path) for path in _paths(rest)]
                self.images = [*self.images, *more] if more else []
                say(f"attached: {len(self.images)} image{'' if len(self.images) == 1 else 's'}")
            case "video" if len(paths := _paths(rest)) < 2:
                video = paths[0] if paths else None
                if video is not None and not os.path.isfile(video):
                    raise DataError(video, "there is no such file", "give the path of a video")
                self.video = video
                say(f"attached: {video or 'no video'}")
            case "think" if rest in ("on", "off"):
                self.thinking = rest == "on"
                say(f"thinking: {rest}")
            case "budget" if rest == "off" or rest.isdecimal():
                budget = None if rest == "off" else int(rest)
                self.sampling = replace(self.sampling, thinking_budget=budget)
                say(f"thinking budget: {rest}")
            case "system":
                self.chat = self.inference.chat(rest or None)
                say("a new chat" + (" with this system prompt" if rest else ""))
            case "clear" if not rest:
                self.chat.clear()
                self.images, self.video = [], None
                say("a new chat, nothing attached")
            case "help" if not rest:
                say(HELP)
            case _:
                raise _refused(name)


def _line(prompt: str) -> str:
    """The next line of the input, with those that it goes on in."""
    line = input(prompt)
    with suppress(EOFError):
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input("… " if prompt else "")
    return line


def _paths(words: str) -> list[str]:
    """As a shell reads them."""
    try:
        return [os.path.expanduser(word) for word in shlex.split(words)]
    except ValueError as error:
        raise ConfigError(words, str(error), "close the quotes") from None


def _readable(path: str) -> "ImageSource":
    """The image, or the path of it; raises DataError where there is none in it."""
    from ..inference.media import fetched, open_picture

    source = fetched(path, "image")
    open_picture(source, "image")
    return source


def _refused(name: str) -> ConfigError:
    """Why a command cannot be followed."""
    if name in COMMANDS:
        form = f"/{name} {COMMANDS[name][0]}".rstrip()
        return ConfigError(f"/{name}", "is not used like this", f"write {form}")
    near = get_close_matches(name, COMMANDS, n=1)
    fix = f"write /{near[0]}" if near else "see /help; a question may begin with a space"
    return ConfigError(f"/{name}", "there is no such command", fix)
