"""The tool loop: a call in an answer pauses generation, what the tool gives back is written behind
the call, and generation goes on, in the form of training data.

A tool is one function. Its name is what the model writes, its docstring says what it does, and it
is called with the images of the conversation so far, as they were given, and the arguments:
`<tool_call>Crop [100, 200, 300, 400]</tool_call>` calls `Crop(images, 100, 200, 300, 400)`. What
it returns is the response: an image, `<tool_response><image></tool_response>`, or text.
"""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from ..core.errors import ConfigError, VLMTuneError
from ..data.conversation import IMAGE_MARK, VIDEO_MARK
from .crop_tool import Crop
from .generation import EARLY_STOP
from .media import fetched, open_picture
from .reply import END_OF_THOUGHT, THINK, Ended, Reply
from .request import Request
from .sampling import Sampling

if TYPE_CHECKING:
    from .vlm import VLMInference

Tool = Callable[..., Image.Image | str]

TOOLS: dict[str, Tool] = {"crop": Crop}
"""Tools by their names on the command line."""

CALL, CALL_END = "<tool_call>", "</tool_call>"
_CALL = re.compile(r"\s*(\w+)\s*(\[.*\])\s*", re.DOTALL)
_TAGS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}|{THINK}|{END_OF_THOUGHT}|</?tool_response>")


def describe(tools: Sequence[Tool]) -> str:
    """The tools and how to call them, for the system prompt of a model that was not trained to.

    Raises:
        ConfigError: a tool has no docstring.
    """
    lines = [
        f"You can call tools: {CALL}NAME [arguments]{CALL_END}, with a JSON list of arguments. "
        "The result follows as <tool_response>result</tool_response>."
    ]
    for tool in tools:
        text = inspect.getdoc(tool)
        if not text:
            where = f"tool {tool.__name__}"
            raise ConfigError(where, "has no docstring.", "write there what it does.")
        lines.append(f"- {tool.__name__}: {' '.join(text.split())}")
    return "\n".join(lines)


def answer_with_tools(
    inference: "VLMInference",
    request: Request,
    sampling: Sampling,
    tools: Sequence[Tool],
    max_rounds: int = 5,
    enable_thinking: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Reply:
    """One answer in which the model may call tools, in its thought and behind it.

    A call that fails (unknown tool, arguments that do not fit, an error of the tool) gets the
    response `Error: ...`, and the model goes on. A call is answered also where the model would
    end its turn behind it, but not behind the text of a mark, which no prompt could hold as text
    ("tool_call"). Each round is a prompt of its own, with every image anew: one more image changes
    the pixel limits of all, in training too.

    Args:
        max_rounds: How many calls are answered; one more ends the answer ("tool_rounds").
        on_text: Called with each piece of the answer when it is there, responses included.

    Returns:
        `text` is the answer as training data write it, responses included, `images` are what
        tools gave back, in order. `tokens` are the model's own, which `max_new_tokens` and the
        thinking budget count over all rounds.

    Raises:
        ConfigError: a tool returned neither an image nor text.
        DataError, ModelError: as `VLMInference.complete`.
    """
    text, tokens, images, rounds, opened = "", [], [], 0, False
    # A URL is asked once.
    sources = [fetched(source, where) for where, source in request.placed_images()]
    request = replace(request, images=sources)
    while True:
        thinks = enable_thinking and END_OF_THOUGHT not in text
        budget = sampling.thinking_budget if thinks else None
        generated, opened_here = inference.complete(
            replace(request, images=[*request.images, *images]),
            replace(
                sampling,
                max_new_tokens=sampling.max_new_tokens - len(tokens),
                thinking_budget=budget and budget - len(tokens),
            ),
            enable_thinking=enable_thinking,
            begun=text,
            stop_at=[CALL_END],
            on_text=on_text,
        )
        opened = opened or opened_here
        tokens += generated.ids
        written = inference.tokenizer.decode(generated.ids, skip_special_tokens=True)
        text += written
        ended: Ended = generated.ended
        if ended != "tool_call" or IMAGE_MARK in written or VIDEO_MARK in written:
            break
        if rounds == max_rounds:
            ended = "tool_rounds"
            break
        given = [open_picture(source, where) for where, source in request.placed_images()]
        call = written.rpartition(CALL_END)[0].rpartition(CALL)[2]
        result = _result(tools, call, [*given, *images])
        rounds += 1
        if isinstance(result, Image.Image) and request.video is not None:
            result = "Error: an image cannot be shown beside a video."
        if isinstance(result, Image.Image):
            images.append(result)
            result = IMAGE_MARK
        response = f"<tool_response>{result}</tool_response>"
        if budget == len(tokens) and END_OF_THOUGHT not in text:
            response += EARLY_STOP
            tokens += inference.tokenizer.encode(EARLY_STOP, add_special_tokens=False)
        text += response
        if on_text:
            on_text(response)
        if len(tokens) >= sampling.max_new_tokens:
            ended = "length"
            break
    return Reply.of(text, tokens, ended, opened=opened, images=images, tool_rounds=rounds)


def _result(tools: Sequence[Tool], call: str, images: list[Image.Image]) -> Image.Image | str:
    """What a call gives: an image, or text without tags, of an error too."""
    named = {tool.__name__: tool for tool in tools}
    form = _CALL.fullmatch(call)
    try:
        arguments = json.loads(form[2]) if form else None
    except (ValueError, RecursionError):
        arguments = None
    if form is None or arguments is None:
        return "Error: a call is the name of a tool and a JSON list of arguments."
    name = form[1]
    if name not in named:
        return f"Error: there is no tool {name}. There is {', '.join(named)}."
    try:
        result = named[name](images, *arguments)
    except Exception as error:  # whatever a tool raises, the model is told
        kind = "" if isinstance(error, VLMTuneError) else f"{type(error).__name__}: "
        result = " ".join(f"Error: {kind}{error}".split())
    if not isinstance(result, str | Image.Image):
        what = f"returned {type(result).__name__}."
        raise ConfigError(f"tool {name}", what, "return an image of Pillow, or text.")
    if isinstance(result, str) and _TAGS.search(result):
        return f"Error: the text of {name} holds a tag of an image, a thought or a response."
    return result
