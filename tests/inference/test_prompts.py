"""A prompt is, token by token and pixel by pixel, what precedes its answer in a training sample."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from vlmtune.collators.padded import PaddedCollator
from vlmtune.collators.sample import SampleEncoder
from vlmtune.core.errors import ConfigError, DataError
from vlmtune.data.conversation import Conversation, Turn, parse_conversation
from vlmtune.data.images import PixelLimits
from vlmtune.inference.prompts import DEFAULT_LIMITS, OvisPrompts, PromptSettings
from vlmtune.inference.request import Request, ask_about
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

LIMITS = PixelLimits(256, 2304, 64, 1024, 64, 576, 2, 3)
SIZES = {"a.png": (40, 70), "b.jpg": (90, 31), "c.png": (20, 20)}
THOUGHT = "<think>\nTwo legs.\n</think>\n\nA bird."


@pytest.fixture(scope="module")
def processor(ovis_goldens) -> Ovis2_5Processor:
    tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
    return Ovis2_5Processor(Ovis2_5ImageProcessor(patch_size=4), tokenizer)


@pytest.fixture
def folder(tmp_path):
    for i, (name, size) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def conversation(folder):
    """`conversation("question", "answer", ..., image=[...])`, a record of those turns; one that
    begins with "system: " is the system's."""

    def make(*texts: str, **media) -> Conversation:
        turns = []
        for text in texts:
            system = text.startswith("system: ")
            speaker = "system" if system else ("human", "gpt")[len(turns) % 2]
            if turns and turns[0]["from"] == "system":
                speaker = ("gpt", "human")[len(turns) % 2]
            turns.append({"from": speaker, "value": text.removeprefix("system: ")})
        record = {"id": "x", "conversations": turns, **media}
        return parse_conversation(record, "data.json", 3, str(folder))

    return make


CONVERSATIONS = {
    "text": (["Five?", "5."], {}),
    "one image": (["<image>\nWhat is this?", "A bird."], {"image": "a.png"}),
    "thought": (["<image>\nWhat is this?", THOUGHT], {"image": "b.jpg"}),
    "mark inside": (["What is <image>?", "A bird."], {"image": "c.png"}),
    "two images": (
        ["<image>\n<image>\nWhich is larger?", "The first."],
        {"image": ["a.png", "b.jpg"]},
    ),
    "image in the second turn": (
        ["<image>\nThis?", "A bird.", "And <image>?", THOUGHT],
        {"image": ["a.png", "c.png"]},
    ),
    "system": (["system: Be short.", "<image>\nThis?", "A bird."], {"image": "a.png"}),
    "history": (
        ["<image>\nThis?", "A bird.", "Sure?", "Yes.", "So?", "A bird."],
        {"image": "a.png"},
    ),
    "history of thoughts": (["Five?", THOUGHT, "Six?", "6.", "Seven?", THOUGHT], {}),
    "frames": (
        ["<video>\nWhat moves?", "A bird."],
        {"video_frames": ["a.png", "b.jpg", "c.png"] * 2},
    ),
    "one frame": (["<video>\nWhat moves?", "A bird."], {"video_frames": ["b.jpg"]}),
}


def training(encoder: SampleEncoder, conversation: Conversation) -> dict:
    """The sample as the model gets it in training, and where its trained stretches begin."""
    batch = PaddedCollator(encoder)([encoder.row(conversation)])
    if "pixel_values" in batch:
        batch["pixel_values"] = encoder.processor.image_processor.normalise(batch["pixel_values"])
    trained = (batch.pop("labels")[0] != -100).tolist()
    starts = [i for i in range(1, len(trained)) if trained[i] and not trained[i - 1]]
    return {**batch, "starts": starts}


