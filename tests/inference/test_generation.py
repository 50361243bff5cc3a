"""Generation equals the reference, row by row, whatever else is in the batch."""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.utils import logging as host_logging

from vlmtune.collators.rendering import encode, render_prompt
from vlmtune.core.errors import ConfigError, ModelError
from vlmtune.data.conversation import Turn
from vlmtune.inference.generation import EARLY_STOP, Generated, Sampling, check_context, generate
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

QUESTION = Turn("user", "<image>\nWhat is in the image?")
ASKED_AGAIN = [QUESTION, Turn("assistant", "A square."), Turn("user", "How many?")]
CASES = {
    "no_thinking": ([QUESTION], False, None, 12),
    "thinking_unbounded": ([QUESTION], True, None, 12),
    "thinking_budget_5": ([QUESTION], True, 5, 120),
    "thinking_budget_exhausted": ([QUESTION], True, 5, 20),
    "two_turn_history": (ASKED_AGAIN, False, None, 4),
}


@pytest.fixture
def model(ovis_goldens) -> Any:
    return AutoModelForImageTextToText.from_pretrained(ovis_goldens / "full_single_untied").eval()


@pytest.fixture
def other_family() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, **sizes}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vocab_size": 352}
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4, **sizes}
    vision |= {"spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=330, vision_start_token_id=332
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 322
    return model


@pytest.fixture(scope="module")
def processor(ovis_goldens) -> Ovis2_5Processor:
    tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
    return Ovis2_5Processor(Ovis2_5ImageProcessor(patch_size=4), tokenizer)


@pytest.fixture(scope="module")
def image(ovis_goldens) -> Image.Image:
    return Image.open(ovis_goldens / "preprocess" / "images" / "grad_40x70.png")


def prompt(
    processor: Ovis2_5Processor,
    turns: Sequence[Turn],
    images: Sequence[Image.Image] = (),
    thinking: bool = False,
) -> dict[str, Any]:
    """One row: its ids, pixels and grids. Earlier answers are written as the reference does."""
    read = [processor.image_processor.patches([picture], 256, 2304) for picture in images]
    tokens = [processor.image_processor.visual_tokens(grid) for _, grid in read]
    segments = render_prompt(turns, processor, "last_turn", thinking)
    return {
        "ids": encode(segments, processor, tokens).ids,
        "pixels": [torch.from_numpy(pixels) for pixels, _ in read],
        "grids": [grid for _, grid in read],
    }


def batch(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the left."""
    longest = max(len(row["ids"]) for row in rows)
    padding = [longest - len(row["ids"]) for row in rows]
    inputs = {
        "input_ids": torch.tensor([[0] * n + r["ids"] for n, r in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
    }
    if any(row["pixels"] for row in rows):
        inputs["pixel_values"] = torch.cat([pixels for row in rows for pixels in row["pixels"]])
        inputs["grid_thws"] = torch.tensor([grid for row in rows for grid in row["grids"]])
    return inputs


def one(model: Any, row: dict[str, Any], processor: Ovis2_5Processor, **settings) -> Generated:
    thinking = settings.pop("thinking", False)
    [found] = generate(
        model, batch([row]), processor.tokenizer, Sampling(**settings), thinking=thinking
    )
    return found


class Counts:
    """How often the vision encoder runs, and the numbers of positions the decoder is given."""

    def __init__(self, model: Any):
        self.vision, self.positions = 0, []
        model.visual_tokenizer.vit.register_forward_hook(self._see)
        model.get_decoder().register_forward_pre_hook(self._decode, with_kwargs=True)

    def _see(self, *_: Any) -> None:
        self.vision += 1

    def _decode(self, _: nn.Module, args: Any, given: dict[str, Any]) -> None:
        embeds = given.get("inputs_embeds")
        self.positions.append((given["input_ids"] if embeds is None else embeds).shape[1])


# The reference.


@pytest.fixture(scope="module")
def recorded(ovis_goldens) -> dict[str, Any]:
    file = ovis_goldens / "full_single_untied" / "generation.json"
    return json.loads(file.read_text("utf-8"))


def test_every_recorded_case_is_here(recorded):
    assert {*recorded} == {*CASES, "notes"}


@pytest.mark.parametrize("name", CASES)
def test_prompt_and_tokens_equal_the_reference(model, processor, image, recorded, name):
    turns, thinking, budget, most = CASES[name]
    case = recorded[name]
    calls = case.get("generate_calls") or [case["second_call"]]
    row = prompt(processor, turns, [image], thinking)
    assert row["ids"] == calls[0]["input_ids"]
    expected = calls[0]["output_ids"]
    if budget:
        early_stop = processor.tokenizer(EARLY_STOP)["input_ids"]
        expected = expected + early_stop
        # The reference starts again with all tokens up to there, unless none is left.
        assert [call["input_ids"] for call in calls[1:]] in ([], [row["ids"] + expected])
        expected = expected + [token for call in calls[1:] for token in call["output_ids"]]
    counts = Counts(model)
    found = one(
        model, row, processor, thinking=thinking, thinking_budget=budget, max_new_tokens=most
    )
    assert (found.ids, found.ended) == (expected, "length")
    read = [len(row["ids"])] + [1] * (len(expected) - 1)
    if budget:
        # The last token of the thought waits for those that end it, and no answer may follow.
        together = [len(early_stop) + 1] if len(calls) == 2 else []
        read[budget : budget + len(early_stop) + 1] = together
    assert (counts.vision, counts.positions) == (1, read)
    if "response" in case:
        text = processor.tokenizer.decode(found.ids, skip_special_tokens=True)
        assert text.strip() == case["response"].strip()


# Batches.

STOPS = [211, 292, 323]
"""Tokens that three of the rows below write: one that thinks before its budget, another behind
it, and one that does not think late."""
ENDS = [("length", 110), ("length", 110), ("stop", 3), ("stop", 104), ("stop", 69)]


@pytest.fixture
def mixed(processor, image) -> tuple[list[dict[str, Any]], list[bool]]:
    """Rows without and with one and two images, of different lengths; which of them think."""
    second = image.rotate(90, expand=True)
    both = Turn("user", "<image>\n<image>\nWhich one is larger, and why?")
    questions = [
        ([Turn("user", "Hi")], [], True),
        ([QUESTION], [image], False),
        ([both], [image, second], True),
        ([Turn("system", "Be brief."), QUESTION], [second], True),
        (ASKED_AGAIN, [image], False),
    ]
    rows = [prompt(processor, turns, images, on) for turns, images, on in questions]
    return rows, [on for *_, on in questions]


@pytest.mark.parametrize("attention", ["sdpa", "packed"])
def test_a_batch_gives_the_tokens_of_each_row_alone(ovis_goldens, processor, mixed, attention):
    rows, thinks = mixed
    model = AutoModelForImageTextToText.from_pretrained(
        ovis_goldens / "full_single_untied", attn_implementation=attention
    )
    assert model.llm.config._attn_implementation == attention
    model.generation_config.eos_token_id = STOPS
    tokenizer, sampling = processor.tokenizer, Sampling(max_new_tokens=110, thinking_budget=6)
    alone = [
        generate(model, batch([row]), tokenizer, sampling, thinking=think)[0]
        for row, think in zip(rows, thinks, strict=True)
    ]
    assert [(found.ended, len(found.ids)) for found in alone] == ENDS
    early_stop = tokenizer(EARLY_STOP)["input_ids"]
    told = [row for row, found in enumerate(alone) if found.ids[6:][:87] == early_stop]
    assert (len(early_stop), told) == (87, [0, 3])
    counts, longest = Counts(model), max(len(row["ids"]) for row in rows)
    together = generate(model, batch(rows), tokenizer, sampling, thinking=thinks)
    assert together == alone
    assert (counts.vision, counts.positions) == (1, [longest] + [1] * 109)


def test_thoughts_that_end_together_are_ended_in_one_step(model, processor, mixed):
    rows, _ = mixed
    model.generation_config.eos_token_id = STOPS
    tokenizer, sampling = processor.tokenizer, Sampling(max_new_tokens=110, thinking_budget=6)
    alone = [generate(model, batch([row]), tokenizer, sampling, thinking=True)[0] for row in rows]
    assert [len(found.ids) < 6 for found in alone] == [False, False, True, False, False]
    counts, longest = Counts(model), max(len(row["ids"]) for row in rows)
    together = generate(model, batch(rows), tokenizer, sampling, thinking=True)
    assert together == alone
    assert (counts.vision, counts.positions) == (1, [longest] + [1] * 5 + [88] + [1] * 16)


@pytest.fixture(scope="module")
def fluent(fluent_ovis) -> Any:
    return AutoModelForImageTextToText.from_pretrained(fluent_ovis).eval()


@pytest.fixture(scope="module")
def fluent_processor(fluent_ovis) -> Ovis2_5Processor:
    return Ovis2_5Processor.from_pretrained(fluent_ovis)


def test_a_thought_that_ends_in_time_is_left_alone_beside_one_that_does_not(
    fluent, fluent_processor, fluent_ovis
):
    model, processor = fluent, fluent_processor
    images = [
        Image.open(fluent_ovis / "images" / name) for name in ("digit_0605.png", "digit_0654.png")
    ]
    which = Turn("user", "<image>\n<image>\nWhich image shows the larger digit?")
    colours = [
        Turn("user", "Name a colour."),
        Turn("assistant", "Blue.", True),
        Turn("user", "And another one?"),
    ]
    read = [processor.image_processor.patches([picture], 64**2, 64**2) for picture in images]
    tokens = [processor.image_processor.visual_tokens(grid) for _, grid in read]
    long, short = (
        encode(render_prompt(turns, processor, enable_thinking=True), processor, seen).ids
        for turns, seen in (([which], tokens), (colours, []))
    )
    rows = [
        {
            "ids": long,
            "pixels": [torch.from_numpy(p) for p, _ in read],
            "grids": [g for _, g in read],
        },
        {"ids": short, "pixels": [], "grids": []},
    ]
    answers = [
        "<think>\nThe first shows 6, the second shows 5.\n</think>\n\n"
        "The first, since 6 is larger than 5.<|im_end|>",
        "<think>\nNot blue.\n</think>\n\nGreen.<|im_end|>",
    ]
    decode = processor.tokenizer.decode
    budget = len(processor.text_ids("<think>\nNot blue.\n</think>"))
    sampling = Sampling(max_new_tokens=200, thinking_budget=budget)
    alone = [
        generate(model, batch([row]), processor.tokenizer, sampling, thinking=True)[0]
        for row in rows
    ]
    assert decode(alone[1].ids) == answers[1]
    begun = decode(alone[0].ids[:budget])
    assert answers[0].startswith(begun) and "</think>" not in begun
    assert decode(alone[0].ids).startswith(begun + EARLY_STOP)
    assert generate(model, batch(rows), processor.tokenizer, sampling, thinking=True) == alone
    unbounded = Sampling(max_new_tokens=200)
    found = generate(model, batch(rows), processor.tokenizer, unbounded, thinking=True)
    assert [(decode(row.ids), row.ended) for row in found] == [(text, "stop") for text in answers]


# Ends.


def test_a_text_to_stop_at_ends_its_row_with_the_token_that_completes_it(model, processor, mixed):
    rows, _ = mixed
    plain = [one(model, row, processor, max_new_tokens=30).ids for row in rows]
    text = processor.tokenizer.decode(plain[1][:9])[-4:]
    assert len(processor.text_ids(text)) > 1
    sampling = Sampling(max_new_tokens=30)
    found = generate(
        model, batch(rows), processor.tokenizer, sampling, thinking=False, stop_at=["?!", text]
    )
    assert [row.ended for row in found] == ["length", "tool_call", "length", "length", "length"]
    assert found[1].ids == plain[1][:9]
    assert [row.ids for i, row in enumerate(found) if i != 1] == plain[:1] + plain[2:]


def test_without_a_stop_token_in_the_configs_that_of_the_tokenizer_ends_a_row(model, processor):
    row = prompt(processor, [Turn("user", "Hi")])
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    expected = one(model, row, processor, max_new_tokens=8).ids
    model.llm.generation_config.eos_token_id = None
    other = AutoTokenizer.from_pretrained(processor.tokenizer.name_or_path)
    other.eos_token = other.convert_ids_to_tokens(expected[3])
    [found] = generate(model, batch([row]), other, Sampling(max_new_tokens=8), thinking=False)
    assert (found.ids, found.ended) == (expected[: expected.index(expected[3]) + 1], "stop")


def test_more_tokens_than_the_model_has_positions_are_refused(model, processor, image):
    row = prompt(processor, [QUESTION], [image])
    model.config.llm_config.max_position_embeddings = 60
    assert len(one(model, row, processor, max_new_tokens=10).ids) == 10
    check_context(model, 50, 10)
    with pytest.raises(ModelError, match=r"its 50 tokens and up to 11 new ones .* 60 positions"):
        one(model, row, processor, max_new_tokens=11)


def test_text_that_ends_a_thought_needs_positions_of_its_row_too(model, processor):
    long, short = (prompt(processor, [Turn("user", text)]) for text in ("H" + "i" * 80, "Hi"))
    positions = len(short["ids"]) + 5 + 87
    budget = Sampling(max_new_tokens=6, thinking_budget=5)
    model.config.llm_config.max_position_embeddings = positions
    assert len(short["ids"]) + 50 < len(long["ids"]) < positions - 6
    inputs = batch([long, short])
    found = generate(model, inputs, processor.tokenizer, budget, thinking=[False, True])
    assert [len(row.ids) for row in found] == [6, 92]
    with pytest.raises(ModelError, match="tokens and up to 92 new ones are more than the"):
        generate(model, inputs, processor.tokenizer, budget, thinking=True)
    model.config.llm_config.max_position_embeddings -= 1
    with pytest.raises(ModelError, match=f"up to 92 new ones are more than the {positions - 1} "):
        one(model, short, processor, max_new_tokens=6, thinking_budget=5, thinking=True)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_without_numbers_is_an_error_and_the_others_go_on(model, processor, mixed, drawn):
    rows = mixed[0][:4]
    sampling = Sampling(max_new_tokens=12, do_sample=drawn, seed=1 if drawn else None)
    inputs = batch(rows)
    # The last row's image comes last.
    inputs["pixel_values"][-len(rows[3]["pixels"][0]) :] = torch.nan
    found = generate(model, inputs, processor.tokenizer, sampling, thinking=False)
    assert [row.ended for row in found] == ["length", "length", "length", "error"]
    assert found[3].ids == []
    assert str(found[3].error) == (
        "generation, row 4:\n  the logits are NaN or infinite after 0 new tokens.\n  Fix: run the "
        "model in the dtype it was trained in, or in float32, and look for NaN in its weights."
    )
    if not drawn:
        alone = [one(model, row, processor, max_new_tokens=12) for row in rows[:3]]
        assert found[:3] == alone


def test_a_model_that_breaks_while_it_writes_keeps_what_it_wrote(model, processor):
    row = prompt(processor, [Turn("user", "Hi")])
    expected = one(model, row, processor, max_new_tokens=6).ids
    assert expected[3] not in row["ids"] + expected[:3]
    with torch.no_grad():
        model.get_input_embeddings().weight[expected[3]] = torch.inf
    found = one(model, row, processor, max_new_tokens=6)
    assert (found.ids, found.ended) == (expected[:4], "error")
    with pytest.raises(ModelError, match="NaN or infinite after 4 new tokens"):
        raise found.error or AssertionError


# Settings.


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"thinking_budget": 0}, "thinking_budget"),
        ({"thinking_budget": 8, "max_new_tokens": 8}, "thinking_budget"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "top_p": 1.1}, "top_p"),
        ({"do_sample": True, "top_k": 0}, "top_k"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"top_k": 5}, "top_k"),
    ],
)
def test_settings_that_make_no_sense_or_no_difference_are_refused(settings, key):
    with pytest.raises(ConfigError) as refused:
        Sampling(**settings)
    assert refused.value.where == key


def test_a_seed_repeats_what_is_drawn_and_leaves_other_random_numbers_alone(model, processor):
    row = prompt(processor, [Turn("user", "Hi")])
    state = torch.get_rng_state()
    drawn = [
        one(model, row, processor, max_new_tokens=8, do_sample=True, temperature=2.0, seed=seed).ids
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_one_choice_left_of_many_is_the_likeliest(model, processor):
    row = prompt(processor, [Turn("user", "Hi")])
    greedy = one(model, row, processor, max_new_tokens=8).ids
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        found = one(model, row, processor, max_new_tokens=8, do_sample=True, **settings)
        assert found.ids == greedy, settings


def test_the_models_own_settings_count_unless_others_are_given(model, processor):
    row = prompt(processor, [Turn("user", "Hi")])
    plain = one(model, row, processor, max_new_tokens=30).ids
    model.generation_config.repetition_penalty = 1.8
    theirs = one(model, row, processor, max_new_tokens=30).ids
    again = model.generate(batch([row])["input_ids"], max_new_tokens=30, do_sample=False)
    assert theirs == again[0].tolist() != plain
    assert one(model, row, processor, max_new_tokens=30, repetition_penalty=1.0).ids == plain
    assert model.generation_config.repetition_penalty == 1.8


def test_a_penalty_counts_every_new_token_of_a_padded_row(model, processor, mixed):
    rows, _ = mixed
    penalty = {"max_new_tokens": 40, "repetition_penalty": 1.8}
    alone = [one(model, row, processor, **penalty) for row in rows]
    sampling = Sampling(**penalty)
    assert generate(model, batch(rows), processor.tokenizer, sampling, thinking=False) == alone


@pytest.mark.parametrize("family", ["ovis2_5", "qwen2_5_vl"])
def test_greedy_with_a_config_that_draws_says_nothing(
    model, other_family, processor, caplog, recwarn, family
):
    chosen = {"ovis2_5": model, "qwen2_5_vl": other_family}[family]
    row = prompt(processor, [Turn("user", "Hi")])
    plain = one(chosen, row, processor, max_new_tokens=4, repetition_penalty=1.05).ids
    drawing = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}
    chosen.generation_config.update(**drawing, repetition_penalty=1.05, max_length=500)
    host_logging.enable_propagation()
    try:
        assert one(chosen, row, processor, max_new_tokens=4).ids == plain
    finally:
        host_logging.disable_propagation()
    assert ([r.message for r in caplog.records], recwarn.list) == ([], [])


# Models in training, adapters, other families.


def test_a_model_in_training_generates_as_one_at_rest_and_goes_on_training(model, processor, mixed):
    rows, _ = mixed
    expected = generate(
        model, batch(rows), processor.tokenizer, Sampling(max_new_tokens=8), thinking=False
    )
    model.config.use_cache = model.generation_config.use_cache = False
    model.config.llm_config.attention_dropout = 0.9
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.9
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model.visual_tokenizer.eval()
    counts = Counts(model)
    found = generate(
        model, batch(rows), processor.tokenizer, Sampling(max_new_tokens=8), thinking=False
    )
    assert found == expected
    assert [n for n in counts.positions if n > 1] == [max(len(row["ids"]) for row in rows)]
    assert model.training and model.llm.training and not model.visual_tokenizer.training
    assert model.config.use_cache is False


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_model_with_an_adapter_gives_the_tokens_of_the_merged_one(model, processor, mixed, task):
    rows, thinks = mixed
    sampling = Sampling(max_new_tokens=100, thinking_budget=4)
    plain = generate(model, batch(rows), processor.tokenizer, sampling, thinking=thinks)
    layers = r"llm.*(q_proj|v_proj|up_proj)|visual_tokenizer\.vit.*out_proj"
    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=layers, task_type=task))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    found = generate(adapted, batch(rows), processor.tokenizer, sampling, thinking=thinks)
    merged = adapted.merge_and_unload()
    again = generate(merged, batch(rows), processor.tokenizer, sampling, thinking=thinks)
    assert found == again != plain


def test_another_family_that_gives_the_prompt_back_as_well(other_family, processor):
    pixels = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    counts = [0, 1, 2]
    seen = [torch.arange(48) // 16 == 3, torch.arange(48) < 16, torch.arange(48) >= 16]
    texts = ["Hi", "What is this now?", "And two"]
    ids = [
        ([332] + [330] * 4) * count + processor.text_ids(text)
        for count, text in zip(counts, texts, strict=True)
    ]

    def inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        made = batch([{"ids": ids[row], "pixels": [], "grids": []} for row in rows])
        made["mm_token_type_ids"] = (made["input_ids"] == 330).long()
        if any(counts[row] for row in rows):
            made["pixel_values"] = torch.cat([pixels[seen[row]] for row in rows])
            images = sum(counts[row] for row in rows)
            made["image_grid_thw"] = torch.tensor([[1, 4, 4]] * images)
        return made

    sampling, tokenizer = Sampling(max_new_tokens=95, thinking_budget=5), processor.tokenizer
    thinks = [True, False, True]
    alone = [
        generate(other_family, inputs([row]), tokenizer, sampling, thinking=thinks[row])[0]
        for row in range(3)
    ]
    early_stop = tokenizer(EARLY_STOP)["input_ids"]
    assert [found.ids[5:92] == early_stop for found in alone] == thinks
    encoded, read = [], []
    other_family.model.visual.register_forward_hook(lambda *_: encoded.append(1))
    layer = other_family.get_decoder().layers[0]
    layer.register_forward_hook(lambda _, given, output: read.append(given[0].shape[1]))
    other_family.config.use_cache = other_family.generation_config.use_cache = False
    assert generate(other_family, inputs([0, 1, 2]), tokenizer, sampling, thinking=thinks) == alone
    assert (len(encoded), read) == (1, [max(map(len, ids))] + [1] * 94)


# Streaming, and ranks that wait for each other.


def streamed(model: Any, row: dict[str, Any], tokenizer: Any, **settings) -> tuple[list[str], str]:
    """The pieces, and the text of all tokens together."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = Sampling(**settings)
    [found] = generate(model, batch([row]), tokenizer, sampling, thinking=True, streamer=streamer)
    return list(streamer), tokenizer.decode(found.ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings", [{"thinking_budget": 5, "max_new_tokens": 110}, {"max_new_tokens": 40}]
)
def test_the_pieces_of_a_stream_are_the_text(model, processor, settings):
    row = prompt(processor, [Turn("user", "Hi")], thinking=True)
    pieces, text = streamed(model, row, processor.tokenizer, **settings)
    assert "".join(pieces) == text
    assert len(pieces) > 5 and (EARLY_STOP in text) == ("thinking_budget" in settings)


class Breaking(TextIteratorStreamer):
    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.token_cache) > 7:
            raise BrokenPipeError


@pytest.mark.parametrize("hooked", [False, True])
def test_a_stream_that_nobody_reads_any_more_leaves_the_model_as_it_was(model, processor, hooked):
    row, tokenizer = prompt(processor, [Turn("user", "Hi")], thinking=True), processor.tokenizer
    settings = {"max_new_tokens": 110, "thinking_budget": 5}
    expected = one(model, row, processor, thinking=True, **settings)
    model.train()
    if hooked:  # as accelerate does it
        model.llm.forward = model.llm.forward
    before = dict(vars(model.llm))
    with pytest.raises(BrokenPipeError):
        generate(
            model,
            batch([row]),
            tokenizer,
            Sampling(**settings),
            thinking=True,
            streamer=Breaking(tokenizer, skip_prompt=True),
        )
    assert model.training and vars(model.llm) == before
    assert one(model, row, processor, thinking=True, **settings) == expected


def test_two_threads_on_one_model_take_turns(model, processor):
    rows = [prompt(processor, [Turn("user", text)], thinking=True) for text in ("Hi", "What now?")]
    settings = {"max_new_tokens": 100, "thinking_budget": 5, "thinking": True}
    expected = [one(model, row, processor, **settings) for row in rows]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda row: one(model, row, processor, **settings), rows * 2))
    assert found == expected * 2


