"""Answers to whole files: every row, stopped and gone on with, by one process and by two."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from vlmtune.cli.main import main
from vlmtune.core.distributed import rank
from vlmtune.core.errors import ConfigError, DataError, TrainingError
from vlmtune.data.sources import Source
from vlmtune.data.tables import open_table
from vlmtune.inference import Sampling, VLMInference
from vlmtune.inference.crop_tool import Crop
from vlmtune.inference.files import Summary, answer_file, check_output
from vlmtune.inference.parts import Parts


@pytest.fixture(scope="module")
def inference(fluent_ovis) -> VLMInference:
    return VLMInference(str(fluent_ovis), device="cpu")


@pytest.fixture(scope="module")
def records(fluent_ovis) -> dict[str, dict]:
    """What the model knows, by id."""
    return {r["id"]: r for r in json.loads((fluent_ovis / "records.json").read_text("utf-8"))}


@pytest.fixture
def source(fluent_ovis, tmp_path):
    """`source(records, name)`: a file of records, lines where they are given as text."""

    def write(content: list, name: str = "data") -> Source:
        lines = [r if isinstance(r, str) else json.dumps(r) for r in content]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return Source(name, str(path), str(fluent_ovis / "images"))

    return write


@pytest.fixture
def answered(inference, tmp_path):
    """`answered(sources, key=value)`: the summary, and the rows of `out.jsonl`."""

    def run(*sources: Source, **changes: Any) -> tuple[Summary, list[dict]]:
        given: dict[str, Any] = {
            "sampling": Sampling(max_new_tokens=96),
            "enable_thinking": None,
            "batch_size": 4,
            "settings": {},
            "output": tmp_path / "out.jsonl",
            **changes,
        }
        summary = answer_file(inference, sources, **given)
        return summary, [
            json.loads(line) for line in summary.output.read_text("utf-8").splitlines()
        ]

    return run


def question(text: str = "Name a colour.", identity: str = "q", **rest) -> dict:
    return {"id": identity, "conversations": [{"from": "human", "value": text}], **rest}


def words(row: dict) -> tuple[str, str]:
    return row["thinking"], row["answer"]


def test_each_record_gets_the_answer_that_it_has_itself_with_its_thought(
    source, answered, records, fluent_ovis, tmp_path
):
    data = source([r for r in records.values() if r["id"] != "crop"])
    summary, rows = answered(data)
    assert summary == Summary(6, 0, tmp_path / "out.jsonl")
    assert [row["record"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [(row["id"], *words(row)) for row in rows] == [
        ("digit", "", "It is a four."),
        ("larger", "", "The first image."),
        (
            "larger-thinking",
            "The first shows 6, the second shows 5.",
            "The first, since 6 is larger than 5.",
        ),
        ("box", "", "At <box>(250,125),(750,875)</box>."),
        ("colours", "", "Blue was the first."),
        ("greeting", "", "Grüße, 你好 👋!"),
    ]
    assert rows[2] == {
        "record": 3,
        "source": data.path,
        "id": "larger-thinking",
        "prompt": "<image>\n<image>\nWhich image shows the larger digit?",
        "images": [str(fluent_ovis / "images" / f"digit_{n}.png") for n in ("0605", "0654")],
        "video": None,
        "references": [records["larger-thinking"]["conversations"][1]["value"]],
        "thinking": "The first shows 6, the second shows 5.",
        "answer": "The first, since 6 is larger than 5.",
        "unfinished_thought": False,
        "ended": "stop",
        "tokens": rows[2]["tokens"],
        "error": None,
    }
    assert rows[2]["tokens"] > rows[1]["tokens"] > 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["data.jsonl", "out.jsonl", "out.jsonl.settings.json"]


def test_thinking_may_be_asked_of_every_record(source, answered, records):
    _, rows = answered(source([records["larger"]]), enable_thinking=True)
    thought = "The first shows 6, the second shows 5."
    assert words(rows[0]) == (thought, "The first, since 6 is larger than 5.")


def test_bad_records_report_and_leave_the_others_of_their_batch_alone(
    source, answered, records, tmp_path
):
    empty = json.loads(json.dumps(records["digit"]))
    empty["conversations"][1]["value"] = ""
    summary, rows = answered(
        source([
            records["digit"],
            '{"id": "cut", "conv',
            {**records["digit"], "id": "gone", "image": "gone.png"},
            question(),
            question("<image>\nWhat?", "marks"),
            empty,
            records["larger"],
            {"id": "said", "conversations": [{"from": "gpt", "value": "Hello."}]},
        ]),
        batch_size=8,
    )  # fmt: skip
    assert (summary.records, summary.errors) == (8, 4)
    assert [row["answer"] for row in rows] == [
        *("It is a four.", "", "", "Blue.", "", "It is a four.", "The first image.", "")
    ]
    path = tmp_path / "data.jsonl"
    errors = [row["error"] for row in rows]
    assert [error is None for error in errors] == [True, False, False, True, False, True, True,
                                                   False]  # fmt: skip
    assert errors[1] == summary.first_error
    assert errors[1].startswith(f"{path}, line 2, column 15: broken JSON")
    assert errors[2].startswith(f'{path}, record 3 (id "gone"), image: ')
    assert "gone.png does not exist. Fix: " in errors[2]
    assert '1 "<image>" placeholder, but "image" lists 0 files' in errors[4]
    assert "there is no question" in errors[7]
    assert {row["ended"] for row in rows if row["error"]} == {"error"}
    assert [row["id"] for row in rows] == [
        *("digit", "2", "gone", "q", "marks", "digit", "larger", "said")
    ]
    assert [rows[i]["references"] for i in (0, 3, 5)] == [["It is a four."], [], []]


@pytest.mark.parametrize(
    ("listed", "references"),
    [
        ({"references": ["a", "b"], "answers": ["c"]}, ["a", "b"]),
        ({"captions": ["a", "b"], "caption": "c"}, ["a", "b"]),
        ({"answers": "Blue"}, ["Blue"]),
        ({"answers": [4, 4.5]}, ["4", "4.5"]),
        ({"references": "a\u2028b\x85"}, ["a\u2028b\x85"]),
        ({"answers": [{"answer": "net", "answer_id": 1}, {"answer": "nets"}]}, ["net", "nets"]),
        ({"answers": [None]}, "answers: None is no text. Fix: write a text, or a list of texts"),
    ],
)
def test_references_are_what_the_record_lists(listed, references, source, answered):
    _, [row] = answered(source([question(**listed)]), sampling=Sampling(max_new_tokens=1))
    assert (row["references"] or row["error"].partition("), ")[2].rstrip(".")) == references


def test_records_count_through_all_sources_up_to_the_limit(source, answered, records):
    data = [source([records["digit"], question()], "a"), source([records["greeting"]] * 5, "b")]
    summary, rows = answered(*data, limit=4, batch_size=3)
    assert summary.records == 4
    assert [(row["record"], Path(row["source"]).stem) for row in rows] == [
        *((1, "a"), (2, "a"), (3, "b"), (4, "b"))
    ]
    assert rows[3]["answer"] == "Grüße, 你好 👋!"


def test_captions_and_tables_are_sources_too(answered, fluent_ovis, tmp_path):
    images = fluent_ovis / "images"
    (tmp_path / "captions.json").write_text(
        json.dumps([{"image": "digit_0675.png", "caption": "A four."}]), "utf-8"
    )
    content = (images / "digit_0675.png").read_bytes()
    row = {"image": content, "messages": question("<image>\nWhich digit is this?")["conversations"]}
    row["messages"] = [{"role": "user", "content": row["messages"][0]["value"]}]
    pyarrow.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "table.parquet")
    open_table.cache_clear()
    _, rows = answered(
        Source("captions", str(tmp_path / "captions.json"), str(images), "caption"),
        Source("table", str(tmp_path / "table.parquet")),
    )
    assert [row["error"] for row in rows] == [None, None]
    assert (rows[0]["prompt"], rows[0]["references"]) == ("<image>", ["A four."])
    assert rows[1]["answer"] == "It is a four."
    assert rows[1]["images"] == [f"table://{tmp_path}/table.parquet#0.image"]


def test_tools_answer_each_record_by_itself(source, answered, records):
    _, rows = answered(source([records["digit"], records["crop"]]), tools=[Crop])
    expected = records["crop"]["conversations"][1]["value"]
    assert [row["answer"] for row in rows] == ["It is a four.", expected]
    assert [Path(image).name for image in rows[1]["images"]] == ["digit_0675.png"]


class Stopping:
    """The crop tool, which counts its calls and at one of them is as Ctrl-C."""

    __name__ = "Crop"

    def __init__(self, stop_at: int = 0):
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, images, *box):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return Crop(images, *box)


def test_what_was_stopped_is_gone_on_with_and_nothing_is_answered_twice(
    source, answered, records, tmp_path, capsys
):
    data = source([records["crop"], records["digit"], *[records["crop"]] * 3])
    whole, _ = answered(data, tools=[Crop], output=tmp_path / "whole.jsonl")
    first, again = Stopping(3), Stopping()
    with pytest.raises(KeyboardInterrupt):
        answered(data, tools=[first], batch_size=1)
    parts = tmp_path / "out.jsonl.parts"
    assert capsys.readouterr().err == (
        f"What is done is kept in {parts}; the same command goes on from there.\n"
    )
    written = parts / "rank-0.jsonl"
    assert len(written.read_text("utf-8").splitlines()) == 3
    with written.open("a", encoding="utf-8") as file:
        file.write('{"record": 4, "answer": "hal')
    summary, rows = answered(data, tools=[again], batch_size=4)
    assert again.calls == 2
    assert summary.records == len(rows) == 5
    assert summary.output.read_bytes() == whole.output.read_bytes()
    assert not parts.exists()


def test_other_settings_are_refused_by_name(source, answered, records, tmp_path):
    data = source([records["crop"]])
    settings = {"model": "a", "seed": None, "limit": 8}
    with pytest.raises(KeyboardInterrupt):
        answered(data, tools=[Stopping(1)], settings=settings)
    changed = {"model": "b", "limit": 8, "seed": 1}
    for run in (answered, lambda s, settings: check_output([s], tmp_path / "out.jsonl", settings)):
        with pytest.raises(ConfigError) as caught:
            run(data, settings=changed)
        assert str(caught.value) == (
            f"output {tmp_path}/out.jsonl:\n  was begun with other settings: "
            'model was "a", is "b"; seed was not given, is 1.\n'
            "  Fix: give those settings or another output, or remove "
            f"{tmp_path}/out.jsonl.parts to start anew."
        )
    answered(data, settings=settings)
    with pytest.raises(ConfigError, match="was made with other settings: limit was 8, is 9"):
        answered(data, settings={**settings, "limit": 9})
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(ConfigError, match="is there already, and no "):
        answered(data, settings=settings)


def test_complete_output_is_told_and_not_made_again(source, answered, tmp_path):
    data = source([question(), "{"])
    made, _ = answered(data)
    (tmp_path / "data.jsonl").unlink()
    assert check_output([data], tmp_path / "out.jsonl", {}) == made
    assert (made.records, made.errors) == (2, 1)


def test_output_that_was_removed_is_made_anew_with_any_settings(source, answered, tmp_path):
    answered(source([question()]), settings={"model": "a"})
    (tmp_path / "out.jsonl").unlink()
    answered(source([question()]), settings={"model": "b"})
    told = json.loads((tmp_path / "out.jsonl.settings.json").read_text("utf-8"))
    assert told == {"model": "b"}


@pytest.mark.parametrize(
    ("name", "what"), [("absent/out.jsonl", "there is no folder"), ("", "is a folder")]
)
def test_output_that_cannot_be_is_refused(name, what, source, tmp_path):
    with pytest.raises(ConfigError, match=what):
        check_output([source([question()])], tmp_path / name, {})


def test_data_that_cannot_be_read_to_its_end_is_refused_before_the_first_answer(tmp_path):
    broken, empty = tmp_path / "broken.json", tmp_path / "empty.json"
    broken.write_text('[{"id": 1}, {"id": 2', "utf-8")
    empty.write_text("[]", "utf-8")
    for path, what in ((broken, "broken JSON"), (empty, "there is no record")):
        with pytest.raises(DataError, match=what):
            check_output([Source("x", str(path))], tmp_path / "out.jsonl", {})
    assert not (tmp_path / "out.jsonl.settings.json").exists()


def test_gpu_without_memory_ends_the_run_with_what_to_lower_and_it_goes_on(
    source, answered, inference, tmp_path
):
    asked = source([question(identity=str(i)) for i in range(4)])
    calls: list[int] = []

    def full(*_):
        calls.append(1)
        if len(calls) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")

    hook = inference.model.llm.register_forward_pre_hook(full)
    try:
        with pytest.raises(TrainingError, match=r"records \d to \d:\n .* 2 GiB\.\n .* batch_size"):
            answered(asked, batch_size=1)
    finally:
        hook.remove()
    written = (tmp_path / "out.jsonl.parts/rank-0.jsonl").read_text("utf-8")
    summary, rows = answered(asked, batch_size=2)
    assert (summary.records, summary.errors) == (4, 0)
    kept = written.splitlines()
    assert [json.dumps(row, ensure_ascii=False) for row in rows[: len(kept)]] == kept != []


def test_two_runs_cannot_write_one_output(source, answered, tmp_path):
    data = source([question()])
    refused = pytest.raises(ConfigError, match="another run is writing it")
    with Parts(tmp_path / "out.jsonl", {}).begun(), refused:
        answered(data)
    assert answered(data)[0].records == 1


def test_output_without_all_lines_gets_no_name(tmp_path):
    parts = Parts(tmp_path / "out.jsonl", {})
    with parts.begun():
        with parts.lines() as write:
            write({"record": 2})
        with pytest.raises(DataError, match="3 records were to be answered, and 1 lines are there"):
            parts.finish(3)
    assert not parts.output.exists()
    with parts.begun():
        assert parts.done() == {2}


def test_folder_that_cannot_be_written_is_one_error(source, answered, tmp_path):
    (tmp_path / "out.jsonl.settings.json").mkdir()
    with pytest.raises(DataError, match="cannot be read or written: "):
        answered(source([question()]))


def test_what_is_drawn_with_a_seed_does_not_depend_on_the_batch(source, answered, tmp_path):
    data = source([question(identity=str(i)) for i in range(4)])
    texts = []
    for seed, size in ((5, 1), (5, 4), (6, 4)):
        sampling = Sampling(max_new_tokens=8, do_sample=True, temperature=3.0, seed=seed)
        output = tmp_path / f"{seed}-{size}.jsonl"
        _, rows = answered(data, sampling=sampling, batch_size=size, output=output)
        texts.append([row["answer"] for row in rows])
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 4


class Killing(Stopping):
    """The crop tool, which at one of its calls in the second process kills that."""

    def __call__(self, images, *box):
        self.calls += 1
        if self.calls == self.stop_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return Crop(images, *box)


def test_a_killed_process_ends_the_others_and_two_again_write_what_one_writes(
    source, answered, records, two_ranks, tmp_path
):
    gone = {**records["digit"], "image": "gone.png"}
    data = source([records["crop"]] * 7 + [records["greeting"], gone, records["digit"]])
    one, _ = answered(data, tools=[Crop], output=tmp_path / "one.jsonl")

    assert two_ranks(lambda: answered(data, tools=[Killing(3)], batch_size=1)) == [
        1,
        -signal.SIGKILL,
    ]
    parts = tmp_path / "out.jsonl.parts"
    numbers = [
        [json.loads(line)["record"] for line in (parts / f"rank-{rank}.jsonl").open("rb")]
        for rank in range(2)
    ]
    assert numbers == [[1, 3, 5, 7, 9], [2, 4]]
    for part in parts.glob("rank-*.jsonl"):  # were it answered again, this would be gone
        part.write_bytes(part.read_bytes().replace(b'"thinking": ""', b'"thinking": "kept"'))

    assert two_ranks(lambda: answered(data, tools=[Crop], batch_size=2)) == [0, 0]
    content = (tmp_path / "out.jsonl").read_bytes()
    kept = [json.loads(line)["thinking"] == "kept" for line in content.splitlines()]
    assert kept == [number in numbers[0] + numbers[1] for number in range(1, 11)]
    assert content.replace(b"kept", b"") == one.output.read_bytes()


def test_two_processes_write_one_file_after_another(two_ranks, tmp_path):
    outputs = [tmp_path / f"{n}.jsonl" for n in range(20)]

    def run() -> None:
        for parts in (Parts(output, {}) for output in outputs):
            with parts.begun() as wait:
                with parts.lines() as write:
                    write({"record": rank() + 1})
                    wait()
                if rank() == 0:
                    parts.finish(2)
                wait()

    assert two_ranks(run) == [0, 0]
    assert {output.read_text() for output in outputs} == {'{"record": 1}\n{"record": 2}\n'}


@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_process_writes(
    source, records, fluent_ovis, tmp_path
):
    data = source([r for r in records.values() if r["id"] != "crop"])
    words = ["infer", "--model", str(fluent_ovis), "--data", data.path, "--max_new_tokens", "64"]
    words += ["--image_folder", str(data.folder), "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "vlmtune.cli.main", *words, str(tmp_path / "two.jsonl")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("two.jsonl: 6 records") == 1
    assert main([*words, str(tmp_path / "one.jsonl")]) == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not (tmp_path / "two.jsonl.parts").exists()
