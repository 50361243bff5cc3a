"""A model to talk to: one question, a batch, a stream of text, a chat."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, Unpack, get_args

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..collators.rendering import Thinking
from ..core.errors import ConfigError, DataError, ModelError
from ..data.boxes import find_boxes
from ..models import Ovis2_5Processor
from .chat import Chat
from .chat_template import TemplatePrompts
from .crop_tool import PixelBox, Unit, point_to_pixel, to_pixels
from .generation import Generated, check_context, generate, memory_for, new_tokens
from .loading import load
from .media import ImageSource, Video, fetched, open_picture
from .prompts import OvisPrompts, Prompt, PromptSettings
from .reply import END_OF_THOUGHT, Reply
from .request import Request, ask_about, read_request
from .sampling import Sampling
from .settings import Settings, arguments_of
from .streaming import Stream, TextStreamer
from .tools import Tool, answer_with_tools


@dataclass(frozen=True)
class Grounding:
    """Attributes:
    boxes, points: Those of the answer, in pixels of the image as it was given.
    faults: Why others of the answer are none, such as a box with swapped corners.
    """

    reply: Reply
    boxes: list[PixelBox]
    points: list[tuple[int, int]]
    faults: list[DataError]


class VLMInference:
    """A vision language model, with prompts as its training wrote them.

    Methods that answer one question raise; `answer` and `batch_inference` put the error into the
    reply to the request that it belongs to.

    Attributes:
        model, processor, tokenizer: The parts; the model may be a PeftModel.
        prompts: How requests become inputs of the model.
    """

    prompts: OvisPrompts | TemplatePrompts

    def __init__(
        self,
        model: str,
        adapter: str | Sequence[str] | None = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        load_in_4bit: bool = False,
        attn_implementation: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        thinking_format: Thinking | None = None,
    ):
        """Load a model.

        Args:
            model: Folder or Hub name; an adapter's folder stands for its base with that adapter.
            adapter: One or several to put on top, each a folder or `PATH:WEIGHT`.
            dtype, device, load_in_4bit, attn_implementation: As of `loading.load`.
            min_pixels, max_pixels: Of each image and frame, in place of the limits of its
                training.
            thinking_format: `thinking` of its training (`collators.rendering.render`), where no
                run file beside the model says it.

        Raises:
            ModelError: as `loading.load`, or its processor has no chat template.
            ConfigError: the pixel limits contradict each other, or are not for this family, or the
                format is unknown.
        """
        formats = get_args(Thinking)
        if thinking_format and thinking_format not in formats:
            what = f'"{thinking_format}" is unknown'
            raise ConfigError("thinking_format", what, f"give {', '.join(formats)}")

        def prepare(processor: Any, run: dict[str, Any]) -> None:
            settings = PromptSettings.of_run(run)
            if isinstance(processor, Ovis2_5Processor):
                settings = settings.with_pixels(min_pixels, max_pixels)
            elif min_pixels or max_pixels:
                key = "min_pixels" if min_pixels else "max_pixels"
                what = "is for Ovis2.5; the processor of this model sizes images by itself"
                raise ConfigError(key, what, "leave it out")
            if thinking_format:
                settings = replace(settings, thinking=thinking_format)
            self._use(processor, settings)

        self.model = load(
            model,
            [adapter] if isinstance(adapter, str) else list(adapter or ()),
            dtype=dtype,
            device=device,
            load_in_4bit=load_in_4bit,
            attn_implementation=attn_implementation,
            before=prepare,
        ).model

    @classmethod
    def of(cls, model: Any, processor: Any, settings: PromptSettings) -> Self:
        """With a model that is there already, such as one in training; its mode and its device
        are left as they are."""
        self = cls.__new__(cls)
        self._use(processor, settings)
        self.model = model
        return self

    def _use(self, processor: Any, settings: PromptSettings) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        if isinstance(processor, Ovis2_5Processor):
            self.prompts = OvisPrompts(processor, settings)
        else:
            self.prompts = TemplatePrompts(processor)

    def answer(
        self,
        requests: Sequence[Request],
        sampling: Sampling | None = None,
        *,
        enable_thinking: bool | Sequence[bool] = False,
        synced: bool | None = None,
    ) -> list[Reply]:
        """Replies to one batch, in its order, the same as one at a time (greedy, float32).

        A request that cannot be read or is too long for the model gets a reply with `ended`
        "error"; the others go on.

        Args:
            enable_thinking: For all, or for each; the thinking budget counts for those that think.
            synced: As `generation.generate` takes it; a rank that has no request, or none that
                can be read, then keeps step with the others.
        """
        sampling = sampling or Sampling()
        if isinstance(enable_thinking, bool):
            enable_thinking = [enable_thinking] * len(requests)
        prompts: dict[int, Prompt] = {}
        replies: dict[int, Reply] = {}
        for i, (request, thinks) in enumerate(zip(requests, enable_thinking, strict=True)):
            try:
                prompts[i] = self._prompt(request, sampling, thinks)
            except (DataError, ModelError) as error:
                replies[i] = Reply.failed(error)
        if not prompts and (synced or (synced is None and is_deepspeed_zero3_enabled())):
            self._generate([self.prompts.encode(ask_about(""))], sampling, [False], synced=synced)
        if prompts:
            batch, thinking = list(prompts.values()), [enable_thinking[i] for i in prompts]
            found = self._generate(batch, sampling, thinking, synced=synced)
            for i, prompt, generated in zip(prompts, batch, found, strict=True):
                if error := generated.error:
                    replies[i] = Reply.failed(_placed(error, requests[i]))
                else:
                    replies[i] = self._reply(generated, prompt.opened)
        return [replies[i] for i in range(len(requests))]

    def complete(
        self,
        request: Request,
        sampling: Sampling | None = None,
        *,
        enable_thinking: bool = False,
        begun: str = "",
        stop_at: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> tuple[Generated, bool]:
        """New tokens for one request, and whether its prompt ended in `<think>`.

        Args:
            begun: As of `OvisPrompts.encode`; the thinking budget does not count behind a
                `</think>` in it.
            stop_at: As of `generation.generate`.
            on_text: Called with each piece of text when it is there, and for a token that
                completes none with "".

        Raises:
            DataError: the request cannot be read.
            ModelError: it is too long for the model, or the logits are no numbers.
            TrainingError: the GPU is out of memory.
        """
        sampling = sampling or Sampling()
        prompt = self._prompt(request, sampling, enable_thinking, begun)
        thinks = _thinks_on(enable_thinking, begun)
        streamer = TextStreamer(self.tokenizer, on_text) if on_text else None
        fix = "lower max_pixels or max_new_tokens, or load the model in 4 bits"
        with memory_for(request.where, fix):
            [generated] = self._generate(
                [prompt], sampling, [thinks], stop_at=stop_at, streamer=streamer
            )
        if generated.error:
            raise _placed(generated.error, request)
        return generated, prompt.opened

    def respond(
        self,
        request: Request,
        sampling: Sampling | None = None,
        *,
        enable_thinking: bool = False,
        tools: Sequence[Tool] = (),
        max_rounds: int = 5,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """The reply to one request, with tools where some are given; raises as `complete`."""
        sampling = sampling or Sampling()
        if tools:
            return answer_with_tools(
                self, request, sampling, tools, max_rounds, enable_thinking, on_text
            )
        generated, opened = self.complete(
            request, sampling, enable_thinking=enable_thinking, on_text=on_text
        )
        return self._reply(generated, opened)

    def stream(
        self,
        request: Request,
        sampling: Sampling | None = None,
        *,
        enable_thinking: bool = False,
        tools: Sequence[Tool] = (),
        max_rounds: int = 5,
    ) -> Stream:
        """As `respond`, piece by piece; what that raises is raised while reading."""
        return Stream(
            lambda on_text: self.respond(
                request,
                sampling,
                enable_thinking=enable_thinking,
                tools=tools,
                max_rounds=max_rounds,
                on_text=on_text,
            )
        )

    def single_image_inference(
        self,
        image: ImageSource,
        prompt: str,
        *,
        system: str | None = None,
        **settings: Unpack[Settings],
    ) -> Reply:
        """The reply to a question about an image, `settings` as `Settings` describes them.

        Raises:
            DataError: the image cannot be read.
            ModelError: the prompt is too long, or the model gives no numbers.
            ConfigError: the sampling settings contradict each other.
        """
        return self.respond(ask_about(prompt, [image], system=system), **arguments_of(settings))

    def single_image_inference_streaming(
        self,
        image: ImageSource,
        prompt: str,
        *,
        system: str | None = None,
        **settings: Unpack[Settings],
    ) -> Stream:
        """As `single_image_inference`, piece by piece."""
        return self.stream(ask_about(prompt, [image], system=system), **arguments_of(settings))

    def multi_image_inference(
        self,
        images: ImageSource | Sequence[ImageSource],
        prompt: str,
        *,
        system: str | None = None,
        **settings: Unpack[Settings],
    ) -> Reply:
        """The reply to a question about several images; otherwise as `single_image_inference`."""
        return self.respond(ask_about(prompt, images, system=system), **arguments_of(settings))

    def video_inference(
        self, video: Video, prompt: str, *, system: str | None = None, **settings: Unpack[Settings]
    ) -> Reply:
        """The reply to a question about a video file or a list of frames; otherwise as
        `single_image_inference`."""
        request = ask_about(prompt, video=video, system=system)
        return self.respond(request, **arguments_of(settings))

    def text_only_inference(
        self, prompt: str, *, system: str | None = None, **settings: Unpack[Settings]
    ) -> Reply:
        """The reply to a question without media; otherwise as `single_image_inference`."""
        return self.respond(ask_about(prompt, system=system), **arguments_of(settings))

    def grounding_inference(
        self,
        image: ImageSource,
        prompt: str,
        *,
        unit: Unit = "normalized",
        system: str | None = None,
        **settings: Unpack[Settings],
    ) -> Grounding:
        """The reply with its boxes and points scaled to the image; otherwise as
        `single_image_inference`.

        Args:
            unit: As of `crop_tool.to_pixels`: what the model writes; `pixels` are those of the
                image as the model sees it, resized, of Ovis2.5 alone.
        """
        if unit not in get_args(Unit):
            raise ConfigError("unit", f'"{unit}" is unknown', f"give {', '.join(get_args(Unit))}")
        prompts = self.prompts
        if unit == "pixels" and not isinstance(prompts, OvisPrompts):
            what = "pixels is for Ovis2.5; how this model resizes images is not known"
            raise ConfigError("unit", what, "leave it out")
        image = fetched(image, "image")
        reply = self.single_image_inference(image, prompt, system=system, **settings)
        size, resized = open_picture(image, "image").size, None
        if isinstance(prompts, OvisPrompts):
            # What tools showed changes the limits of all images.
            resized = prompts.seen_size(size, 1 + len(reply.images))
        return ground(reply, size, resized, unit)

    def batch_inference(
        self,
        requests: Iterable[Request | Mapping[str, Any]],
        batch_size: int = 8,
        *,
        enable_thinking: bool = False,
        **sampling: Any,
    ) -> list[Reply]:
        """Replies in order; one that could not be given has `ended` "error".

        Args:
            requests: Each a `Request`, or `{"prompt", "image" | "images" | "video", "system"}`
                with one image or a list of them.
            sampling: Fields of `Sampling`.

        Raises:
            ConfigError: the settings are out of range, or contradict each other.
            TrainingError: the GPU is out of memory.
        """
        if batch_size < 1:
            raise ConfigError("batch_size", f"{batch_size} is below 1", "give 1 or more")
        chosen = Sampling(**sampling)
        read = [read_request(given, f"requests[{i}]") for i, given in enumerate(requests)]
        replies = []
        for start in range(0, len(read), batch_size):
            batch = read[start : start + batch_size]
            asked = [request for request in batch if isinstance(request, Request)]
            where = f"requests[{start}] to [{start + len(batch) - 1}]"
            with memory_for(where, "lower batch_size or max_pixels"):
                found = iter(self.answer(asked, chosen, enable_thinking=enable_thinking))
            replies += [
                next(found) if isinstance(request, Request) else Reply.failed(request)
                for request in batch
            ]
        return replies

    def chat(self, system: str | None = None) -> Chat:
        """A conversation over several turns."""
        return Chat(self, system)

    def _prompt(
        self, request: Request, sampling: Sampling, enable_thinking: bool, begun: str = ""
    ) -> Prompt:
        prompt = self.prompts.encode(request, enable_thinking, begun)
        new = new_tokens(self.tokenizer, sampling, _thinks_on(enable_thinking, begun))
        try:
            check_context(self.model, prompt.length, new)
        except ModelError as error:
            raise _placed(error, request) from None
        return prompt

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, thinking: Sequence[bool], **more: Any
    ) -> list[Generated]:
        batch = self.prompts.batch(prompts)
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        return generate(self.model, inputs, self.tokenizer, sampling, thinking=thinking, **more)

    def _reply(self, generated: Generated, opened: bool) -> Reply:
        text = self.tokenizer.decode(generated.ids, skip_special_tokens=True)
        return Reply.of(text, generated.ids, generated.ended, opened=opened)


class Ovis25Inference(VLMInference):
    """`VLMInference` for Ovis2.5 alone.

    Raises:
        ModelError: the model is of another family.
    """

    prompts: OvisPrompts

    def _use(self, processor: Any, settings: PromptSettings) -> None:
        if not isinstance(processor, Ovis2_5Processor):
            what = f"its processor is {type(processor).__name__}, and not of Ovis2.5"
            raise ModelError("Ovis25Inference", what, "use VLMInference for other families")
        super()._use(processor, settings)


def _thinks_on(enable_thinking: bool, begun: str) -> bool:
    return enable_thinking and END_OF_THOUGHT not in begun


def _placed(error: ModelError, request: Request) -> ModelError:
    """The error with the place of the request that it belongs to."""
    return ModelError(request.where, error.what, error.fix)


def ground(
    reply: Reply,
    size: tuple[int, int],
    resized: tuple[int, int] | None = None,
    unit: Unit = "normalized",
) -> Grounding:
    """What a reply points at in an image of that width and height; arguments as of
    `crop_tool.to_pixels`."""
    found = Grounding(reply, [], [], [])
    for box in find_boxes(reply.answer):
        try:
            if len(box.coordinates) == 4:
                found.boxes.append(to_pixels(box.coordinates, size, resized=resized, unit=unit))
            else:
                found.points.append(
                    point_to_pixel(box.coordinates, size, resized=resized, unit=unit)
                )
        except DataError as error:
            found.faults.append(error)
    return found
