"""A conversation and its files to one sample: sizes, length limits, and what is decoded."""

import ctypes
import json
import multiprocessing
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from vlmtune.collators.sample import SampleEncoder, grids_of
from vlmtune.core.errors import DataError
from vlmtune.data.conversation import Conversation, Turn, parse_conversation
from vlmtune.data.dataset import FEATURES
from vlmtune.data.images import frame_indices
from vlmtune.data.tables import table_records

GOLDENS = Path(__file__).parents[1] / "goldens" / "ovis2_5"
IMAGES = GOLDENS / "preprocess" / "images"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/samples.json"))


def parse(*said: str, folder: Path | None = IMAGES, **media) -> Conversation:
    """Questions and answers by turns."""
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(said)]
    record = {"id": "one", **media, "conversations": turns}
    return parse_conversation(record, "train.json", 17, str(folder) if folder else None)


def pixels_of(encoder: SampleEncoder, row: dict) -> np.ndarray:
    """A filling that no write may leave stands where nothing was written."""
    out = np.full((row["patches"], encoder.processor.image_processor.features), 7, np.uint8)
    encoder.write_pixels(row, out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_row_gives_the_ids_labels_and_pixels_of_the_whole_sample(make_encoder, case):
    encoder = make_encoder(case)
    images = encoder.processor.image_processor
    given = json.loads((GOLDENS / case / "samples.json").read_text("utf-8"))
    for record in given["samples"]:
        conversation = parse_conversation(
            record, "train.json", 17, str(GOLDENS / case / given["image_dir"])
        )
        encoded = encoder.encode(conversation, encoder.check_files(conversation))
        row = encoder.row(conversation)
        ids, labels = encoder.ids_and_labels(row)
        assert (ids.dtype, labels.dtype) == (np.int64, np.int64)
        assert (ids.tolist(), labels.tolist()) == (encoded.ids, encoded.labels)
        assert (row["length"], row["trained_tokens"]) == (len(ids), encoded.trained_tokens)
        files = [[file] for file in conversation.images]
        limits = encoder.limits.for_images(len(files))
        if frames := conversation.frames:
            low, high = encoder.limits.min_frames, encoder.limits.max_frames
            files = [[frames[i] for i in frame_indices(len(frames), low, high)]]
            limits = encoder.limits.for_video(len(files[0]))
        media = [images.patches([Image.open(f) for f in one], *limits) for one in files]
        assert grids_of(row) == [grid for _, grid in media]
        assert row["patches"] == sum(len(patches) for patches, _ in media)
        assert row["patches_squared"] == sum(t * (h * w) ** 2 for t, h, w in grids_of(row))
        if media:
            normalised = images.normalise(torch.from_numpy(pixels_of(encoder, row))).numpy()
            np.testing.assert_array_equal(normalised, np.concatenate([p for p, _ in media]))


def test_row_is_small_and_has_the_columns_of_a_prepared_dataset(make_encoder):
    said = ["<image>5<image>", "9"]
    conversation = parse(*said, image=["grad_64x64.png", "tiny_2x2.png"])
    row = make_encoder(single_image_max_pixels=64**2, multiple_image_max_pixels=1024).row(
        conversation
    )
    assert set(row) == set(FEATURES)
    assert row["grids"].tolist() == [1, 8, 8, 1, 4, 4]
    begin, atom, end = -301, -300, -302
    head, tail = [321, 314, 198], [322, 198, 321, 295, 198, 344, 260, 345, 260, 24, 322]
    assert row["ids"].tolist() == [*head, begin, atom, end, 20, begin, atom, end, *tail]
    # 16 and 4 visual tokens, and the answer with its end.
    assert row["length"] == len(row["ids"]) + 15 + 3
    assert row["trained"].tolist() == [row["length"] - 2, row["length"]]
    assert (row["trained_tokens"], row["cut"], row["patches"]) == (2, 0, 80)
    assert row["patches_squared"] == 64**2 + 16**2


def test_row_of_an_empty_question_has_tokens_and_trains_none(make_encoder):
    encoder = make_encoder()
    row = encoder.row(Conversation("one", [Turn("user", "")], source="train.json", record=17))
    ids, labels = encoder.ids_and_labels(row)
    assert ids.tolist() == [321, 314, 198, 322, 198]
    assert labels.tolist() == [-100] * 5
    assert (row["length"], row["trained"].tolist(), row["trained_tokens"]) == (5, [], 0)
    assert pixels_of(encoder, row).shape == (0, 48)


@pytest.mark.parametrize("as_list", [False, True])
def test_row_is_exact_at_every_length_limit(make_encoder, as_list):
    said = ["<image>5", "<tool_response>2</tool_response>9", "<image>7", "9"]
    conversation = parse(*said, image=["tiny_2x2.png", "grad_40x70.png"])
    whole = make_encoder().row(conversation)
    whole_length = whole["length"] + whole["cut"]
    expanded = make_encoder(multimodal_max_length=4).expand(conversation, [(1, 2, 2), (1, 40, 70)])
    assert (len(expanded.ids), len(expanded.media)) == (whole_length, 2)
    for limit in range(len(whole["ids"]) + 60):
        encoder = make_encoder(multimodal_max_length=limit)
        encoded = encoder.encode(conversation, [(1, 2, 2), (1, 40, 70)])
        row = encoder.columns(conversation, [(1, 2, 2), (1, 40, 70)])
        if as_list:
            row |= {name: row[name].tolist() for name in ("ids", "trained", "grids")}
        ids, labels = encoder.ids_and_labels(row)
        assert (ids.tolist(), labels.tolist()) == (encoded.ids, encoded.labels)
        assert row["length"] == len(ids)
        assert row["length"] + row["cut"] == whole_length
        assert row["trained_tokens"] == encoded.trained_tokens
        assert len(grids_of(row)) == len(encoded.media)


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
    assert encoder.check_files(conversation) == [(12, 40, 70)]
    row = encoder.row(conversation)
    assert row["grids"].tolist() == [3, 10, 18]
    assert row["length"] == len(row["ids"]) - 1 + 3 * 10 * 18 // 4
    assert (pixels_of(encoder, row) != 7).any(axis=1).all()


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


def test_missing_video_is_named_with_its_record(make_encoder):
    pytest.importorskip("av")
    with pytest.raises(DataError) as error:
        make_encoder().check_files(parse("<video>", "5", video="no.mp4"))
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
    row = encoder.row(parse(question, "5", **media))
    assert grids_of(row) == grids
    assert row["length"] == len(row["ids"]) + sum(t * h * w // 4 - 1 for t, h, w in grids)
    assert (pixels_of(encoder, row) != 7).any(axis=1).all()


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
    assert encoder.row(parse(question, "5", **media))["length"] == kept


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
def test_image_that_is_cut_off_is_not_opened_and_leaves_no_pixels(
    make_encoder, second_is_broken, limit, kept
):
    encoder = make_encoder(multimodal_max_length=limit)
    row = second_is_broken.to_row() | encoder.columns(second_is_broken, [(1, 16, 16)] * 2)
    os.remove(second_is_broken.images[1])
    images = (kept - 3) // 6
    ids, _ = encoder.ids_and_labels(row)
    assert ids.tolist() == [321, 314, 198, *[-301, *[-300] * 4, -302] * images]
    assert row["grids"].tolist() == [1, 4, 4] * images
    assert pixels_of(encoder, row).shape == (16 * images, 48)


@pytest.mark.parametrize("limit", [15, 512])
def test_image_that_is_kept_is_decoded(make_encoder, second_is_broken, limit):
    encoder = make_encoder(multimodal_max_length=limit)
    row = second_is_broken.to_row() | encoder.columns(second_is_broken, [(1, 16, 16)] * 2)
    with pytest.raises(DataError) as error:
        pixels_of(encoder, row)
    assert error.value.where == 'train.json, record 17 (id "one"), image'
    assert error.value.what.startswith(f"{second_is_broken.images[1]} is corrupt: ")


@pytest.mark.parametrize(
    ("question", "media", "place"),
    [
        ("<image>", {"image": "a.png"}, "image"),
        ("<video>", {"video_frames": ["a.png", "a.png"]}, "video_frames"),
    ],
)
def test_file_of_another_size_than_when_it_was_checked_is_refused(
    make_encoder, tmp_path, question, media, place
):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    encoder = make_encoder()
    row = encoder.row(parse(question, "5", folder=tmp_path, **media))
    Image.new("RGB", (640, 64)).save(tmp_path / "a.png")
    with pytest.raises(DataError) as error:
        pixels_of(encoder, row)
    assert error.value.where == f'train.json, record 17 (id "one"), {place}'
    assert error.value.what == (
        f"{tmp_path / 'a.png'} has changed since it was checked: 640 x 64 pixels now."
    )


def test_one_decoded_image_is_held_at_a_time(make_encoder, tmp_path):
    """Each takes 27 MB decoded; nothing but pixels grows with their number."""
    Image.new("RGB", (3000, 3000), "red").save(tmp_path / "a.jpg")
    encoder = make_encoder(multiple_image_max_pixels=256, video_max_pixels=256)
    peaks = []
    for question, count in [("<image>", 1), ("<image>" * 6, 6), ("<video>", 6)]:
        files = {"image" if "image" in question else "video_frames": ["a.jpg"] * count}
        row = encoder.row(parse(question, "5", folder=tmp_path, **files))
        peaks.append(peak_mb(lambda row=row: pixels_of(encoder, row)))
    assert peaks[0] > 15
    assert max(peaks) < peaks[0] + 15


def test_few_frames_of_a_video_file_are_held_at_a_time(make_encoder, tmp_path):
    """Each takes 6 MB as RGB and half of that as it is decoded."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((1080, 1920, 3), np.uint8), format="rgb24")
        for _ in range(24):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    film = parse("<video>", "5", folder=tmp_path, video="a.mp4")
    few, many = (make_encoder(min_frames=n, max_frames=n, video_max_pixels=256) for n in (8, 24))

    def train(encoder: SampleEncoder) -> None:
        pixels_of(encoder, film.to_row() | encoder.columns(film, [(24, 1080, 1920)]))

    for call in (train, lambda encoder: encoder.check_files(film)):
        peaks = [peak_mb(partial(call, encoder)) for encoder in (few, many)]
        assert peaks[0] > 6
        assert peaks[1] < peaks[0] + 20


def peak_mb(call) -> float:
    """How far the memory of a fork grows by the call."""
    reading, writing = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        # What earlier tests have freed would be used again, and its peak would count.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kb("VmRSS")
        call()
        writing.send((status_kb("VmHWM") - before) / 1024)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    peak = reading.recv() if reading.poll(60) else None
    process.join()
    assert peak is not None
    return peak


def status_kb(key: str) -> int:
    [line] = re.findall(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(line)


def test_draft_of_a_jpeg_is_opt_in_and_keeps_the_shape(make_encoder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    conversation = parse("<image>", "5", folder=tmp_path, image="a.jpg")
    exact, draft = (make_encoder(single_image_max_pixels=1600, jpeg_draft=d) for d in (False, True))
    row = exact.row(conversation)
    assert row["grids"].tolist() == draft.row(conversation)["grids"].tolist() == [1, 10, 10]
    # 320 pixels to 40: the draft is an eighth, and nothing is resized.
    small = Image.open(tmp_path / "a.jpg")
    small.draft("RGB", (40, 40))
    expected = np.empty((100, 48), np.uint8)
    draft.processor.image_processor.write_patches([small], (1, 10, 10), expected)
    np.testing.assert_array_equal(pixels_of(draft, row), expected)
    assert (pixels_of(exact, row) != expected).any()


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
    row = encoder.row(film)
    # 4 frames to 3, 0, 2 and 3, of at most 768 pixels.
    assert row["grids"].tolist() == [3, 4, 8]
    pixels = pixels_of(encoder, row)
    assert pixels.reshape(3, -1).mean(1) == pytest.approx([20, 160, 230], abs=5)

    by_frames = encoder.row(parse("<video>", "5", folder=tmp_path, video_frames=names))
    for name in ("ids", "trained", "grids", "length"):
        np.testing.assert_array_equal(by_frames[name], row[name])
    np.testing.assert_array_equal(pixels_of(encoder, by_frames), pixels)


def test_thinking_that_does_not_fit_names_the_record(make_encoder):
    said = ["<image>", "<think><image></think>5", "5", "5"]
    conversation = parse(*said, image=["tiny_2x2.png"] * 2)
    encoder = make_encoder(thinking="last_turn")
    with pytest.raises(DataError) as error:
        encoder.row(conversation)
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
    row = make_encoder(**changes).row(parse("5", "9", "5", "9"))
    question = [321, 314, 198, 20, 322, 198, 321, 295, 198]
    assert row["ids"].tolist() == [*question, *first, 24, 322, 198, *question, *second, 24, 322]


def test_corrupt_image_of_a_table_is_named_by_its_record_and_place(make_encoder, tmp_path):
    files = [(IMAGES / "grad_64x64.png").read_bytes(), (IMAGES / "grad_40x70.png").read_bytes()]
    table = pa.Table.from_pylist([{"image": [files[0], files[1][:-200]]}])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    [(index, record)] = table_records(str(tmp_path / "t.parquet"))
    given = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "5"}]
    record = {**record, "id": "one", "conversations": given}
    conversation = parse_conversation(record, "t.parquet", index)
    encoder = make_encoder()
    file = f"table://{tmp_path / 't.parquet'}#0.image.1"
    row = conversation.to_row() | encoder.columns(conversation, [(1, 64, 64), (1, 40, 70)])
    for call in (lambda: encoder.check_files(conversation), lambda: pixels_of(encoder, row)):
        with pytest.raises(DataError) as error:
            call()
        assert error.value.where == 't.parquet, record 1 (id "one"), image'
        assert error.value.what.startswith(f"{file} is corrupt: ")
