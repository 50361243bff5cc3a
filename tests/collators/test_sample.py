"""A conversation and its files to one sample: sizes, length limits, and what is decoded."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from vlmtune.core.errors import DataError
from vlmtune.data.conversation import Conversation, parse_conversation
from vlmtune.data.tables import table_records

GOLDENS = Path(__file__).parents[1] / "goldens" / "ovis2_5"
IMAGES = GOLDENS / "preprocess" / "images"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/samples.json"))


def parse(*said: str, folder: Path | None = IMAGES, **media) -> Conversation:
    """Questions and answers by turns."""
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(said)]
    record = {"id": "one", **media, "conversations": turns}
    return parse_conversation(record, "train.json", 17, str(folder) if folder else None)


@pytest.mark.parametrize("case", CASES)
def test_sizes_alone_give_the_ids_that_loading_gives(make_encoder, case):
    encoder = make_encoder(case)
    given = json.loads((GOLDENS / case / "samples.json").read_text("utf-8"))
    for record in given["samples"]:
        conversation = parse_conversation(
            record, "train.json", 17, str(GOLDENS / case / given["image_dir"])
        )
        sizes = encoder.check_files(conversation)
        sample = encoder.load(conversation)
        assert encoder.encode(conversation, sizes) == sample.encoded
        assert len(sample.grids) == len(sample.patches) == len(sample.encoded.media)


@pytest.mark.parametrize(
    ("question", "media", "sizes"),
    [
        ("5", {}, []),
        ("<image>", {"image": "grad_40x70.png"}, [(1, 40, 70)]),
        (
            "<image><image>",
            {"image": ["rgba_33x47.png", "grad_40x70.png"]},
            [(1, 33, 47), (1, 40, 70)],
        ),
        # The first frame's size stands for all.
        ("<video>", {"video_frames": ["grad_40x70.png", "tiny_2x2.png"]}, [(2, 40, 70)]),
    ],
)
def test_check_tells_frames_height_and_width_of_each_medium(make_encoder, question, media, sizes):
    assert make_encoder().check_files(parse(question, "5", **media)) == sizes


def test_first_frame_taken_sets_the_size_even_if_it_is_not_the_first_of_the_video(make_encoder):
    # Of twelve frames three are taken, from the third on; the first two have another size.
    files = ["tiny_2x2.png"] * 2 + ["grad_40x70.png"] * 10
    encoder = make_encoder(min_frames=2, max_frames=3, video_max_pixels=4096)
    conversation = parse("<video>", "5", video_frames=files)
    sample = encoder.load(conversation)
    [(begin, end)] = sample.encoded.media
    frames, rows, columns = sample.grids[0]
    assert (frames, rows, columns) == (3, 10, 18)
    assert end - begin - 2 == 3 * 10 * 18 // 4
    sizes = encoder.check_files(conversation)
    assert sizes == [(12, 40, 70)]
    assert encoder.encode(conversation, sizes) == sample.encoded


@pytest.mark.parametrize(
    ("question", "media"),
    [
        ("<image><image>", {"image": ["tiny_2x2.png", "no.png"]}),
        ("<video>", {"video_frames": ["tiny_2x2.png", "no.png"]}),
    ],
)
def test_check_finds_the_missing_file_and_names_the_record(make_encoder, question, media):
    with pytest.raises(DataError) as error:
        make_encoder().check_files(parse(question, "5", **media))
    assert error.value.where == f'train.json, record 17 (id "one"), {next(iter(media))}'
    assert error.value.what == f"{IMAGES / 'no.png'} does not exist."


@pytest.mark.parametrize("action", ["check_files", "load"])
def test_missing_video_is_named_with_its_record(make_encoder, action):
    pytest.importorskip("av")
    with pytest.raises(DataError) as error:
        getattr(make_encoder(), action)(parse("<video>", "5", video="no.mp4"))
    assert error.value.where == 'train.json, record 17 (id "one"), video'
    assert error.value.what.startswith(f"{IMAGES / 'no.mp4'} cannot be opened: ")


@pytest.mark.parametrize(
    ("media", "question", "changes", "grids"),
    [
        # 64x64 pixels are 16x16 patches.
        ({"image": "grad_64x64.png"}, "<image>", {}, [(1, 16, 16)]),
        ({"image": ["grad_64x64.png"] * 2}, "<image><image>", {}, [(1, 8, 8)] * 2),
        ({"video_frames": ["grad_64x64.png"] * 3}, "<video>", {}, [(3, 4, 4)]),
        ({"video_frames": ["grad_64x64.png"] * 5}, "<video>", {}, [(3, 4, 4)]),
        ({"video_frames": ["grad_64x64.png"]}, "<video>", {}, [(2, 4, 4)]),
        # Derived: 4096 pixels shared by 2 images, or by the 2 frames that are taken.
        (
            {"image": ["grad_64x64.png"] * 2},
            "<image><image>",
            {"multiple_image_max_pixels": -1},
            [(1, 10, 10)] * 2,
        ),
        (
            {"video_frames": ["grad_64x64.png"] * 2},
            "<video>",
            {"video_max_pixels": -1},
            [(2, 10, 10)],
        ),
        (
            {"video_frames": ["grad_64x64.png"] * 5},
            "<video>",
            {"video_max_pixels": -1, "max_frames": 2},
            [(2, 10, 10)],
        ),
    ],
)
def test_each_kind_of_media_has_its_pixel_limits(make_encoder, media, question, changes, grids):
    limits = {
        "single_image_max_pixels": 64 * 64,
        "multiple_image_max_pixels": 32 * 32,
        "video_min_pixels": 16 * 16,
        "video_max_pixels": 16 * 16,
    }
    encoder = make_encoder(**{**limits, **changes})
    sample = encoder.load(parse(question, "5", **media))
    assert sample.grids == grids
    assert [len(patches) for patches in sample.patches] == [t * h * w for t, h, w in grids]
    assert [end - begin - 2 for begin, end in sample.encoded.media] == [
        t * h * w // 4 for t, h, w in grids
    ]


@pytest.mark.parametrize(
    ("question", "media", "text_limit", "media_limit", "kept"),
    [
        pytest.param("5", {}, 7, 9, 7, id="text"),
        pytest.param("<image>5", {"image": "tiny_2x2.png"}, 3, 11, 11, id="image"),
        pytest.param("<image>5", {"image": "tiny_2x2.png"}, 9, 5, 3, id="image-cut-off"),
        pytest.param("<video>", {"video_frames": ["tiny_2x2.png"] * 2}, 3, 14, 14, id="video"),
    ],
)
def test_samples_with_and_without_media_have_their_own_longest_length(
    make_encoder, question, media, text_limit, media_limit, kept
):
    encoder = make_encoder(text_max_length=text_limit, multimodal_max_length=media_limit)
    assert len(encoder.load(parse(question, "5", **media)).encoded.ids) == kept


@pytest.fixture
def second_is_broken(tmp_path) -> Conversation:
    """An image and a cut one with a good header, of 4 visual tokens each."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("whole.png", "broken.png"):
        Image.fromarray(noise).save(tmp_path / name)
    os.truncate(tmp_path / "broken.png", 400)
    return parse("<image><image>", "5", folder=tmp_path, image=["whole.png", "broken.png"])


