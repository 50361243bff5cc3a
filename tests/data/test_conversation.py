"""LLaVA records to conversations: what is accepted, and what is said of the rest."""

from typing import Any

import datasets
import pytest

from vlmtune.core.errors import DataError
from vlmtune.data.conversation import (
    Conversation,
    Turn,
    parse_conversation,
    read_conversation,
    record_id,
)
from vlmtune.data.dataset import FEATURES

AT = 'train.json, record 17 (id "coco_0123")'
Said = list[tuple[str, Any]]


def record(said: Said, **rest) -> dict[str, Any]:
    turns = [{"from": speaker, "value": text} for speaker, text in said]
    return {"id": "coco_0123", **rest, "conversations": turns}


def parse(given: Any, image_folder: str | None = None) -> Conversation:
    return parse_conversation(given, "train.json", 17, image_folder)


def error_of(given: Any) -> DataError:
    with pytest.raises(DataError) as error:
        parse(given)
    return error.value


def asked(question: str, answer: str = "A cat.") -> Said:
    return [("human", question), ("gpt", answer)]


PLAIN = asked("What?")


def test_speakers_become_roles_and_only_gpt_is_trained():
    said: Said = [
        ("system", "Be brief."),
        ("human", "What?"),
        ("ignored_gpt", "A dog."),
        ("human", "Sure?"),
        ("gpt", " No, a cat.\n"),
        ("human", "Thanks."),
    ]
    assert parse(record(said)) == Conversation(
        id="coco_0123",
        turns=[
            Turn("system", "Be brief.", trained=False),
            Turn("user", "What?", trained=False),
            Turn("assistant", "A dog.", trained=False),
            Turn("user", "Sure?", trained=False),
            Turn("assistant", " No, a cat.\n", trained=True),
            Turn("user", "Thanks.", trained=False),
        ],
        images=[],
        video=None,
        frames=[],
        source="train.json",
        record=17,
    )


@pytest.mark.parametrize(
    ("image", "said", "files"),
    [
        pytest.param("a.png", asked("<image>\nWhat?"), ["a.png"], id="path"),
        pytest.param(["a.png"], asked("What is <image>?"), ["a.png"], id="list-of-one"),
        pytest.param(["b.png", "a.png"], asked("<image><image>"), ["b.png", "a.png"], id="two"),
        pytest.param(["a.png", "a.png"], asked("<image>\n<image>"), ["a.png"] * 2, id="same-twice"),
        pytest.param(
            ["a.png", "b.png", "c.png"],
            [
                ("system", "Like <image>."),
                ("human", "What?"),
                ("gpt", "See <image>."),
                ("human", "And <image>"),
                ("gpt", "No."),
            ],
            ["a.png", "b.png", "c.png"],
            id="in-every-role",
        ),
        pytest.param([], PLAIN, [], id="empty-list"),
        pytest.param(None, PLAIN, [], id="null"),
    ],
)
def test_images_are_listed_in_the_order_of_their_marks(image, said, files):
    conversation = parse(record(said, image=image))
    assert conversation.images == conversation.media_files == files
    assert [turn.text for turn in conversation.turns] == [text for _, text in said]


@pytest.mark.parametrize(
    ("given", "video", "frames"),
    [
        ({"video": "a.mp4"}, "a.mp4", []),
        ({"video": ["a.mp4"]}, "a.mp4", []),
        ({"video_frames": ["2.png", "1.png"]}, None, ["2.png", "1.png"]),
        ({"video_frames": "1.png"}, None, ["1.png"]),
        ({"video_frames": ["1.png"], "video": None, "image": []}, None, ["1.png"]),
    ],
)
def test_a_video_is_one_file_or_a_list_of_frames(given, video, frames):
    conversation = parse(record(asked("<video>\nWhat?"), **given))
    assert (conversation.images, conversation.video, conversation.frames) == ([], video, frames)
    assert conversation.media_files == ([video] if video else frames)


