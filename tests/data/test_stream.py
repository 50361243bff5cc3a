"""Micro-batches read while training: their order, their resume, and what is left out."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from vlmtune.core.errors import DataError
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import FEATURES
from vlmtune.data.sources import Source
from vlmtune.data.stream import RecordStream


class Checks:
    """Stands for the model; every look at a sample leaves a line in a file that workers share."""

    def __init__(self, log: Path):
        self.log = log

    def row(self, conversation: Conversation) -> dict[str, Any]:
        if conversation.turns[-1].trained:  # the row that trains nothing is made
            with self.log.open("a") as file:
                file.write(f"{conversation.id}\n")
        if "bad" in conversation.turns[0].text:
            raise DataError(conversation.where("image"), "is bad.", "mend it.")

        trained = [1, 3] if conversation.turns[-1].trained else []
        trained = [] if "cut" in conversation.turns[0].text else trained
        return {
            **conversation.to_row(),
            "ids": [7, 8, 9],
            "trained": trained,
            "grids": [],
            "length": 3,
            "trained_tokens": len(trained),
            "cut": 0,
            "patches": 0,
            "patches_squared": 0,
        }

    def looked(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []


@pytest.fixture
def checks(tmp_path) -> Checks:
    return Checks(tmp_path / "looked.txt")


def record(identity: int, question: str = "Hi") -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    return {"id": identity, "conversations": turns}


@pytest.fixture
def stream(tmp_path, checks):
    """`stream([questions], [questions], key=value)` over a file for each list; ids count on."""

    def make(*files: list[str], **keys) -> RecordStream:
        sources, identity = [], 0
        for number, questions in enumerate(files or [["Hi"] * 10]):
            path = tmp_path / f"{number}.jsonl"
            lines = [json.dumps(record(identity + i, q)) for i, q in enumerate(questions)]
            path.write_text("\n".join(lines))
            sources.append(Source(path.stem, str(path)))
            identity += len(questions)
        settings: dict[str, Any] = {"batch": 2, "seed": 0, "shuffle_buffer": 4, "skip_bad": False}
        settings |= keys
        return RecordStream(sources, checks.row, ledger=tmp_path / "bad.jsonl", **settings)

    return make


def take(stream: RecordStream, batches: int, workers: int = 0) -> list[list[int]]:
    """Ids of the first micro-batches."""
    loader = DataLoader(stream, batch_size=None, collate_fn=list, num_workers=workers)
    return [[int(row["id"]) for row in rows] for rows in islice(loader, batches)]


def flat(batches: list[list[int]]) -> list[int]:
    return [identity for batch in batches for identity in batch]


def test_each_pass_has_every_record_once_in_its_own_order(stream):
    ids = flat(take(stream(), 15))
    passes = [ids[0:10], ids[10:20], ids[20:30]]
    assert [sorted(one) for one in passes] == [list(range(10))] * 3
    assert len(set(map(tuple, passes))) == 3
    assert list(range(10)) not in passes


def test_order_depends_on_the_seed_alone(stream):
    assert take(stream(), 12) == take(stream(), 12)
    assert take(stream(), 12) != take(stream(seed=1), 12)


def test_buffer_of_one_keeps_the_order_of_the_files(stream):
    given = stream(["Hi"] * 3, ["Hi"] * 4, shuffle_buffer=1)
    assert take(given, 7) == [[0, 1], [2, 3], [4, 5], [6, 0], [1, 2], [3, 4], [5, 6]]


def test_record_is_drawn_from_those_in_the_buffer(stream):
    ids = flat(take(stream(["Hi"] * 40, shuffle_buffer=5), 20))
    assert sorted(ids) == list(range(40))
    # Before the end of the pass the n-th drawn is one of the first n + 5 records.
    assert all(identity < n + 5 for n, identity in enumerate(ids))
    assert sum(identity == n for n, identity in enumerate(ids)) < 20


def test_row_is_that_of_a_prepared_dataset(stream, tmp_path):
    [row] = next(iter(stream(["Hi"], batch=1)))
    assert row == {
        "id": "0",
        "source": str(tmp_path / "0.jsonl"),
        "record": 1,
        "image_files": [],
        "video_file": None,
        "frame_files": [],
        "ids": [7, 8, 9],
        "trained": [1, 3],
        "grids": [],
        "length": 3,
        "trained_tokens": 2,
        "cut": 0,
        "patches": 0,
        "patches_squared": 0,
    }
    assert set(row) == set(FEATURES)


def test_ranks_share_the_order_of_one(stream):
    alone = flat(take(stream(batch=6), 5))
    ranks = [take(stream(batch=2, rank=rank, world=3), 5) for rank in range(3)]
    together = [identity for step in zip(*ranks, strict=True) for identity in flat(list(step))]
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("skipped", [0, 1, 3, 12])
def test_any_number_of_workers_resumes_with_the_same_batches(stream, workers, skipped):
    """12 micro-batches of 2 for 2 ranks lie in the fifth pass over 10 records."""
    expected = take(stream(rank=1, world=2), 20)
    resumed = stream(rank=1, world=2)
    resumed.skip(skipped)
    assert take(resumed, 20 - skipped, workers) == expected[skipped:]


@pytest.mark.parametrize("skipped", [0, 1, 5, 6, 14, 100])
def test_what_is_skipped_is_not_looked_at(stream, checks, skipped):
    resumed = stream()
    resumed.skip(skipped)
    taken = take(resumed, 3)
    assert checks.looked() == flat(taken)
    assert taken == take(stream(), skipped + 3)[skipped:]


def test_passes_before_the_start_are_read_once(stream, monkeypatch):
    reads = []
    real = Source.records
    monkeypatch.setattr(Source, "records", lambda source: (reads.append(1), real(source))[1])
    resumed = stream()
    resumed.skip(5 * 100 + 1)
    taken = take(resumed, 2)
    assert len(reads) == 2
    monkeypatch.undo()
    assert taken == take(stream(), 503)[501:]


def test_no_rank_looks_at_the_samples_of_another(stream, checks):
    taken = take(stream(rank=1, world=2), 4)
    assert checks.looked() == flat(taken)


def test_bad_sample_ends_the_run(stream, tmp_path):
    given = stream(["Hi", "Hi", "bad", "Hi"], shuffle_buffer=1)
    batches = iter(given)
    assert [row["id"] for row in next(batches)] == ["0", "1"]
    with pytest.raises(DataError) as error:
        next(batches)
    assert error.value.where == f'{tmp_path / "0.jsonl"}, record 3 (id "2"), image'
    assert error.value.what == "is bad."
    assert not given.ledger.exists()


def test_broken_line_and_bad_record_end_the_run(stream, tmp_path):
    given = stream(["Hi", "Hi"], shuffle_buffer=1, batch=1)
    for line, place in [('{"id" 1}', "line 3, column 7"), ("5", "record 3")]:
        with (tmp_path / "0.jsonl").open("w") as file:
            file.write("\n".join([json.dumps(record(0)), json.dumps(record(1)), line]))
        batches = iter(given)
        assert [row["id"] for _ in range(2) for row in next(batches)] == ["0", "1"]
        with pytest.raises(DataError) as error:
            next(batches)
        assert error.value.where == f"{tmp_path / '0.jsonl'}, {place}"


def test_bad_samples_are_left_out_of_their_batch_and_listed(stream, tmp_path):
    questions = ["Hi", "bad", "Hi", "Hi", "cut", "bad", "Hi"]
    given = stream(questions, skip_bad=True, shuffle_buffer=1)
    batches = iter(given)
    rows = [next(batches) for _ in range(4)]
    assert [[row["id"] for row in batch] for batch in rows] == [
        ["0"],
        ["2", "3"],
        ["4"],
        ["6", "0"],
    ]
    # Nothing is left of the third: a row that trains nothing keeps the ranks in step.
    [blank] = rows[2]
    assert (blank["ids"], blank["length"]) == ([7, 8, 9], 3)
    assert (blank["trained"], blank["trained_tokens"]) == ([], 0)
    entries = [json.loads(line) for line in given.ledger.read_text("utf-8").splitlines()]
    path = str(tmp_path / "0.jsonl")
    assert [(e["file"], e["record"], e["id"], e["pass"]) for e in entries] == [
        (path, 2, "1", 0),
        (path, 5, "4", 0),
        (path, 6, "5", 0),
    ]
    assert entries[0] == {
        "file": path,
        "record": 2,
        "id": "1",
        "where": f'{path}, record 2 (id "1"), image',
        "what": "is bad.",
        "fix": "mend it.",
        "pass": 0,
    }
    assert entries[1]["what"] == "no token to learn from is left after the cut to 3 tokens."


def test_sample_with_nothing_to_learn_is_left_out_even_if_bad_ones_end_the_run(stream):
    given = stream(["cut", "Hi"], shuffle_buffer=1)
    assert take(given, 1) == [[1]]
    assert len(given.ledger.read_text("utf-8").splitlines()) == 1


def test_batches_do_not_shift_when_a_sample_is_left_out(stream):
    whole = take(stream(["Hi"] * 9), 12)
    left = take(stream(["Hi"] * 4 + ["bad"] + ["Hi"] * 4, skip_bad=True), 12)
    assert left == [[i for i in batch if i != 4] or [4] for batch in whole]


def test_set_without_records_ends_the_run(stream, tmp_path):
    given = stream(["Hi"])
    (tmp_path / "a.json").write_text("[]")
    given.sources = [Source("a", str(tmp_path / "a.json"))]
    with pytest.raises(DataError) as error:
        next(iter(given))
    assert (error.value.where, error.value.what) == (
        str(tmp_path / "a.json"),
        "there is no record.",
    )


def test_host_sees_the_columns_and_nothing_is_read_for_it(stream, checks, tmp_path):
    given = stream()
    (tmp_path / "0.jsonl").unlink()
    dataset = given.for_host()
    assert dataset.column_names == list(FEATURES)
    [row] = list(dataset)
    assert (row["id"], row["ids"], row["trained"]) == ("", [7, 8, 9], [])
    assert checks.looked() == []
