"""What is kept, what is left out, and when the work is done again."""

import json
import math
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmtune.core.errors import DataError
from vlmtune.data import preparation
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import FEATURES, ArrowRows, PreparedData, prepare_dataset
from vlmtune.data.images import check_image
from vlmtune.data.preparation import Totals
from vlmtune.data.sources import Source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("vlmtune.data.dataset.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlmtune"


@pytest.fixture
def write(tmp_path):
    """`write(name, content)` writes a list as JSON and strings as they are."""

    def write_file(name: str, content: Any) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, "utf-8")
        return str(tmp_path / name)

    return write_file


class Checks:
    """Stands for the model: a file's size is its length, a word is a token. Counts its calls."""

    def __init__(self):
        self.checked: list[str] = []

    def check_files(self, conversation: Conversation) -> list[int]:
        self.checked.append(conversation.id)
        sizes = []
        for file in conversation.media_files:
            if not Path(file).exists():
                raise DataError(conversation.where("image"), f"{file} is gone.", "find it.")
            sizes.append(Path(file).stat().st_size)
        return sizes

    def encode(self, conversation: Conversation, sizes: list[int]) -> dict[str, Any]:
        if "tremble" in conversation.turns[0].text:
            raise DataError(conversation.where("conversations"), "has a rattle.", "mend it.")
        words = [len(word) for turn in conversation.turns for word in turn.text.split()]
        trained = sum(len(turn.text.split()) for turn in conversation.turns if turn.trained)
        trained = 0 if "cut" in conversation.turns[0].text else trained
        return {
            "ids": np.array(words, np.int32),
            "trained": np.array([len(words) - trained, len(words)], np.int32),
            "grids": np.array(sizes, np.int32),
            "length": len(words) + sum(sizes),
            "trained_tokens": trained,
            "cut": 3 if "cut" in conversation.turns[0].text else 0,
            "patches": sum(sizes),
            "patches_squared": sum(size**2 for size in sizes),
        }


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
def prepare(checks):
    def prepare_with(
        *paths: str,
        folder: str | None = None,
        skip_bad: bool = False,
        by: str = "t",
        check_files=None,
    ):
        return prepare_dataset(
            [Source(Path(path).stem, path, folder) for path in paths],
            check_files=check_files or checks.check_files,
            encode=checks.encode,
            skip_bad=skip_bad,
            fingerprint=by,
        )

    return prepare_with


def record(identity: Any, question: str = "What is it?", answer: str = "A cat.", **rest) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, **rest, "conversations": turns}


def ids(prepared: PreparedData) -> list[str]:
    return list(prepared.dataset["id"])


def test_a_sample_becomes_a_row_that_trl_leaves_alone(write, prepare, tmp_path):
    write("a.png", "12345")
    path = write("d.json", [record("one", "<image>\nWhat?", image="a.png")])
    prepared = prepare(path, folder=str(tmp_path))
    assert prepared.left_out == []
    assert prepared.dataset.to_list() == [
        {
            "id": "one",
            "source": path,
            "record": 1,
            "image_files": [str(tmp_path / "a.png")],
            "video_file": None,
            "frame_files": [],
            "ids": [7, 5, 1, 4],
            "trained": [2, 4],
            "grids": [5],
            "length": 9,
            "trained_tokens": 2,
            "cut": 0,
            "patches": 5,
            "patches_squared": 25,
        }
    ]


def test_rows_keep_the_order_of_the_files_and_records(write, prepare):
    first = write("1.jsonl", "\n".join(json.dumps(record(f"a{i}")) for i in range(40)))
    second = write("2.json", [record(f"b{i}") for i in range(3)])
    expected = [*(f"b{i}" for i in range(3)), *(f"a{i}" for i in range(40))]
    assert ids(prepare(second, first)) == expected


BAD = {
    "record": (record("two", answer=""), "conversations[1].value", "answer without text."),
    "file": (record("two", "<image>", image="no.png"), "image", "no.png is gone."),
    "fit": (record("two", "Why tremble?"), "conversations", "has a rattle."),
}


@pytest.mark.parametrize(("bad", "place", "what"), BAD.values(), ids=BAD)
def test_first_bad_record_stops_the_preparation(write, prepare, cache, bad, place, what):
    path = write("d.json", [record("one"), bad, {**bad, "id": "three"}])
    with pytest.raises(DataError) as error:
        prepare(path)
    assert error.value.where == f'{path}, record 2 (id "two"), {place}'
    assert error.value.what == what
    assert not list(cache.glob("*"))


