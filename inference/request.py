"""What is to be answered, as turns and media."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import DataError
from ..data.conversation import IMAGE_MARK, VIDEO_MARK, Conversation, Turn
from ..data.turns import is_unicode
from .media import ImageSource, Video, listed


@dataclass(frozen=True)
class Request:
    """What is to be answered.

    Attributes:
        turns: All turns before the answer, its own question last; the text holds one `<image>` or
            `<video>` where a medium stands.
        images: In the order of their marks.
        where: What messages name, such as a data file and a record.
    """

    turns: Sequence[Turn]
    images: Sequence[ImageSource] = ()
    video: Video | None = None
    where: str = "request"

    @classmethod
    def of(cls, conversation: Conversation) -> "Request":
        """The request of a record: for its last turn where that is an answer or a caption, else
        for what comes after all of its turns."""
        turns = conversation.turns
        if turns and (turns[-1].role == "assistant" or turns[-1].trained):
            turns = turns[:-1]
        return cls(
            turns,
            conversation.images[: _marks(turns, IMAGE_MARK)],
            conversation.video or conversation.frames or None,
            conversation.where("").removesuffix(", "),
        )

    def placed_images(self) -> list[tuple[str, ImageSource]]:
        """The images, each with its place for messages."""
        several = len(self.images) > 1
        return [
            (f"{self.where}, image {i}" if several else f"{self.where}, image", image)
            for i, image in enumerate(self.images, start=1)
        ]

    def check(self, begun: str = "") -> None:
        """Whether there is a question, and the marks in it and in what is begun of the answer
        stand for the media.

        Raises:
            DataError: they do not, or a text is not Unicode.
        """
        if not self.turns:
            raise DataError(self.where, "there is no question.", "give one turn at least.")
        texts = [*self.turns, Turn("assistant", begun)]
        if not all(is_unicode(turn.text) for turn in texts):
            raise DataError(
                self.where, "a text holds half a surrogate pair.", "write the whole character."
            )
        if self.images and self.video is not None:
            fix = "give one kind of media."
            raise DataError(self.where, "there are images and a video.", fix)
        for mark, given in ((IMAGE_MARK, len(self.images)), (VIDEO_MARK, self.video is not None)):
            found = _marks(texts, mark)
            if found != given:
                marks = f'{found} "{mark}" placeholder{"" if found == 1 else "s"}'
                what = f"{marks}, but {given:d} given."
                fix = "write one for each, or none in a prompt whose media stand before it."
                raise DataError(self.where, what, fix)


def ask_about(
    prompt: str,
    images: ImageSource | Sequence[ImageSource] = (),
    video: Video | None = None,
    *,
    system: str | None = None,
    history: Sequence[Turn] = (),
    where: str = "request",
) -> Request:
    """A question as a request; each medium stands on a line of its own before the prompt, unless
    the prompt has marks of its own.

    Args:
        images, video: Those of the history first.
        history: Turns before the question, a system turn of theirs included.
    """
    images = listed(images)
    turns = [*([Turn("system", system)] if system else []), *history]
    for mark, given in ((VIDEO_MARK, video is not None), (IMAGE_MARK, len(images))):
        if mark not in prompt:
            prompt = f"{mark}\n" * (given - _marks(turns, mark)) + prompt
    return Request([*turns, Turn("user", prompt)], images, video, where)


def _marks(turns: Sequence[Turn], mark: str) -> int:
    return sum(turn.text.count(mark) for turn in turns)


def read_request(given: Request | Mapping[str, Any], where: str) -> Request | DataError:
    """The request that `{"prompt", "image" | "images" | "video", "system"}` stands for, or what is
    wrong with it; one that names no place of its own gets this one."""
    if isinstance(given, Request):
        return replace(given, where=where) if given.where == Request.where else given
    form = 'write {"prompt": ..., "image" or "images" or "video": ...}.'
    if not isinstance(given, Mapping):
        return DataError(where, f"{type(given).__name__} is no request.", form)
    unknown = sorted(set(given) - {"prompt", "image", "images", "video", "system"})
    if unknown:
        return DataError(where, f'has an unknown key "{unknown[0]}".', form)
    if not isinstance(given.get("prompt"), str):
        return DataError(where, 'has no "prompt".', form)
    if given.get("image") is not None and given.get("images") is not None:
        return DataError(where, 'has both "image" and "images".', "keep one of them.")
    images = given.get("images") if given.get("image") is None else given["image"]
    if not isinstance(images, list | tuple):
        images = [] if images is None else [images]
    system = given.get("system")
    return ask_about(given["prompt"], images, given.get("video"), system=system, where=where)
