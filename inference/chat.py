"""A conversation over several turns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from ..core.errors import DataError
from ..data.conversation import IMAGE_MARK, VIDEO_MARK, Turn
from .media import ImageSource, Video, fetched, listed
from .reply import END_OF_THOUGHT, Reply
from .request import Request, ask_about
from .settings import Settings, arguments_of
from .streaming import Stream

if TYPE_CHECKING:
    from .vlm import VLMInference


class Chat:
    """Questions and answers with one history, kept as training data write it: the model's own text
    with its thoughts; how the history is rendered is the matter of its training's `thinking`.

    A turn that fails, or whose stream is not read to its end, leaves no trace. Where the model
    itself writes `<image>` or `<video>`, the history has `< image>` or `< video>`, which stand for
    no medium; a thought that was cut off is ended there.

    Attributes:
        history: Turns so far, a system turn first where one was given.
        images: Of the history, crops of tools included, in the order of their marks.
        video: Of the history.
    """

    def __init__(self, inference: "VLMInference", system: str | None = None):
        self.inference, self.system = inference, system
        self.clear()

    def clear(self) -> None:
        """Forget all but the system turn."""
        self.history = [Turn("system", self.system)] if self.system else []
        self.images: list[ImageSource] = []
        self.video: Video | None = None

    def send(
        self,
        prompt: str,
        images: ImageSource | Sequence[ImageSource] = (),
        video: Video | None = None,
        **settings: Unpack[Settings],
    ) -> Reply:
        """The reply to the next question; otherwise as `VLMInference.single_image_inference`."""
        request = self._next(prompt, images, video)
        return self._keep(request, self.inference.respond(request, **arguments_of(settings)))

    def stream(
        self,
        prompt: str,
        images: ImageSource | Sequence[ImageSource] = (),
        video: Video | None = None,
        **settings: Unpack[Settings],
    ) -> Stream:
        """As `send`, piece by piece; once that is read to its end, the turn is in the history."""
        request = self._next(prompt, images, video)
        arguments = arguments_of(settings)
        return Stream(
            lambda on_text: self.inference.respond(request, on_text=on_text, **arguments),
            lambda reply: self._keep(request, reply),
        )

    def _next(
        self, prompt: str, images: ImageSource | Sequence[ImageSource], video: Video | None
    ) -> Request:
        # What a URL gives is kept: the next turn needs it again.
        new = [fetched(image, "chat, image") for image in listed(images)]
        if video is not None and self.video is not None:
            raise DataError("chat, video", "it has one already.", "start a new chat for another.")
        return ask_about(
            prompt,
            [*self.images, *new],
            self.video if video is None else video,
            history=self.history,
            where="chat",
        )

    def _keep(self, request: Request, reply: Reply) -> Reply:
        # After a mark of the model's own, no tool has shown another image.
        parts, shown = reply.text.split(IMAGE_MARK), len(reply.images) + 1
        parts = [IMAGE_MARK.join(parts[:shown]), *parts[shown:]]
        text = _unmarked(IMAGE_MARK).join(parts).replace(VIDEO_MARK, _unmarked(VIDEO_MARK))
        if reply.unfinished_thought:
            text += f"\n{END_OF_THOUGHT}\n\n"
        self.history = [*request.turns, Turn("assistant", text, True)]
        self.images = [*request.images, *reply.images]
        self.video = request.video
        return reply


def _unmarked(mark: str) -> str:
    """The mark as text that stands for no medium."""
    return mark.replace("<", "< ")