def test_broken_line_stops_the_preparation(write, prepare):
    path = write("d.jsonl", f'{json.dumps(record("one"))}\n{{"id" 2}}')
    with pytest.raises(DataError) as error:
        prepare(path)
    assert error.value.where == f"{path}, line 2, column 7"


@pytest.mark.parametrize("skip_bad", [False, True])
def test_unreadable_file_stops_the_preparation_even_if_bad_records_are_skipped(
    write, prepare, skip_bad
):
    path = write("d.json", '[{"id": 1}')
    with pytest.raises(DataError, match=r"line 1, column 11:\n  broken JSON"):
        prepare(path, skip_bad=skip_bad)


@pytest.mark.parametrize(("bad", "place", "what"), BAD.values(), ids=BAD)
def test_bad_record_is_skipped_and_listed(write, prepare, bad, place, what):
    path = write("d.json", [record("one"), bad, record("three")])
    prepared = prepare(path, skip_bad=True)
    assert ids(prepared) == ["one", "three"]
    [entry] = prepared.left_out
    assert entry.pop("fix") in ("write the answer, or remove the turn.", "find it.", "mend it.")
    assert entry == {
        "file": path,
        "record": 2,
        "id": "two",
        "where": f'{path}, record 2 (id "two"), {place}',
        "what": what,
    }


def test_broken_line_is_skipped_and_listed_under_its_position(write, prepare):
    lines = [json.dumps(record("one")), "", '{"id" 2}', json.dumps(record("three"))]
    path = write("d.jsonl", "\n".join(lines))
    prepared = prepare(path, skip_bad=True)
    assert ids(prepared) == ["one", "three"]
    assert list(prepared.dataset["record"]) == [1, 3]
    assert prepared.left_out == [
        {
            "file": path,
            "record": 2,
            "id": "2",
            "where": f"{path}, line 3, column 7",
            "what": "broken JSON: Expecting ':' delimiter.",
            "fix": "mend that line, or write the file with a JSON library.",
        }
    ]


def test_every_bad_record_of_every_file_is_listed(write, prepare):
    first = write("1.json", [record("a"), record("b", answer=" "), 5, record("c")])
    second = write("2.json", [record("d", "Why tremble?"), record("e", "<image>", image="no.png")])
    prepared = prepare(first, second, skip_bad=True)
    assert ids(prepared) == ["a", "c"]
    assert [(e["file"], e["record"], e["id"]) for e in prepared.left_out] == [
        (first, 2, "b"),
        (first, 3, "3"),
        (second, 1, "d"),
        (second, 2, "e"),
    ]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_sample_with_nothing_to_learn_is_left_out_and_listed(write, prepare, skip_bad):
    path = write("d.json", [record("one", "Please cut it off."), record("two")])
    prepared = prepare(path, skip_bad=skip_bad)
    assert ids(prepared) == ["two"]
    assert prepared.left_out == [
        {
            "file": path,
            "record": 1,
            "id": "one",
            "where": f'{path}, record 1 (id "one"), conversations',
            "what": "no token to learn from is left after the cut to 6 tokens.",
            "fix": "raise multimodal_max_length or text_max_length, or lower the pixel limits.",
        }
    ]


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([], "no sample is left to learn from; 0 were left out."),
        (
            [record("one", answer=""), record("two", "Now cut.")],
            "no sample is left to learn from; 2 were left out, the first because: "
            "answer without text.",
        ),
    ],
)
def test_nothing_left_is_refused_each_time(write, prepare, cache, records, what):
    path, other = write("d.json", records), write("e.json", [])
    for _ in range(2):
        with pytest.raises(DataError) as error:
            prepare(path, other, skip_bad=True)
        assert (error.value.where, error.value.what) == (f"{path}, {other}", what)
        assert error.value.fix == (
            "mend the data, or raise multimodal_max_length and text_max_length."
        )
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_first_process_alone_shows_its_progress(write, prepare, capsys, monkeypatch, rank, shown):
    monkeypatch.setenv("RANK", rank)
    prepare(write("d.json", [record("one")]))
    assert ("Checking data: 100%" in capsys.readouterr().err) is shown


