"""Questions, batches, streams and chats, with a model whose answers are known."""

import _thread
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmtune.core.errors import ConfigError, DataError, ModelError, TrainingError
from vlmtune.data.conversation import Turn, parse_conversation
from vlmtune.data.images import PixelLimits
from vlmtune.inference import Ovis25Inference, Reply, Request, Sampling, VLMInference, ask_about
from vlmtune.inference.generation import EARLY_STOP
from vlmtune.inference.prompts import OvisPrompts, PromptSettings
from vlmtune.inference.tools import TOOLS
from vlmtune.inference.vlm import ground

DIGIT, LARGER = "Which digit is this?", "Which image shows the larger digit?"
THOUGHT = "<think>\nThe first shows 6, the second shows 5.\n</think>\n\n"
GREETING = "Grüße, 你好 👋!"


@pytest.fixture(scope="module")
def ovis(fluent_ovis) -> Ovis25Inference:
    return Ovis25Inference(str(fluent_ovis))


@pytest.fixture(scope="module")
def image(fluent_ovis) -> Path:
    return fluent_ovis / "images" / "digit_0675.png"


@pytest.fixture(scope="module")
def pair(fluent_ovis) -> list[Path]:
    return [fluent_ovis / "images" / f"digit_0{n}.png" for n in (605, 654)]


@pytest.fixture(scope="module")
def records(fluent_ovis) -> dict[str, Any]:
    found = json.loads((fluent_ovis / "records.json").read_text("utf-8"))
    folder = str(fluent_ovis / "images")
    return {r["id"]: parse_conversation(r, "r.json", i, folder) for i, r in enumerate(found, 1)}


@pytest.fixture(scope="module")
def endless(tiny_ovis) -> VLMInference:
    """A random model that no token stops."""
    inference = VLMInference(str(tiny_ovis), min_pixels=64**2, max_pixels=64**2)
    inference.model.generation_config.eos_token_id = [len(inference.tokenizer) - 20]
    return inference


@pytest.fixture
def babbling(checkpoint) -> VLMInference:
    """A random model that says something else to everyone."""
    return VLMInference(str(checkpoint()), min_pixels=256, max_pixels=2304)


@pytest.fixture
def steps(endless):
    """Counts the model's steps."""
    counted = []
    hook = endless.model.llm.register_forward_pre_hook(lambda *_: counted.append(1))
    yield counted
    hook.remove()


def streaming() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vlmtune-stream"]


def test_importing_the_package_does_not_import_torch():
    code = "import sys, vlmtune.inference; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from vlmtune.inference import Nothing  # type: ignore[attr-defined]  # noqa: F401


def test_questions_get_the_answers_that_were_trained(ovis, image, pair):
    reply = ovis.single_image_inference(image, DIGIT)
    assert (reply.text, reply.answer, reply.ended) == ("It is a four.", "It is a four.", "stop")
    assert ovis.tokenizer.decode(reply.tokens) == "It is a four.<|im_end|>"
    assert ovis.multi_image_inference(pair, LARGER).answer == "The first image."
    reply = ovis.multi_image_inference(pair, LARGER, enable_thinking=True)
    assert reply.thinking == "The first shows 6, the second shows 5."
    assert reply.answer == "The first, since 6 is larger than 5."
    assert reply.text == f"{THOUGHT}{reply.answer}"
    assert ovis.multi_image_inference(image, DIGIT).answer == "It is a four."
    assert ovis.text_only_inference("Name a colour.").answer == "Blue."
    assert ovis.text_only_inference("Say hello.", system="Be kind.").answer == GREETING


@pytest.mark.parametrize("form", [str, Path.read_bytes, Image.open])
def test_image_may_be_given_in_any_form(ovis, image, form):
    assert ovis.single_image_inference(form(image), DIGIT).answer == "It is a four."


def test_thought_is_ended_at_its_budget(ovis, pair):
    reply = ovis.multi_image_inference(pair, LARGER, enable_thinking=True, thinking_budget=5)
    assert reply.thinking.startswith("The first")
    assert reply.thinking.endswith("the solution based on the thinking directly now.")
    same = ovis.multi_image_inference(pair, LARGER, thinking_budget=5)
    assert same.answer == "The first image."


