"""The page of `vlmtune serve-ui`: a chat of each browser session with one model."""

import mimetypes
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.themes import Default
from gradio.utils import get_upload_folder

from ..core.errors import ConfigError, VLMTuneError
from ..inference import Chat, Sampling, Stream, VLMInference
from .answer_text import how_it_ended, parts_so_far
from .page import text

if TYPE_CHECKING:
    from ..inference.tools import Tool

PAUSE = 0.05
"""Seconds between two states of an answer on the page."""

THEME = Default(font=("system-ui", "sans-serif")).set(
    block_info_text_color="*neutral_600", input_placeholder_color="*neutral_500"
)
CSS = """
.message .md { white-space: pre-wrap; }
.message-buttons { display: none !important; }
"""
"""Gradio always puts a button there that uploads what was shared elsewhere."""

Message = dict[str, Any]
"""As `gr.Chatbot` takes it. Also without Markdown it reads text as HTML: all of it is escaped."""


@dataclass
class Question:
    prompt: str
    images: list[str]
    videos: list[str]


@dataclass
class Session:
    """The chat of one browser page.

    Attributes:
        shown: All messages on the page, those of failed and stopped turns too.
        asked: The question that is waiting for its answer, or being answered.
    """

    chat: Chat
    shown: list[Message] = field(default_factory=list)
    asked: Question | None = None


