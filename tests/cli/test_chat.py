"""`vlmtune chat`: in a real terminal, from a pipe, and what it prints while an answer grows."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from select import select

import pytest

from vlmtune.cli.answer_text import AnswerPrinter, parts_so_far
from vlmtune.cli.main import main
from vlmtune.inference import Reply

PROMPT = "\n> "
DIM = re.compile(r"\x1b\[2m(.*?)\x1b\[0m", re.DOTALL)
RAMBLE = ["--temperature", "1e6", "--top_k", "1000", "--seed", "40"]
"""Any token is as likely as any other: an answer of 959 tokens."""


class Terminal:
    """`vlmtune chat` in a terminal of its own."""

    def __init__(self, *words: object, **environment: str):
        self.screen, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 1000, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlmtune.cli.main", "chat", *map(str, words)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
            | {"TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
        )
        os.close(follower)

    def until(self, end: str) -> str:
        """What appears up to there."""
        seen, stop = b"", time.monotonic() + 60
        while not seen.endswith(end.encode()):
            assert select([self.screen], [], [], stop - time.monotonic())[0], seen.decode()
            seen += os.read(self.screen, 1)
        return seen.decode().removesuffix(end)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def answer(self, line: str) -> str:
        """What is printed for a line, without the line itself."""
        self.type(line + "\r")
        seen = self.until(PROMPT).replace("\r", "") + "\n"
        return seen.removeprefix(line + "\n")

    def end(self) -> int:
        self.process.wait(30)
        os.close(self.screen)
        return self.process.returncode


@pytest.fixture(scope="module")
def terminals(fluent_ovis) -> Iterator[tuple[Terminal, Terminal]]:
    """One in colour that answers as it was taught, and one without that rambles; both are started
    at once, since imports take seconds."""
    both = Terminal("--model", fluent_ovis), Terminal("--model", fluent_ovis, *RAMBLE, NO_COLOR="1")
    yield both
    for terminal in both:
        terminal.process.kill()
        terminal.process.wait()


@pytest.fixture(scope="module")
def terminal(terminals) -> Terminal:
    terminals[0].until(PROMPT)
    return terminals[0]


THOUGHT = "The first shows 6, the second shows 5."
ANSWER = "The first, since 6 is larger than 5."


def test_answer_is_streamed_with_its_thought_dimmed(terminal, fluent_ovis):
    images = fluent_ovis / "images"
    assert terminal.answer("/think on") == "thinking: on\n"
    assert terminal.answer(f"/image {images}/digit_0605.png") == "attached: 1 image\n"
    assert terminal.answer(f"/image '{images}/digit_0654.png'") == "attached: 2 images\n"
    printed = terminal.answer("Which image shows the larger digit?")
    thought = DIM.findall(printed)
    assert "".join(thought) == THOUGHT
    assert len(thought) > 5
    assert DIM.sub("", printed) == f"\n\n{ANSWER}\n"
    assert terminal.answer("/think off") == "thinking: off\n"
    assert terminal.answer("/clear") == "a new chat, nothing attached\n"


def test_turns_before_are_part_of_the_question(terminal):
    assert terminal.answer("Name a colour.") == "Blue.\n"
    terminal.answer("/think on")
    assert terminal.answer("And another one?").endswith("\n\nGreen.\n")
    terminal.answer("/think off")
    assert terminal.answer("Which was the first?") == "Blue was the first.\n"
    assert terminal.answer("/system Be kind.") == "a new chat with this system prompt\n"
    assert terminal.answer("Say hello.") == "Grüße, 你好 👋!\n"


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(terminal, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    terminal.answer("/clear")
    for line, told in [
        ("/imgae x.png", "ConfigError: /imgae:\n  there is no such command.\n  Fix: write /image."),
        (
            "/budget few",
            "ConfigError: /budget:\n  is not used like this.\n  Fix: write /budget N|off.",
        ),
        ("/budget 1024", "ConfigError: thinking_budget:\n  1024 leaves no token"),
        (f"/image {tmp_path}/gone.png", "DataError: image:\n  "),
        (f"/image {tmp_path}/text.png", "DataError: image:\n  "),
        ("/image 'x.png", "ConfigError: 'x.png:\n  No closing quotation."),
        (
            f"/video {tmp_path}/gone.mp4",
            f"DataError: {tmp_path}/gone.mp4:\n  there is no such file.",
        ),
    ]:
        assert terminal.answer(line).startswith(told)
    told = terminal.answer("/help")
    for command in ("/budget N|off", "/image [PATH ...]", "/video [PATH]"):
        assert f"\n{command}  " in f"\n{told}"
    terminal.answer("/system")
    assert terminal.answer("Name a colour.") == "Blue.\n"


def test_what_is_attached_is_taken_back_by_its_command_alone(terminal, fluent_ovis, tmp_path):
    video, image = tmp_path / "clip.mp4", f"/image {fluent_ovis}/images/digit_0675.png"
    video.touch()
    terminal.answer("/clear")
    assert terminal.answer(image) == "attached: 1 image\n"
    assert terminal.answer(f"/video {video}") == f"attached: {video}\n"
    assert terminal.answer("Which digit is this?").startswith("DataError: ")
    assert terminal.answer("/video") == "attached: no video\n"
    assert terminal.answer("Which digit is this?") == "It is a four.\n"
    terminal.answer("/clear")
    terminal.answer(image)
    assert terminal.answer("/image") == "attached: 0 images\n"
    assert terminal.answer("Name a colour.") == "Blue.\n"


def test_line_is_brought_back_by_the_arrow_and_goes_on_behind_a_backslash(terminal):
    terminal.answer("/clear")
    assert terminal.answer("Name a colour.") == "Blue.\n"
    terminal.answer("/clear")
    terminal.type("\x1b[A\x1b[A\r")
    assert terminal.until(PROMPT).endswith("Name a colour.\r\nBlue.\r")
    terminal.type("Name \\\r")
    terminal.until("… ")
    terminal.type("it.\r")
    assert "ConfigError" not in terminal.until(PROMPT)


def test_interrupt_stops_the_answer_and_keeps_the_chat(terminals):
    rambling = terminals[1]
    rambling.until(PROMPT)
    rambling.type("Name a colour.\r")
    rambling.until("Name a colour.\r\n")
    written = os.read(rambling.screen, 1).decode()
    rambling.type("\x03")
    written += rambling.until(PROMPT)
    assert written.endswith("\nStopped; the question is not part of the chat.\r")
    assert rambling.answer("/think on") == "thinking: on\n"


def test_end_of_input_and_interrupt_at_the_prompt_leave(terminal, terminals):
    terminal.type("\x04")
    terminals[1].type("\x03")
    terminals[1].until("Stopped.\r\n")
    assert (terminal.end(), terminals[1].end()) == (0, 128 + signal.SIGINT)


@pytest.fixture
def piped(fluent_ovis, monkeypatch, capsys):
    """`piped(lines, word, ...)` is exit code, stdout and stderr of a chat fed from a pipe."""

    def run(lines: bytes, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
        code = main(["chat", "--model", str(fluent_ovis), "--device", "cpu", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_lines_of_a_pipe_are_answered_one_after_another(piped, fluent_ovis):
    images = [fluent_ovis / f"images/digit_{number}.png" for number in ("0605", "0654")]
    lines = b"Which image shows the larger digit?\n/think off\n\nWhat \\\nis it, \xff\\\n"
    code, out, told = piped(lines, "--image", *images, "--thinking", "--max_new_tokens", 200)
    assert code == 0
    assert out.startswith(f"thinking:\n{THOUGHT}\n\nanswer:\n{ANSWER}\n")
    assert told.splitlines()[-1] == "thinking: off"


def test_tool_is_called_and_its_crop_is_answered_about(piped, fluent_ovis):
    image = fluent_ovis / "images/digit_0675.png"
    code, out, _ = piped(b"Look closely. Which digit is this?", "--image", image, "--tools", "crop")
    call = "<tool_call>Crop [250, 125, 750, 875]</tool_call><tool_response><image></tool_response>"
    assert (code, out) == (0, f"I look.\n{call}\nSeen closely, it is a four.\n")


def test_failed_line_of_a_pipe_shows_in_the_exit_code(piped):
    code, out, told = piped(b"/image gone.png\nName a colour.\n/exit\nName a colour.\n")
    assert (code, out) == (1, "Blue.\n")
    assert "DataError: image:\n  gone.png does not exist" in told


def test_answer_that_is_cut_off_says_so(piped):
    code, out, told = piped(b"Name a colour.\n", "--max_new_tokens", "1")
    assert (code, "Blue.".startswith(out.strip())) == (0, True)
    assert told.endswith("note: the answer was cut off at 1 new tokens\n")


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nIs 3 < 5? </b>\n</think>\n\nYes, <b>3 < 5</b>.",
        "No thought, <thin or </thin, and <",
        "<think>\nIt never ends",
    ],
)
def test_what_is_shown_of_an_answer_only_grows(text):
    whole = Reply.of(text, [], "stop")
    shown = [parts_so_far(text[:end]) for end in range(len(text) + 1)]
    for thinking, answer in shown:
        assert whole.thinking.startswith(thinking)
        assert whole.answer.startswith(answer)
        assert not thinking or not answer or thinking == whole.thinking
    assert len(set(shown)) > len(text) / 3


@pytest.mark.parametrize(
    ("colour", "expected"),
    [(True, "\x1b[2mA\x1b[0m\x1b[2mB\x1b[0m\n\nC\n"), (False, "thinking:\nAB\n\nanswer:\nC\n")],
)
def test_parts_of_an_answer_are_told_apart(colour, expected):
    out = io.StringIO()
    printer = AnswerPrinter(out, colour)
    for parts in (("", ""), ("A", ""), ("AB", ""), ("AB", "C")):
        printer.show(*parts)
    printer.end()
    assert out.getvalue() == expected


def test_text_that_turns_out_to_be_a_thought_is_not_repeated():
    out = io.StringIO()
    printer = AnswerPrinter(out, True)
    for text in ("Hm", "Hm.\n</think>", "Hm.\n</think>\n\nYes."):
        printer.show(*parts_so_far(text))
    assert out.getvalue() == "Hm\x1b[2m.\x1b[0m\n\nYes."


def test_text_cannot_move_the_cursor_or_turn_its_direction():
    out = io.StringIO()
    AnswerPrinter(out, True).show("\x1b[2J", "a\rb\x1b]0;title\x07\x9b1A\u202ec\td\n")
    assert out.getvalue() == "\x1b[2m␛[2J\x1b[0m\n\na␍b␛]0;title␇\ufffd1A\ufffdc\td\n"