def test_video_is_asked_about_by_its_frames(ovis, image, pair):
    frames = [*pair, image]
    reply = ovis.video_inference(frames, "What moves?", max_new_tokens=6)
    request = Request([Turn("user", "<video>\nWhat moves?")], video=frames)
    assert ovis.answer([request], Sampling(max_new_tokens=6)) == [reply]
    batch = ovis.prompts.batch([ovis.prompts.encode(request)])
    assert batch["grid_thws"].tolist() == [[2, 8, 8]]


def test_boxes_are_pixels_of_the_image_that_was_given(ovis, image, tmp_path):
    found = ovis.grounding_inference(image, "Where is the digit?")
    assert found.reply.answer == "At <box>(250,125),(750,875)</box>."
    assert (found.boxes, found.points, found.faults) == ([(16, 8, 48, 56)], [], [])
    with Image.open(image) as small:
        small.resize((192, 128)).save(tmp_path / "large.png")
    found = ovis.grounding_inference(tmp_path / "large.png", "Where is the digit?")
    assert found.boxes == [(48, 16, 144, 112)]


def test_boxes_in_pixels_are_those_of_the_image_as_the_model_sees_it(ovis, image, tmp_path):
    with Image.open(image) as small:
        small.resize((320, 192)).save(tmp_path / "wide.png")
    limits = PixelLimits(1024, 3000, 1024, 3000, 1024, 3000, 2, 2)
    inference = VLMInference.of(ovis.model, ovis.processor, PromptSettings(limits))
    assert inference.prompts.seen_size((320, 192), 1) == (64, 32)  # a fifth and a sixth
    text = "<box>(8,16),(24,24)</box><box>64.5,0,70,9</box><point>(63, 31)</point>"
    inference.respond = lambda *_, **__: Reply.of(text, [], "stop")
    found = inference.grounding_inference(tmp_path / "wide.png", "Where?", unit="pixels")
    assert (found.boxes, found.points) == ([(40, 96, 120, 144)], [(315, 186)])
    assert [fault.what[:12] for fault in found.faults] == ["lies outside"]
    with pytest.raises(ConfigError, match='unit:\n  "px" is unknown'):
        ovis.grounding_inference(image, "Where?", unit="px")  # type: ignore[arg-type]


def test_boxes_that_are_none_are_told_of():
    text = "<think><box>1,2,3,4</box></think><box>0.5,0,1,1</box><point>(500, 250)</point>"
    found = ground(Reply.of(f"{text}<box>9,9,1,1</box>", [], "stop"), (64, 48))
    assert found.boxes == [(32, 0, 64, 48)]
    assert found.points == [(32, 12)]
    assert [fault.where for fault in found.faults] == ["box [9.0, 9.0, 1.0, 1.0]"]


def test_batch_gives_what_each_request_gives_alone_and_tells_of_bad_ones(
    ovis, image, pair, records
):
    requests = [
        {"prompt": DIGIT, "image": str(image)},
        {"prompt": DIGIT, "image": "gone.png"},
        {"prompt": LARGER, "image": pair},
        {"prompt": "Say hello.", "system": "Be kind."},
        {"prompt": "Name a colour. " * 50},
        Request.of(records["colours"]),
        {"prompt": "Name a colour.", "imagee": str(image)},
        {"image": str(image)},
        {"prompt": "Which?", "image": str(image), "images": pair},
        {"prompt": "What moves?", "video": []},
        {"prompt": DIGIT, "images": [3]},
        "Name a colour.",
    ]
    almost_all = 40_960 - 150
    replies = ovis.batch_inference(requests, batch_size=4, max_new_tokens=almost_all)
    assert [reply.answer for reply in replies] == [
        *("It is a four.", "", "The first image.", GREETING, "", "Blue was the first."),
        *("", "", "", "", "", ""),
    ]
    errors = {i: reply.error for i, reply in enumerate(replies) if reply.ended == "error"}
    assert list(errors) == [1, 4, 6, 7, 8, 9, 10, 11]
    assert errors[1].startswith("requests[1], image: gone.png does not exist. Fix: ")
    assert errors[4].startswith("requests[4]: its ")
    assert errors[6].startswith('requests[6]: has an unknown key "imagee".')
    assert errors[7].startswith('requests[7]: has no "prompt".')
    assert errors[8].startswith('requests[8]: has both "image" and "images".')
    assert errors[9].startswith("requests[9], video: has no frames.")
    assert errors[10].startswith("requests[10], image: int is no image.")
    assert errors[11].startswith("requests[11]: str is no request.")
    for i in (0, 2, 3, 5):
        assert ovis.batch_inference([requests[i]]) == [replies[i]]
    one = {"prompt": DIGIT, "images": str(image)}
    assert ovis.batch_inference([one]) == replies[:1]
    assert ovis.batch_inference([]) == []
    with pytest.raises(ConfigError, match="batch_size"):
        ovis.batch_inference(requests, batch_size=0)