def assert_precedes(prompts: OvisPrompts, request: Request, sample: dict, start: int, **given):
    prompt = prompts.encode(request, **given)
    batch = prompts.batch([prompt])
    assert batch["input_ids"].tolist() == [sample["input_ids"][0, :start].tolist()]
    assert batch["attention_mask"].tolist() == [[1] * start]
    assert prompt.length == start
    for key in ("pixel_values", "grid_thws"):
        assert (key in batch) == (key in sample)
        assert key not in batch or torch.equal(batch[key], sample[key])


@pytest.mark.parametrize("thinking", ["every_turn", "last_turn", "as_is"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_request_of_a_record_is_what_precedes_its_last_answer(
    processor, conversation, name, thinking
):
    texts, media = CONVERSATIONS[name]
    record = conversation(*texts, **media)
    sample = training(SampleEncoder(processor, LIMITS, 4096, 4096, thinking), record)
    prompts = OvisPrompts(processor, PromptSettings(LIMITS, thinking))
    start = sample["starts"][-1]
    thinks = texts[-1] == THOUGHT
    assert_precedes(prompts, Request.of(record), sample, start, enable_thinking=thinks)


@pytest.mark.parametrize("thinking", ["every_turn", "as_is"])
@pytest.mark.parametrize("name", ["history", "history of thoughts"])
def test_prompt_of_each_turn_is_what_precedes_its_answer(processor, conversation, name, thinking):
    texts, media = CONVERSATIONS[name]
    record = conversation(*texts, **media)
    sample = training(SampleEncoder(processor, LIMITS, 4096, 4096, thinking), record)
    prompts = OvisPrompts(processor, PromptSettings(LIMITS, thinking))
    for answer, start in zip((1, 3, 5), sample["starts"], strict=True):
        request = ask_about(texts[answer - 1], record.images, history=record.turns[: answer - 1])
        thinks = texts[answer] == THOUGHT
        assert_precedes(prompts, request, sample, start, enable_thinking=thinks)


def test_question_about_images_is_the_record_that_asks_it(processor, conversation, folder):
    prompts = OvisPrompts(processor, PromptSettings(LIMITS))
    encoder = SampleEncoder(processor, LIMITS, 4096, 4096)
    for names in (["a.png"], ["a.png", "b.jpg"], ["c.png", "b.jpg", "a.png"]):
        question = "<image>\n" * len(names) + "What is this?"
        record = conversation("system: Be short.", question, "A bird.", image=names)
        images = [Image.open(folder / name) for name in names]
        request = ask_about("What is this?", images, system="Be short.")
        sample = training(encoder, record)
        assert_precedes(prompts, request, sample, sample["starts"][0])


def test_caption_is_asked_for_by_its_template(processor, folder):
    record = {
        "id": "x",
        "image": "a.png",
        "caption": "A bird.",
        "caption_template": "<image>It is ",
    }
    caption = parse_conversation(record, "data.json", 3, str(folder), "caption")
    sample = training(SampleEncoder(processor, LIMITS, 4096, 4096), caption)
    prompts = OvisPrompts(processor, PromptSettings(LIMITS))
    assert_precedes(prompts, Request.of(caption), sample, sample["starts"][0])


def test_begun_answer_with_a_crop_is_the_sample_up_to_there(processor, conversation):
    begun = (
        "I look.\n<tool_call>Crop [1, 2, 3, 4]</tool_call><tool_response><image></tool_response>"
    )
    record = conversation("<image>\nThis?", f"{begun}\nA bird.", image=["a.png", "c.png"])
    sample = training(SampleEncoder(processor, LIMITS, 4096, 4096), record)
    prompts = OvisPrompts(processor, PromptSettings(LIMITS))
    request = Request(record.turns[:1], record.images)
    assert_precedes(prompts, request, sample, sample["starts"][1], begun=begun)
    assert Request.of(record).images == record.images[:1]


def test_frames_of_a_video_file_are_those_of_training(processor, conversation, folder):
    av = pytest.importorskip("av")
    with av.open(str(folder / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in (20, 90, 160, 230):
            image = Image.new("RGB", (48, 32), (level,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    record = conversation("<video>\nWhat moves?", "A bird.", video="v.mp4")
    sample = training(SampleEncoder(processor, LIMITS, 4096, 4096), record)
    prompts = OvisPrompts(processor, PromptSettings(LIMITS))
    assert_precedes(prompts, Request.of(record), sample, sample["starts"][0])
    asked = ask_about("What moves?", video=folder / "v.mp4")
    assert_precedes(prompts, asked, sample, sample["starts"][0])


def test_jpegs_are_drafted_where_training_drafts_them(processor, conversation):
    limits = PixelLimits(64, 256, 64, 256, 64, 256, 2, 3)
    for media in ({"image": "b.jpg"}, {"video_frames": ["b.jpg", "a.png"]}):
        mark = "<image>" if "image" in media else "<video>"
        record = conversation(f"{mark}\nThis?", "A bird.", **media)
        pixels = []
        for draft in (False, True):
            encoder = SampleEncoder(processor, limits, 4096, 4096, jpeg_draft=draft)
            sample = training(encoder, record)
            prompts = OvisPrompts(processor, PromptSettings(limits, jpeg_draft=draft))
            assert_precedes(prompts, Request.of(record), sample, sample["starts"][0])
            pixels.append(sample["pixel_values"])
        assert not torch.equal(*pixels)


def test_batch_is_padded_on_the_left_and_holds_the_media_of_all_rows_in_order(
    processor, conversation
):
    prompts = OvisPrompts(processor, PromptSettings(LIMITS))
    names = ["two images", "text", "one image", "frames"]
    encoded = [
        prompts.encode(Request.of(conversation(*texts, **media)))
        for texts, media in map(CONVERSATIONS.__getitem__, names)
    ]
    batch, alone = prompts.batch(encoded), [prompts.batch([prompt]) for prompt in encoded]
    longest = max(prompt.length for prompt in encoded)
    pad = processor.tokenizer.pad_token_id
    for row, prompt in enumerate(encoded):
        padding = longest - prompt.length
        ids = alone[row]["input_ids"][0].tolist()
        assert batch["input_ids"][row].tolist() == [pad] * padding + ids
        assert batch["attention_mask"][row].tolist() == [0] * padding + [1] * prompt.length
    for key in ("pixel_values", "grid_thws"):
        assert torch.equal(batch[key], torch.cat([one[key] for one in alone if key in one]))
    assert set(alone[1]) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("request_", "where", "what"),
    [
        (Request([]), "request", "there is no question."),
        (
            ask_about("<image> and <image>?", ["a.png"]),
            "request",
            '2 "<image>" placeholders, but 1 given.',
        ),
        (ask_about("What is <image>?"), "request", '1 "<image>" placeholder, but 0 given.'),
        (ask_about("Hm \ud83d?"), "request", "a text holds half a surrogate pair."),
        (ask_about("?", ["a.png"], "v.mp4"), "request", "there are images and a video."),
        (ask_about("<video>?"), "request", '1 "<video>" placeholder, but 0 given.'),
        (ask_about("?", ["gone.png"]), "request, image", "gone.png does not exist."),
        (ask_about("?", [Image.new("L", (3, 4)), "gone.png"]), "request, image 2", "gone.png does"),
        (ask_about("?", video=[]), "request, video", "has no frames."),
        (ask_about("?", video=["gone.png"]), "request, video, frame 1", "gone.png does not exist."),
    ],
)
def test_request_that_cannot_be_read_is_refused_with_its_place(processor, request_, where, what):
    with pytest.raises(DataError) as error:
        OvisPrompts(processor, PromptSettings(LIMITS)).encode(request_)
    assert error.value.where == where
    assert error.value.what.startswith(what)


def test_thought_with_an_image_has_no_place_in_a_history_without_thoughts(processor):
    begun = "<think><tool_response><image></tool_response></think>A bird."
    history = [Turn("user", "<image>"), Turn("assistant", begun, True)]
    images = [Image.new("RGB", (9, 9))] * 2
    request = ask_about("Sure?", images, history=history, where="chat")
    with pytest.raises(DataError) as error:
        OvisPrompts(processor, PromptSettings(LIMITS, "last_turn")).encode(request)
    assert error.value.where == "chat, thinking: last_turn"
    assert error.value.fix.startswith("start a new chat, or leave the record out: this model")


def test_size_at_which_an_image_is_seen_is_that_of_its_patches(processor):
    prompts = OvisPrompts(processor, PromptSettings(LIMITS))
    images = [Image.new("RGB", size) for size in ((90, 31), (20, 20))]
    for count, seen in ((1, (80, 24)), (2, (48, 16))):
        batch = prompts.batch([prompts.encode(ask_about("?", images[:count]))])
        rows, columns = batch["grid_thws"][0, 1:].tolist()
        assert prompts.seen_size((90, 31), count) == (4 * columns, 4 * rows) == seen


def test_request_of_a_record_ends_with_its_last_question(conversation):
    for texts, kept in ((["1?", "1", "2?", "2"], 3), (["1?", "1", "2?"], 3), (["1?", "1"], 1)):
        record = conversation(*texts)
        request = Request.of(record)
        assert request.turns == record.turns[:kept]
        assert request.where == 'data.json, record 3 (id "x")'


def test_media_stand_before_the_prompt_unless_it_has_marks():
    image, turn = Image.new("RGB", (1, 1)), Turn("user", "<image>\nThis?")
    answer = Turn("assistant", "A bird.", True)
    assert ask_about("So?").turns == [Turn("user", "So?")]
    assert ask_about("So?", [image] * 2).turns == [Turn("user", "<image>\n<image>\nSo?")]
    assert ask_about("In <image>?", [image]).turns == [Turn("user", "In <image>?")]
    assert ask_about("So?", video="v.mp4").turns == [Turn("user", "<video>\nSo?")]
    later = ask_about("So?", [image] * 3, history=[turn, answer])
    assert later.turns == [turn, answer, Turn("user", "<image>\n<image>\nSo?")]
    assert ask_about("So?", [image], history=[turn, answer], system="Be short.").turns == [
        Turn("system", "Be short."),
        turn,
        answer,
        Turn("user", "So?"),
    ]


def test_settings_are_those_of_the_run_and_defaults_without_one():
    assert PromptSettings.of_run({}) == PromptSettings(DEFAULT_LIMITS, "every_turn", False)
    run = {**asdict(LIMITS), "thinking": "as_is", "jpeg_draft": True, "model_path": "m"}
    assert PromptSettings.of_run(run) == PromptSettings(LIMITS, "as_is", True)
    assert PromptSettings.of_run({"max_frames": 9}).limits == PixelLimits(
        *(448**2, 1792**2, 448**2, 896**2, 448**2, 896**2), 8, 9
    )


def test_pixel_limits_that_are_given_hold_for_images_and_frames():
    settings = PromptSettings(LIMITS, "as_is", True)
    assert settings.with_pixels(None, None) == settings
    assert settings.with_pixels(300, 400) == PromptSettings(
        PixelLimits(300, 400, 300, 400, 300, 400, 2, 3), "as_is", True
    )
    assert settings.with_pixels(None, 400).limits == PixelLimits(256, 400, 64, 400, 64, 400, 2, 3)
    derived = PromptSettings(PixelLimits(256, 2304, -1, -1, -1, -1, 2, 3))
    assert derived.with_pixels(300, None).limits.for_images(2) == (300, 1152)


@pytest.mark.parametrize(
    ("low", "high", "key"),
    [
        (0, None, "min_pixels"),
        (None, -5, "max_pixels"),
        (1000, 999, "min_pixels"),
        (None, 255, "max_pixels"),
        (2305, None, "min_pixels"),
    ],
)
def test_pixel_limits_that_contradict_each_other_are_refused(low, high, key):
    with pytest.raises(ConfigError) as error:
        PromptSettings(LIMITS).with_pixels(low, high)
    assert error.value.where == key