@pytest.mark.parametrize(
    ("key", "mark"), [("image", "<image>"), ("video", "<video>"), ("video_frames", "<video>")]
)
@pytest.mark.parametrize(
    ("folder", "path", "resolved"),
    [
        ("/data/coco", "val/1.png", "/data/coco/val/1.png"),
        ("coco", "val/1.png", "coco/val/1.png"),
        ("/data/coco", "/other/1.png", "/other/1.png"),
        (None, "val/1.png", "val/1.png"),
        ("", "val/1.png", "val/1.png"),
    ],
)
def test_relative_paths_start_at_the_image_folder(key, mark, folder, path, resolved):
    given = record(asked(mark), **{key: path})
    assert parse(given, image_folder=folder).media_files == [resolved]


def test_id_may_be_a_number():
    assert parse({**record(PLAIN), "id": 7}).id == "7"


def test_missing_id_becomes_the_position():
    given = record(PLAIN)
    del given["id"]
    assert parse(given).id == "17"
    assert parse(given).where("image") == 'train.json, record 17 (id "17"), image'


def test_where_names_file_record_id_and_place():
    assert parse(record(PLAIN)).where("image") == f"{AT}, image"


def test_image_count_error_reads_as_documented():
    given = record(asked("<image>\n<image>\nWhich?"), image="a.png")
    assert str(error_of(given)) == (
        'train.json, record 17 (id "coco_0123"), conversations[0].value:\n'
        '  2 "<image>" placeholders, but "image" lists 1 file.\n'
        '  Fix: list a file in "image" for each placeholder, or remove the surplus.'
    )


@pytest.mark.parametrize(
    ("said", "media", "place", "what"),
    [
        pytest.param(
            asked("<image>"),
            {},
            "conversations[0].value",
            '1 "<image>" placeholder, but "image" lists 0 files.',
            id="mark-without-image",
        ),
        pytest.param(
            asked("<image>"),
            {"image": ["a", "b", "c"]},
            "conversations[0].value",
            '1 "<image>" placeholder, but "image" lists 3 files.',
            id="fewer-marks",
        ),
        pytest.param(
            PLAIN,
            {"image": "a"},
            "image",
            '0 "<image>" placeholders, but "image" lists 1 file.',
            id="no-mark",
        ),
        pytest.param(
            [("human", "<image>"), ("gpt", "Yes."), ("human", "<image>"), ("gpt", "<image>")],
            {"image": ["a", "b"]},
            "conversations[0].value, conversations[2].value, conversations[3].value",
            '3 "<image>" placeholders, but "image" lists 2 files.',
            id="marks-in-many-turns",
        ),
        pytest.param(
            asked("What?", "<video>"),
            {},
            "conversations[1].value",
            '1 "<video>" placeholder, but the record has no "video".',
            id="mark-without-video",
        ),
        pytest.param(
            asked("<video>"),
            {"image": "a"},
            "image",
            '0 "<image>" placeholders, but "image" lists 1 file.',
            id="video-mark-for-an-image",
        ),
        pytest.param(
            asked("<video>\n<video>"),
            {"video": "a"},
            "conversations[0].value",
            '2 "<video>" placeholders, but the record has a "video".',
            id="two-video-marks",
        ),
        pytest.param(
            PLAIN,
            {"video": "a"},
            "video",
            '0 "<video>" placeholders, but the record has a "video".',
            id="no-video-mark",
        ),
        pytest.param(
            PLAIN,
            {"video_frames": ["a", "b"]},
            "video_frames",
            '0 "<video>" placeholders, but the record has a "video_frames".',
            id="no-mark-for-frames",
        ),
    ],
)
def test_marks_that_do_not_match_the_files_are_refused(said, media, place, what):
    error = error_of(record(said, **media))
    assert (error.where, error.what) == (f"{AT}, {place}", what)


