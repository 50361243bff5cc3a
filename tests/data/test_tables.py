"""Parquet files, datasets folders and Hub names: their records, and images kept inside them."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from vlmtune.core.errors import DataError
from vlmtune.data.conversation import Conversation, parse_conversation
from vlmtune.data.dataset import prepare_dataset
from vlmtune.data.images import check_image, open_image
from vlmtune.data.sources import Source
from vlmtune.data.tables import open_table, read_image, table_records

WHERE = 'train.parquet, record 1 (id "one"), image'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    open_table.cache_clear()
    monkeypatch.setattr("vlmtune.data.dataset.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlmtune"


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Four images of noise, each with its own size."""
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 256, (9 + i, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return paths


def turns(question: str = "<image>\nWhat?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}]


def write_parquet(path: Path, rows: list[dict[str, Any]], **kinds: pa.DataType) -> str:
    table = pa.Table.from_pylist(rows)
    for name, kind in kinds.items():
        table = table.set_column(
            table.column_names.index(name), name, table.column(name).cast(kind)
        )
    pyarrow.parquet.write_table(table, path)
    return str(path)


def conversations(source: str, folder: Path | None = None) -> list[Conversation]:
    return [
        parse_conversation(record, source, index, str(folder) if folder else None)
        for index, record in Source("x", source).records()
    ]


def pixels(path: str) -> np.ndarray:
    with open_image(path, WHERE) as image:
        return np.asarray(image)


FORMS = {
    "path": lambda path: path.name,
    "bytes": lambda path: path.read_bytes(),
    "struct": lambda path: {"bytes": path.read_bytes(), "path": path.name},
    "struct-of-path": lambda path: {"bytes": None, "path": path.name},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("key", ["image", "images"])
def test_every_form_of_an_image_gives_the_pixels_of_its_file(tmp_path, images, form, kind, key):
    write = FORMS[form]
    values = [[write(p) for p in images[:2]], [write(images[2])], None]
    if key == "image":
        values = [write(images[0]), write(images[1]), None]
    counts = [len(v) if isinstance(v, list) else int(v is not None) for v in values]
    rows = [
        {"id": i, key: value, "conversations": turns("<image>" * count)}
        for i, (value, count) in enumerate(zip(values, counts, strict=True))
    ]
    if form == "struct-of-path":  # Arrow cannot tell the type of what is always null
        element = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        source = write_parquet(
            tmp_path / "t.parquet", rows, **{key: element if key == "image" else pa.list_(element)}
        )
    else:
        source = write_parquet(tmp_path / "t.parquet", rows)
    if kind == "folder":
        table = pa.parquet.read_table(source)
        source = str(tmp_path / "saved")
        datasets.Dataset(table).save_to_disk(source)

    found = conversations(source, tmp_path)
    files = [f for c in found for f in c.images]
    assert [len(c.images) for c in found] == counts
    assert [f.startswith("table://") for f in files] == [form in ("bytes", "struct")] * sum(counts)
    for file, path in zip(files, images, strict=False):
        np.testing.assert_array_equal(pixels(file), np.asarray(Image.open(path)))
        assert check_image(file, WHERE) == (Image.open(path).height, 7)


def test_images_of_a_hub_style_dataset_are_read_as_they_were_written(tmp_path, images):
    rows = {
        "images": [
            [{"bytes": p.read_bytes(), "path": p.name} for p in part]
            for part in (images[:2], images[2:3])
        ],
        "messages": [
            [
                {"role": "user", "content": "<image>" * count},
                {"role": "assistant", "content": "A cat."},
            ]
            for count in (2, 1)
        ],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        }
    )
    path = str(tmp_path / "t.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    found = conversations(path)
    assert [c.images for c in found] == [
        [f"table://{path}#0.images.0", f"table://{path}#0.images.1"],
        [f"table://{path}#1.images.0"],
    ]
    files = [f for c in found for f in c.images]
    for file, image in zip(files, images, strict=False):
        assert read_image(file) == image.read_bytes()


def test_records_of_several_batches_keep_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmtune.data.tables.BATCH", 3)
    rows = [{"id": i, "image": bytes([i]), "conversations": turns()} for i in range(8)]
    source = write_parquet(tmp_path / "t.parquet", rows)
    found = list(table_records(source))
    assert [(index, record["id"]) for index, record in found] == [(i + 1, i) for i in range(8)]
    assert [read_image(record["image"]) for _, record in found] == [bytes([i]) for i in range(8)]


def test_records_of_parquet_equal_those_of_json(tmp_path):
    rows = [{"id": "a", "conversations": turns("Hi")}, {"id": "b", "conversations": turns("图")}]
    source = write_parquet(tmp_path / "t.parquet", rows)
    assert [record for _, record in table_records(source)] == rows


def test_train_split_of_a_saved_dictionary_is_taken(tmp_path):
    data = datasets.Dataset.from_list([{"id": "a", "conversations": turns("Hi")}])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"test": data, "dev": data}).save_to_disk(str(tmp_path / "other"))
    assert len(list(table_records(str(tmp_path / "both")))) == 1
    with pytest.raises(DataError) as error:
        open_table(str(tmp_path / "other"))
    assert error.value.where == str(tmp_path / "other")
    assert error.value.what == "has splits test, dev."


@pytest.mark.parametrize(
    ("source", "what", "fix"),
    [
        (
            "none.parquet",
            "there is no such file.",
            "check the path; it is relative to where you start.",
        ),
        ("bad.parquet", "cannot be read: ", "write the file with pyarrow, pandas or datasets."),
        (
            ".",
            "cannot be read: ",
            "name a folder that datasets' save_to_disk wrote, or the files in it.",
        ),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, monkeypatch, source, what, fix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.parquet").write_text("[]")
    with pytest.raises(DataError) as error:
        open_table(source)
    assert error.value.where == str(Path(source).absolute())
    assert error.value.what.startswith(what)
    assert error.value.fix == fix


def test_hub_dataset_that_cannot_be_reached_is_refused():
    with pytest.raises(DataError) as error:
        list(Source("x", "vlmtune-tests/no-such-dataset:test").records())
    assert error.value.where == "vlmtune-tests/no-such-dataset:test"
    assert error.value.what.startswith("is no file here, and the Hub gives no such dataset: ")
    assert "\n" not in error.value.what


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("owner/name", ("owner/name", "train")),
        ("owner/name:test[:10]", ("owner/name", "test[:10]")),
    ],
)
def test_hub_dataset_is_loaded_by_name_and_split(monkeypatch, name, arguments):
    asked = []

    def load_dataset(path: str, split: str) -> datasets.Dataset:
        asked.append((path, split))
        return datasets.Dataset.from_list([{"id": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(Source("x", name).records()) == [(1, {"id": "a"})]
    assert asked == [arguments]


def test_reference_written_in_a_record_is_only_a_path(tmp_path, images):
    source = write_parquet(tmp_path / "t.parquet", [{"image": images[0].read_bytes()}])
    record = {"image": f"table://{source}#0.image", "conversations": turns()}
    [file] = parse_conversation(record, "train.json", 1).images
    assert file == f"table:{source}#0.image"
    with pytest.raises(DataError, match="does not exist"):
        open_image(file, WHERE)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"no image", "is no image Pillow can read."), (b"", "is empty.")],
)
def test_bad_bytes_are_refused_with_their_place(tmp_path, content, what):
    source = write_parquet(tmp_path / "t.parquet", [{"image": content}])
    with pytest.raises(DataError) as error:
        open_image(f"table://{source}#0.image", WHERE)
    assert (error.value.where, error.value.what) == (WHERE, f"table://{source}#0.image {what}")


@pytest.mark.parametrize("place", ["5.image", "0.picture", "1.image"])
def test_row_that_is_gone_is_refused(tmp_path, images, place):
    rows = [{"image": {"bytes": b"x", "path": "a"}}, {"image": {"bytes": None, "path": "a"}}]
    source = write_parquet(tmp_path / "t.parquet", rows)
    with pytest.raises(DataError) as error:
        open_image(f"table://{source}#{place}", WHERE)
    assert error.value.what == f"table://{source}#{place} is not in the table any more."


class Checks:
    def __init__(self):
        self.sizes: list[tuple[int, int]] = []

    def check_files(self, conversation: Conversation) -> None:
        self.sizes += [check_image(f, conversation.where("image")) for f in conversation.images]

    def prepare(self, source: str):
        return prepare_dataset(
            [Source("x", source)],
            check_files=self.check_files,
            encode=lambda conversation, sizes: {
                **{"ids": [7, 8], "trained": [1, 2], "grids": []},
                **{"length": 2, "trained_tokens": 1, "patches": 0, "patches_squared": 0},
            },
            skip_bad=False,
            fingerprint="t",
        )


def test_prepared_dataset_refers_to_the_images_and_holds_none(tmp_path, images, cache):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    rows = [{"id": i, "image": buffer.getvalue(), "conversations": turns()} for i in range(5)]
    source = write_parquet(tmp_path / "t.parquet", rows)
    checks = Checks()
    prepared = checks.prepare(source)
    assert checks.sizes == [(200, 200)] * 5
    files = [row["image_files"] for row in prepared.dataset]
    assert files == [[f"table://{source}#{i}.image"] for i in range(5)]
    np.testing.assert_array_equal(pixels(files[3][0]), noise)
    assert not {"image", "images"} & set(prepared.dataset.column_names)
    size = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
    assert len(buffer.getvalue()) > 100_000
    assert size < 10_000


def test_table_written_anew_is_prepared_anew(tmp_path, images):
    source = tmp_path / "t.parquet"
    checks = Checks()
    for number in (0, 0, 1):
        if not checks.sizes or number:
            row = {"image": images[number].read_bytes(), "conversations": turns()}
            write_parquet(source, [row])
        [[file]] = checks.prepare(str(source)).dataset["image_files"]
        np.testing.assert_array_equal(pixels(file), np.asarray(Image.open(images[number])))
    assert checks.sizes == [(9, 7), (10, 7)]


def test_captions_in_parquet_and_a_set_that_names_them(tmp_path, images):
    rows = [{"image": images[0].read_bytes(), "caption": "A cat.", "caption_template": None}]
    source = write_parquet(tmp_path / "t.parquet", rows, caption_template=pa.string())
    caption = Source("x", source, None, "caption")
    [(index, record)] = caption.records()
    conversation = caption.parse(index, record)
    assert [turn.text for turn in conversation.turns] == ["<image>", "A cat."]
    assert json.loads(json.dumps(conversation.images)) == [f"table://{source}#0.image"]