def test_result_is_reused_with_its_ledger(write, prepare, checks, tmp_path):
    write("a.png", "12345")
    image = record("two", "<image>", image="a.png")
    path = write("d.json", [record("one"), image, record("3", answer=""), record("4", "Cut? cut")])
    first = prepare(path, folder=str(tmp_path), skip_bad=True)
    assert sorted(checks.checked) == ["4", "one", "two"]
    again = prepare(path, folder=str(tmp_path), skip_bad=True)
    assert sorted(checks.checked) == ["4", "one", "two"]
    assert again.dataset.to_list() == first.dataset.to_list()
    assert [entry["id"] for entry in again.left_out] == ["3", "4"]
    assert again.left_out == first.left_out


def append_record(path: str, image: Path) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record("three")))


def append_space(path: str, image: Path) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(" ")


def touch_image(path: str, image: Path) -> None:
    stat = image.stat()
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))


def grow_image(path: str, image: Path) -> None:
    stat = image.stat()
    image.write_text("123456", "utf-8")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remove_image(path: str, image: Path) -> None:
    image.unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (append_record, {"one": 3, "two": 8, "three": 5}),
        (append_space, {"one": 3, "two": 8}),
        (touch_image, {"one": 3, "two": 8}),
        (grow_image, {"one": 3, "two": 9}),
        (remove_image, {"one": 3}),
    ],
)
def test_result_is_made_again_when_a_file_changed(
    write, prepare, checks, tmp_path, change, expected
):
    image = Path(write("a.png", "12345"))
    lines = [record("one", "So?"), record("two", "<image>", image="a.png")]
    path = write("d.jsonl", "\n".join(map(json.dumps, lines)))
    prepare(path, folder=str(tmp_path), skip_bad=True)
    checks.checked.clear()
    change(path, image)
    prepared = prepare(path, folder=str(tmp_path), skip_bad=True)
    assert len(checks.checked) >= 2
    assert dict(zip(ids(prepared), prepared.dataset["length"], strict=True)) == expected


@pytest.mark.parametrize(
    "change", [{"by": "other limits"}, {"folder": "elsewhere"}, {"skip_bad": True}]
)
def test_result_is_made_again_when_the_settings_changed(write, prepare, checks, change):
    path = write("d.json", [record("one")])
    prepare(path)
    prepare(path, **change)
    assert checks.checked == ["one", "one"]
    prepare(path)
    assert checks.checked == ["one", "one"]


def test_same_content_under_another_name_is_made_again_to_name_that_file(write, prepare):
    first, second = (write(name, [record("one")]) for name in ("1.json", "2.json"))
    assert list(prepare(first).dataset["source"]) == [first]
    assert list(prepare(second).dataset["source"]) == [second]


def test_finished_result_leaves_no_partial_folder(write, prepare, cache):
    prepare(write("d.json", [record("one")]))
    [folder] = cache.iterdir()
    assert not folder.name.startswith(".")
    assert json.loads((folder / "left_out.json").read_text("utf-8")) == []


def test_half_written_result_is_never_used(write, prepare, checks, cache):
    path = write("d.json", [record("one")])
    prepare(path)
    [folder] = cache.iterdir()
    (folder / "left_out.json").unlink()  # written last
    folder.rename(cache / ".partial-killed")
    again = prepare(path)
    assert checks.checked == ["one", "one"]
    assert (ids(again), again.left_out) == (["one"], [])
    assert {f.name for f in cache.iterdir()} == {".partial-killed", folder.name}


def test_process_that_comes_second_takes_the_result_of_the_first(write, prepare, checks, cache):
    path = write("d.json", [record("one")])
    alone = checks.check_files

    def overtaken(conversation: Conversation) -> list[int]:
        checks.check_files = alone
        prepare(path)  # the other process, from start to end
        return alone(conversation)

    checks.check_files = overtaken
    assert ids(prepare(path)) == ["one"]
    assert checks.checked == ["one", "one"]
    [folder] = cache.iterdir()
    assert not folder.name.startswith(".")


def test_path_no_system_knows_and_half_a_surrogate_pair_are_listed(write, prepare):
    bad = [record("two", "<image>", image="a\0.png"), record("\ud83d", answer="")]
    path = write("d.json", [record("one"), *bad])
    prepared = prepare(path, skip_bad=True)
    assert ids(prepared) == ["one"]
    assert [e["record"] for e in prepared.left_out] == [2, 3]