def test_rows_that_think_and_rows_that_do_not_share_a_batch(ovis, pair):
    request = ask_about(LARGER, pair)
    budget = Sampling(thinking_budget=5)
    plain, thought = ovis.answer([request] * 2, enable_thinking=[False, True])
    assert (plain.text, thought.thinking[:9]) == ("The first image.", "The first")
    gone = ask_about(LARGER, ["gone.png", "gone.png"])
    asked, thinks = [gone, request, request], [True, False, True]
    _, plain, ended = ovis.answer(asked, budget, enable_thinking=thinks)
    assert plain.text == "The first image."
    assert [ended] == ovis.answer([request], budget, enable_thinking=True)


def test_random_model_gives_the_same_tokens_in_a_batch(babbling, image, pair):
    requests = [
        ask_about(LARGER, [*pair, image]),
        ask_about("Five?"),
        ask_about("Is it a 4, or what else could it be?", [image]),
        ask_about("What moves?", video=pair),
    ]
    sampling = Sampling(max_new_tokens=12)
    together = babbling.answer(requests, sampling)
    assert together == [babbling.answer([request], sampling)[0] for request in requests]
    assert len({tuple(reply.tokens) for reply in together}) == 3


@pytest.mark.parametrize(
    "name",
    ["no_thinking", "thinking_unbounded", "thinking_budget_5", "thinking_budget_exhausted"],
)
def test_text_is_that_of_the_reference(babbling, ovis_goldens, name):
    recorded = json.loads((ovis_goldens / "full_single_untied/generation.json").read_text("utf-8"))
    given = recorded[name]["arguments"]
    prompt = given["prompt"].removeprefix("<image>\n")
    settings = {key: given[key] for key in ("enable_thinking", "max_new_tokens")}
    settings["thinking_budget"] = given.get("thinking_budget")
    image = ovis_goldens / "preprocess/images" / given["image"]
    reply = babbling.single_image_inference(image, prompt, **settings)
    assert reply.text.strip() == recorded[name]["response"]


def test_second_turn_is_that_of_the_reference(checkpoint, ovis_goldens):
    recorded = json.loads((ovis_goldens / "full_single_untied/generation.json").read_text("utf-8"))
    inference = Ovis25Inference(
        str(checkpoint()), min_pixels=256, max_pixels=2304, thinking_format="last_turn"
    )
    image = ovis_goldens / "preprocess/images/grad_40x70.png"
    history = [Turn("user", "<image>\nWhat is in the image?"), Turn("assistant", "A square.")]
    request = ask_about("How many?", [image], history=history)
    [reply] = inference.answer([request], Sampling(max_new_tokens=4))
    assert reply.tokens == recorded["two_turn_history"]["second_call"]["output_ids"]


def test_adapter_is_put_on_top_and_prompts_are_those_of_its_run(fluent_ovis, ovis, image, tmp_path):
    adapted = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(fluent_ovis),
        LoraConfig(r=2, target_modules="all-linear"),
    )
    adapted.save_pretrained(tmp_path)
    run = json.loads((fluent_ovis / "vlmtune_run.json").read_text("utf-8"))
    run["config"]["thinking"] = "last_turn"
    (tmp_path / "vlmtune_run.json").write_text(json.dumps(run), "utf-8")
    for inference in (
        Ovis25Inference(str(fluent_ovis), str(tmp_path)),
        Ovis25Inference(str(fluent_ovis), [f"{tmp_path}:0.5"]),
        Ovis25Inference(str(tmp_path)),
    ):
        assert isinstance(inference.model, PeftModel)
        assert inference.prompts.settings.thinking == "last_turn"
        reply = inference.single_image_inference(image, DIGIT)
        assert reply == ovis.single_image_inference(image, DIGIT)


