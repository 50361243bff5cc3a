"""New tokens for a batch of prompts, with a budget of thought by row."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..core.errors import ModelError, TrainingError
from ..models import Ovis2_5
from .rows import Generated, Rows, Steering, Watching, read_together
from .sampling import DRAWN, Sampling

EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n</think>\n\n"
)
"""What ends a thought that reaches its budget. Source: AIDC-AI/Ovis 2.5.0, `generate`."""

ONE_AT_A_TIME = threading.Lock()
"""Held while a model generates: its modules are not as they were then."""

GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None}
GREEDY |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""What does not change the likeliest token, by values that transformers (5.23) does not warn of."""


def new_tokens(tokenizer: Any, sampling: Sampling, thinks: bool) -> int:
    """The most that a row can have."""
    return sampling.limit(thinks, len(_early_stop(tokenizer)))


def check_context(model: Any, prompt_tokens: int, new: int) -> None:
    """Raises ModelError where prompt and new tokens are more than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt_tokens + new > limit:
        raise ModelError(
            "prompt",
            f"its {prompt_tokens:,} tokens and up to {new:,} new ones are more than the {limit:,} "
            "positions of the model",
            "shorten it, lower max_pixels where images fill it, or lower max_new_tokens and "
            "thinking_budget",
        )


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    tokenizer: Any,
    sampling: Sampling,
    *,
    thinking: bool | Sequence[bool],
    stop_at: Sequence[str] = (),
    streamer: Any = None,
    synced: bool | None = None,
) -> list[Generated]:
    """The continuation of each row.

    The batch is encoded once; thoughts that reach their budget are ended inside the same run of
    the model, on the key/value cache that is there.

    Args:
        model: An `Ovis2_5`, any other model of transformers that generates, or a PeftModel of one.
        inputs: A batch padded on the left, on the model's device: `input_ids` and
            `attention_mask` `[B, prompt]`, and what belongs to its images.
        thinking: Whether the rows think, all of them or each, so that
            `sampling.thinking_budget` counts.
        stop_at: Texts, each of which ends a row that has written it ("tool_call"). Its last token
            may go on behind the text.
        streamer: As transformers takes it, for a batch of one.
        synced: Whether ranks wait for each other because each has only parts of the weights;
            None: where DeepSpeed ZeRO-3 is on.

    Raises:
        ModelError: the context is too long.
    """
    lengths_B = inputs["attention_mask"].sum(-1)
    thinks = [thinking] * len(lengths_B) if isinstance(thinking, bool) else list(thinking)
    settings = _settings(model, tokenizer, sampling)
    early_stop = _early_stop(tokenizer)
    rows = Rows(tokenizer, sampling, thinks, early_stop, stop_at, settings["eos_token_id"])
    for length, new in zip(lengths_B.tolist(), rows.limits, strict=True):
        check_context(model, length, new)
    with ExitStack() as stack:
        stack.enter_context(ONE_AT_A_TIME)
        stack.enter_context(_evaluating(model))
        stack.enter_context(_seeded(sampling.seed, lengths_B.device))
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        # Ranks that wait for each other take the same steps.
        if isinstance(inner, Ovis2_5) and not synced and not is_deepspeed_zero3_enabled():
            stack.enter_context(read_together(inner.llm, rows))
        ids_BT = model.generate(
            **inputs,
            **settings,
            max_new_tokens=rows.limit,
            logits_processor=LogitsProcessorList([Steering(rows)]),
            stopping_criteria=StoppingCriteriaList([Watching(rows)]),
            streamer=streamer,
            synced_gpus=synced,
        )
    return [rows.result(row, ids) for row, ids in enumerate(ids_BT.tolist())]


@contextmanager
def memory_for(where: str, fix: str) -> Iterator[None]:
    """Raises TrainingError, with that place and fix, where the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"the GPU is out of memory: {str(error).splitlines()[0]}"
        raise TrainingError(where, what, fix) from error


def _early_stop(tokenizer: Any) -> list[int]:
    return tokenizer.encode(EARLY_STOP, add_special_tokens=False)


def _settings(model: Any, tokenizer: Any, sampling: Sampling) -> dict[str, Any]:
    """What differs from the model's own generation_config, one stop id at least."""
    own = model.generation_config
    stops = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops)
    chosen = {key: getattr(sampling, key) for key in (*DRAWN, "repetition_penalty")}
    return {
        **({} if sampling.do_sample else GREEDY),
        **{key: value for key, value in chosen.items() if value is not None},
        "do_sample": sampling.do_sample,
        "eos_token_id": stops,
        "pad_token_id": stops[0] if own.pad_token_id is None else own.pad_token_id,
        "max_length": None,
        "num_beams": 1,
        "num_return_sequences": 1,
        # Training turns it off.
        "use_cache": True,
        "return_dict_in_generate": False,
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, each module afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
