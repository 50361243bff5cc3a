"""Talk to a model: prompts in the training form, generation, thinking, tools."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Chat
    from .reply import Reply
    from .request import Request, ask_about
    from .sampling import Sampling
    from .streaming import Stream
    from .vlm import Grounding, Ovis25Inference, VLMInference

__all__ = [
    "Chat",
    "Grounding",
    "Ovis25Inference",
    "Reply",
    "Request",
    "Sampling",
    "Stream",
    "VLMInference",
    "ask_about",
]

_HOMES = {
    "Chat": "chat",
    "Reply": "reply",
    "Request": "request",
    "Sampling": "sampling",
    "Stream": "streaming",
    "ask_about": "request",
}


def __getattr__(name: str) -> Any:
    # torch and transformers are imported when they are needed.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'vlm')}", __name__), name)