@pytest.mark.parametrize(
    "media",
    [
        {"image": "a", "video": "b"},
        {"image": "a", "video_frames": ["b"]},
        {"video": "a", "video_frames": ["b"]},
        {"image": ["a"], "video": "b", "video_frames": "c"},
    ],
)
def test_two_kinds_of_media_are_refused(media):
    error = error_of(record(asked("<image><video>"), **media))
    assert error.where == AT
    assert error.what == 'has more than one of "image", "video" and "video_frames".'
    assert error.fix == "keep one kind of media per record."


def test_two_videos_are_refused():
    error = error_of(record(asked("<video><video>"), video=["a", "b"]))
    assert (error.where, error.what) == (f"{AT}, video", "lists 2 files.")
    assert error.fix == "give one video per record."


@pytest.mark.parametrize(
    ("value", "what"),
    [(5, "is int 5."), (True, "is bool True."), ({"path": "a.png"}, "is an object.")],
)
@pytest.mark.parametrize("key", ["image", "video", "video_frames"])
def test_media_of_a_wrong_type_are_refused(key, value, what):
    error = error_of(record(PLAIN, **{key: value}))
    assert (error.where, error.what) == (f"{AT}, {key}", what)
    assert error.fix == "write a path, or a list of paths."


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "'' is no path."),
        ([""], "'' is no path."),
        ([None], "None is no path."),
        (["a.png", 5], "5 is no path."),
        ([["a.png"]], "['a.png'] is no path."),
        ("a\0.png", "'a\\x00.png' is no path."),
        ("\ud83d.png", "'\\ud83d.png' is no path."),
    ],
)
@pytest.mark.parametrize("key", ["image", "video", "video_frames"])
def test_anything_but_paths_is_refused(key, value, what):
    error = error_of(record(PLAIN, **{key: value}))
    assert (error.where, error.what) == (f"{AT}, {key}", what)
    assert error.fix == "write the path of a file, or remove the key."


def test_half_a_surrogate_pair_is_refused():
    error = error_of(record([("human", "Hi"), ("gpt", "cut \ud83d")]))
    assert error.what == "holds half a surrogate pair."


def test_null_id_becomes_the_position():
    assert parse({**record(PLAIN), "id": None}).id == "17"


@pytest.mark.parametrize("media", [{"video": "a"}, {"video_frames": ["a", "b"]}])
def test_fix_for_two_video_marks_can_be_followed(media):
    error = error_of(record(asked("<video><video>"), **media))
    assert error.fix == 'write one "<video>" and give one video.'


@pytest.mark.parametrize(
    ("speaker", "nearest"),
    [
        ("user", "human"),
        ("assistant", "gpt"),
        ("model", "gpt"),
        ("bot", "gpt"),
        ("gpts", "gpt"),
        ("Human", "human"),
        ("ignore_gpt", "ignored_gpt"),
        ("sytem", "system"),
        ("", "human"),
        ("observation", "human"),
        (None, "human"),
        (["gpt"], "gpt"),
    ],
)
def test_unknown_role_is_refused_with_the_nearest_known(speaker, nearest):
    error = error_of(record([("human", "What?"), (speaker, "A cat.")]))
    assert error.where == f"{AT}, conversations[1].from"
    assert error.what == f'unknown role "{speaker}".'
    assert error.fix == f'write "{nearest}"; known are human, gpt, ignored_gpt, system.'


@pytest.mark.parametrize(
    ("conversations", "what"),
    [
        ([], "is empty."),
        (None, "is missing, not a list."),
        ("What?", "is a string, not a list."),
        ({"human": "What?"}, "is an object, not a list."),
        (5, "is int 5, not a list."),
    ],
)
def test_conversations_must_be_a_list_of_turns(conversations, what):
    error = error_of({"id": "coco_0123", "conversations": conversations})
    assert (error.where, error.what) == (f"{AT}, conversations", what)
    assert error.fix == 'write a list of {"from": ..., "value": ...}.'


def test_missing_conversations_are_refused():
    error = error_of({"id": "coco_0123", "image": "a.png"})
    assert (error.where, error.what) == (f"{AT}, conversations", "is missing, not a list.")


