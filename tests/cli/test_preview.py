"""`vlmtune preview`: what it prints is what the trainer's own batches hold."""

import json
import os
import re
import subprocess
import sys
from io import TextIOWrapper
from typing import Any

import pytest
from PIL import Image

from vlmtune.cli import preview_text
from vlmtune.cli.main import main
from vlmtune.cli.planned import planned_config
from vlmtune.collators.packed import PackedCollator
from vlmtune.collators.padded import PaddedCollator
from vlmtune.configs.load import load_config
from vlmtune.data.dataset import ArrowRows
from vlmtune.models.loading import load_processor
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.batches import train_batches
from vlmtune.sft.data import load_data
from vlmtune.sft.modules import apply_train_modules
from vlmtune.sft.rows import plan_rows
from vlmtune.sft.train import load_model

TWO_IMAGES = "<image> and <image>: which is larger?"
THOUGHT = "<think>\nThe second is 64 wide.\n</think>\n\nThe second. "


def record(identity: str, *said: str, **media: Any) -> dict[str, Any]:
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(said)]
    return {"id": identity, **media, "conversations": turns}


RECORDS = [
    record("two", TWO_IMAGES, THOUGHT, image=["small.png", "large.png"]),
    record("text", "5", "9"),
    record("history", "5", "<think>\na\n</think>\n\n9", "7", "8 é你😀"),
    record("image", "<image>", "A square.", image="large.png"),
    *[record(f"n{i}", f"{i}?", f"{i}." * (i + 1)) for i in range(6)],
]


