"""Greedy generation equals every recorded call of the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmtune.core.errors import ModelError

GOLDENS = Path(__file__).parents[2] / "goldens" / "ovis2_5" / "full_single_untied"
RECORDED: dict[str, Any] = json.loads((GOLDENS / "generation.json").read_text("utf-8"))
CALLS = {
    f"{name}-{index}": call
    for name, record in RECORDED.items()
    if name != "notes"
    for index, call in enumerate(record.get("generate_calls") or [record["second_call"]])
}
PAD = 320


@pytest.fixture
def model(golden) -> Any:
    return golden().model()


@pytest.fixture
def image(golden):
    """The image of every recorded call; it is the one of the golden sample."""
    return {key: golden().inputs[key] for key in ("pixel_values", "grid_thws")}


def test_all_recorded_calls_are_here():
    assert list(CALLS) == [
        "no_thinking-0",
        "thinking_unbounded-0",
        "thinking_budget_5-0",
        "thinking_budget_5-1",
        "thinking_budget_exhausted-0",
        "two_turn_history-0",
    ]


@pytest.mark.parametrize("name", CALLS)
def test_greedy_tokens_equal_the_reference(model, image, name):
    call = CALLS[name]
    output = model.generate(
        torch.tensor([call["input_ids"]]),
        **image,
        max_new_tokens=call["max_new_tokens"],
        do_sample=False,
    )
    assert output.tolist() == [call["output_ids"]]


def test_left_padded_batch_gives_the_tokens_of_each_prompt_alone(model, image, golden):
    text = golden("full_single_untied", "_text_only_eval").inputs["input_ids"][0, :9].tolist()
    prompts = [
        CALLS["no_thinking-0"]["input_ids"],
        text,
        CALLS["two_turn_history-0"]["input_ids"],
    ]
    settings = {"max_new_tokens": 12, "do_sample": False}
    alone = [
        model.generate(torch.tensor([ids]), **(image if -300 in ids else {}), **settings)[0]
        for ids in prompts
    ]
    assert alone[0].tolist() == CALLS["no_thinking-0"]["output_ids"]
    assert alone[2].tolist()[:4] == CALLS["two_turn_history-0"]["output_ids"]

    longest = max(map(len, prompts))
    padding = [longest - len(ids) for ids in prompts]
    together = model.generate(
        torch.tensor([[PAD] * n + ids for n, ids in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor(
            [[0] * n + [1] * len(ids) for n, ids in zip(padding, prompts, strict=True)]
        ),
        pixel_values=image["pixel_values"].repeat(2, 1),
        grid_thws=image["grid_thws"].repeat(2, 1),
        **settings,
    )
    assert together.tolist() == [tokens.tolist() for tokens in alone]


def test_generation_stops_at_the_language_models_end_token(checkpoint, image):
    call = CALLS["no_thinking-0"]
    third = call["output_ids"][2]
    model: Any = AutoModelForImageTextToText.from_pretrained(
        checkpoint(llm_config={"eos_token_id": third})
    )
    output = model.generate(
        torch.tensor([call["input_ids"]]), **image, max_new_tokens=12, do_sample=False
    )
    assert output.tolist() == [call["output_ids"][:3]]


def test_generation_config_of_the_folder_holds_and_a_call_overrides_it_once(checkpoint, image):
    folder = checkpoint()
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5, "do_sample": false}')
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    call = CALLS["no_thinking-0"]
    for override, length in (({}, 5), ({"max_new_tokens": 2}, 2), ({}, 5)):
        output = model.generate(torch.tensor([call["input_ids"]]), **image, **override)
        assert output.tolist() == [call["output_ids"][:length]]


def test_generation_without_ids_is_refused(model):
    with pytest.raises(ModelError, match="input_ids are missing"):
        model.generate(max_new_tokens=1)


def test_prompt_whose_pixels_are_missing_is_refused(model):
    with pytest.raises(
        ModelError, match=r"hold 28 visual tokens .* images, the grids of 0 images 0"
    ):
        model.generate(torch.tensor([CALLS["no_thinking-0"]["input_ids"]]), max_new_tokens=1)