@pytest.mark.parametrize(
    "turn", ["A cat.", None, ["gpt", "A cat."], {"from": "gpt"}, {"value": "A cat."}, {}]
)
def test_turn_must_be_an_object_with_both_keys(turn):
    given = record(PLAIN)
    given["conversations"].append(turn)
    error = error_of(given)
    assert error.where == f"{AT}, conversations[2]"
    assert error.what == 'is not an object with "from" and "value".'
    assert error.fix == "write both keys."


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "is missing, not text."),
        (5, "is int 5, not text."),
        (["A cat."], "is a list, not text."),
        ({"text": "A cat."}, "is an object, not text."),
    ],
)
@pytest.mark.parametrize("speaker", ["human", "gpt", "ignored_gpt", "system"])
def test_value_must_be_text(speaker, value, what):
    error = error_of(record([*PLAIN, (speaker, value)]))
    assert (error.where, error.what) == (f"{AT}, conversations[2].value", what)
    assert error.fix == "write a string."


@pytest.mark.parametrize("text", ["", " ", "\n\t\n"])
def test_answer_without_text_is_refused(text):
    error = error_of(record([*PLAIN, ("human", "Sure?"), ("gpt", text)]))
    assert error.where == f"{AT}, conversations[3].value"
    assert error.what == "answer without text."
    assert error.fix == "write the answer, or remove the turn."


@pytest.mark.parametrize("speaker", ["human", "ignored_gpt", "system"])
def test_what_is_not_learned_may_be_empty(speaker):
    assert [turn.text for turn in parse(record([(speaker, ""), ("gpt", "A cat.")])).turns] == [
        "",
        "A cat.",
    ]


@pytest.mark.parametrize(
    "said", [[("human", "What?")], [("human", "What?"), ("ignored_gpt", "A dog.")]]
)
def test_record_without_an_answer_to_learn_is_refused(said):
    error = error_of(record(said))
    assert (error.where, error.what) == (f"{AT}, conversations", 'has no turn from "gpt".')
    assert error.fix == "add an answer, or remove the record."


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_response>5",
        "5</tool_response>",
        "</tool_response>5<tool_response>",
        "<tool_response>5</tool_response><tool_response>6",
        "<tool_response>5</tool_response></tool_response>",
    ],
)
def test_unpaired_tool_response_in_an_answer_is_refused(answer):
    error = error_of(record(asked("What?", answer)))
    assert error.where == f"{AT}, conversations[1].value"
    assert error.what == "<tool_response> and </tool_response> do not pair up."
    assert error.fix == "close each <tool_response> in the same answer."


def test_paired_tool_responses_are_accepted():
    answer = "a<tool_response>\n5\n</tool_response>b<tool_response></tool_response>c"
    assert parse(record(asked("</tool_response>", answer))).turns[1].text == answer


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["What?"], "is a list, not an object."),
        ("What?", "is a string, not an object."),
        (5, "is int 5, not an object."),
        (None, "is missing, not an object."),
    ],
)
def test_record_must_be_an_object(given, what):
    error = error_of(given)
    assert (error.where, error.what) == ("train.json, record 17", what)
    assert error.fix == 'write {"id": ..., "conversations": [...]}.'


@pytest.mark.parametrize(
    ("said", "media"),
    [
        pytest.param([("system", ""), *asked("What? 图\n", " é\n")], {}, id="text"),
        pytest.param(asked("<image><image>"), {"image": ["b.png", "a.png"]}, id="images"),
        pytest.param(asked("<video>"), {"video": "a.mp4"}, id="video"),
        pytest.param(asked("<video>"), {"video_frames": ["2.png", "1.png"]}, id="frames"),
    ],
)
def test_row_survives_an_arrow_dataset_and_names_the_record_and_its_files(said, media):
    conversation = parse(record(said, **media), image_folder="/data")
    lists = {"ids": [7, 8], "trained": [1, 2], "grids": [1, 4, 4]}
    numbers = {"length": 5, "trained_tokens": 1, "cut": 0, "patches": 16, "patches_squared": 256}
    row = {**conversation.to_row(), **lists, **numbers}
    other = {**parse(record(PLAIN)).to_row(), **lists, **numbers}
    dataset = datasets.Dataset.from_list([other, row], features=FEATURES)
    assert dataset[1] == row
    assert (row["id"], row["source"], row["record"]) == ("coco_0123", "train.json", 17)
    assert row["image_files"] == conversation.images
    assert (row["video_file"], row["frame_files"]) == (conversation.video, conversation.frames)
    assert not {"image", "images"} & set(dataset.column_names)