# The user's header is 3 tokens long, each image 6.
@pytest.mark.parametrize(("limit", "kept"), [(8, 3), (9, 9), (14, 9)])
def test_image_that_is_cut_off_is_not_decoded_and_leaves_no_pixels(
    make_encoder, second_is_broken, limit, kept
):
    sample = make_encoder(multimodal_max_length=limit).load(second_is_broken)
    images = (kept - 3) // 6
    assert sample.encoded.ids == [321, 314, 198, *[-301, *[-300] * 4, -302] * images]
    assert sample.encoded.media == [(3, 9)] * images
    assert sample.grids == [(1, 4, 4)] * images
    assert [patches.shape for patches in sample.patches] == [(16, 48)] * images


@pytest.mark.parametrize("limit", [15, 512])
def test_image_that_is_kept_is_decoded(make_encoder, second_is_broken, limit):
    with pytest.raises(DataError) as error:
        make_encoder(multimodal_max_length=limit).load(second_is_broken)
    assert error.value.where == 'train.json, record 17 (id "one"), image'
    assert error.value.what.startswith(f"{second_is_broken.images[1]} is corrupt: ")


def test_check_reads_images_that_would_be_cut_off(make_encoder, second_is_broken):
    with pytest.raises(DataError) as error:
        make_encoder(multimodal_max_length=14).check_files(second_is_broken)
    assert error.value.where == 'train.json, record 17 (id "one"), image'
    assert error.value.what.startswith(f"{second_is_broken.images[1]} is corrupt: ")


