"""The tool loop, with a model that has learned to crop, and with models that write what a script
says: the whole answer, what the tool is given, what the model is fed, and what goes wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmtune.collators.padded import PaddedCollator
from vlmtune.collators.sample import SampleEncoder
from vlmtune.core.errors import ConfigError, DataError
from vlmtune.data.conversation import parse_conversation
from vlmtune.inference.crop_tool import crop, to_pixels
from vlmtune.inference.generation import EARLY_STOP
from vlmtune.inference.request import Request, ask_about
from vlmtune.inference.sampling import Sampling
from vlmtune.inference.tools import TOOLS, _result, answer_with_tools, describe
from vlmtune.inference.vlm import Ovis25Inference

QUESTION = "Look closely. Which digit is this?"
CALL = "<tool_call>Crop [250, 125, 750, 875]</tool_call>"
SHOWN = "<tool_response><image></tool_response>"
LEARNED = f"I look.\n{CALL}{SHOWN}\nSeen closely, it is a four."
CROP = TOOLS["crop"]


@pytest.fixture(scope="module")
def fluent(fluent_ovis) -> Ovis25Inference:
    return Ovis25Inference(str(fluent_ovis))


class Scripted(Ovis25Inference):
    """A random model whose rounds begin with the texts of a script and end: their tokens, and the
    stop token behind them, are favoured by its generation config, of which only the tokens of the
    round are seen."""

    script: list[str]
    asked: list[tuple[Request, str]]

    def complete(self, request, sampling=None, **settings):
        self.asked.append((request, settings["begun"]))
        text = self.script[min(len(self.asked), len(self.script)) - 1]
        ids = [*self.processor.text_ids(text), self.processor.control_id("<|im_end|>")]
        contexts = [ids[max(0, i - 8) : i + 1] for i in range(len(ids))]
        bias = {tuple(context): 1000.0 * len(context) for context in contexts}
        self.model.generation_config.sequence_bias = [[[*c], value] for c, value in bias.items()]
        return super().complete(request, sampling, **settings)

    def own(self, *texts: str) -> list[int]:
        return [i for text in texts for i in self.processor.text_ids(text)]


@pytest.fixture(scope="module")
def random_model(tiny_ovis) -> Scripted:
    return Scripted(str(tiny_ovis), min_pixels=32**2, max_pixels=64**2)


@pytest.fixture
def scripted(random_model) -> Callable[..., Scripted]:
    """`scripted("One.", "Two.")` writes these in its rounds, the last one also in later ones."""

    def write(*script: str) -> Scripted:
        random_model.script, random_model.asked = list(script), []
        return random_model

    return write


@pytest.fixture
def digit(fluent_ovis) -> Path:
    return fluent_ovis / "images" / "digit_0675.png"


def pixels(image) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def reply_to(inference, tools, images=(), settings=None, **more):
    request = ask_about(QUESTION, images)
    sampling = Sampling(**{"max_new_tokens": 200, **(settings or {})})
    return answer_with_tools(inference, request, sampling, tools, **more)


def note(images, *arguments) -> str:
    return f"noted {list(arguments)}"


def test_answer_of_a_model_that_learned_to_crop_is_its_training_text(fluent, digit):
    reply = reply_to(fluent, [CROP], [digit])
    assert reply.text == reply.answer == LEARNED
    assert (reply.thinking, reply.unfinished_thought) == ("", False)
    assert (reply.ended, reply.tool_rounds, reply.error) == ("stop", 1, None)
    [cropped] = reply.images
    assert np.array_equal(pixels(cropped), pixels(digit)[8:56, 16:48])
    own = LEARNED.split(SHOWN)
    stop = fluent.processor.control_id("<|im_end|>")
    assert reply.tokens == [*(i for text in own for i in fluent.processor.text_ids(text)), stop]


def test_each_round_feeds_the_ids_and_pixels_of_the_training_sample_up_to_there(
    fluent, fluent_ovis, digit, monkeypatch
):
    fed, embed = [], fluent.model.embed

    def keep(ids, pixel_values, grids):
        if ids.shape[1] > 1:
            fed.append((ids, pixel_values, grids))
        return embed(ids, pixel_values, grids)

    monkeypatch.setattr(fluent.model, "embed", keep)
    reply_to(fluent, [CROP], [digit])
    [(first, _, _), (ids, pixel_values, grids)] = fed

    records = json.loads((fluent_ovis / "records.json").read_text("utf-8"))
    [record] = [record for record in records if record["id"] == "crop"]
    limits = fluent.prompts.settings.limits
    encoder = SampleEncoder(fluent.processor, limits, 4096, 4096)
    conversation = parse_conversation(record, "records.json", 1, str(digit.parent))
    batch = PaddedCollator(encoder)([encoder.row(conversation)])
    sample, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    end = sample.index(fluent.processor.control_id("</tool_response>")) + 1
    assert ids.tolist() == [sample[:end]]
    assert torch.equal(grids, batch["grid_thws"])
    trained_on = fluent.processor.image_processor.normalise(batch["pixel_values"])
    assert torch.equal(pixel_values, trained_on)
    prefix = next(i for i, label in enumerate(labels) if label != -100)
    assert first.tolist() == [sample[:prefix]]


def test_what_is_streamed_is_the_text_responses_included(fluent, digit):
    pieces = []
    reply = reply_to(fluent, [CROP], [digit], on_text=pieces.append)
    assert "".join(pieces) == reply.text == LEARNED
    place = pieces.index(SHOWN)
    assert "".join(pieces[:place]) == f"I look.\n{CALL}"
    assert len([piece for piece in pieces[place:] if piece]) > 2

    stream = fluent.stream(ask_about(QUESTION, [digit]), Sampling(200), tools=[CROP])
    assert "".join(stream) == stream.reply.text == LEARNED
    assert len(stream.reply.images) == 1


def test_the_method_for_one_image_uses_tools(fluent, digit):
    reply = fluent.single_image_inference(digit, QUESTION, tools=[CROP], max_new_tokens=200)
    assert (reply.text, reply.tool_rounds) == (LEARNED, 1)


def test_chat_keeps_what_the_tool_showed_for_the_next_turn(fluent, digit):
    chat = fluent.chat()
    reply = chat.send(QUESTION, [digit], tools=[CROP], max_new_tokens=200)
    assert chat.history[-1].text == LEARNED
    assert [pixels(image).shape for image in chat.images] == [(64, 64), (48, 32)]
    assert chat.images[1] is reply.images[0]
    assert chat.send("And now?", max_new_tokens=4).error is None


def test_text_of_a_tool_stands_as_its_response(scripted):
    model = scripted('So <tool_call>note [1, "a"]</tool_call>', "Done.")
    reply = reply_to(model, [note])
    response = "<tool_response>noted [1, 'a']</tool_response>"
    assert reply.text == f'So <tool_call>note [1, "a"]</tool_call>{response}Done.'
    assert (reply.ended, reply.tool_rounds, reply.images) == ("stop", 1, [])


def test_call_is_answered_where_the_model_would_end_its_turn_behind_it(scripted):
    call = "<tool_call>note []</tool_call>"
    model = scripted(call, "Done.")
    unpaused = model.complete(ask_about(QUESTION), Sampling(99), begun="")[0]
    assert (unpaused.ended, unpaused.ids[:-1]) == ("stop", model.own(call))
    reply = reply_to(scripted(call, "Done."), [note])
    assert reply.text == f"{call}<tool_response>noted []</tool_response>Done."


NO_CALL = "a call is the name of a tool and a JSON list of arguments."


def fails(images):
    raise RuntimeError("no\n  network")


def marks(images):
    return "an <image>"


def marks_in_its_error(images):
    raise ValueError("</tool_response>")


@pytest.mark.parametrize(
    ("call", "response"),
    [
        pytest.param(
            "Zoom [1]",
            "there is no tool Zoom. There is Crop, fails, marks, marks_in_its_error.",
            id="unknown",
        ),
        pytest.param("Crop 1, 2, 3, 4", NO_CALL, id="no-list"),
        pytest.param("Crop [1, 2, 3, 4", NO_CALL, id="open-list"),
        pytest.param("Crop [1, 2, 3 4]", NO_CALL, id="no-json"),
        pytest.param('{"name": "Crop"}', NO_CALL, id="object"),
        pytest.param("", NO_CALL, id="empty"),
        pytest.param("Crop", NO_CALL, id="name-alone"),
        pytest.param(
            "Crop [1, 2]",
            "TypeError: Crop() missing 2 required positional arguments: 'x2' and 'y2'",
            id="too-few-arguments",
        ),
        pytest.param(
            "Crop [1000, 0, 1200, 9]",
            "box [1000, 0, 1200, 9]: lies outside the image of 64 x 64 pixels. "
            "Fix: write thousandths of its sides.",
            id="outside",
        ),
        pytest.param(
            "Crop [0, 0, 1, 1, 2]",
            "Crop: there is no image 2. Fix: write a number from 1 to 1, or none.",
            id="image-number",
        ),
        pytest.param("fails []", "RuntimeError: no network", id="tool-raises"),
        pytest.param(
            "marks []",
            "the text of marks holds a tag of an image, a thought or a response.",
            id="mark-in-the-text",
        ),
        pytest.param(
            "marks_in_its_error []",
            "the text of marks_in_its_error holds a tag of an image, a thought or a response.",
            id="tag-in-the-error",
        ),
    ],
)
def test_model_is_told_why_its_call_failed_and_goes_on(scripted, digit, call, response):
    model = scripted(f"<tool_call>{call}</tool_call>", "Well.")
    tools = [CROP, fails, marks, marks_in_its_error]
    reply = reply_to(model, tools, [digit])
    told = f"<tool_response>Error: {response}</tool_response>"
    assert reply.text == f"<tool_call>{call}</tool_call>{told}Well."
    assert (reply.ended, reply.tool_rounds, reply.images) == ("stop", 1, [])


def test_every_call_of_an_answer_is_run_with_its_own_arguments(scripted):
    calls = [f"<tool_call>note [{n}]</tool_call>" for n in range(3)]
    reply = reply_to(scripted(*calls, "Done."), [note])
    parts = [f"{call}<tool_response>noted [{n}]</tool_response>" for n, call in enumerate(calls)]
    assert reply.text == "".join([*parts, "Done."])
    assert (reply.ended, reply.tool_rounds) == ("stop", 3)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_call_after_the_last_round_is_not_run_and_ends_the_answer(scripted, rounds):
    call, run = "<tool_call>count []</tool_call>", []

    def count(images):
        run.append(1)
        return str(len(run))

    reply = reply_to(scripted(call), [count], max_rounds=rounds)
    parts = [f"{call}<tool_response>{n}</tool_response>" for n in range(1, rounds + 1)]
    assert reply.text == "".join([*parts, call])
    assert (reply.ended, reply.tool_rounds, len(run)) == ("tool_rounds", rounds, rounds)


def test_new_tokens_are_counted_over_all_rounds_without_responses(scripted):
    call, rest = "a<tool_call>note [1]</tool_call>", "b c d e f"
    first = f"{call}<tool_response>noted [1]</tool_response>"
    model = scripted(call, rest)
    whole = model.own(call, rest)
    length = len(model.own(call))
    for limit in (length - 1, length, length + 1, len(whole), len(whole) + 1):
        reply = reply_to(scripted(call, rest), [note], settings={"max_new_tokens": limit})
        assert reply.tokens[: len(whole)] == whole[:limit]
        assert len(reply.tokens) == limit
        assert reply.ended == ("stop" if limit > len(whole) else "length")
        assert reply.tool_rounds == (limit >= length)
        assert len(model.asked) == 1 + (limit > length)
    assert reply.text == first + rest


THOUGHT_CALL = "<think>Hm.<tool_call>note []</tool_call>"
NOTED = "<tool_response>noted []</tool_response>"


def test_call_within_a_thought_is_answered_there_and_the_thought_goes_on(scripted):
    model = scripted(THOUGHT_CALL, "Ah.</think>Yes. <tool_call>note []</tool_call>", "No.")
    reply = reply_to(model, [note], enable_thinking=True)
    called = "<tool_call>note []</tool_call>"
    assert reply.thinking == f"Hm.{called}{NOTED}Ah."
    assert reply.answer == f"Yes. {called}{NOTED}No."
    assert (reply.ended, reply.unfinished_thought, reply.tool_rounds) == ("stop", False, 2)


def test_budget_ends_a_thought_before_its_call_is_whole(scripted):
    model = scripted(THOUGHT_CALL)
    budget = len(model.own("<think>Hm.<tool_call>note"))
    limit = budget + len(model.own(EARLY_STOP))
    settings = {"thinking_budget": budget, "max_new_tokens": limit}
    reply = reply_to(model, [note], settings=settings, enable_thinking=True)
    assert reply.text == f"<think>Hm.<tool_call>note{EARLY_STOP}"
    assert (reply.ended, reply.tool_rounds, len(reply.tokens)) == ("length", 0, limit)


@pytest.mark.parametrize("spare", [0, 1, 3])
def test_budget_counts_the_models_tokens_of_all_rounds(scripted, spare):
    rest = "one two three"
    model = scripted(THOUGHT_CALL, rest)
    own = model.own(THOUGHT_CALL, rest)
    budget = len(model.own(THOUGHT_CALL)) + spare
    limit = budget + len(model.own(EARLY_STOP))
    settings = {"thinking_budget": budget, "max_new_tokens": limit}
    reply = reply_to(model, [note], settings=settings, enable_thinking=True)
    written = model.tokenizer.decode(own[budget - spare : budget])
    assert reply.text == f"{THOUGHT_CALL}{NOTED}{written}{EARLY_STOP}"
    assert reply.tokens == [*own[:budget], *model.own(EARLY_STOP)]
    assert (reply.ended, reply.unfinished_thought) == ("length", False)
    assert len(model.asked) == 1 + (spare > 0)


def test_answer_behind_a_thought_is_not_cut_by_the_budget(scripted):
    answer = "one two three four five six"
    model = scripted(THOUGHT_CALL, f"</think>{answer}<tool_call>note []</tool_call>", answer)
    budget = len(model.own(THOUGHT_CALL)) + 2
    reply = reply_to(model, [note], settings={"thinking_budget": budget}, enable_thinking=True)
    called = f"<tool_call>note []</tool_call>{NOTED}"
    assert reply.text == f"<think>Hm.{called}</think>{answer}{called}{answer}"
    plain = reply_to(scripted(called, answer), [note], settings={"thinking_budget": 1})
    assert plain.ended == "stop"


def test_tool_is_given_all_images_as_they_were_given_and_then_what_tools_showed(scripted, tmp_path):
    files = [tmp_path / "wide.png", tmp_path / "high.png"]
    for file, size in zip(files, [(150, 40), (30, 90)], strict=True):
        Image.effect_noise(size, 64).convert("RGB").save(file)
    seen = []

    def zoom(images, *box):
        seen.append([pixels(image) for image in images])
        return CROP(images, *box)

    calls = ["zoom [0, 0, 500, 500]", "zoom [500, 0, 1000, 1000]", "zoom [100, 0, 300, 1000, 1]"]
    model = scripted(*(f"<tool_call>{call}</tool_call>" for call in calls), "Done.")
    reply = reply_to(model, [zoom], files)
    assert reply.text.count(SHOWN) == 3
    wide, high = map(pixels, files)
    quarter = high[:45, :15]
    # The middle of its 15 columns belongs to both halves.
    shown = [quarter, quarter[:, 7:], wide[:, 15:45]]
    assert all(map(np.array_equal, map(pixels, reply.images), shown))
    assert [len(images) for images in seen] == [2, 3, 4]
    assert all(map(np.array_equal, seen[2], [wide, high, *shown[:2]]))
    assert [len(request.images) for request, _ in model.asked] == [2, 3, 4, 5]
    assert model.asked[1][1] == f"<tool_call>{calls[0]}</tool_call>{SHOWN}"


def test_tool_of_ones_own_can_read_boxes_in_pixels_of_what_the_model_saw(scripted):
    image, sizes = Image.effect_noise((150, 40), 64).convert("RGB"), []

    def region(images, *box):
        low, high = model.prompts.settings.limits.for_images(len(images))
        processor = model.processor.image_processor
        _, rows, columns = processor.grid(images[0].height, images[0].width, low, high)
        sizes.append((columns * processor.patch_size, rows * processor.patch_size))
        seen = to_pixels(box, images[0].size, resized=sizes[0], unit="pixels")
        return crop(images[0], seen, margin=0.1)

    model = scripted("<tool_call>region [56, 8, 112, 16]</tool_call>", "Done.")
    [shown] = reply_to(model, [region], [image]).images
    assert sizes == [(112, 32)]
    # 56 and 112 of 112 pixels are 75 and 150 of 150, 8 and 16 of 32 are 10 and 20 of 40.
    assert np.array_equal(pixels(shown), pixels(image)[9:21, 67:150])


def test_images_of_a_tool_beside_a_video_are_refused_as_the_model_sees_none_so(scripted, digit):
    def still(images):
        return Image.new("RGB", (8, 8))

    model = scripted("<tool_call>still []</tool_call>", "Well.")
    request = ask_about(QUESTION, video=[digit, digit])
    reply = answer_with_tools(model, request, Sampling(99), [still])
    told = "<tool_response>Error: an image cannot be shown beside a video.</tool_response>"
    assert reply.text == f"<tool_call>still []</tool_call>{told}Well."
    assert reply.images == []


def test_tool_that_returns_neither_image_nor_text_is_a_mistake_of_its_author(scripted):
    def nothing(images):
        return None

    with pytest.raises(ConfigError) as error:
        reply_to(scripted("<tool_call>nothing []</tool_call>"), [nothing])
    assert error.value.where == "tool nothing"
    assert error.value.what == "returned NoneType."


def test_image_that_cannot_be_read_is_an_error_before_anything_is_written(scripted, tmp_path):
    model, pieces = scripted("<tool_call>note []</tool_call>"), []
    with pytest.raises(DataError) as error:
        reply_to(model, [note], [tmp_path / "gone.png"], on_text=pieces.append)
    assert error.value.what == f"{tmp_path / 'gone.png'} does not exist."
    assert pieces == []


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_answer_in_which_the_model_writes_a_mark_itself_ends_at_its_next_call(scripted, mark):
    text = f"An {mark}. <tool_call>note []</tool_call>"
    reply = reply_to(scripted(text), [note])
    assert (reply.text, reply.ended, reply.tool_rounds) == (text, "tool_call", 0)


def test_list_nested_too_deeply_is_no_call():
    assert _result([note], "note " + "[" * 9999 + "]" * 9999, []) == f"Error: {NO_CALL}"
    assert _result([note], f"note [{'1' * 9999}]", []) == f"Error: {NO_CALL}"


def test_tools_are_described_by_name_and_docstring():
    def look(images, word):
        """Look [word] looks a word up.

        In a book.
        """
        return word

    assert describe([CROP, look]) == (
        "You can call tools: <tool_call>NAME [arguments]</tool_call>, with a JSON list of "
        "arguments. The result follows as <tool_response>result</tool_response>.\n"
        "- Crop: Crop [x1, y1, x2, y2] shows that part of the last image, in thousandths of its "
        "width and height; Crop [x1, y1, x2, y2, n] shows that part of the n-th image.\n"
        "- look: Look [word] looks a word up. In a book."
    )
    with pytest.raises(ConfigError) as error:
        describe([note])
    assert error.value.where == "tool note"