def messages(*said: tuple[str, Any], **rest) -> dict[str, Any]:
    turns = [{"role": role, "content": content} for role, content in said]
    return {"id": "coco_0123", **rest, "messages": turns}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_messages_become_the_turns_that_conversations_give():
    given = messages(
        ("system", "Be brief."),
        ("user", [{"type": "image"}, text_part("What?"), text_part("Say."), {"type": "image"}]),
        ("assistant", [text_part("A cat.")]),
        ("user", "Sure? <image>"),
        ("assistant", "Yes."),
        images=["a.png", "b.png", "c.png"],
    )
    said: Said = [
        ("system", "Be brief."),
        ("human", "<image>\nWhat?\nSay.\n<image>"),
        ("gpt", "A cat."),
        ("human", "Sure? <image>"),
        ("gpt", "Yes."),
    ]
    conversation = parse(given, "/data")
    assert conversation == parse(record(said, image=["a.png", "b.png", "c.png"]), "/data")
    assert conversation.images == ["/data/a.png", "/data/b.png", "/data/c.png"]


def test_video_part_stands_for_the_video():
    given = messages(("user", [{"type": "video"}]), ("assistant", "A dog."), video="a.mp4")
    assert parse(given).turns[0].text == "<video>"


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("value", ["a.png", ["a.png"]])
@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_image_and_images_mean_the_same(key, value, form):
    given = record(asked("<image>")) if form == "conversations" else None
    given = given or messages(("user", "<image>"), ("assistant", "A cat."))
    assert parse({**given, key: value}).images == ["a.png"]
    # What a table has no value for is null.
    other = {"image": "images", "images": "image"}[key]
    assert parse({**given, key: value, other: None}).images == ["a.png"]


def test_image_and_images_together_are_refused():
    error = error_of(record(asked("<image>"), image="a.png", images=["a.png"]))
    assert (error.where, error.what) == (AT, 'has both "image" and "images".')


GOOD = ("user", "What?")


@pytest.mark.parametrize(
    ("given", "place", "what", "fix"),
    [
        pytest.param(
            messages(),
            "messages",
            "is empty.",
            'write a list of {"role": ..., "content": ...}.',
            id="empty",
        ),
        pytest.param(
            {"id": "coco_0123", "messages": "Hi"},
            "messages",
            "is a string, not a list.",
            'write a list of {"role": ..., "content": ...}.',
            id="no-list",
        ),
        pytest.param(
            {"id": "coco_0123", "messages": [{"from": "human", "value": "Hi"}]},
            "messages[0]",
            'is not an object with "role" and "content".',
            "write both keys.",
            id="llava-turn",
        ),
        pytest.param(
            messages(GOOD, ("gpt", "A cat.")),
            "messages[1].role",
            'unknown role "gpt".',
            'write "assistant"; known are user, assistant, system.',
            id="llava-role",
        ),
        pytest.param(
            messages(GOOD, ("asistant", "A cat.")),
            "messages[1].role",
            'unknown role "asistant".',
            'write "assistant"; known are user, assistant, system.',
            id="typo",
        ),
        pytest.param(
            messages(GOOD),
            "messages",
            'has no message of "assistant".',
            "add an answer, or remove the record.",
            id="no-answer",
        ),
        pytest.param(
            messages(GOOD, ("assistant", [text_part(" ")])),
            "messages[1].content",
            "answer without text.",
            "write the answer, or remove the turn.",
            id="empty-answer",
        ),
        pytest.param(
            messages(("user", 5), ("assistant", "A cat.")),
            "messages[0].content",
            "is int 5, not text.",
            "write a string.",
            id="number",
        ),
        pytest.param(
            messages(("user", [{"type": "text"}]), ("assistant", "A cat.")),
            "messages[0].content[0].text",
            "is missing, not text.",
            "write a string.",
            id="part-without-text",
        ),
        pytest.param(
            messages(("user", [text_part("a"), {"type": "audio"}]), ("assistant", "A cat.")),
            "messages[0].content[1]",
            "is no part of a message.",
            'write {"type": "text", "text": ...}, {"type": "image"} or {"type": "video"}.',
            id="unknown-part",
        ),
        pytest.param(
            messages(("user", [{"type": "image"}]), ("assistant", "A cat."), images=[]),
            "messages[0].content",
            '1 "<image>" placeholder, but "images" lists 0 files.',
            'list a file in "images" for each placeholder, or remove the surplus.',
            id="image-missing",
        ),
    ],
)
def test_broken_messages_are_refused_with_their_place(given, place, what, fix):
    error = error_of(given)
    assert (error.where, error.what, error.fix) == (f"{AT}, {place}", what, fix)


