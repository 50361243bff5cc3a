"""Prompts for families other than Ovis2.5, as their processors' chat templates write them."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from ..core.errors import DataError, ModelError
from ..data.conversation import IMAGE_MARK, PLAIN
from .media import open_picture
from .prompts import Prompt
from .reply import THINK
from .request import Request


class TemplatePrompts:
    """Prompts through `processor.apply_chat_template`, which also places the images.

    Raises:
        ModelError: the processor has no chat template.
    """

    def __init__(self, processor: Any):
        if not getattr(processor, "chat_template", None):
            raise ModelError(
                f"processor {type(processor).__name__}",
                "has no chat template, by which prompts are written",
                "put the chat_template.jinja of the model into its folder",
            )
        self.processor = processor

    def encode(self, request: Request, enable_thinking: bool = False, begun: str = "") -> Prompt:
        """The prompt of a request; arguments as of `prompts.OvisPrompts.encode`.

        Raises:
            DataError: an image cannot be read, the marks do not match the images, there is a video
                or caption, or the template takes no such conversation.
        """
        request.check(begun)
        if request.video is not None:
            fix = "give its frames as images."
            raise DataError(request.where, "has a video, which Ovis2.5 alone is given.", fix)
        if any(turn.role == PLAIN for turn in request.turns):
            what, fix = "is a caption, which has no place in a chat.", "ask for it in a question."
            raise DataError(request.where, what, fix)
        messages = [_message(turn.role, turn.text) for turn in request.turns]
        messages += [_message("assistant", begun)] if begun else []
        given: dict[str, Any] = {}
        if "enable_thinking" in str(self.processor.chat_template):
            given["enable_thinking"] = enable_thinking
        try:
            text = self.processor.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=bool(begun),
                **given,
            )
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            what = f"the chat template of the model does not take it: {reason}"
            fix = "change the turns, or the system prompt, to what the model knows."
            raise DataError(request.where, what, fix) from error
        images = [
            open_picture(source, where).convert("RGB") for where, source in request.placed_images()
        ]
        opened = text.rstrip().endswith(THINK)
        prompt = Prompt(0, (text, images), opened)
        return Prompt(self.batch([prompt])["input_ids"].shape[1], (text, images), opened)

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What the processor gives for texts and images, padded on the left."""
        texts, images = zip(*(prompt.data for prompt in prompts), strict=True)
        tokenizer = self.processor.tokenizer
        start = tokenizer.bos_token
        return dict(
            self.processor(
                text=list(texts),
                images=list(images) if any(images) else None,
                padding=True,
                padding_side="left",
                add_special_tokens=not (start and texts[0].startswith(start)),
                return_tensors="pt",
            )
        )


def _message(role: str, text: str) -> dict[str, Any]:
    content: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(IMAGE_MARK)):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": piece}] if piece else []
    return {"role": role, "content": content}
