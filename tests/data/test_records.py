"""Every way a data file may be written, and what is said of a broken one."""

import json
import tracemalloc

import pytest

from vlmtune.core.errors import DataError
from vlmtune.data.conversation import parse_conversation
from vlmtune.data.findings import CODES
from vlmtune.data.records import read_records

BOM = "\ufeff"


def write(tmp_path, name: str, text: str | bytes):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def error_of(path) -> DataError:
    with pytest.raises(DataError) as error:
        list(read_records(path))
    return error.value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("d.json", '[{"id": "a"}, {"id": "ü"}]', id="array"),
        pytest.param("d.json", ' \n[\n{"id": "a"},\n{"id": "ü"}\n]\n', id="array-over-lines"),
        pytest.param("d.json", BOM + '[{"id": "a"}, {"id": "ü"}]', id="array-with-bom"),
        pytest.param("d.jsonl", '{"id": "a"}\n{"id": "ü"}', id="lines"),
        pytest.param("d.jsonl", '{"id": "a"}\r\n\r\n{"id": "ü"}\r\n', id="lines-with-crlf-and-gap"),
        pytest.param("d.jsonl", BOM + '{"id": "a"}\n{"id": "ü"}\n', id="lines-with-bom"),
        pytest.param("d.json", '{"id": "a"}\n{"id": "ü"}\n', id="lines-without-the-suffix"),
        pytest.param("d", '\n{"id": "a"}\n\n{"id": "ü"}', id="lines-without-a-suffix-and-gaps"),
        pytest.param("d.json", '{"data": [{"id": "a"}, {"id": "ü"}]}', id="object-around-the-list"),
        pytest.param(
            "d.json",
            '{"version": 2, "tags": [], "data": [{"id": "a"}, {"id": "ü"}]}',
            id="object-with-other-keys",
        ),
    ],
)
def test_records_come_in_order_with_positions_from_1(tmp_path, name, text):
    path = write(tmp_path, name, text)
    assert list(read_records(path)) == [(1, {"id": "a"}), (2, {"id": "ü"})]
    assert list(read_records(str(path))) == [(1, {"id": "a"}), (2, {"id": "ü"})]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_a_file_may_hold_one_record(tmp_path, name):
    path = write(tmp_path, name, '{"id": "a", "image": ["b.png"], "conversations": [5]}')
    record = {"id": "a", "image": ["b.png"], "conversations": [5]}
    assert list(read_records(path)) == [(1, record)]


def test_one_record_may_stand_on_many_lines(tmp_path):
    path = write(tmp_path, "d.json", '{\n"id": "a",\n"conversations": [\n5\n]\n}')
    assert list(read_records(path)) == [(1, {"id": "a", "conversations": [5]})]


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path):
    path = write(tmp_path, "d.jsonl", '{"id": "a\u2028b\u0085c"}\n{"id": "d"}')
    assert list(read_records(path)) == [(1, {"id": "a\u2028b\u0085c"}), (2, {"id": "d"})]


def test_missing_file_is_named_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = error_of("nothing.json")
    assert error.where == str(tmp_path / "nothing.json")
    assert error.what == "there is no such file."
    assert error.fix == "check the path; it is relative to where you start."


def test_directory_is_refused(tmp_path):
    error = error_of(tmp_path)
    assert (error.where, error.what) == (str(tmp_path), "cannot be read: Is a directory.")
    assert error.fix == "check the path and its permissions."


@pytest.mark.parametrize("text", ["", " \n\t\n", BOM])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_empty_file_is_refused(tmp_path, name, text):
    path = write(tmp_path, name, text)
    error = error_of(path)
    assert (error.where, error.what) == (str(path), "the file is empty.")
    assert error.fix == "write a JSON array of records."


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "file-unreadable"),
        (b" ", "file-empty"),
        (b"5", "file-form"),
        (b'["\xe9"]', "encoding"),
        (b"[1,]", "json"),
        (b'{"a" 1}', "json"),
        (b"[" * 100_000, "json-value"),
        (b'{"a": %s}' % (b"1" * 5000), "json-value"),
    ],
)
def test_a_file_that_cannot_be_read_has_a_code(tmp_path, content, code):
    path = tmp_path / "d.json"
    if content is not None:
        path.write_bytes(content)
    error = error_of(path)
    assert error.code == code and CODES[code].severity == "error"