def caption(**keys) -> Conversation:
    given = {"id": "coco_0123", "image": "a.png", **keys}
    return parse_conversation(given, "train.json", 17, "/data", "caption")


@pytest.mark.parametrize(
    ("keys", "template"),
    [({}, "<image>"), ({"caption_template": "See <image>: "}, "See <image>: ")],
)
def test_caption_stands_plainly_behind_its_template_and_alone_is_trained(keys, template):
    conversation = caption(caption=" A cat.", **keys)
    assert conversation.turns == [Turn("plain", template), Turn("plain", " A cat.", trained=True)]
    assert conversation.images == ["/data/a.png"]


@pytest.mark.parametrize(
    ("keys", "place", "what"),
    [
        ({}, "caption", "is missing, not text."),
        ({"caption": " "}, "caption", "is empty."),
        (
            {"caption": "A cat.", "caption_template": "See:"},
            "caption_template",
            '0 "<image>" placeholders.',
        ),
        (
            {"caption": "A cat.", "caption_template": "<image><image>"},
            "caption_template",
            '2 "<image>" placeholders.',
        ),
        (
            {"caption": "A <image>."},
            "caption_template, caption",
            '2 "<image>" placeholders, but "image" lists 1 file.',
        ),
        (
            {"caption": "A cat.", "image": None},
            "caption_template",
            '1 "<image>" placeholder, but "image" lists 0 files.',
        ),
    ],
)
def test_broken_caption_is_refused_with_its_place(keys, place, what):
    with pytest.raises(DataError) as error:
        caption(**keys)
    assert (error.value.where, error.value.what) == (f"{AT}, {place}", what)


def test_caption_record_in_a_set_of_conversations_is_refused():
    error = error_of({"id": "coco_0123", "image": "a.png", "caption": "A cat."})
    assert (error.where, error.what) == (f"{AT}, conversations", "is missing, not a list.")