def test_failed_media_file_is_tried_again_at_the_next_start(write, prepare):
    mended = []

    def check(conversation):
        if conversation.id == "two" and not mended:
            raise DataError(conversation.where("image"), "cannot be read", "mount the disk")
        return []

    path = write("d.json", [record("one"), record("two")])
    assert ids(prepare(path, skip_bad=True, check_files=check)) == ["one"]
    mended.append(True)
    assert ids(prepare(path, skip_bad=True, check_files=check)) == ["one", "two"]


def test_totals_and_sizes_are_counted_and_kept(write, prepare, tmp_path):
    write("a.png", "12345")
    first = write("1.json", [record("a"), record("b", answer="Yes."), record("c", answer="")])
    second = write("2.json", [record("d", "<image>", image="a.png"), record("e", "Cut it: cut")])
    third = write("3.json", [record("f", answer="")])
    for _ in range(2):
        prepared = prepare(first, second, third, folder=str(tmp_path), skip_bad=True)
        assert list(prepared.dataset["length"]) == [5, 4, 8]
        assert (prepared.tokens, prepared.trained_tokens, prepared.longest) == (17, 5, 8)
        assert prepared.sizes == [2, 1, 0]
        assert prepared.has_images is True
    assert prepare(first, skip_bad=True).has_images is False


@pytest.mark.parametrize("change", [touch_image, remove_image])
def test_image_of_a_sample_left_out_counts_too(write, prepare, checks, tmp_path, change):
    image = Path(write("a.png", "12345"))
    records = [record("one"), record("two", "<image> cut", image="a.png")]
    path = write("d.json", records)
    for _ in range(2):
        assert ids(prepare(path, folder=str(tmp_path), skip_bad=True)) == ["one"]
    assert sorted(checks.checked) == ["one", "two"]
    change(path, image)
    prepare(path, folder=str(tmp_path), skip_bad=True)
    assert sorted(checks.checked) == ["one", "one", "two", "two"]


def test_stale_result_is_replaced_and_leaves_nothing_behind(write, prepare, tmp_path, cache):
    image = Path(write("a.png", "12345"))
    path = write("d.json", [record("one", "<image>", image="a.png")])
    prepare(path, folder=str(tmp_path))
    [before] = cache.iterdir()
    touch_image(path, image)
    prepare(path, folder=str(tmp_path))
    assert list(cache.iterdir()) == [before]


def test_other_processes_neither_parse_nor_look_at_media(write, prepare, tmp_path, monkeypatch):
    image = Path(write("a.png", "12345"))
    path = write("d.json", [record("one", "<image>", image="a.png")])
    first = prepare(path, folder=str(tmp_path))
    image.unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(Source, "records", None)
    again = prepare(path, folder=str(tmp_path))
    monkeypatch.undo()
    assert again.dataset.to_list() == first.dataset.to_list()
    assert again.totals == first.totals


def test_all_records_are_parsed_before_the_first_file_is_opened(write, prepare, checks):
    bad = record("last", answer="")
    path = write("d.json", [*(record(str(i), "<image>", image="no.png") for i in range(50)), bad])
    with pytest.raises(DataError, match=r"record 51 \(id .last.\)"):
        prepare(path)
    assert checks.checked == []


def test_records_are_read_a_few_ahead_of_the_one_written(write, prepare, processes, monkeypatch):
    taken, ahead = [], []
    records, add = Source.records, Totals.add

    def counted(source):
        for index, given in records(source):
            taken.append(index)
            yield index, given

    def written(totals, *batch):
        add(totals, *batch)
        ahead.append(len(taken) - 3000 - sum(totals.sizes))

    monkeypatch.setattr(Source, "records", counted)
    monkeypatch.setattr(Totals, "add", written)
    processes(2)
    path = write("d.json", [record(str(i)) for i in range(3000)])
    assert len(prepare(path).dataset) == 3000
    assert len(taken) == 6000
    assert max(ahead) == 4 * preparation.CHUNK


def test_sets_keep_their_folder_and_format(write, prepare, checks, tmp_path):
    (tmp_path / "pics").mkdir()
    write("pics/a.png", "12345")
    caption = write("c.json", [{"image": "a.png", "caption": "A cat."}])
    prepared = prepare_dataset(
        [
            Source("c", caption, str(tmp_path / "pics"), "caption"),
            Source("d", write("d.json", [record("one")])),
        ],
        check_files=checks.check_files,
        encode=checks.encode,
        skip_bad=False,
        fingerprint="t",
    )
    # "<image>" and "A cat." alone, without the words of a question.
    assert prepared.dataset["ids"][0] == [7, 1, 4]
    assert prepared.dataset[0]["image_files"] == [str(tmp_path / "pics/a.png")]
    assert prepared.sizes == [1, 1]


