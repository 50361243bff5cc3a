"""Images from everywhere they may be given, decoded as training decodes them; bad ones named."""

import base64
import http.server
import io
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from vlmtune.core.errors import DataError
from vlmtune.data.images import PixelLimits, decode, open_image
from vlmtune.inference import media
from vlmtune.inference.media import frames_of, open_picture

WHERE = "request, image 2"
LIMITS = PixelLimits(1, 1, 1, 1, 1, 1, 2, 3)


def noise(width: int = 33, height: int = 47, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_bytes(image: Image.Image, form: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


PNG, JPEG = as_bytes(noise()), as_bytes(noise(), "JPEG")
PIXELS = np.asarray(noise())


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(PNG)
    return tmp_path / "a.png"


def error_of(source, call=open_picture) -> DataError:
    with pytest.raises(DataError) as error:
        call(source, WHERE)
    assert error.value.where == WHERE
    return error.value


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self):
        name = self.path[1:]
        if name == "silent":
            time.sleep(3)
            return
        if name in ("away", "file", "circle"):
            target = {"away": "/a.png", "file": "file:///etc/hostname", "circle": "/circle"}[name]
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        known = {
            "a.png": PNG,
            "%C3%BC%20b.png": PNG,
            "page": b"<!DOCTYPE html><p>Log in",
            "cut": JPEG[:900],
            "drip": b"",
        }
        self.send_response(200 if name in known else 404)
        self.end_headers()
        with suppress(BrokenPipeError):  # nobody waits any more
            for _ in range(8 if name == "drip" else 0):
                self.wfile.write(b"x")
                time.sleep(0.05)
            self.wfile.write(known.get(name, b""))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url(monkeypatch):
    """`url(name)` at a server of this test."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_every_kind_of_source_gives_the_same_pixels(file, url, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    table = pa.table({"image": [b"", PNG]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    sources = [
        str(file),
        file,
        "~/a.png",
        PNG,
        noise(),
        Image.open(file),
        url("a.png"),
        url("a.png").replace("http", "HTTP"),
        url("away"),
        url("ü b.png"),
        f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
        f"table://{tmp_path}/t.parquet#1.image",
    ]
    for source in sources:
        assert np.array_equal(np.asarray(open_picture(source, WHERE)), PIXELS), source


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_pixels_are_those_that_training_decodes_without_a_turn_by_exif(tmp_path, form):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    content = as_bytes(noise(), form, **({} if form == "GIF" else {"exif": exif}))
    path = tmp_path / "a"
    path.write_bytes(content)
    with closing(open_image(str(path), WHERE)) as trained:
        decode(trained, str(path), WHERE)
        for source in (path, content):
            image = open_picture(source, WHERE)
            assert (image.size, image.mode) == ((33, 47), trained.mode)
            assert image.tobytes() == trained.tobytes()


def test_image_is_seen_before_it_is_decoded_but_not_if_it_was_given_as_one(file):
    loaded = []

    def before(image):
        loaded.append(getattr(image, "_im", None) is not None)

    open_picture(file, WHERE, before)
    open_picture(PNG, WHERE, before)
    open_picture(Image.open(file), WHERE, before)
    assert loaded == [False, False, True]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty."),
        (b"GIF89a", "is no image Pillow can read."),
        (b"\n <html><body>", "is a web page."),
        (PNG[:2000], "is corrupt: "),
        (JPEG[:900], "is corrupt: "),
        (JPEG[:900] + bytes(9000), "is corrupt: it has no end."),
        (b"P6 20000 10000 255\n", "has too many pixels to be an honest image."),
    ],
)
def test_bytes_that_are_no_whole_image_are_refused(content, what):
    found = error_of(content).what
    assert found.startswith(f"the image of {len(content):,} bytes {what}")


def test_file_that_is_no_whole_image_is_refused_with_its_path(tmp_path):
    for name, content, what in (
        ("empty.png", b"", "is empty."),
        ("text.png", b"text", "is no image Pillow can read."),
        ("cut.png", PNG[:2000], "is corrupt: "),
        ("open.jpg", JPEG[:900] + bytes(9000), "is corrupt: it has no end."),
        ("huge.ppm", b"P6 20000 10000 255\n", "has too many pixels to be an honest image."),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert error_of(path).what.startswith(f"{path} {what}")
    assert error_of(str(tmp_path / "none.png")).what == f"{tmp_path}/none.png does not exist."
    assert error_of(tmp_path).what.startswith(f"{tmp_path} cannot be opened: ")
    assert error_of("").what == '"" is no path.'


def test_image_without_pixels_is_refused():
    assert error_of(Image.new("RGB", (0, 5))).what == "the image has no pixels."


def test_image_given_as_one_that_is_truncated_is_refused():
    assert error_of(Image.open(io.BytesIO(PNG[:2000]))).what.startswith("the image is corrupt: ")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("data:image/png;base64,%%%", "data:image/png;base64,%%% cannot be read: "),
        ("data:text/plain,hello", "data:text/plain,hello is no image Pillow can read."),
        ("data:image/png;base64", "data:image/png;base64 is empty."),
        ("ftp://host/a.png", "ftp://host/a.png is of a kind of URL that is not fetched."),
        ("file:///a.png", "file:///a.png is of a kind of URL that is not fetched."),
    ],
)
def test_url_that_holds_no_image_is_refused(source, what):
    assert error_of(source).what.startswith(what)


def test_long_data_url_is_shortened_in_messages():
    what = error_of("data:image/png;base64," + "A" * 100_000).what
    assert what == f"data:image/png;base64,{'A' * 178}... is no image Pillow can read."


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("none.png", "cannot be fetched: the server says 404 Not Found."),
        ("page", "is a web page."),
        ("cut", "is corrupt: "),
        ("file", "cannot be fetched: the server says 302 "),
        ("circle", "cannot be fetched: the server says 302 "),
    ],
)
def test_what_a_server_sends_instead_of_an_image_is_told_with_the_url(url, name, what):
    assert error_of(url(name)).what.startswith(f"{url(name)} {what}")


def test_server_that_is_silent_slow_or_sends_too_much_is_not_waited_for(url, monkeypatch):
    monkeypatch.setattr(media, "SILENCE", 0.2)
    start = time.monotonic()
    what = error_of(url("silent")).what
    assert what == f"{url('silent')} cannot be fetched: the server is silent for 0.2 seconds."
    assert time.monotonic() - start < 2.5
    monkeypatch.setattr(media, "SILENCE", 10.0)
    monkeypatch.setattr(media, "PATIENCE", 0.1)
    assert error_of(url("drip")).what.endswith("fetched: it takes longer than 0.1 seconds.")
    monkeypatch.setattr(media, "LARGEST", 1000)
    assert error_of(url("a.png")).what.endswith("fetched: it is larger than 1,000 bytes.")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.png", "http://", "http://[x/a.png"])
def test_address_without_a_server_is_refused(address, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert error_of(address).what.startswith(f"{address} cannot be fetched: ")


def test_frames_are_the_ones_that_training_takes_and_keep_their_number():
    frames = [noise(seed=i) for i in range(7)]
    taken = frames_of(frames, LIMITS, WHERE)
    assert [where for where, _ in taken] == [f"{WHERE}, frame {n}" for n in (2, 4, 7)]
    assert [frame for _, frame in taken] == [frames[1], frames[3], frames[6]]
    assert [where for where, _ in frames_of(frames[:1], LIMITS, WHERE)] == [f"{WHERE}, frame 1"] * 2


def test_frames_of_a_file_are_decoded_and_files_and_urls_are_told_apart(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in (20, 90, 160, 230):
            image = Image.new("RGB", (48, 32), (level,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    for video in (path, str(path)):
        taken = [frame for _, frame in frames_of(video, LIMITS, WHERE)]
        assert [type(frame) for frame in taken] == [Image.Image] * 3
        assert [np.asarray(f).mean() for f in taken] == pytest.approx([20, 160, 230], abs=8)


@pytest.mark.parametrize(
    ("video", "what"),
    [
        ([], "has no frames."),
        ("none.mp4", "none.mp4 "),
        ("http://127.0.0.1:9/a.mp4", "http://127.0.0.1:9/a.mp4 is a URL, and videos are read"),
    ],
)
def test_video_that_cannot_be_read_is_refused(video, what):
    error = error_of(video, lambda video, where: frames_of(video, LIMITS, where))
    assert error.what.startswith(what)