class Page:
    """What happens on the page. One answer is generated at a time, in the order of the questions
    of all sessions."""

    def __init__(
        self,
        inference: VLMInference,
        sampling: Sampling,
        thinking: bool = False,
        tools: "Sequence[Tool]" = (),
    ):
        self.inference, self.sampling = inference, sampling
        self.thinking, self.tools = thinking, tools
        self.stream: Stream | None = None

    def close(self) -> None:
        """End generation; a thread in the middle of it would not survive the interpreter's end."""
        if self.stream:
            self.stream.close()

    def blocks(self, title: str) -> gr.Blocks:
        """The page itself, with settings that begin as they were given."""
        given = self.sampling
        name = f"{title} · vlmtune"
        with gr.Blocks(title=name, analytics_enabled=False, fill_height=True) as page:
            session = gr.State(None)
            with gr.Sidebar(position="right"):
                thinking = gr.Checkbox(self.thinking, label="Thinking")
                budget = gr.Number(
                    given.thinking_budget or 0,
                    label="Thinking budget",
                    info="Tokens after which a thought is ended; 0: no limit",
                    precision=0,
                )
                longest = gr.Number(given.max_new_tokens, label="Max new tokens", precision=0)
                temperature = gr.Number(
                    self._temperature(),
                    label="Temperature",
                    info="0: always the likeliest token",
                    step=0.1,
                )
                clear = gr.Button("Clear")
            talk = gr.Chatbot(
                label=title,
                scale=1,
                min_height=240,
                buttons=[],
                allow_file_downloads=False,
                feedback_options=None,
                render_markdown=False,
                latex_delimiters=[],
                allow_tags=False,
            )
            box = gr.MultimodalTextbox(
                show_label=False,
                placeholder="Ask; images and videos may be dropped here",
                file_types=["image", "video"],
                file_count="multiple",
                max_plain_text_length=1_000_000,
                autofocus=True,
            )
            sent = box.submit(self.take, [session, box], [session, talk, box], queue=False)
            sent.success(
                self.answer,
                [session, thinking, budget, longest, temperature],
                [talk, box],
                concurrency_limit=1,
            )
            box.stop(self.stop, session, [talk, box], queue=False)
            cleared = [clear.click, talk.clear]
            gr.on(cleared, self.clear, session, [talk, box], queue=False)
        return page

    def take(self, session: Session | None, value: dict[str, Any]) -> tuple[Any, ...]:
        """Show what was sent; while a question waits for its answer, nothing more is taken."""
        session = session or Session(self.inference.chat())
        files, prompt = value["files"], value["text"]
        if session.asked or not (files or prompt.strip()):
            return session, gr.skip(), gr.skip()
        videos = [f for f in files if (mimetypes.guess_type(f)[0] or "").startswith("video/")]
        session.asked = Question(prompt, [f for f in files if f not in videos], videos)
        content = [*({"path": path} for path in files), *(_texts(prompt) if prompt else [])]
        session.shown.append({"role": "user", "content": content})
        return (
            session,
            session.shown,
            gr.update(value="", interactive=False, submit_btn=False, stop_btn=True),
        )

    def answer(
        self,
        session: Session,
        thinking: bool,
        budget: int | None,
        longest: int | None,
        temperature: float | None,
    ) -> Iterator[tuple[Any, Any]]:
        """The messages, again and again while the answer grows."""
        asked, before = session.asked, len(session.shown)
        try:
            for messages in self._answered(session, thinking, budget, longest, temperature):
                session.shown[before:] = messages
                yield session.shown, gr.skip()
        except Exception as error:
            if not isinstance(error, VLMTuneError):
                traceback.print_exc()
            session.shown.append(_message(f"{type(error).__name__}: {error}", "Error"))
        if asked and session.asked is asked:
            session.asked = None
            yield session.shown, _ready()
        else:
            yield session.shown, gr.skip()

    def _answered(
        self,
        session: Session,
        thinking: bool,
        budget: int | None,
        longest: int | None,
        temperature: float | None,
    ) -> Iterator[list[Message]]:
        """What is to be shown of the answer, until it ends or is not wanted any more."""
        if not (asked := session.asked):
            return
        sampling = self._sampling(budget, longest, temperature)
        if len(asked.videos) > 1:
            what = f"{len(asked.videos)} videos in one question"
            raise ConfigError("upload", what, "send one video with each question")
        self.stream = stream = session.chat.stream(
            asked.prompt,
            asked.images,
            asked.videos[0] if asked.videos else None,
            enable_thinking=thinking,
            tools=self.tools,
            **asdict(sampling),
        )
        written, sent = "", 0.0
        try:
            for piece in stream:
                if session.asked is not asked:
                    return
                written += piece
                if monotonic() - sent > PAUSE:
                    sent = monotonic()
                    yield _messages(*parts_so_far(written))
            reply = stream.reply
        finally:
            stream.close()
        crops = [{"path": save_pil_to_cache(image, get_upload_folder())} for image in reply.images]
        cut = how_it_ended(reply, sampling)
        yield [
            *_messages(reply.thinking, reply.answer, ended=True),
            *([{"role": "assistant", "content": crops}] if crops else []),
            *([_message(cut, "Note")] if cut else []),
        ]

    def _temperature(self) -> float:
        """What the page begins with."""
        if not self.sampling.do_sample:
            return 0.0
        return self.sampling.temperature or self.inference.model.generation_config.temperature or 1

    def _sampling(
        self, budget: int | None, longest: int | None, temperature: float | None
    ) -> Sampling:
        """The settings of the page over those that were given.

        Raises:
            ConfigError: they cannot be, or contradict each other.
        """
        greedy = {"top_p": None, "top_k": None} if not temperature else {}
        return replace(
            self.sampling,
            thinking_budget=budget or None,
            max_new_tokens=longest or 0,
            do_sample=bool(temperature),
            temperature=float(temperature) if temperature else None,  # 1.0 comes as 1
            **greedy,
        )

    def stop(self, session: Session) -> tuple[list[Message], Any]:
        """Want the answer no more."""
        if session.asked:
            session.asked = None
            session.shown.append(_message("Stopped; this turn is not part of the chat.", "Note"))
        return session.shown, _ready()

    def clear(self, session: Session | None) -> tuple[list[Message], Any]:
        """Start over."""
        if session:
            session.chat, session.shown, session.asked = self.inference.chat(), [], None
        return [], _ready()


def _ready() -> dict[str, Any]:
    """Anew each time: Gradio takes it apart."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)


def _messages(thinking: str, answer: str, ended: bool = False) -> list[Message]:
    """The thought, open until the answer begins, and the answer."""
    status = "done" if answer or ended else "pending"
    return [
        *([_message(thinking, "Thinking", status)] if thinking else []),
        *([_message(answer)] if answer else []),
    ]


def _message(body: str, title: str = "", status: str = "") -> Message:
    """What the model says; with a title it can be folded, and is where the status is "done"."""
    metadata = {"title": title, "status": status}
    return {
        "role": "assistant",
        "content": _texts(body),
        "metadata": {key: value for key, value in metadata.items() if value},
    }


def _texts(body: str) -> list[dict[str, str]]:
    # As a dict: of a string, Gradio would remove the indentation.
    return [{"type": "text", "text": text(body)}]
