"""What is told of an image or video beside its size."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from vlmtune.data import image_checks
from vlmtune.data.conversation import Conversation
from vlmtune.data.image_checks import inspect_image, inspect_media, inspect_video
from vlmtune.data.tables import open_table

WHERE = 'train.json, record 17 (id "coco_0123"), image'


def picture(mode: str = "RGB", width: int = 33, height: int = 47) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert("L" if mode[0] in "IF" else "RGB").convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.fixture
def save(tmp_path):
    def write(image: Image.Image, name: str, **options) -> str:
        image.save(tmp_path / name, **options)
        return str(tmp_path / name)

    return write


def frames(count: int) -> list[Image.Image]:
    return [picture().rotate(i) for i in range(1, count)]


SUSPICIOUS = {
    "image-aspect": [
        (picture(width=201, height=1), "a.png", {}),
        (picture(width=1, height=201), "a.jpg", {}),
    ],
    "image-animated": [
        (picture(), "a.gif", {"save_all": True, "append_images": frames(3)}),
        (picture(), "a.png", {"save_all": True, "append_images": frames(3)}),
        (picture(), "a.webp", {"save_all": True, "append_images": frames(3)}),
        (picture(), "a.tiff", {"save_all": True, "append_images": frames(3)}),
    ],
    "image-cmyk": [(picture("CMYK"), "a.jpg", {}), (picture("CMYK"), "a.tiff", {})],
    "image-16bit": [
        (picture("I;16"), "a.png", {}),
        (picture("I;16"), "a.tiff", {}),
        (picture("F"), "a.tiff", {}),
    ],
    "image-rotated": [
        (picture(), "a.jpg", {"exif": turned(6)}),
        (picture(), "a.png", {"exif": turned(3)}),
        (picture(), "a.webp", {"exif": turned(8)}),
    ],
}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(
    ("code", "image", "name", "options"),
    [
        pytest.param(code, *case, id=f"{code}-{case[1]}-{i}")
        for code, cases in SUSPICIOUS.items()
        for i, case in enumerate(cases)
    ],
)
def test_suspicious_image_is_told_and_keeps_its_size(save, code, image, name, options, decode):
    path = save(image, name, **options)
    size, found = inspect_image(path, WHERE, decode)
    assert size == (image.height, image.width)
    assert [(e.code, e.where) for e in found] == [(code, WHERE)]
    assert found[0].what.startswith(f"{path} ")


@pytest.mark.parametrize(
    ("image", "name", "options"),
    [
        *((picture(mode), "a.png", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        (picture(width=200, height=1), "a.png", {}),
        *((picture(), "a.jpg", {"exif": turned(i)}) for i in (0, 1, 9)),
        (picture(), "a.tiff", {"exif": turned(6)}),  # Pillow turns a TIFF as it decodes it
        (picture(), "a.mpo", {"save_all": True, "append_images": [picture()]}),
        (picture(), "a.gif", {}),
    ],
)
def test_plain_image_has_nothing_to_tell(save, image, name, options):
    size, found = inspect_image(save(image, name, **options), WHERE, decode=True)
    assert found == []
    with Image.open(save(image, name, **options)) as opened:
        opened.load()
        assert size == (opened.height, opened.width)


def cut(content: bytes) -> bytes:
    return content[: len(content) * 3 // 4]


@pytest.mark.parametrize("kind", ["file", "table"])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(cut, "image-truncated", id="cut"),
        pytest.param(lambda content: b"", "image-empty", id="empty"),
        pytest.param(lambda content: b"<html>404</html>", "image-unreadable", id="page"),
    ],
)
def test_broken_image_is_told_alone(tmp_path, change, code, kind):
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    content, path = change(buffer.getvalue()), tmp_path / "a.png"
    path.write_bytes(content)
    if kind == "table":
        open_table.cache_clear()
        source = tmp_path / "t.parquet"
        pa.parquet.write_table(pa.table({"image": [content]}), source)
        path = f"table://{source}#0.image"
    size, found = inspect_image(str(path), WHERE)
    assert size is None
    assert [e.code for e in found] == [code]


def test_missing_image_and_decompression_bomb_are_refused(tmp_path):
    assert [e.code for e in inspect_image(str(tmp_path / "a.png"), WHERE)[1]] == ["image-missing"]
    (tmp_path / "a.ppm").write_bytes(b"P6 65536 65536 255\n")
    assert [e.code for e in inspect_image(str(tmp_path / "a.ppm"), WHERE)[1]] == ["image-huge"]


def test_fault_inside_a_whole_jpeg_is_found_by_decoding_alone(save):
    path = Path(save(picture(), "a.jpg"))
    content = bytearray(path.read_bytes())
    content[1000:1002] = b"\xff\xc4"  # a table of codes among the pixels
    path.write_bytes(content)
    assert inspect_image(str(path), WHERE) == ((47, 33), [])
    assert [e.code for e in inspect_image(str(path), WHERE, True)[1]] == ["image-truncated"]


def test_png_is_not_decoded_for_its_orientation(save, monkeypatch):
    path = save(picture(), "a.png", exif=turned(3))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert [e.code for e in inspect_image(path, WHERE)[1]] == ["image-rotated"]


def test_files_of_a_record_are_told_with_their_fields_and_sizes(save, tmp_path):
    good, wide = save(picture(), "a.png"), save(picture(width=300, height=1), "b.png")
    conversation = Conversation("a", [], [good, wide], source="t.json", record=1)
    sizes, found = inspect_media(conversation)
    assert sizes == [(1, 47, 33), (1, 1, 300)]
    assert [(e.where, e.code) for e in found] == [
        ('t.json, record 1 (id "a"), image', "image-aspect")
    ]
    frames = Conversation("a", [], frames=[good, "no.png"], source="t.json", record=1)
    sizes, found = inspect_media(frames)
    assert sizes is None
    assert [(e.where, e.code) for e in found] == [
        ('t.json, record 1 (id "a"), video_frames', "image-missing")
    ]


def test_missing_and_empty_videos_are_told_with_and_without_pyav(tmp_path, monkeypatch):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    for available in (True, False):
        monkeypatch.setattr(image_checks, "can_open_videos", lambda there=available: there)
        names = ["no.mp4", "empty.mp4", "."]
        found = [inspect_video(str(tmp_path / name), WHERE) for name in names]
        assert [(size, [e.code for e in errors]) for size, errors in found] == [
            (None, ["video-missing"]),
            (None, ["video-unreadable"]),
            (None, ["video-unreadable"]),
        ]
    assert inspect_video(str(tmp_path / "text.mp4"), WHERE) == (None, [])  # it cannot be opened


def test_video_is_measured_and_broken_ones_are_told(tmp_path):
    av = pytest.importorskip("av")
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(5):
            image = picture(width=64, height=48).rotate(i)
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    assert inspect_video(path, WHERE) == ((5, 48, 64), [])
    assert inspect_video(path, WHERE, decode=True) == ((5, 48, 64), [])
    (tmp_path / "b.mp4").write_text("no video")
    size, [error] = inspect_video(str(tmp_path / "b.mp4"), WHERE)
    assert (size, error.code) == (None, "video-unreadable")