def test_one_question_that_cannot_be_answered_is_an_error(ovis, image):
    with pytest.raises(DataError, match=r"request, image:\n  gone.png does not exist"):
        ovis.single_image_inference("gone.png", DIGIT)
    with pytest.raises(ModelError, match=r"request:\n  its \d+ tokens and up to 40,958 new"):
        ovis.text_only_inference("Name a colour.", max_new_tokens=40_958)
    with pytest.raises(ConfigError, match="thinking_budget"):
        ovis.single_image_inference(image, DIGIT, thinking_budget=9, max_new_tokens=9)
    with pytest.raises(ConfigError, match='thinking_format:\n  "last" is unknown'):
        Ovis25Inference("gone", thinking_format="last")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temprature"):
        ovis.single_image_inference(image, DIGIT, temprature=1.0)


def test_row_without_numbers_is_told_by_the_place_of_its_request(babbling):
    [token] = babbling.processor.text_ids("x")
    babbling.model.get_input_embeddings().weight[token] = torch.nan
    prompts = [{"prompt": "?", "image": "gone.png"}, {"prompt": "Five?"}, {"prompt": "x"}]
    replies = babbling.batch_inference([*prompts, ask_about("x")], max_new_tokens=2)
    assert [reply.error and reply.error.split(": ")[0] for reply in replies] == [
        *("requests[0], image", None, "requests[2]", "requests[3]")
    ]
    with pytest.raises(ModelError, match=r"request:\n  the logits are NaN"):
        babbling.text_only_inference("x")


def test_gpu_without_memory_is_an_error_that_says_what_to_lower(endless):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")

    hook = endless.model.llm.register_forward_pre_hook(full)
    try:
        with pytest.raises(TrainingError, match=r"request:\n  .* allocate 2 GiB\.\n  Fix: lower "):
            endless.text_only_inference("Five?")
        requests = [{"prompt": "?", "image": "gone.png"}] * 2 + [{"prompt": "Five?"}] * 3
        with pytest.raises(TrainingError, match=r"requests\[2\] to \[3\]:\n .*\n .* batch_size"):
            endless.batch_inference(requests, batch_size=2)
    finally:
        hook.remove()


def test_rank_without_a_readable_request_keeps_step(endless, steps, tmp_path):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sampling = Sampling(max_new_tokens=3)
        [reply] = endless.answer([ask_about("?", ["gone.png"])], sampling, synced=True)
        assert (reply.ended, len(steps)) == ("error", 3)
        assert endless.answer([], sampling, synced=True) == []
        assert len(steps) == 6
        endless.answer([], sampling)
        assert len(steps) == 6
    finally:
        torch.distributed.destroy_process_group()


def test_model_that_is_there_already_is_used_as_it_is(ovis, fluent_ovis, image):
    model = AutoModelForImageTextToText.from_pretrained(fluent_ovis).train()
    processor = AutoProcessor.from_pretrained(fluent_ovis)
    inference = VLMInference.of(model, processor, ovis.prompts.settings)
    assert type(inference) is VLMInference
    request = ask_about(DIGIT, [image])
    assert inference.answer([request]) == ovis.answer([request])
    assert model.training


def test_settings_are_those_of_the_run_beside_the_model_unless_others_are_given(ovis, fluent_ovis):
    assert ovis.prompts.settings.limits.for_images(2) == (64 * 64, 64 * 64)
    assert ovis.prompts.settings.thinking == "every_turn"
    other = Ovis25Inference(str(fluent_ovis), max_pixels=8192, thinking_format="as_is")
    assert other.prompts.settings.limits.for_images(1) == (64 * 64, 8192)
    assert other.prompts.settings.thinking == "as_is"
    assert isinstance(other.prompts, OvisPrompts)


def test_pieces_of_a_stream_are_its_reply(ovis, babbling, image):
    stream = ovis.single_image_inference_streaming(image, DIGIT)
    assert streaming() == []
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == "It is a four."
    assert stream.reply == ovis.single_image_inference(image, DIGIT)
    assert list(stream) == []
    greeting = ovis.stream(ask_about("Say hello.", system="Be kind."))
    assert len(pieces := list(greeting)) > 5
    assert "".join(pieces) == greeting.reply.text == GREETING
    noise = babbling.stream(ask_about("Five?"), Sampling(max_new_tokens=60))
    assert "".join(noise) == noise.reply.text
    assert "\ufffd" in noise.reply.text
    assert ovis.stream(ask_about("Name a colour.")).reply.text == "Blue."
    assert streaming() == []


