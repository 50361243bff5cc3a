"""Settings of the methods that answer one question."""

from collections.abc import Sequence
from typing import Any, TypedDict

from .sampling import Sampling
from .tools import Tool


class Settings(TypedDict, total=False):
    """How one question is answered: these, and the fields of `Sampling`.

    Attributes:
        enable_thinking: Whether the model thinks first.
        thinking_budget: New tokens after which a thought is ended; counts where it thinks.
        tools: Functions that the model may call (`inference.tools`).
        max_rounds: How many of its calls are answered.
    """

    enable_thinking: bool
    thinking_budget: int | None
    tools: Sequence[Tool]
    max_rounds: int
    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None


def arguments_of(settings: Settings) -> dict[str, Any]:
    """Those of `VLMInference.respond`."""
    given: dict[str, Any] = dict(settings)
    own = ("enable_thinking", "tools", "max_rounds")
    how = {key: given.pop(key) for key in own if key in given}
    return {"sampling": Sampling(**given), **how}