def test_video_file_gives_what_its_sampled_frames_give(make_encoder, tmp_path):
    av = pytest.importorskip("av")
    path = str(tmp_path / "a.avi")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in (20, 90, 160, 230):
            pixels = np.full((32, 48, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    names = [f"{i}.png" for i in range(4)]
    with av.open(path) as container:
        for name, frame in zip(names, container.decode(video=0), strict=True):
            frame.to_image().save(tmp_path / name)

    encoder = make_encoder()
    film = parse("<video>", "5", video=path)
    assert encoder.check_files(film) == [(4, 32, 48)]
    sample = encoder.load(film)
    # 4 frames to 3, 0, 2 and 3, of at most 768 pixels.
    assert sample.grids == [(3, 4, 8)]
    [patches] = sample.patches
    means = [255 * (float(frame.mean()) + 1) / 2 for frame in patches.reshape(3, -1)]
    assert means == pytest.approx([20, 160, 230], abs=5)

    by_frames = encoder.load(parse("<video>", "5", folder=tmp_path, video_frames=names))
    assert (by_frames.encoded, by_frames.grids) == (sample.encoded, sample.grids)
    np.testing.assert_array_equal(by_frames.patches[0], patches)


def test_thinking_that_does_not_fit_names_the_record(make_encoder):
    said = ["<image>", "<think><image></think>5", "5", "5"]
    conversation = parse(*said, image=["tiny_2x2.png"] * 2)
    encoder = make_encoder(thinking="last_turn")
    for call in (encoder.load, lambda c: encoder.encode(c, encoder.check_files(c))):
        with pytest.raises(DataError) as error:
            call(conversation)
        assert error.value.where == 'train.json, record 17 (id "one"), thinking: last_turn'
        assert error.value.what == "would drop an earlier thought that holds an image."


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({}, [344, 260, 345, 260], [344, 260, 345, 260]),
        ({"thinking": "every_turn"}, [344, 260, 345, 260], [344, 260, 345, 260]),
        ({"thinking": "last_turn"}, [], [344, 260, 345, 260]),
        ({"thinking": "as_is"}, [], []),
    ],
)
def test_thinking_of_the_run_reaches_its_samples(make_encoder, changes, first, second):
    sample = make_encoder(**changes).load(parse("5", "9", "5", "9"))
    question = [321, 314, 198, 20, 322, 198, 321, 295, 198]
    assert sample.encoded.ids == [*question, *first, 24, 322, 198, *question, *second, 24, 322]


def test_corrupt_image_of_a_table_is_named_by_its_record_and_number(make_encoder, tmp_path):
    files = [(IMAGES / "grad_64x64.png").read_bytes(), (IMAGES / "grad_40x70.png").read_bytes()]
    table = pa.Table.from_pylist([{"image": [files[0], files[1][:-200]]}])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    [(index, record)] = table_records(str(tmp_path / "t.parquet"))
    given = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "5"}]
    record = {**record, "id": "one", "conversations": given}
    conversation = parse_conversation(record, "t.parquet", index)
    encoder = make_encoder()
    where = 't.parquet, record 1 (id "one"), image'
    with pytest.raises(DataError) as error:
        encoder.load(conversation)
    assert error.value.where == where
    assert error.value.what.startswith("image 2 is corrupt: ")
    with pytest.raises(DataError) as error:
        encoder.check_files(conversation)
    assert error.value.where == where
    assert error.value.what.startswith(f"table://{tmp_path / 't.parquet'}#0.image.1 is corrupt: ")


@pytest.mark.parametrize(("question", "expected"), [("5", (15, 2)), ("5:9", (17, 2))])
def test_measure_tells_tokens_and_trained_tokens(make_encoder, question, expected):
    assert make_encoder().measure(parse(question, "5"), []) == expected