def test_error_while_generating_is_raised_to_the_reader(endless, image):
    for request, error in (
        (ask_about("?", ["gone.png"]), DataError),
        (ask_about("Five?"), ModelError),
    ):
        stream = endless.stream(request, Sampling(max_new_tokens=40_958))
        with pytest.raises(error):
            list(stream)
        with pytest.raises(error):
            _ = stream.reply

    def fail(*_):
        raise ZeroDivisionError("in the third step")

    stream = endless.stream(ask_about("Five?"), Sampling(max_new_tokens=50))
    reader = iter(stream)
    next(reader)
    hook = endless.model.llm.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        list(reader)
    hook.remove()
    assert streaming() == []


LONG = Sampling(max_new_tokens=20_000)


def test_generation_ends_when_the_reader_leaves(endless, steps):
    stream = endless.stream(ask_about("Five?"), LONG)
    for _ in stream:
        break
    assert streaming() == []
    assert len(steps) < 500
    with pytest.raises(ModelError, match="it was closed before the reply was whole"):
        _ = stream.reply
    stream = endless.stream(ask_about("Five?"), LONG)
    with pytest.raises(KeyError):
        for _ in stream:
            raise KeyError
    assert streaming() == []
    stream = endless.stream(ask_about("Five?"), LONG)
    reader = iter(stream)
    next(reader)
    stream.close()
    assert streaming() == []
    stopped = len(steps)
    time.sleep(0.1)
    assert len(steps) == stopped < 1000
    unread = endless.stream(ask_about("Five?"), LONG)
    unread.close()
    assert list(unread) == []


def test_interrupt_while_waiting_for_text_ends_generation(endless, steps):
    stream = endless.stream(ask_about("Five?"), LONG)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    timer.join()
    assert streaming() == []
    assert 0 < len(steps) < 2000


def test_chat_keeps_its_history_in_the_training_form(ovis, records):
    chat = ovis.chat()
    assert chat.send("Name a colour.").answer == "Blue."
    stream = chat.stream("And another one?", enable_thinking=True)
    assert "".join(stream) == "<think>\nNot blue.\n</think>\n\nGreen."
    assert chat.send("Which was the first?").answer == "Blue was the first."
    assert chat.history == records["colours"].turns
    chat.clear()
    assert (chat.history, chat.images, chat.video) == ([], [], None)
    chat = ovis.chat("Be kind.")
    assert chat.send("Say hello.").answer == GREETING
    assert chat.history == records["greeting"].turns
    chat.clear()
    assert chat.history == records["greeting"].turns[:1]


def test_turn_of_a_chat_is_asked_as_the_record_with_that_history(ovis, image, pair, records):
    chat = ovis.chat()
    chat.send(f"Look closely. {DIGIT}", [image], tools=[TOOLS["crop"]])
    assert chat.history == records["crop"].turns
    assert [i if isinstance(i, str) else i.size for i in chat.images] == [str(image), (32, 48)]
    turns, images = list(chat.history), list(chat.images)
    second = chat.send("And <image>?", pair[:1], max_new_tokens=6)
    request = Request([*turns, Turn("user", "And <image>?")], [*images, pair[0]])
    assert ovis.answer([request], Sampling(max_new_tokens=6)) == [second]
    assert len(chat.images) == 3


def test_turn_that_fails_or_is_left_leaves_no_trace(ovis, endless, image):
    chat = ovis.chat()
    chat.send(DIGIT, [image])
    before = (list(chat.history), list(chat.images), chat.video)
    with pytest.raises(DataError, match="chat, image 2"):
        chat.send("And this?", ["gone.png"])
    with pytest.raises(DataError, match="chat:\n  there are images and a video"):
        chat.send("And this?", video=[image])
    with pytest.raises(ModelError, match="chat:\n  its "):
        list(chat.stream("And this?", max_new_tokens=40_958))
    with pytest.raises(DataError, match=r"chat, image:\n  http://\[x cannot be fetched"):
        chat.stream("And this?", ["http://[x"])
    assert (chat.history, chat.images, chat.video) == before
    chat = endless.chat()
    for _ in chat.stream("Five?", max_new_tokens=20_000):
        break
    assert chat.history == []
    chat.send("What moves?", video=[image], max_new_tokens=2)
    with pytest.raises(DataError, match="chat, video"):
        chat.send("And here?", video=[image])
    assert len(chat.send("So?", max_new_tokens=2).tokens) == 2
    assert len(chat.history) == 4


