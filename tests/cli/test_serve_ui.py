"""`vlmtune serve-ui` in a real browser: what is asked, shown, stopped, and kept from elsewhere."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RAMBLE = ["--temperature", "1e6", "--top_k", "1000", "--seed", "40"]
"""Any token is as likely as any other: an answer of 959 tokens."""

ATTACK = "<script>hacked = 1</script><img src=x onerror='hacked = 1'> **b** $$x$$ &lt;"
THOUGHT = "The first shows 6, the second shows 5."
ANSWER = "The first, since 6 is larger than 5."
SENT = "Network.requestWillBeSent"


def wait_for(what: Callable[[], Any]) -> Any:
    """What is no longer false or failing."""
    stop = time.monotonic() + 60
    while True:
        try:
            if found := what():
                return found
        except Exception:  # the page is being redrawn
            if time.monotonic() > stop:
                raise
        assert time.monotonic() < stop, "waited in vain"
        time.sleep(0.02)


class Server:
    """The command, with what it says and uploads in a folder."""

    def __init__(self, folder: Path, *words: object):
        self.folder, self.said = folder, folder / "stderr"
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vlmtune.cli.main", "serve-ui", *map(str, words)],
                stderr=stderr,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            )

    @property
    def address(self) -> str:
        told = r"^http://\S+"
        wait_for(lambda: self.process.poll() or re.search(told, self.said.read_text(), re.M))
        found = re.search(told, self.said.read_text(), re.M)
        assert found, self.said.read_text()
        return found[0]


class Page:
    """The page in a real browser."""

    def __init__(self, chromium, address: str):
        self.chromium, self.address = chromium, address
        chromium.get(address)
        wait_for(lambda: self.all("textarea")[0].is_displayed())

    def all(self, css: str) -> list[Any]:
        return self.chromium.find_elements("css selector", css)

    @property
    def shown(self) -> str:
        """The text of the chat, as it is seen."""
        return "".join(log.text for log in self.all("[role=log]"))

    def set(self, label: str, value: object) -> None:
        (number,) = self.all(f"input[aria-label='{label}']")
        wait_for(lambda: number.clear() is None)
        number.send_keys(str(value), "\t")

    def ask(self, prompt: str, *files: Path) -> None:
        box = wait_for(lambda: self.all("textarea:enabled"))[0]
        if files:
            (upload,) = self.all("input[type=file]")
            self.chromium.execute_script("arguments[0].value = ''", upload)
            upload.send_keys("\n".join(map(str, files)))
            wait_for(lambda: len(self.all(".thumbnail-item img")) == len(files))
        box.send_keys(prompt)
        self.all("[aria-label=Submit]")[0].click()

    def answer(self, prompt: str, *files: Path) -> str:
        """What is seen behind the question once the answer is there."""
        before = len(self.all("[data-testid=user]"))
        self.ask(prompt, *files)
        wait_for(lambda: len(self.all("[data-testid=user]")) > before)
        wait_for(lambda: self.all("[aria-label=Submit]") and self.all("textarea:enabled"))
        return self.shown.rpartition(prompt)[2].strip()


@pytest.fixture(scope="module")
def server(fluent_ovis, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    words = ["--model", fluent_ovis, "--device", "cpu", "--port", 0, "--max_new_tokens", 2000]
    started = Server(folder, *words, *RAMBLE)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def page(server, chromium) -> Page:
    screen = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)
    return Page(chromium, server.address)


@pytest.fixture
def chat(page) -> Page:
    """The page, cleared, with the model as it was taught."""
    page.all("button.secondary")[0].click()
    wait_for(lambda: not page.shown)
    page.set("Temperature", 0)
    return page


def test_answer_can_be_stopped_and_is_forgotten(page):
    page.ask("Name a colour.")
    wait_for(lambda: len(page.shown) > 100)
    page.all("[aria-label=Stop]")[0].click()
    wait_for(lambda: page.shown.endswith("Stopped; this turn is not part of the chat."))
    page.set("Temperature", 0)
    assert page.answer("Name a colour.") == "Blue."


def test_images_are_asked_about_and_the_thought_is_folded(chat, fluent_ovis, faint_text):
    images = [fluent_ovis / f"images/digit_{number}.png" for number in ("0605", "0654")]
    chat.all("[data-testid=checkbox]")[0].click()
    seen = chat.answer("Which image shows the larger digit?", *images)
    assert re.sub(r"\s+", " ", seen) == f"Thinking {ANSWER}"
    chat.all("[role=log] [data-testid=bot] button")[0].click()
    wait_for(lambda: THOUGHT in chat.shown)
    widths = [image.get_property("naturalWidth") for image in chat.all("[role=log] img")]
    assert widths == [64, 64]
    assert faint_text(chat.chromium) == []
    chat.all("[data-testid=checkbox]")[0].click()


def test_turns_before_are_part_of_the_question(chat):
    assert chat.answer("Name a colour.") == "Blue."
    chat.all("[data-testid=checkbox]")[0].click()
    assert chat.answer("And another one?").endswith("Green.")
    chat.all("[data-testid=checkbox]")[0].click()
    assert chat.answer("Which was the first?") == "Blue was the first."


def test_nothing_in_a_text_is_read_as_html_or_markdown(chat):
    chat.answer(ATTACK)
    assert ATTACK in chat.shown
    assert chat.all("[role=log] script, [role=log] img, [role=log] b") == []
    assert chat.chromium.execute_script("return window.hacked") is None


def test_errors_are_shown_in_the_chat(chat, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    chat.set("Thinking budget", 2000)
    chat.answer("Which?")
    wait_for(lambda: "ConfigError: thinking_budget:\n  2000 leaves no token" in chat.shown)
    chat.set("Thinking budget", 0)
    chat.answer("What is it?", tmp_path / "broken.png")
    wait_for(lambda: "Error\nDataError: chat" in chat.shown)
    assert chat.answer("Name a colour.") == "Blue."


def test_another_page_has_a_chat_of_its_own(chat):
    chat.answer("Name a colour.")
    first = chat.chromium.current_window_handle
    chat.chromium.switch_to.new_window("tab")
    other = Page(chat.chromium, chat.address)
    assert other.shown == ""
    other.set("Temperature", 0)
    assert other.answer("Name a colour.") == "Blue."
    chat.chromium.close()
    chat.chromium.switch_to.window(first)
    assert chat.shown.count("Blue.") == 1


def test_page_asks_nobody_else_and_its_console_is_empty(page):
    events = [json.loads(e["message"])["message"] for e in page.chromium.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == SENT]
    assert len(asked) > 50
    assert [url for url in asked if not url.startswith((page.address, "data:", "blob:"))] == []
    assert page.chromium.get_log("browser") == []
    assert not any(button.is_displayed() for button in page.all("[aria-label=Share]"))


def test_policy_keeps_the_page_from_asking_elsewhere(page):
    elsewhere = page.address.replace("127.0.0.1", "localhost")
    refused = page.chromium.execute_async_script(
        "const [url, done] = arguments;"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.blockedURI));"
        "fetch(url).then(() => done('asked'), () => {});",
        elsewhere,
    )
    assert refused.startswith(elsewhere.rstrip("/"))


def test_signal_ends_the_command_and_nothing_stays_behind(page, server):
    page.set("Temperature", 1e6)
    page.ask("Name a colour.")
    wait_for(lambda: "Name a colour." in page.shown)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 128 + signal.SIGTERM
    assert server.said.read_text().endswith("; Ctrl-C ends it\nStopped.\n")
    assert os.listdir(server.folder) == ["stderr"]


def test_what_cannot_be_served_is_said_before_torch_is_imported(fluent_ovis):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["serve-ui", "--model", str(fluent_ovis), "--port"]
        port = str(taken.getsockname()[1])
        code = (
            "import sys, time\n"
            "from vlmtune.cli.main import main\n"
            f"codes = [main({words} + [port]) for port in ({port!r}, '65536')]\n"
            "sys.modules['gradio'] = None\n"
            f"codes += [main({words} + ['0'])]\n"
            "print(codes, 'torch' in sys.modules, time.process_time() < 0.3)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[1, 1, 1] False True\n"
    assert "another program serves there" in done.stderr
    assert "ports are numbers from 0 to 65535" in done.stderr
    assert "Gradio is missing.\n  Fix: pip install 'vlmtune[ui]'." in done.stderr
