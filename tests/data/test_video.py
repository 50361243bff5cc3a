"""Video files, written here with PyAV: their size, their frames, and damaged ones."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtune.core.errors import DataError
from vlmtune.data.images import check_video, read_video

WHERE = 'train.json, record 17 (id "coco_0123"), video'
LEVELS = [20, 60, 100, 140, 180, 220]


@pytest.fixture
def av():
    return pytest.importorskip("av")


@pytest.fixture
def video(av, tmp_path):
    """`video(name)` is a video of 48x32 with one grey frame for each of LEVELS."""

    def write(name: str = "a.mp4") -> str:
        path = str(tmp_path / name)
        with av.open(path, "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for level in LEVELS:
                pixels = np.full((32, 48, 3), level, dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


def read(path: str, where: str, indices=(0,)) -> list[Image.Image]:
    return list(read_video(path, where, indices))


def error_of(call) -> DataError:
    with pytest.raises(DataError) as error:
        call()
    assert error.value.where == WHERE
    return error.value


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_check_counts_the_frames_and_tells_height_and_width(video, name):
    assert check_video(video(name), WHERE) == (6, 32, 48)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
@pytest.mark.parametrize("indices", [[0], [5], [0, 1, 2, 3, 4, 5], [1, 4], [0, 0, 3, 5, 5], []])
def test_frames_are_those_asked_for(video, name, indices):
    frames = read(video(name), WHERE, indices)
    assert [frame.size for frame in frames] == [(48, 32)] * len(indices)
    # The codec is lossy; the levels are 40 apart.
    means = [float(np.asarray(frame).mean()) for frame in frames]
    assert means == pytest.approx([LEVELS[i] for i in indices], abs=5)


def test_reading_behind_the_end_is_refused(video):
    path = video()
    error = error_of(lambda: read(path, WHERE, [2, 6, 8]))
    assert error.what == f"{path} ends before frame 6."
    assert error.fix == "replace or remove it."


def test_frames_are_given_before_the_end_is_missed(video):
    frames = read_video(video(), WHERE, [2, 6])
    assert np.asarray(next(frames)).mean() == pytest.approx(LEVELS[2], abs=5)
    assert error_of(lambda: next(frames)).what.endswith("ends before frame 6.")


@pytest.mark.parametrize("read", [check_video, read])
class TestRefused:
    def test_missing(self, av, tmp_path, read):
        path = str(tmp_path / "a.mp4")
        error = error_of(lambda: read(path, WHERE))
        assert error.what.startswith(f"{path} cannot be opened: ")
        assert error.fix == "check the path and file."

    def test_not_a_video(self, av, tmp_path, read):
        path = tmp_path / "a.mp4"
        path.write_bytes(bytes(range(256)) * 8)
        assert error_of(lambda: read(str(path), WHERE)).what.startswith(f"{path} cannot be opened:")

    @pytest.mark.parametrize("left", [0, 200, 500])
    def test_cut_in_its_index(self, video, read, left):
        path = video("a.mp4")
        os.truncate(path, left)
        error = error_of(lambda: read(path, WHERE))
        assert error.what.startswith(f"{path} ")
        assert error.fix in ("check the path and file.", "replace or remove it.")

    def test_sound_alone(self, av, tmp_path, read):
        path = str(tmp_path / "a.wav")
        with av.open(path, "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 80), dtype=np.int16), format="s16", layout="mono"
            )
            silence.sample_rate = 8000
            container.mux(stream.encode(silence))
            container.mux(stream.encode())
        assert error_of(lambda: read(path, WHERE)).what == f"{path} has no video stream."

    def test_without_pyav(self, tmp_path, monkeypatch, read):
        monkeypatch.setitem(sys.modules, "av", None)
        error = error_of(lambda: read("a.mp4", WHERE))
        assert error.what == (
            "a.mp4 is a video file, and PyAV, which decodes it, is not installed."
        )
        assert error.fix == 'run: pip install "vlmtune[video]", or give "video_frames".'


def starts_of_frames(path: str) -> list[int]:
    """Where the frames of an AVI file start."""
    content = Path(path).read_bytes()
    found = [match.start() for match in re.finditer(b"00dc", content)]
    return [start for start in found if start > content.index(b"movi")]


@pytest.fixture
def shortened(video):
    """`shortened(n)` is a video cut before its n-th frame, counted from 0."""

    def cut(n: int) -> str:
        path = video("a.avi")
        os.truncate(path, starts_of_frames(path)[n])
        return path

    return cut


def test_frames_behind_the_last_one_wanted_are_not_decoded(video):
    path = video("a.avi")
    start = starts_of_frames(path)[2] + 8  # behind the chunk's name and size
    content = bytearray(Path(path).read_bytes())
    content[start : start + 60] = bytes(60)
    Path(path).write_bytes(content)
    assert len(read(path, WHERE, [0, 1])) == 2


def test_shortened_video_has_the_frames_left(shortened):
    path = shortened(3)
    assert check_video(path, WHERE) == (3, 32, 48)
    assert len(read(path, WHERE, [0, 1, 2])) == 3
    assert error_of(lambda: read(path, WHERE, [0, 3])).what == f"{path} ends before frame 3."


def test_video_without_frames_is_refused(shortened):
    path = shortened(0)
    error = error_of(lambda: check_video(path, WHERE))
    assert (error.what, error.fix) == (f"{path} has no video frames.", "replace or remove it.")
    assert error_of(lambda: read(path, WHERE, [0])).what == f"{path} ends before frame 0."


def test_frames_hidden_by_a_trim_are_not_counted(av, tmp_path):
    whole, trimmed = str(tmp_path / "whole.mp4"), str(tmp_path / "trimmed.mp4")
    with av.open(whole, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in range(20):
            pixels = np.full((32, 48, 3), 2 * level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    # What `ffmpeg -ss 2.8 -c copy` does: frames before the start stay in the file, marked hidden.
    options = {"avoid_negative_ts": "disabled"}
    with av.open(whole) as source, av.open(trimmed, "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(14 / 5 / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                target.mux(packet)
    with av.open(trimmed) as container:
        shown = sum(1 for _ in container.decode(video=0))
    assert shown == 6
    assert check_video(trimmed, WHERE) == (shown, 32, 48)


def test_damaged_frame_is_refused(video):
    path = video("a.avi")
    start = starts_of_frames(path)[2] + 8
    content = bytearray(Path(path).read_bytes())
    content[start : start + 60] = bytes(60)
    Path(path).write_bytes(content)
    assert check_video(path, WHERE) == (6, 32, 48)
    error = error_of(lambda: read(path, WHERE, [0, 5]))
    assert error.what.startswith(f"{path} cannot be decoded: ")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_video_cut_anywhere_is_read_or_refused(video, name):
    path = video(name)
    for length in reversed(range(Path(path).stat().st_size)):
        os.truncate(path, length)
        try:
            read(path, WHERE, range(check_video(path, WHERE)[0]))
        except DataError as error:
            assert error.where == WHERE