def test_caption_that_was_cut_off_is_listed_with_its_field(write, checks, tmp_path):
    path = write("c.json", [{"image": "a.png", "caption": "A.", "caption_template": "cut <image>"}])
    write("a.png", "12345")
    with pytest.raises(DataError, match="no sample is left to learn from; 1 were left out"):
        prepare_dataset(
            [Source("c", path, str(tmp_path), "caption")],
            check_files=checks.check_files,
            encode=checks.encode,
            skip_bad=False,
            fingerprint="t",
        )


@pytest.fixture
def processes(monkeypatch):
    """`processes(n)`: from now on n processes do the work, or for 0 this one."""

    def use(number: int) -> None:
        monkeypatch.setattr(preparation, "ALONE", 0 if number else math.inf)
        monkeypatch.setattr(preparation, "usable_cores", lambda: max(1, number))

    return use


def test_other_processes_are_started_when_the_work_has_taken_a_while(
    write, prepare, monkeypatch, tmp_path
):
    monkeypatch.setattr(preparation, "ALONE", 0.5)
    monkeypatch.setattr(preparation, "usable_cores", lambda: 2)
    log = tmp_path / "log.txt"

    def slow(conversation):
        time.sleep(0.01)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return []

    assert len(prepare(write("few.json", [record("a")] * 8), check_files=slow).dataset) == 8
    assert set(log.read_text().split()) == {str(os.getpid())}
    log.unlink()
    assert len(prepare(write("many.json", [record("a")] * 240), check_files=slow).dataset) == 240
    counts = Counter(log.read_text().split())
    assert 1 <= counts.pop(str(os.getpid())) <= 63
    assert len(counts) == 2


def test_first_records_of_a_source_are_handed_out_a_few_at_a_time(write, tmp_path, checks):
    """One process alone would be minutes with the first of long videos."""
    given = [record(str(i)) for i in range(100)]
    sources = [Source(name, write(f"{name}.json", given)) for name in "ab"]
    made = preparation.Preparation(
        sources, checks.check_files, checks.encode, False, FEATURES.arrow_schema
    )
    sizes = [len(records) for number, records in made._chunks() if number == 1]
    assert sizes == [1, 2, 4, 8, 16, 32, 32, 5]


def test_any_number_of_processes_writes_the_same_bytes(
    write, prepare, processes, cache, tmp_path, monkeypatch
):
    write("a.png", "12345")
    records = [record(str(i), "Why? " * (i % 7), answer="Yes. " * (1 + i % 5)) for i in range(900)]
    records[70] = record("70", "<image>", image="a.png")
    for i, bad in [(5, {"answer": ""}), (300, {"image": "no.png", "question": "<image>"})]:
        records[i] = record(str(i), **bad)
    records[600] = record("600", "Why tremble?")
    paths = [write("1.json", records), write("2.jsonl", "\n".join(map(json.dumps, records[:100])))]
    written = []
    for number in (0, 1, 3):
        processes(number)
        monkeypatch.setattr("vlmtune.data.dataset.HF_DATASETS_CACHE", str(cache / str(number)))
        prepared = prepare(*paths, folder=str(tmp_path), skip_bad=True)
        assert prepared.sizes == [897, 99]
        [folder] = (cache / str(number) / "vlmtune").iterdir()
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert set(written[0]) == {
        "data.arrow",
        "totals.json",
        "media.json",
        "left_out.json",
        "recheck",
    }
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("kind", ["file", "fit"])
def test_first_bad_sample_of_several_processes_stops_the_preparation(
    write, prepare, processes, cache, kind
):
    processes(3)
    bad, place, what = BAD[kind]
    good = [record(str(i)) for i in range(400)]
    path = write("d.json", [*good, bad, *good, {**bad, "id": "later"}])
    with pytest.raises(DataError) as error:
        prepare(path)
    assert error.value.where == f'{path}, record 401 (id "two"), {place}'
    assert error.value.what == what
    assert psutil.Process().children() == []
    assert not list(cache.glob("*"))


