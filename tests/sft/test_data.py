"""The data of a run from its settings: sets, mix, stream, and what is said of them."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig

import vlmtune.collators.sample
import vlmtune.data.images
from vlmtune.collators.padded import PaddedCollator
from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError, DataError
from vlmtune.data.mixing import MixSampler
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor
from vlmtune.sft.data import RunData, load_data


@pytest.fixture(scope="module")
def processor(ovis_goldens) -> Ovis2_5Processor:
    tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
    return Ovis2_5Processor(Ovis2_5ImageProcessor(patch_size=4), tokenizer)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmtune.data.dataset.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def load(processor):
    """`load(data_path="a.json", max_steps=5)` with keys of the config and of the host."""

    def load_with(**keys) -> RunData:
        host = {"max_steps": -1, "per_device_train_batch_size": 2, "seed": 5, "data_seed": None}
        given = {k: keys.pop(k, v) for k, v in host.items()}
        given["resume_from_checkpoint"] = keys.pop("resume_from_checkpoint", None)
        keys = {"model_path": "none", "output_dir": "out", "single_image_min_pixels": 64, **keys}
        if given["max_steps"] > 0:
            keys["max_steps"] = given["max_steps"]
        words = [
            word
            for key, value in keys.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        args = SFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", **given)
        return load_data(load_config(words), args, processor)

    return load_with


def record(identity: Any, question: str = "Hi", **rest) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    return {"id": identity, **rest, "conversations": turns}


def write(name: str, records: Any) -> str:
    Path(name).write_text(json.dumps(records), "utf-8")
    return name


def picture(name: str, seed: int = 0) -> str:
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    return name


def ids(data: RunData) -> list[str]:
    assert data.train is not None
    return list(data.train.dataset["id"])


def test_datainfo_names_the_sets_of_a_run(load, folder):
    (folder / "pics").mkdir()
    picture("pics/a.png")
    write("c.json", [{"id": "c", "image": "a.png", "caption": "A cat."}])
    write("t.json", [record("t1"), record("t2")])
    write("other.json", [record("o")])
    sets = {
        "captions": {"meta_file": "c.json", "image_dir": "pics", "data_format": "caption"},
        "text": {"meta_file": "t.json", "image_dir": None, "data_format": "conversation"},
    }
    write("sets.json", sets)
    data = load(
        data_path="text|captions|other.json",
        eval_data_path={"held": ["captions"]},
        datainfo="sets.json",
    )
    assert data.train is not None
    assert ids(data) == ["t1", "t2", "c", "o"]
    assert data.train.sizes == [2, 1, 1]
    assert list(data.evaluation["held"].dataset["id"]) == ["c"]
    assert (data.sampler, data.stream) == (None, None)
    assert data.for_host() is data.train.dataset
    # Image (3 x 3 patches merged to 4 tokens and 2 indicators), caption, end of turn.
    [row] = data.evaluation["held"].dataset
    batch = PaddedCollator(data.encoder)([row])
    caption = data.encoder.processor.text_ids("A cat.")
    end = data.encoder.processor.control_id("<|im_end|>")
    visual = len(batch["input_ids"][0]) - len(caption) - 1
    assert batch["input_ids"][0, visual:].tolist() == [*caption, end]
    assert batch["labels"][0].tolist() == [-100] * visual + [*caption, end]


def test_mix_draws_from_the_sets_and_says_how_much(load, capsys):
    write("a.json", [record(f"a{i}") for i in range(3)])
    write("b.json", [record(f"b{i}") for i in range(10)])
    write("c.json", [record("c")])
    data = load(data_path="a.json|b.json|c.json", mix={"a": 2, "b": 0.3})
    assert isinstance(data.sampler, MixSampler)
    assert list(data.sampler) == list(MixSampler([3, 10, 1], [2, 0.3, 1], 5))
    drawn = sorted(ids(data)[i][0] for i in data.sampler)
    assert drawn == ["a"] * 6 + ["b"] * 3 + ["c"]
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if line[:2] == "  "]
    assert lines == [
        ["set", "samples", "passes", "per", "epoch"],
        ["a", "3", "2", "6"],
        ["b", "10", "0.3", "3"],
        ["c", "1", "1", "1"],
    ]
    again = load(data_path="a.json|b.json|c.json", mix={"a": 2, "b": 0.3}, data_seed=6)
    assert list(again.sampler) != list(data.sampler)


def test_evaluation_is_not_mixed(load):
    write("a.json", [record("a0"), record("a1")])
    write("b.json", [record("b")])
    data = load(data_path="a.json|b.json", eval_data_path="a.json", mix={"a": 0.5})
    assert len(data.sampler) == 2
    assert len(data.evaluation[""].dataset) == 2


def test_counts_of_several_sets_are_said_without_a_mix_too(load, capsys):
    write("a.json", [record("a0"), record("a1")])
    write("b.json", [record("b")])
    load(data_path="a.json|b.json")
    assert ["a", "2", "1", "2"] in [li.split() for li in capsys.readouterr().err.splitlines()]
    load(data_path="a.json")
    assert "per epoch" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "where", "what"),
    [
        ({"mix": {"aa": 2}}, "mix, aa", 'there is no set "aa"'),
        ({"mix": {"a": 0.1}}, "mix", "no sample is drawn in an epoch"),
    ],
)
def test_settings_that_do_not_fit_are_refused(load, keys, where, what):
    write("a.json", [record("a0"), record("a1")])
    with pytest.raises(ConfigError) as error:
        load(data_path="a.json", **keys)
    assert (error.value.where, error.value.what) == (where, what)


@pytest.mark.parametrize(("content", "what"), [([], "there is no record."), (5, "holds no list")])
def test_stream_of_nothing_is_refused_before_the_run(load, content, what):
    write("a.json", [record("a")])
    write("b.json", content)
    with pytest.raises(DataError) as error:
        load(data_path="a.json|b.json", streaming=True, max_steps=5)
    assert error.value.where == "b.json"
    assert error.value.what.startswith(what)


def test_jpeg_broken_inside_is_listed_where_bad_samples_are_left_out(load, folder):
    picture("a.jpg")
    content = bytearray((folder / "a.jpg").read_bytes())
    content[700:702] = b"\xff\xc4"  # a table of codes among the pixels
    (folder / "b.jpg").write_bytes(content)
    write("a.json", [record(name, "<image>", image=f"{name}.jpg") for name in "ab"])
    data = load(data_path="a.json", on_bad_sample="skip")
    assert ids(data) == ["a"]
    [line] = (folder / "out" / "bad_samples.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["record"] == 2
    assert json.loads(line)["what"].startswith("b.jpg is corrupt: broken data stream")
    # Where it ends the run, it does so when it is trained on.
    data = load(data_path="a.json")
    assert ids(data) == ["a", "b"]
    with pytest.raises(DataError, match=r"b\.jpg is corrupt: broken data stream"):
        PaddedCollator(data.encoder)([data.train.dataset[1]])


@pytest.fixture
def opened(monkeypatch, folder):
    """`opened()` is the set of images opened so far, by loader processes too."""
    log = folder / "opened.txt"
    log.touch()
    real = vlmtune.data.images.open_image

    def counted(path, where):
        with log.open("a") as file:
            file.write(f"{path}\n")
        return real(path, where)

    monkeypatch.setattr(vlmtune.collators.sample, "open_image", counted)
    monkeypatch.setattr(vlmtune.data.images, "open_image", counted)
    return lambda: set(log.read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumed_stream_gives_the_same_batches_and_opens_no_skipped_image(
    load, workers, opened, folder
):
    names = [picture(f"{i}.png", i) for i in range(40)]
    write("a.json", [record(i, "<image>", image=name) for i, name in enumerate(names)])
    keys = {"data_path": "a.json", "streaming": True, "max_steps": 9, "shuffle_buffer": 3}
    data = load(**keys)
    assert data.train is None and data.sampler is None
    assert data.stream is not None
    rows = list(islice(data.stream, 9))
    collator = PaddedCollator(data.encoder)
    expected = [collator(batch) for batch in rows]
    files = [file for batch in rows for row in batch for file in row["image_files"]]
    assert opened() == set(files)
    (folder / "opened.txt").write_text("")

    resumed = load(**keys).stream
    resumed.skip(5)
    loader = DataLoader(resumed, batch_size=None, collate_fn=collator, num_workers=workers)
    for batch, wanted in zip(islice(loader, 4), expected[5:], strict=True):
        for name in ("input_ids", "labels", "attention_mask", "pixel_values", "grid_thws"):
            assert torch.equal(batch[name], wanted[name]), name
    assert opened() >= set(files[5 * 2 :])
    assert not opened() & set(files[: 5 * 2])
    if workers == 0:
        assert opened() == set(files[5 * 2 :])


def test_stream_writes_the_ledger_on_and_a_resumed_run_keeps_it(load, folder):
    write("a.json", [record("a"), record("b", "<image>", image="no.png")])
    keys = {
        "data_path": "a.json",
        "eval_data_path": "a.json",
        "streaming": True,
        "max_steps": 9,
        "on_bad_sample": "skip",
    }
    ledger = folder / "out" / "bad_samples.jsonl"
    next(iter(load(**keys).stream))
    assert len(ledger.read_text("utf-8").splitlines()) == 2  # of evaluation and of the stream
    load(**keys, resume_from_checkpoint="true")
    assert len(ledger.read_text("utf-8").splitlines()) == 2
    load(**keys)
    assert len(ledger.read_text("utf-8").splitlines()) == 1


def test_stream_takes_its_place_among_the_processes(load, monkeypatch):
    monkeypatch.setattr("vlmtune.sft.data.rank", lambda: 1)
    monkeypatch.setattr("vlmtune.sft.data.world_size", lambda: 2)
    write("a.json", [record(i) for i in range(8)])
    data = load(data_path="a.json", streaming=True, max_steps=9, shuffle_buffer=1)
    stream = iter(data.stream)
    assert [[row["id"] for row in next(stream)] for _ in range(2)] == [["2", "3"], ["6", "7"]]
    assert data.for_host().column_names[:3] == ["id", "source", "record"]