def faults_of(given: Any, data_format: str = "conversation") -> list[tuple[str, str]]:
    _, faults = read_conversation(given, "train.json", 17, "/data", data_format)
    return [(fault.where.removeprefix(AT).removeprefix(", "), fault.code) for fault in faults]


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        pytest.param(record(PLAIN), [], id="none"),
        pytest.param([], [("train.json, record 17", "not-object")], id="no-object"),
        pytest.param(
            {"id": "coco_0123", "image": 5},
            [("conversations", "turns-missing"), ("image", "media-field")],
            id="no-turns",
        ),
        pytest.param(
            record(
                [("user", "<image>"), ("gpt", " "), ("tool", 5), ("gpt", "<tool_response>")],
                image=["a.png", 5],
                video=["", "b.mp4", "c.mp4"],
            ),
            [
                ("conversations[0].from", "role-unknown"),
                ("conversations[1].value", "answer-empty"),
                ("conversations[2].from", "role-unknown"),
                ("conversations[2].value", "text-type"),
                ("conversations[3].value", "tool-response"),
                ("image", "media-field"),
                ("video", "media-field"),
                ("video", "video-several"),
                ("", "media-mixed"),
            ],
            id="many",
        ),
        pytest.param(
            record([("Human", "cut \ud83d"), ("human", "<image>")], image=["a.png", ""]),
            [
                ("conversations[0].from", "role-unknown"),
                ("conversations[0].value", "surrogate"),
                ("conversations", "answer-none"),
                ("image", "media-field"),
            ],
            id="an-empty-path-is-no-file",
        ),
        pytest.param(
            record(asked("<video>"), image=["a.png", "b.png"]),
            [("image", "image-marks-few"), ("conversations[0].value", "video-marks")],
            id="marks-of-both-kinds",
        ),
        pytest.param(
            record(asked("<image>"), images=[], image="a.png"),
            [("", "media-twice"), ("conversations[0].value", "image-marks-many")],
            id="image-and-images",
        ),
        pytest.param(
            messages(("user", [text_part("a"), {"type": "audio"}, {"type": "image"}])),
            [("messages[0].content[1]", "content-part"), ("messages", "answer-none")],
            id="marks-of-a-text-that-is-not-whole-are-not-counted",
        ),
        pytest.param(
            {"id": "coco_0123", "conversations": [5, *messages(GOOD, ("bot", ""))["messages"]]},
            [
                ("conversations[0]", "turn-form"),
                ("conversations[1]", "turn-form"),
                ("conversations[2]", "turn-form"),
                ("conversations[2].content", "answer-empty"),
            ],
            id="turns-of-the-other-form-are-read",
        ),
        pytest.param(
            record([("human", "What?"), ("tool", "5")]),
            [("conversations[1].from", "role-unknown")],
            id="an-unknown-role-may-be-the-answer",
        ),
    ],
)
def test_every_fault_of_a_record_is_found_in_the_order_of_reading(given, faults):
    assert faults_of(given) == faults


@pytest.mark.parametrize(
    ("keys", "faults"),
    [
        ({}, [("caption", "text-type")]),
        (
            {"caption": " ", "caption_template": "See:", "image": 5},
            [
                ("caption", "caption-empty"),
                ("caption_template", "caption-template"),
                ("image", "media-field"),
            ],
        ),
        ({"caption": "A cat."}, [("caption_template", "image-marks-many")]),
    ],
)
def test_every_fault_of_a_caption_record_is_found(keys, faults):
    assert faults_of({"id": "coco_0123", **keys}, "caption") == faults


def test_what_can_be_read_of_a_faulty_record_stands_at_its_place():
    given = record(
        [("Human", "cut \ud83d"), ("tool", "5"), ("gpt", 5)], image=["a.png", "", "b.png"]
    )
    given["conversations"].append("A cat.")
    conversation, _ = read_conversation(given, "train.json", 17, "/data")
    assert conversation is not None
    assert conversation.turns == [
        Turn("user", "cut ?"),
        Turn("", "5"),
        Turn("assistant", "", trained=True),
        Turn("", ""),
    ]
    assert conversation.images == ["/data/a.png", "/data/b.png"]


def test_values_as_long_and_deep_as_json_can_hold_are_told_shortly():
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for key in ("id", "image", "conversations"):
        error_of({**record([("robot", "What?")]), key: deep})
    assert record_id({"id": deep}, 1) == "[[[[[[[...]]]]]]]"
    error = error_of(record([("x" * 10_000, "What?"), ("gpt", "A cat.")], image=deep))
    assert len(str(error)) < 400
    assert len(str(error_of(record(PLAIN, image=["x" * 10_000 + "\0"])))) < 500


def test_a_path_that_starts_with_no_users_name_is_a_path():
    given = record(asked("<image>"), image="~nobody-of-this-name.png")
    assert parse(given, "/data").images == ["/data/~nobody-of-this-name.png"]
