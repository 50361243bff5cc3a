"""Validation from files to findings, copies and exit codes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.core.errors import ConfigError, DataError
from vlmtune.data import record_inspection, validation_run
from vlmtune.data.conversation import Conversation
from vlmtune.data.findings import CODES
from vlmtune.data.sources import Source
from vlmtune.data.tables import open_table
from vlmtune.data.validate import main, text_of
from vlmtune.data.validation_run import Summary, validate

COMMAND = [sys.executable, "-m", "vlmtune.data.validate"]


def record(identity: str = "a", question: str = "Hi", answer: str = "Yes.", **rest) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "conversations": turns, **rest}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def to_file(name: str, records: Any) -> Source:
        text = records if isinstance(records, str) else json.dumps(records)
        Path(name).write_text(text, "utf-8")
        return Source(Path(name).stem, name)

    return to_file


def found(*sources: Source, **options) -> list[tuple[str, str, int | None]]:
    """Code, file and record of every finding, in the order of the report."""
    Path("report.json").unlink(missing_ok=True)
    validate(sources, report=Path("report.json"), **options)
    report = json.loads(Path("report.json").read_text("utf-8"))
    return [(f["code"], f["file"], f["record"]) for f in report["findings"]]


def test_findings_come_in_the_order_of_files_and_records(write):
    one = write("1.json", [record("a"), record("b", answer=""), record("c", image="no.png")])
    two = write("2.jsonl", f"{json.dumps(record('d', question='Why?'))}\n{{broken\n[]\n")
    assert found(one, two) == [
        ("answer-empty", "1.json", 2),
        ("image-marks-few", "1.json", 3),
        ("image-missing", "1.json", 3),
        ("json", "2.jsonl", 2),
        ("not-object", "2.jsonl", 3),
    ]


def test_report_has_every_finding_with_its_place_and_the_sums(write):
    source = write("1.json", [record("a"), record("b", answer="", image="é.png"), record("b")])
    summary = validate([source], report=Path("report.json"))
    report = json.loads(Path("report.json").read_text("utf-8"))
    assert {key: value for key, value in report.items() if key != "findings"} == {
        "version": 1,
        "files": ["1.json"],
        "records": 3,
        "counts": {
            "answer-empty": 1,
            "image-marks-few": 1,
            "image-missing": 1,
            "id-duplicate": 1,
            "sample-duplicate": 1,
        },
    }
    assert report["findings"][0] == {
        "code": "answer-empty",
        "severity": "error",
        "file": "1.json",
        "record": 2,
        "id": "b",
        "field": "conversations[1].value",
        "what": "answer without text.",
        "fix": "write the answer, or remove the turn.",
    }
    assert report["counts"] == summary.counts
    assert (summary.number_of("error"), summary.number_of("warning")) == (3, 2)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_any_number_of_processes_finds_and_writes_the_same(write, monkeypatch, jobs):
    monkeypatch.setattr(validation_run, "ALONE", 0)
    monkeypatch.setattr(validation_run, "CHUNK", 8)
    records = [record(str(i), answer="" if i % 70 == 5 else f"Yes {i}.") for i in range(500)]
    records[300]["conversations"][0]["from"] = "Human"
    records[450] = record("449", answer="Yes 449.")
    source = write("1.json", records)
    expected = [("answer-empty", "1.json", i + 1) for i in range(5, 500, 70)]
    expected += [("role-unknown", "1.json", 301)]
    expected += [(f"{kind}-duplicate", "1.json", 451) for kind in ("id", "sample")]
    assert found(source, jobs=jobs, fix=Path("f.json"), quarantine=Path("q.jsonl")) == sorted(
        expected, key=lambda finding: finding[2]
    )
    records[300]["conversations"][0]["from"] = "human"
    assert json.loads(Path("f.json").read_text("utf-8")) == [
        r for i, r in enumerate(records) if i % 70 != 5
    ]
    aside = [json.loads(line) for line in Path("q.jsonl").read_text("utf-8").splitlines()]
    assert aside == records[5::70]


def test_duplicates_name_the_first_place_and_the_evaluation_comes_first(write):
    held = write("eval.json", [record("a", "Q1"), record("b", "Q1")])
    one = write("1.json", [record("a", "Q2"), record("a", "Q3"), record("x", "Q1")])
    two = write("2.json", [record("a", "Q2"), {**record("y", "Q2"), "image": None}])
    summary = validate([one, two], [held])
    said = {f"{f.file} {f.record} {code}": f.what for code in summary.counts
            for f in summary.examples[code]}  # fmt: skip
    assert said == {
        "eval.json 2 sample-duplicate": "record 1 of eval.json is the same sample.",
        "1.json 2 id-duplicate": "record 1 has the same id.",
        "1.json 3 sample-in-eval": "record 1 of eval.json, which is evaluated on, is the same "
        "sample.",
        "2.json 1 sample-duplicate": "record 1 of 1.json is the same sample.",
        "2.json 2 sample-duplicate": "record 1 of 1.json is the same sample.",
    }


def test_samples_that_differ_in_one_part_are_no_duplicates(write):
    picture = Image.new("RGB", (4, 4))
    first = record("a", "<image>Q", image="1.png")
    silent = record("f", "Q")
    silent["conversations"][1:1] = [{"from": "ignored_gpt", "value": "No."}]
    source = write("1.json", [
        first, record("b", "<image>Q", image="2.png"), record("c", "<image>Q.", image="1.png"),
        record("d", "<image>Q", "Yes", image="1.png"), record("e", "Q"), silent,
        record(None, "1"), record(None, "2"),
    ])  # fmt: skip
    for name in ("1.png", "2.png"):
        picture.save(name)
    assert validate([source]).counts["sample-duplicate"] == 0
    assert validate([source]).counts["id-duplicate"] == 0


def test_images_in_tables_are_checked_and_compared_by_their_bytes(write, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    open_table.cache_clear()
    files = []
    for i in range(2):
        Image.new("RGB", (4, 5), (i, i, i)).save(f"{i}.png")
        files.append(Path(f"{i}.png").read_bytes())
    rows = [record(str(i), "<image>Q", image=files[j]) for i, j in enumerate((0, 1, 0))]
    rows.append(record("3", "<image>Q", image=files[0][:45]))
    pa.parquet.write_table(pa.Table.from_pylist(rows), "t.parquet")
    source = Source("t", str(tmp_path / "t.parquet"))
    assert found(source, jobs=2) == [
        ("sample-duplicate", source.path, 3),
        ("image-truncated", source.path, 4),
    ]
    with pytest.raises(ConfigError, match="is a table"):
        validate([source], fix=Path("f.json"))


def test_decoding_finds_what_the_header_hides(write):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("a.jpg")
    content = bytearray(Path("a.jpg").read_bytes())
    content[1000:1002] = b"\xff\xc4"
    Path("a.jpg").write_bytes(content)
    source = write("1.json", [record("a", "<image>", image="a.jpg")])
    assert found(source) == []
    assert found(source, decode=True) == [("image-truncated", "1.json", 1)]


def test_sizes_reach_the_checks_of_a_sample_without_errors_alone(write):
    Image.new("RGB", (30, 20)).save("a.png")
    good = record("a", "<image>", "At <box>1,1,1200,9</box>", image="a.png")
    bad = record("b", "<image>", "", image="a.png")
    asked = []

    def check(conversation: Conversation, sizes: Any) -> list[DataError]:
        asked.append((conversation.id, sizes))
        return [DataError(conversation.where("conversations"), "cut.", "shorten.", "too-long")]

    source = write("1.json", [good, bad, record("c")])
    assert found(source, check_sample=check) == [
        ("box-outside", "1.json", 1),
        ("too-long", "1.json", 1),
        ("answer-empty", "1.json", 2),
        ("too-long", "1.json", 3),
    ]
    assert asked == [("a", [(1, 20, 30)]), ("c", [])]


def test_copy_of_good_records_is_the_file_itself(write):
    records = [record(str(i), answer='Yes é "\\ \ud800 \t' if i else "No.") for i in range(3)]
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    array = "[\n" + ",\n".join(lines) + "\n]\n"
    array = array.encode("utf-8", "backslashreplace").decode()
    source = write("1.json", array)
    validate([source], fix=Path("f.json"))
    assert Path("f.json").read_bytes() == Path("1.json").read_bytes()


def test_records_that_cannot_be_mended_stay_or_are_set_apart_as_they_were(write):
    role, both = record("r"), record("b", answer="")
    for one in (role, both):
        one["conversations"][0]["from"] = "Human"
    source = write("1.json", [record("a"), role, both, 7])
    before = Path("1.json").read_bytes()
    fixed_role = record("r")
    fixed_both = record("b", answer="")
    validate([source], fix=Path("f.json"))
    assert json.loads(Path("f.json").read_text()) == [record("a"), fixed_role, fixed_both, 7]
    summary = validate([source], fix=Path("g.json"), quarantine=Path("q.json"))
    assert json.loads(Path("g.json").read_text()) == [record("a"), fixed_role]
    assert json.loads(Path("q.json").read_text()) == [both, 7]
    assert summary.notes == [
        "q.json: 2 records with errors",
        "g.json: 2 records, 1 of them mended",
    ]
    validate([source], quarantine=Path("alone.json"))
    assert json.loads(Path("alone.json").read_text()) == [role, both, 7]
    assert Path("1.json").read_bytes() == before


def test_copies_of_several_files_lie_in_a_folder_under_their_names(write):
    sources = [write("1.json", [record("a")]), write("2.jsonl", json.dumps(record("b")) + "\n{x")]
    summary = validate(sources, fix=Path("copy"), quarantine=Path("apart"))
    assert json.loads(Path("copy/1.json").read_text()) == [record("a")]
    assert Path("copy/2.jsonl").read_text() == json.dumps(record("b")) + "\n"
    assert Path("apart/1.json").read_text() == "[]\n"
    assert Path("apart/2.jsonl").read_text() == ""
    assert summary.notes[2] == "not written: 1 record of broken JSON"
    assert sorted(os.listdir()) == ["1.json", "2.jsonl", "apart", "copy"]


def test_what_follows_a_fault_is_told_to_be_missing_in_the_copy(write):
    source = write("1.json", json.dumps([record("a"), record("b")])[:-3])
    summary = validate([source], fix=Path("f.json"))
    assert summary.counts == {"json": 1}
    assert summary.records == 1
    assert json.loads(Path("f.json").read_text()) == [record("a")]
    assert summary.notes[1] == "not written: what 1.json holds from its fault on"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["no.json"], "there is no such file"),
        (["1.json", "no.json"], "there is no such file"),
        (["1.json", "--image_folder", "no"], "there is no such folder"),
        (["1.json", "pictures", "--image_folder", "pictures"], "are both folders of images"),
        (["1.json", "--eval_data_path", "no.json"], "there is no such file"),
        (["pictures"], "cannot be read"),
        ([], "there is nothing to check"),
        (["1.json", "--fix", "1.json"], "exists already"),
        (["1.json", "--report", "1.json"], "exists already"),
        (["1.json", "--fix", "o.txt"], "is neither .json nor .jsonl"),
        (["1.json", "--quarantine", "o"], "is neither .json nor .jsonl"),
        (["1.json", "--fix", "no/o.json"], "there is no folder no"),
        (["1.json", "--fix", "o.json", "--report", "./o.json"], "name the same file"),
        (["1.json", "pictures/../1.json", "--fix", "o"], "have the same name"),
        (["1.json", "--report", "/proc/o.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_checked_is_refused_and_nothing_is_written(write, capsys, words, what):
    write("1.json", [record()])
    Path("pictures").mkdir()
    assert main(words) == 2
    said = capsys.readouterr()
    assert what in said.err
    assert "Fix: " in said.err
    assert said.out == ""
    assert sorted(os.listdir()) == ["1.json", "pictures"]


def test_pipe_is_refused_and_an_image_that_is_one_is_not_waited_for(write):
    os.mkfifo("pipe")
    with pytest.raises(DataError, match="is a pipe or a device"):
        validate([Source("pipe", "pipe")])
    source = write("1.json", [record("a", "<image>", image="pipe")])
    assert found(source) == [("image-unreadable", "1.json", 1)]


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--jobs", "two"], ["--config", "c"], ["--x"]])
def test_wrong_flags_are_refused(write, capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(["1.json", *words])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_folder_at_the_end_is_the_image_folder(write, capsys):
    Path("pictures").mkdir()
    Image.new("RGB", (4, 4)).save("pictures/a.png")
    write("1.json", [record("a", "<image>", image="a.png")])
    assert main(["1.json", "pictures"]) == 0
    assert main(["1.json", "--image_folder", "pictures"]) == 0
    assert main(["1.json"]) == 1
    assert "image-missing" in capsys.readouterr().out


def test_terminal_shows_three_findings_of_a_code_and_a_table(write, capsys):
    bad = [record(str(i), answer="") for i in range(5)]
    role = record("r", answer="")
    role["conversations"][0]["from"] = "Human"
    write("1.json", [*bad, role, record("x"), record("x", "Why?")])
    assert main(["1.json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        '1.json, record 6 (id "r"), conversations[0].from: [role-unknown]',
        '  unknown role "Human".',
        '  Fix: write "human"; known are human, gpt, ignored_gpt, system.',
        "",
        '1.json, record 1 (id "0"), conversations[1].value: [answer-empty]',
    ]
    assert lines[13:15] == ["... and 3 more [answer-empty]", ""]
    table = lines.index("code          severity    found  --fix mends  meaning")
    assert [line.split()[:4] for line in lines[table + 1 : -1]] == [
        ["role-unknown", "error", "1", "1"],
        ["answer-empty", "error", "6", "-"],
        ["id-duplicate", "warning", "1", "-"],
    ]
    assert lines[-1].startswith("8 records of 1 file, ")
    assert lines[-1].endswith(" s: 7 errors, 1 warning")


def test_warnings_alone_leave_the_exit_code_at_zero(write, capsys):
    write("1.json", [record("a"), record("a", "Why?")])
    assert main(["1.json"]) == 0
    assert capsys.readouterr().out.endswith(" s: 1 warning\n")


def test_text_that_would_steer_a_terminal_is_shown_as_escapes(write, capsys):
    write("1.json", [record("\x1b[2J\n" + "x" * 1000, answer="")])
    assert main(["1.json"]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith('1.json, record 1 (id "\\x1b[2J\\nxxx')
    assert len(first) < 450


def test_nesting_too_deep_for_python_is_a_finding(write, monkeypatch):
    monkeypatch.setattr(validation_run, "ALONE", 0)
    deep = '{"id": "a", "conversations": ' + "[" * 900 + "]" * 900 + "}"
    source = write("1.jsonl", "\n".join([deep, json.dumps(record("b"))]))
    for jobs in (1, 2):
        codes = [code for code, _, _ in found(source, jobs=jobs)]
        assert len(codes) == 1
        assert CODES[codes[0]].severity == "error"


def test_recursion_in_a_check_is_a_finding_and_the_record_is_in_no_copy(write, monkeypatch):
    def endless(*_: Any) -> Any:
        return endless()

    monkeypatch.setattr(record_inspection, "check_text", endless)
    source = write("1.json", [record("a")])
    summary = validate([source], fix=Path("f.json"))
    assert summary.counts == {"json-value": 1}
    assert json.loads(Path("f.json").read_text()) == []


def test_full_disk_is_told_and_leaves_nothing(write, monkeypatch):
    source = write("1.json", [record("a")])

    def full(self: Any, text: str) -> None:
        raise self._unwritable(OSError(28, "No space left on device"))

    monkeypatch.setattr("vlmtune.data.validation_files.Output.write", full)
    for flags in ({"fix": Path("f.json")}, {"report": Path("r.json")}):
        with pytest.raises(DataError, match="cannot be written: No space left on device"):
            validate([source], **flags)
        assert os.listdir() == ["1.json"]


def test_killed_process_is_told_and_leaves_nothing(write, monkeypatch):
    monkeypatch.setattr(validation_run, "ALONE", 0)
    ours = os.getpid()

    def kill(*_: Any) -> Any:
        if os.getpid() != ours:
            os.kill(os.getpid(), signal.SIGKILL)
        return []

    monkeypatch.setattr(record_inspection, "check_text", kill)
    source = write("1.json", [record("a")])
    with pytest.raises(DataError, match="a process that checked the data was killed"):
        validate([source], jobs=2, fix=Path("f.json"))
    assert os.listdir() == ["1.json"]


def test_memory_does_not_grow_with_the_records(write):
    peaks = []
    for count in (1500, 5500):
        with open("1.jsonl", "w") as file:
            for i in range(count):
                file.write(json.dumps(record(str(i), f"{i}" + "x" * 1000, answer="")) + "\n")
        tracemalloc.start()
        summary = validate([Source("1", "1.jsonl")], fix=Path("f.json"), report=Path("r.json"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert summary.counts == {"answer-empty": count}
        for name in ("f.json", "r.json"):
            Path(name).unlink()
    assert peaks[1] < peaks[0] + 300_000  # four million characters more were read


def test_a_small_file_is_checked_without_heavy_imports(write):
    write("1.json", [record("a")])
    code = (
        "import sys\nfrom vlmtune.data.validate import main\nmain(['1.json'])\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'datasets', 'pyarrow', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_reader_that_leaves_early_gets_no_traceback(write):
    write("1.json", [record(str(i), answer="") for i in range(10)])
    with subprocess.Popen(
        [*COMMAND, "1.json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_stopping_it_leaves_no_trace(write, send, number):
    with open("1.jsonl", "w") as file:
        for i in range(150_000):
            file.write(json.dumps(record(str(i), f"Q{i}")) + "\n")
    process = subprocess.Popen(
        [*COMMAND, "1.jsonl", "--fix", "f.json", "--report", "r.json", "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    began = time.monotonic()
    # It starts others after a second's work; they are ready when they watch it in a thread.
    while [child.num_threads() for child in psutil.Process(process.pid).children()] != [2, 2]:
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    assert len([name for name in os.listdir() if name.startswith(".partial")]) == 2
    send(process.pid, number)
    assert process.communicate() == ("", "Stopped; nothing was written.\n")
    assert process.returncode == 128 + number
    assert os.listdir() == ["1.jsonl"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["<image>", "<think>", "</think>", "<video>", "<box>1,2,3</box>", "user"])
    | st.sampled_from(["\ud800", "a\0b", "~nobody/a.png", "/", "x" * 5000, "<|im_end|>"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "type", "text"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "from": st.sampled_from(["human", "gpt", "Human", "system", "x"]) | VALUES,
            "value": VALUES,
        }
    )
    | VALUES,
    max_size=4,
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES,
        "conversations": TURNS | VALUES,
        "messages": TURNS | VALUES,
        "image": VALUES,
        "images": VALUES,
        "video": VALUES,
        "video_frames": VALUES,
        "caption": VALUES,
    },
)
QUICK = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def run_all(path: str, data_format: str = "conversation") -> Summary:
    for name in ("f.json", "q.json", "r.json"):
        Path(name).unlink(missing_ok=True)
    summary = validate(
        [Source("x", path, None, data_format)],
        fix=Path("f.json"),
        quarantine=Path("q.json"),
        report=Path("r.json"),
    )
    text_of(summary).encode("utf-8", "backslashreplace")
    assert len(json.loads(Path("r.json").read_text("utf-8"))["findings"]) == sum(
        summary.counts.values()
    )
    return summary


@QUICK
@given(records=st.lists(RECORDS | VALUES, min_size=1, max_size=3), caption=st.booleans())
def test_no_record_makes_it_crash_and_its_copy_has_no_errors(write, records, caption):
    write("1.json", [r for r in records if not isinstance(r, float) or math.isfinite(r)] or [1])
    data_format = "caption" if caption else "conversation"
    summary = run_all("1.json", data_format)
    copied = json.loads(Path("f.json").read_text("utf-8"))
    apart = json.loads(Path("q.json").read_text("utf-8"))
    assert summary.records == len(copied) + len(apart)
    if copied:
        again = validate([Source("x", "f.json", None, data_format)])
        assert again.number_of("error") == 0


@QUICK
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{},:"a1\n\\u ').map(str.encode))
@pytest.mark.parametrize("name", ["1.json", "1.jsonl"])
def test_no_file_makes_it_crash(write, name, content):
    write(name, "")
    Path(name).write_bytes(content)
    run_all(name)