def test_killed_process_is_an_error(write, prepare, processes, cache):
    def check(conversation):
        if conversation.record == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        return []

    processes(2)
    path = write("d.json", [record(str(i)) for i in range(900)])
    with pytest.raises(DataError) as error:
        prepare(path, check_files=check)
    assert (error.value.where, error.value.what) == (
        path,
        "a process that checked the data was killed.",
    )
    assert psutil.Process().children() == []
    assert not list(cache.glob("*"))


def test_several_processes_read_the_images_of_a_table(write, prepare, processes, tmp_path):
    images = []
    for side in (20, 30):
        Image.new("RGB", (side, 10)).save(tmp_path / "a.png")
        images.append((tmp_path / "a.png").read_bytes())
    turns = record("")["conversations"]
    turns[0]["value"] = "<image>"
    rows = [{"id": str(i), "image": images[i % 2], "conversations": turns} for i in range(300)]
    rows[250]["image"] = images[0][:-50]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")

    def check(conversation):
        return check_image(conversation.images[0], conversation.where("image"))

    processes(2)
    path = str(tmp_path / "t.parquet")
    text = write("d.json", [record("text")] * 100)
    prepared = prepare(path, text, skip_bad=True, check_files=lambda c: c.images and check(c))
    assert prepared.sizes == [299, 100]
    assert [entry["record"] for entry in prepared.left_out] == [251]
    assert prepared.dataset["grids"][:2] == [[10, 20], [10, 30]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_preparation_leaves_no_process_and_nothing_to_be_used(
    write, prepare, checks, processes, cache, tmp_path, number
):
    workers = tmp_path / "workers.txt"

    def slow(conversation):
        if conversation.record % preparation.CHUNK == 1:
            with workers.open("a") as file:
                file.write(f"{os.getpid()}\n")
        time.sleep(0.001)
        return checks.check_files(conversation)

    def run():
        # A shell that starts the tests in the background has SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare(path, check_files=slow)

    processes(2)
    path = write("d.json", [record(str(i)) for i in range(6000)])
    stopped = multiprocessing.get_context("fork").Process(target=run)
    stopped.start()
    while not any(file.stat().st_size > 10_000 for file in cache.glob(".partial-*/data.arrow")):
        assert stopped.is_alive()
        time.sleep(0.005)
    assert stopped.pid
    os.kill(stopped.pid, number)
    stopped.join()
    assert stopped.exitcode == (1 if number == signal.SIGINT else -number)
    left = {int(pid) for pid in workers.read_text().split()}
    assert len(left) == 2
    until = time.monotonic() + 20
    while left := {pid for pid in left if is_running(pid)}:
        assert time.monotonic() < until, left
        time.sleep(0.05)
    assert len(list(cache.glob(".partial-*"))) == (0 if number == signal.SIGINT else 1)

    processes(0)
    assert len(prepare(path).dataset) == len(checks.checked) == 6000


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_columns_of_numbers_come_as_arrays(write, prepare):
    prepared = prepare(write("d.json", [record("a"), record("b", "Why is it so?")]))
    for name, expected in {"length": [5, 6], "trained_tokens": [2, 2], "patches": [0, 0]}.items():
        column = prepared.column(name)
        assert column.dtype == np.int64
        assert column.tolist() == expected


def test_rows_read_one_by_one_are_those_of_the_dataset(write, prepare, tmp_path):
    write("a.png", "12345")
    records = [record(f"r{i}", "Why? " * (1 + i % 7)) for i in range(2500)]
    records[1234] = record("r1234", "<image>", image="a.png")
    dataset = prepare(write("d.json", records), folder=str(tmp_path)).dataset
    rows = ArrowRows(dataset)
    assert len(rows) == 2500
    for read in (rows, pickle.loads(pickle.dumps(rows))):
        for index in (0, 999, 1000, 1234, 2499):
            row = read[index]
            assert all(row[name].dtype == np.int32 for name in ("ids", "trained", "grids"))
            assert {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in row.items()
            } == dataset[index]
    assert [row["id"] for row in rows] == dataset["id"][:]
    assert len(pickle.dumps(rows)) < 10_000
    for outside in (-1, 2500):
        with pytest.raises(IndexError):
            rows[outside]


def test_selected_rows_are_refused(write, prepare):
    dataset = prepare(write("d.json", [record("a"), record("b"), record("c")])).dataset
    with pytest.raises(ValueError, match="indices mapping"):
        ArrowRows(dataset.select([2, 0]))