def test_a_character_of_several_tokens_comes_in_one_piece(fluent, fluent_processor):
    turns = [Turn("system", "Be kind."), Turn("user", "Say hello.")]
    ids = encode(render_prompt(turns, fluent_processor), fluent_processor).ids
    row = {"ids": ids, "pixels": [], "grids": []}
    pieces, text = streamed(fluent, row, fluent_processor.tokenizer, max_new_tokens=60)
    assert "".join(pieces) == text == "Grüße, 你好 👋!"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(fluent_processor.text_ids("👋")) > 1


def test_a_rank_that_is_done_keeps_running_the_model_for_the_others(model, processor, tmp_path):
    row = prompt(processor, [Turn("user", "Hi")])
    counts = Counts(model)

    def run(rank: int, answers: Any) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2
        )
        sampling = Sampling(max_new_tokens=(3, 95)[rank], thinking_budget=(None, 4)[rank])
        [found] = generate(
            model, batch([row]), processor.tokenizer, sampling, thinking=True, synced=True
        )
        answers.put((rank, found.ids, len(counts.positions)))

    expected = one(model, row, processor, max_new_tokens=95, thinking_budget=4, thinking=True).ids
    counts.positions.clear()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=run, args=(rank, answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = sorted(answers.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert found == [(0, expected[:3], 95), (1, expected, 95)]
