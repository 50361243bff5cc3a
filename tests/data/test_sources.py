"""Names in data_path to sources, and the datainfo file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlmtune.core.errors import ConfigError, DataError
from vlmtune.data.sources import Source, resolve_sources

SETS: dict[str, Any] = {
    "coco": {"meta_file": "coco.json", "image_dir": "images", "data_format": "conversation"},
    "laion": {
        "meta_file": "laion.parquet",
        "image_dir": None,
        "data_format": "caption",
        "storage_type": "hybrid",
        "caption_template": "unused",
    },
    "text": {"meta_file": "~/text.jsonl", "image_dir": "", "data_format": "conversation"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def datainfo(folder):
    def write(content: Any = SETS) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "sets.json").write_text(text, "utf-8")
        return "sets.json"

    return write


def error_of(names: list[str], datainfo: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        resolve_sources(names, None, datainfo)
    return error.value


def test_sets_have_their_own_folder_and_format_and_files_the_run_s(datainfo):
    sources = resolve_sources(["laion", "data/train.v2.json", "coco", "text"], "pics", datainfo())
    assert sources == [
        Source("laion", "laion.parquet", None, "caption"),
        Source("train.v2", "data/train.v2.json", "pics", "conversation"),
        Source("coco", "coco.json", "images", "conversation"),
        Source("text", os.path.expanduser("~/text.jsonl"), None, "conversation"),
    ]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.jsonl", Source("a", "a.jsonl", "pics")),
        ("some/a.parquet", Source("a", "some/a.parquet", "pics")),
        ("owner/name", Source("owner/name", "owner/name", "pics")),
        ("owner/name:test[:10]", Source("owner/name:test[:10]", "owner/name:test[:10]", "pics")),
    ],
)
def test_without_datainfo_every_name_is_a_path_or_a_hub_dataset(name, source):
    assert resolve_sources([name], "pics") == [source]


def test_folder_is_called_by_its_name(folder):
    (folder / "sets" / "coco").mkdir(parents=True)
    assert resolve_sources(["sets/coco"], None) == [Source("coco", "sets/coco")]


@pytest.mark.parametrize(
    ("path", "table"),
    [
        ("a.json", False),
        ("b/a.jsonl", False),
        ("no/such/path", False),
        ("/no/such", False),
        ("train", False),
        ("a.parquet", True),
        ("owner/name", True),
        ("owner/name:test", True),
        ("owner/name.json", False),
    ],
)
def test_what_is_read_as_a_table(path, table):
    assert Source("x", path).is_table is table


def test_existing_file_of_any_name_is_read_as_json(folder):
    (folder / "owner").mkdir()
    (folder / "owner/name").write_text('[{"id": 1}]')
    assert list(Source("x", "owner/name").records()) == [(1, {"id": 1})]


def test_missing_file_is_reported_as_one(folder):
    with pytest.raises(DataError) as error:
        next(Source("x", "train").records())
    assert error.value.where == str(folder / "train")
    assert error.value.what == "there is no such file."


@pytest.mark.parametrize(("name", "nearest"), [("cocoo", "coco"), ("laoin", "laion")])
def test_unknown_set_is_refused_with_the_nearest(datainfo, name, nearest):
    error = error_of(["coco", name], datainfo())
    assert error.where == "data_path"
    assert error.what == f'there is no set "{name}" in sets.json'
    assert error.fix == f'write "{nearest}"; it has coco, laion, text'


@pytest.mark.parametrize(
    ("entry", "place", "what"),
    [
        ({}, "", "has no meta_file, image_dir, data_format"),
        ({"meta_file": "a.json"}, "", "has no image_dir, data_format"),
        ({**SETS["coco"], "meta_file": None}, ", meta_file", "None is no path"),
        ({**SETS["coco"], "image_dir": 5}, ", image_dir", "5 is no path"),
        (
            {**SETS["coco"], "data_format": "captions"},
            ", data_format",
            '"captions" is not a format',
        ),
        ("a.json", "", "is no object"),
    ],
)
def test_broken_set_is_refused_with_its_place(datainfo, entry, place, what):
    error = error_of(["a"], datainfo({"a": entry}))
    assert (error.where, error.what) == (f'datainfo sets.json, "a"{place}', what)


@pytest.mark.parametrize("content", ["[]", "{}", "5"])
def test_datainfo_must_be_an_object_of_sets(datainfo, content):
    error = error_of(["a"], datainfo(content))
    assert (error.where, error.what) == ("datainfo sets.json", "is no object of named sets")


def test_missing_and_broken_datainfo_are_refused(datainfo):
    error = error_of(["a"], "none.json")
    assert (error.where, error.what) == ("datainfo none.json", "there is no such file.")
    assert error_of(["a"], datainfo("{")).what.startswith("is broken JSON: Expecting property")


def test_fingerprint_follows_the_content_and_where_it_is_read_from(folder):
    path = folder / "a.json"
    path.write_text("[1]")
    first = Source("a", "a.json").fingerprint()
    os.utime(path, ns=(1, 1))
    assert Source("other name", "a.json").fingerprint() == first
    path.write_text("[2]")
    changed = Source("a", "a.json").fingerprint()
    others = [
        Source("a", str(path)).fingerprint(),
        Source("a", "a.json", "pics").fingerprint(),
        Source("a", "a.json", None, "caption").fingerprint(),
    ]
    assert len({first, changed, *others}) == 5