@pytest.mark.parametrize(
    ("line", "code"), [('{"a" 1}', "json"), ('{"a": %s}' % ("1" * 5000), "json-value")]
)
def test_a_broken_line_has_a_code(tmp_path, line, code):
    [(_, error)] = read_records(write(tmp_path, "d.jsonl", line))
    assert error.code == code


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[{"id": "\xe9"}]', "is not UTF-8 text (invalid continuation byte at byte 9)."),
        ('[{"id": "a"}]'.encode("utf-16"), "is not UTF-8 text (invalid start byte at byte 0)."),
    ],
)
def test_other_encodings_are_refused_with_the_first_wrong_byte(tmp_path, content, what):
    path = write(tmp_path, "d.json", content)
    error = error_of(path)
    assert (error.where, error.what, error.fix) == (str(path), what, "save it as UTF-8.")


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        pytest.param(
            '[\n {"id": 1},\n {"id" 2}\n]',
            "line 3, column 8",
            "broken JSON: Expecting ':' delimiter.",
            id="in-a-record",
        ),
        pytest.param(
            '[{"id": 1}\n\n', "line 3, column 1", "broken JSON: Expecting ',' delimiter.", id="cut"
        ),
        pytest.param(
            '[{"id": 1}]\n[]', "line 2, column 1", "broken JSON: Extra data.", id="two-arrays"
        ),
        pytest.param(
            '{"id" 1}\n{"id": 2}',
            "line 1, column 7",
            "broken JSON: Expecting ':' delimiter.",
            id="first-of-unmarked-lines",
        ),
    ],
)
def test_broken_json_is_refused_with_its_line(tmp_path, text, place, what):
    path = write(tmp_path, "d.json", text)
    error = error_of(path)
    assert (error.where, error.what) == (f"{path}, {place}", what)
    assert error.fix == "mend that line, or write the file with a JSON library."


@pytest.mark.parametrize(
    ("name", "text", "place", "line"),
    [
        pytest.param("d.jsonl", '{"id": 1}\n\n{"id" 2}\n{"id": 3}', 2, 3, id="after-a-gap"),
        pytest.param("d.json", '{"id": 1}\n{"id" 2}\n{"id": 3}', 2, 2, id="without-the-suffix"),
        pytest.param("d.jsonl", '{"id" 2}\n{"id": 1}\n{"id": 3}', 1, 1, id="first"),
        pytest.param("d.jsonl", '{"id": 1}\n{"id": 3}\n\n{"id" 2}', 3, 4, id="last"),
    ],
)
def test_error_of_a_broken_line_takes_the_place_of_its_record(tmp_path, name, text, place, line):
    path = write(tmp_path, name, text)
    records = dict(read_records(path))
    error = records.pop(place)
    assert list(records) == [p for p in (1, 2, 3) if p != place]
    assert list(records.values()) == [{"id": 1}, {"id": 3}]
    assert isinstance(error, DataError)
    assert error.where == f"{path}, line {line}, column 7"
    assert error.what == "broken JSON: Expecting ':' delimiter."
    with pytest.raises(DataError) as raised:
        parse_conversation(error, str(path), place)
    assert raised.value is error


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "a"}',
        '{"data": []}',
        '{"train": [1], "test": [2]}',
        "5",
        '"conversations"',
        "null",
    ],
)
def test_json_without_one_list_of_records_is_refused(tmp_path, text):
    path = write(tmp_path, "d.json", text)
    error = error_of(path)
    assert (error.where, error.what) == (str(path), "holds no list of records.")
    assert error.fix == "write a JSON array of records, or an object with one list in it."