def test_thought_that_is_cut_off_is_no_part_of_a_history_without_thoughts(ovis, pair):
    settings = replace(ovis.prompts.settings, thinking="last_turn")
    chat = VLMInference.of(ovis.model, ovis.processor, settings).chat()
    reply = chat.send(LARGER, pair, enable_thinking=True, max_new_tokens=5)
    assert reply.unfinished_thought and reply.text.startswith("<think>\nThe ")
    assert chat.history[-1].text == f"{reply.text}\n</think>\n\n"
    turns = [chat.history[0], Turn("assistant", "", True)]
    next_turn, without = (
        chat.inference.prompts.encode(ask_about("So?", pair, history=history)).data[0]
        for history in (chat.history, turns)
    )
    assert next_turn == without


def test_thought_that_is_cut_off_is_ended_in_a_history_with_thoughts(ovis, pair):
    chat = ovis.chat()
    reply = chat.send(LARGER, pair, enable_thinking=True, max_new_tokens=5)
    prompt = ovis.prompts.encode(ask_about("So?", pair, history=chat.history))
    text = ovis.tokenizer.decode([i for i in prompt.data[0] if i >= 0])  # without the images
    assert f"assistant\n{reply.text}\n</think>\n\n<|im_end|>" in text
    assert text.endswith("So?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_room_for_a_thought_and_the_text_that_ends_it_is_looked_for_before_it_begins(ovis):
    most = 40_960 - ovis.prompts.encode(ask_about("Name a colour.")).length
    needed = most - 1 + len(ovis.tokenizer.encode(EARLY_STOP))
    settings: Any = {"max_new_tokens": most, "thinking_budget": most - 1}
    with pytest.raises(ModelError, match=f"up to {needed:,} new ones"):
        ovis.text_only_inference("Name a colour.", enable_thinking=True, **settings)
    request = [ask_about("Name a colour.")]
    [reply] = ovis.answer(request, Sampling(**settings), enable_thinking=True)
    assert reply.error and f"up to {needed:,} new ones" in reply.error
    assert ovis.text_only_inference("Name a colour.", **settings).answer == "Blue."


@pytest.mark.parametrize("tools", [[], [TOOLS["crop"]]])
def test_mark_that_the_model_writes_itself_stands_for_no_image_in_the_next_turn(
    ovis, image, monkeypatch, tools
):
    shown = "<tool_call>Crop [250, 125, 750, 875]</tool_call><tool_response><image></tool_response>"
    own, crops = "<image> <video> <image>", [Image.new("RGB", (32, 48))] if tools else []
    reply = Reply.of((shown if tools else "") + own, [], "stop", images=crops)
    chat = ovis.chat()
    monkeypatch.setattr(ovis, "respond", lambda *_, **__: reply)
    chat.send(DIGIT, [image])
    monkeypatch.undo()
    kept = (shown if tools else "") + "< image> < video> < image>"
    assert chat.history[-1].text == kept
    assert chat.send("And now?", max_new_tokens=2).error is None


def test_turn_whose_stream_is_left_after_the_last_token_leaves_no_trace(ovis):
    chat = ovis.chat()
    stream = chat.stream("Name a colour.")
    reader = iter(stream)
    next(reader)
    while streaming():
        time.sleep(0.01)
    stream.close()
    assert chat.history == []
    with pytest.raises(ModelError, match="it was closed before"):
        _ = stream.reply


def test_image_of_a_url_is_fetched_once_for_a_chat(ovis, image):
    import base64

    chat = ovis.chat()
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    assert chat.send(DIGIT, url).answer == "It is a four."
    assert chat.images == [image.read_bytes()]


def test_sampled_tokens_follow_the_seed(ovis, image):
    def drawn(seed: int) -> list[int]:
        settings: Any = {"do_sample": True, "temperature": 30.0, "max_new_tokens": 8}
        return ovis.single_image_inference(image, DIGIT, seed=seed, **settings).tokens

    assert drawn(1) == drawn(1) != drawn(2)