@pytest.fixture
def run(checkpoint, tmp_path):
    """A config file beside its data, of a tiny model."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "small.png")
    Image.new("RGB", (64, 48), "blue").save(tmp_path / "large.png")
    (tmp_path / "train.json").write_text(json.dumps(RECORDS), "utf-8")
    settings = {
        "model_path": str(checkpoint()),
        "data_path": str(tmp_path / "train.json"),
        "image_folder": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "use_cpu": True,
        **{f"{kind}_image_min_pixels": 1024 for kind in ("single", "multiple")},
        **{f"{kind}_image_max_pixels": 1024 for kind in ("single", "multiple")},
    }
    (tmp_path / "run.json").write_text(json.dumps(settings), "utf-8")
    return tmp_path / "run.json"


@pytest.fixture
def preview(run, capsys):
    """`preview(*words)` is the exit code, and what is on stdout and stderr."""

    def call(*words: str):
        capsys.readouterr()
        code = main(["preview", str(run), *words])
        return code, *capsys.readouterr()

    return call


def flat(previews: list[dict], what: str) -> list[int]:
    tokens = [t for p in previews for piece in p["pieces"] for t in piece["tokens"]]
    return [i for token in tokens for i in token[what]]


def test_json_holds_the_batches_of_the_trainer(preview, run):
    code, out, _ = preview("--json", "--index", "2,0,3")
    previews = json.loads(out)
    assert code == 0
    assert [p["id"] for p in previews] == ["history", "two", "image"]
    config = load_config([str(run)])
    args = training_arguments(config)
    data = load_data(config, args, load_processor(str(config.model.model_path)))
    assert data.train is not None
    rows = ArrowRows(data.train.dataset)
    for seen in previews:
        batch = PaddedCollator(data.encoder)([rows[seen["index"]]])
        assert flat([seen], "ids") == batch["input_ids"][0].tolist()
        assert flat([seen], "labels") == batch["labels"][0].tolist()


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_rows_are_those_that_the_trainer_takes_in_its_first_epoch(preview, run, batch):
    words = ["--packing", "true", "--packing_length", "100", "--multimodal_max_length", "100"]
    words += ["--text_max_length", "100", "--per_device_train_batch_size", str(batch)]
    config = load_config([str(run), *words])
    args = training_arguments(config)
    data = load_data(config, args, load_processor(str(config.model.model_path)))
    assert data.train is not None
    model = load_model(config, "float32")
    apply_train_modules(model, config.model, args.learning_rate)
    batches = train_batches(args, data, plan_rows(config, model, data), 0, 1)
    taken = list(batches)
    assert len(taken) > 1
    numbers = ",".join(map(str, range(len(taken))))
    previews = json.loads(preview("--json", *words, "--index", numbers)[1])
    rows = ArrowRows(data.train.dataset)
    for number, indices in enumerate(taken):
        packed = PackedCollator(data.encoder)([rows[i] for i in indices])
        seen = [p for p in previews if p["place"]["row"] == number]
        assert [p["index"] for p in seen] == indices
        assert flat(seen, "ids") == packed["input_ids"][0].tolist()
        assert flat(seen, "labels") == packed["labels"][0].tolist()
        bounds = packed["cu_seq_lens_q"].tolist()
        assert [p["place"]["start"] for p in seen] == bounds[:-1]
        assert {(p["place"]["tokens"], p["place"]["room"]) for p in seen} == {
            (bounds[-1], 100 * batch)
        }
    fullest = json.loads(preview("--json", *words, "--longest", "1")[1])
    assert fullest[0]["place"]["tokens"] == max(p["place"]["tokens"] for p in previews)


def test_text_names_what_each_token_is_and_whether_it_is_trained(preview, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = preview()
    small, large = run.parent / "small.png", run.parent / "large.png"
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f'sample 0: {run.parent / "train.json"}, record 1 (id "two")'
    pieces = [re.fullmatch(r" ([-+]) +(\d+)  (\w+(?: \w+)?) +(.*)", line) for line in lines]
    named = [(m[1], m[3], m[4]) for m in pieces if m]
    assert named == [
        ("-", "prompt", "<|im_start|>user⏎"),
        ("-", "image", f"⟨image 1: 4×4 → 16 tokens⟩ {small}, 32 x 32 -> 32 x 32 pixels"),
        ("-", "prompt", "␣and␣"),
        ("-", "image", f"⟨image 2: 3×4 → 12 tokens⟩ {large}, 64 x 48 -> 32 x 24 pixels"),
        ("-", "prompt", ": which is larger?<|im_end|>⏎<|im_start|>assistant⏎"),
        ("+", "thought", "<think>⏎The second is 64 wide.⏎</think>⏎⏎"),
        ("+", "answer", "The second.␣"),
        ("+", "stop", "<|im_end|>"),
    ]


def test_text_sums_tokens_by_kind(preview):
    form = re.compile(r"([a-z ]+?) (\d+)(?: \(\+(\d+)\))?(?:, |$)")
    out = preview("--index", "1,2")[1]
    [first, second] = (form.findall(line) for line in re.findall(r"^  (prompt .*)$", out, re.M))
    [total] = re.findall(r"^all 2: (.*)$", out, re.M)
    kinds = [kind for kind, _, _ in form.findall(total)]
    assert kinds == ["prompt", "empty think", "answer", "stop", "thought"]
    for kind, count, trained in form.findall(total):
        parts = [one for one in (*first, *second) if one[0] == kind]
        assert int(count) == sum(int(part[1]) for part in parts)
        assert trained == (count if kind in ("answer", "stop", "thought") else "")


@pytest.mark.parametrize(
    ("environment", "colours"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_a_terminal_that_has_them(run, monkeypatch, environment, colours):
    for name in ("NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    reading, writing = os.openpty()
    with TextIOWrapper(open(writing, "wb"), "utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["preview", str(run), "--index", "1"]) == 0
        shown = os.read(reading, 65536).decode()
    os.close(reading)
    assert ("\x1b[1;32m9\x1b[0m" in shown) is colours
    assert ("\x1b" in shown) is colours
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert re.search(r"^ \+ +1  answer +9\r?$", plain, re.M)


def test_what_would_move_the_cursor_is_shown_as_a_picture(preview, run):
    given = record("x", "a\x1b[2J\x07\u202eb\x9b", "tab\there ")
    (run.parent / "train.json").write_text(json.dumps([given]), "utf-8")
    out = preview()[1]
    assert "a␛[2J␇�b�<|im_end|>" in out
    assert "tab⇥here␣" in out


def test_the_middle_of_long_text_is_left_out_and_counted(preview, run):
    text = "a" * 3000 + "b" * 1000
    (run.parent / "train.json").write_text(json.dumps([record("x", "5", text)]), "utf-8")
    words = ["--text_max_length", "8192"]
    out = preview(*words)[1]
    shown = preview_text.LONGEST // 2
    assert f" … {4000 - 2 * shown:,} characters … " in " ".join(out.split("\n" + " " * 27))
    [seen] = json.loads(preview("--json", *words)[1])
    answer = next(piece for piece in seen["pieces"] if piece["kind"] == "answer")
    assert "".join(token["text"] for token in answer["tokens"]) == text


@pytest.mark.parametrize("text", ["a" * 50, "to be or not to be " * 5, "你好 世界 " * 9, "é" * 21])
def test_wrapped_lines_fit_and_lose_nothing(text):
    lines = list(preview_text._wrapped(text, 20))
    assert "".join(lines) == text
    assert max(sum(map(preview_text._cells, line)) for line in lines) <= 20
    assert len(lines) > 1


def test_cut_samples_and_problems_are_told(preview):
    [whole] = json.loads(preview("--json", "--index", "9")[1])
    limit = whole["length"] - 3
    out = preview("--index", "9", "--text_max_length", str(limit))[1]
    trained = whole["trained_tokens"]
    assert out.splitlines()[1:6] == [
        f"  {limit} tokens, {trained - 3} trained ({(trained - 3) / limit:.1%}), 3 more cut off",
        "  warning [too-long], conversations:",
        f"    {whole['length']} tokens, cut to {limit} by text_max_length {limit}: 3 of {trained} "
        "trained ones are lost.",
        f"    Fix: raise text_max_length to {whole['length']}, or shorten the sample.",
        "     tokens  kind           text",
    ]


def test_longest_are_in_falling_order_and_random_ones_differ(preview):
    longest = json.loads(preview("--json", "--longest", "3")[1])
    everything = json.loads(preview("--json", "--random", "99")[1])
    assert [p["index"] for p in everything] == list(range(len(RECORDS)))
    lengths = sorted((p["length"] for p in everything), reverse=True)
    assert [p["length"] for p in longest] == lengths[:3]
    drawn = json.loads(preview("--json", "--random", "4")[1])
    assert len({p["index"] for p in drawn}) == 4


def test_records_of_several_files_and_left_out_ones_keep_their_places(preview, run):
    other = run.parent / "other.jsonl"
    lines = [record("bad", "5", ""), record("second", "5", "7")]
    other.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    words = ["--data_path", f"{run.parent / 'train.json'}|{other}", "--on_bad_sample", "skip"]
    code, out, err = preview("--json", *words, "--index", str(len(RECORDS)))
    [seen] = json.loads(out)
    told = f'note: 1 left out, the first is {other}, record 1 (id "bad"), conversations[1].value: '
    assert code == 0
    assert f"{told}answer without text.\n" in err
    assert (seen["id"], seen["source"], seen["record"]) == ("second", str(other), 2)


def test_stream_counts_the_records_of_all_files(preview, run):
    words = ["--streaming", "true", "--max_steps", "1"]
    previews = json.loads(preview("--json", *words, "--index", "3,1")[1])
    assert [(p["index"], p["id"]) for p in previews] == [(3, "image"), (1, "text")]
    assert previews == json.loads(preview("--json", "--index", "3,1")[1])
    code, _, err = preview(*words, "--index", "10")
    assert (code, err) == (
        1,
        "ConfigError: command line, index:\n  there is no 10: the data has 10 records.\n"
        "  Fix: give numbers from 0 to 9.\n",
    )
    assert "a stream does not know its samples" in preview(*words, "--longest", "1")[2]


@pytest.mark.parametrize("words", [["--index", "1,a"], ["--index", "-1"], ["--random", "0"]])
def test_a_wrong_number_is_refused_before_anything_is_read(preview, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        preview(*words)
    assert stopped.value.code == 2
    assert f'"{words[1]}" is not ' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--longst", "3"], "unknown flag --longst.\n  Fix: did you mean --longest?"),
        (["--model_path", "./none"], "/none:\n  there is no such folder."),
        (["--data_path", "none.json"], "none.json:\n  there is no such file."),
    ],
)
def test_what_is_missing_or_misspelled_is_told_before_torch_is_imported(run, words, told):
    code = (
        "import sys; from vlmtune.cli.main import main\n"
        "print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    given = [sys.executable, "-c", code, "preview", str(run), *words]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"
    assert told in done.stderr


def test_a_number_that_no_sample_has_is_refused(preview):
    code, out, err = preview("--index", "0,10")
    assert (code, out) == (1, "")
    assert err.endswith(
        "ConfigError: command line, index:\n  there is no 10: the data has 10 samples.\n"
        "  Fix: give numbers from 0 to 9.\n"
    )


def test_page_is_written_and_never_over_another(preview, run):
    page = run.parent / "page.html"
    code, out, err = preview("--html", str(page), "--index", "0")
    assert (code, out) == (0, "")
    assert err.endswith(f"Wrote {page}\n")
    written = page.read_text("utf-8")
    assert TWO_IMAGES[-7:] in re.sub(r"<[^>]*>", "", written)
    assert f"<title>Preview of {run}</title>" in written
    code, _, err = preview("--html", str(page))
    assert code == 1
    assert f"{page}:\n  exists already" in err
    assert page.read_text("utf-8") == written


def test_nothing_is_written_into_the_output_folder(preview, run):
    assert preview()[0] == 0
    assert preview("--packing", "true")[0] == 0
    assert not (run.parent / "out").exists()


def test_a_stage_that_waits_for_another_is_read_with_the_first_model(run, tmp_path):
    recipe = json.loads(run.read_text("utf-8"))
    recipe["stages"] = [{"name": "a"}, {"name": "b", "text_max_length": 64}, {"name": "c"}]
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe), "utf-8")
    config = planned_config([str(file), "--stage", "c"])
    assert config.model.model_path == recipe["model_path"]
    assert planned_config([str(file), "--stage", "b"]).data.text_max_length == 64
    finished = tmp_path / "out" / "b"
    finished.mkdir(parents=True)
    for name in ("config.json", "vlmtune_run.json"):
        (finished / name).write_text("{}")
    assert planned_config([str(file), "--stage", "c"]).model.model_path == str(finished)
    assert planned_config([str(file), "--stage", "b"]).model.model_path == recipe["model_path"]


def test_all_stages_at_once_are_refused(run, tmp_path, capsys):
    recipe = {**json.loads(run.read_text("utf-8")), "stages": [{"name": "a"}, {"name": "b"}]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), "utf-8")
    assert main(["preview", str(tmp_path / "recipe.json"), "--stage", "all"]) == 1
    assert "Fix: give one of a, b." in capsys.readouterr().err


def test_help_answers_without_torch():
    code = (
        "import sys; from vlmtune.cli.main import main\n"
        "try: main(['preview', '--help'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")
    assert "--longest N" in done.stdout