def test_whatever_stands_in_the_list_is_handed_on(tmp_path):
    path = write(tmp_path, "d.json", '[5, null, "a"]')
    assert list(read_records(path)) == [(1, 5), (2, None), (3, "a")]


@pytest.mark.parametrize(
    "text", ['[{"id": %s}]' % ("1" * 5000), "[" * 100_000], ids=["int", "deep"]
)
def test_json_that_python_cannot_hold_is_refused(tmp_path, text):
    path = write(tmp_path, "d.json", text)
    assert error_of(path).where.startswith(str(path))


LONG = "x" * 500
PLACES = (
    '[\n {"id": 1, "n": -12.5e3},\n {"id": "\\ud83d\\ude42", "t": [true, null, "' + LONG + '"]},\n'
)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[]", id="empty"),
        pytest.param(" [ ] \n", id="empty-with-spaces"),
        pytest.param("[1, 23, 456]", id="numbers"),
        pytest.param("[1234.5e-7 ,true,\nnull, -Infinity, NaN,false]\n", id="literals"),
        pytest.param(PLACES + ' {"id": 3}\n]\n', id="objects"),
        pytest.param('["\\u00fc", "' + LONG + '", "ü图🙂"]', id="strings"),
    ],
)
def test_array_read_in_pieces_is_what_json_reads_at_once(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr("vlmtune.data.records.CHUNK", chunk)
    path = write(tmp_path, "d.json", text)
    records = [record for _, record in read_records(path)]
    assert repr(records) == repr(json.loads(text))  # by repr: NaN differs from itself


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        PLACES + ' {"id": tru}\n]',
        PLACES + ' {"id": 3,}\n]',
        PLACES + ' {"id": "\\u12"}\n]',
        PLACES + ' {"id": "' + LONG,
        PLACES + " 3, ]",
        PLACES + " 3 4]",
        PLACES + " 3",
        PLACES + " 3] 5",
        PLACES + " 3}",
        PLACES,
        "[,1]",
        "[",
    ],
)
def test_broken_array_is_reported_as_json_reports_it(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr("vlmtune.data.records.CHUNK", chunk)
    path = write(tmp_path, "d.json", text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    error = error_of(path)
    place = f"line {expected.value.lineno}, column {expected.value.colno}"
    assert error.where == f"{path}, {place}"
    assert error.what == f"broken JSON: {expected.value.msg}."


def test_records_before_the_fault_come_first(tmp_path):
    path = write(tmp_path, "d.json", '[{"id": 1}, {"id": 2}, {"id" 3}]')
    records = read_records(path)
    assert [next(records), next(records)] == [(1, {"id": 1}), (2, {"id": 2})]
    with pytest.raises(DataError, match="column 30"):
        next(records)


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_array_and_lines_are_never_held_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr("vlmtune.data.records.CHUNK", 1000)
    record = json.dumps({"id": "x" * 90})
    text = "\n".join([record] * 5000) if name == "d.jsonl" else f"[{','.join([record] * 5000)}]"
    path = write(tmp_path, name, text)
    list(read_records(write(tmp_path, "warm-up.json", "[1]")))
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 500_000
    assert peak < 100_000


def test_wrong_byte_far_into_a_file_is_counted_from_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmtune.data.records.CHUNK", 1000)
    content = f'["{"ü" * 30_000}", '.encode()
    path = write(tmp_path, "d.json", content + b'"\xff"]')
    assert error_of(path).what == (
        f"is not UTF-8 text (invalid start byte at byte {len(content) + 1})."
    )


def test_value_that_python_cannot_hold_is_named_by_its_position(tmp_path):
    path = write(tmp_path, "d.json", '[{"id": 1}, {"id": %s}]' % ("1" * 5000))
    assert error_of(path).where == f"{path}, record 2"
