"""`vlmtune evaluate` as it is typed: what it prints, writes and refuses, and how fast."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from vlmtune.cli.main import main
from vlmtune.models import Ovis2_5

ROOT = Path(__file__).parents[2]


@pytest.fixture
def evaluate(fluent_ovis, tmp_path, monkeypatch, capsys):
    """`evaluate(word, ...)` is exit code, stdout and stderr, with the images and three records of
    the model in the working directory."""
    shutil.copytree(fluent_ovis / "images", tmp_path / "images")
    records = json.loads((fluent_ovis / "records.json").read_text("utf-8"))[:3]
    (tmp_path / "data.json").write_text(json.dumps(records), "utf-8")
    monkeypatch.chdir(tmp_path)

    def run(*words: str, model: Path = fluent_ovis) -> tuple[int, str, str]:
        flags = ["--model", str(model), "--device", "cpu", "--max_new_tokens", "96"]
        code = main(["evaluate", *flags, *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def model_with_run(fluent_ovis, tmp_path):
    """`model_with_run(key=value)`: a copy of the model whose run file has these keys."""

    def copy(**keys) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(fluent_ovis, folder)
        run = json.loads((folder / "vlmtune_run.json").read_text("utf-8"))
        run["config"] |= keys
        (folder / "vlmtune_run.json").write_text(json.dumps(run), "utf-8")
        return folder

    return copy


def result(folder: str | Path) -> dict:
    return json.loads(Path(folder, "metrics.json").read_text("utf-8"))


def values(folder: str | Path) -> dict[str, float]:
    return {name: entry["value"] for name, entry in result(folder)["metrics"].items()}


def test_table_files_and_what_is_left_out(evaluate, fluent_ovis):
    code, out, err = evaluate("--data", "data.json", "--output", "out")
    assert code == 0, err
    table = [line.split() for line in out.splitlines()]
    assert table[:2] == [
        ["metric", "value", "95", "%", "interval", "n"],
        ["exact_match", "1.0000", "1.0000", "to", "1.0000", "3"],
    ]
    assert [words[0] for words in table[2:12]] == [
        "vqa_accuracy", "anls", "relaxed_accuracy", "bleu_1", "bleu_2", "bleu_3", "bleu_4",
        "cider", "rouge_l", "loss",
    ]  # fmt: skip
    assert out.splitlines()[-2:] == [
        "answers with a thought: 33.3%; unfinished where asked for: 0.0%; "
        "ended by length: 0.0%; without a reference: 0.0%",
        "left out: contrastive: the model makes no vectors of images and texts, as CLIP does",
    ]
    assert err.splitlines()[-1] == "out: metrics.json, report.html, predictions.jsonl"
    found = result("out")
    assert found["model"] == str(fluent_ovis)
    assert found["data"] == ["data.json"]
    assert found["settings"]["max_new_tokens"] == 96
    assert set(found["versions"]) == {
        "vlmtune", "python", "torch", "transformers", "peft", "sacrebleu"
    }  # fmt: skip
    assert "The first, since 6 is larger than 5." in Path("out/report.html").read_text("utf-8")


def test_another_family_is_scored_by_its_answers_alone(evaluate, tiny_llava):
    words = ["--data", "data.json", "--image_folder", "images", "--max_new_tokens", "8"]
    code, _, err = evaluate(*words, "--output", "out", model=tiny_llava)
    assert code == 0, err
    found = result("out")
    assert {entry["n"] for entry in found["metrics"].values()} == {3}
    assert set(found["left_out"]) == {"loss", "contrastive"}
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [(row["error"], row["tokens"]) for row in rows] == [(None, 8)] * 3
    code, _, err = evaluate(*words, "--output", "other", "--metrics", "loss", model=tiny_llava)
    assert (code, Path("other").exists()) == (1, False)
    assert "metrics, loss:\n  " in err and "Ovis2.5" in err


def test_other_metrics_score_the_answers_that_are_there(evaluate):
    words = ["--data", "data.json", "--output", "out", "--metrics"]
    assert evaluate(*words, "exact_match")[0] == 0
    rows = Path("out/predictions.jsonl").read_text("utf-8")
    changed = rows.replace('"answer": "It is a four."', '"answer": "A five."')
    Path("out/predictions.jsonl").write_text(changed, "utf-8")
    code, _, err = evaluate(*words, "anls,exact_match")
    assert (code, values("out")["exact_match"]) == (0, 2 / 3)  # were it asked again: 1
    assert "out/predictions.jsonl is there already; its answers are scored" in err
    code, _, err = evaluate(*words, "anls", "--no_thinking")
    assert code == 1
    assert "was made with other settings: thinking was not given, is false" in err


def test_bad_record_is_wrong_and_the_exit_code_says_so(evaluate):
    records = json.loads(Path("data.json").read_text("utf-8"))
    records[0]["image"] = "gone.png"
    Path("data.json").write_text(json.dumps(records), "utf-8")
    words = ["--data", "data.json", "--output", "out", "--metrics", "exact_match"]
    code, out, _ = evaluate(*words)
    assert code == 1
    assert values("out") == {"exact_match": 2 / 3}
    assert "1 of 3 records have an error, the first:\n  data.json, record 1" in out
    assert evaluate(*words)[0] == 1  # the second time as well
    assert len(Path("out/predictions.jsonl").read_text("utf-8").splitlines()) == 3


def test_adapter_and_limit(evaluate, fluent_ovis, tmp_path):
    settings = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_alpha=99)
    adapted = get_peft_model(Ovis2_5.from_pretrained(fluent_ovis), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["--data", "data.json", "--limit", "2", "--metrics", "exact_match,loss"]
    folder = tmp_path / "adapter" / "evaluation" / "data"
    assert evaluate(*words, "--adapter", "adapter", "--image_folder", "images")[0] == 0
    assert result(folder)["records"] == 2
    assert values(folder)["loss"] > 1  # a random adapter
    assert values(folder)["exact_match"] == 0
    given = ["--data", "data.json", "--limit", "2", "--metrics", "loss", "--output", "out"]
    assert evaluate(*given, "--image_folder", "images", model=tmp_path / "adapter")[0] == 0
    assert values("out")["loss"] == pytest.approx(values(folder)["loss"], rel=1e-5)


def test_split_is_the_data_of_the_run_and_the_output_lies_with_the_model(evaluate, model_with_run):
    model = model_with_run(data_path=["images/train.json"], eval_data_path=["data.json"])
    shutil.copy("data.json", "images/train.json")
    assert evaluate("--split", "val", "--metrics", "loss", model=model)[0] == 0
    assert result(model / "evaluation/data")["data"] == ["data.json"]
    assert result(model / "evaluation/data")["split"] == "val"
    assert evaluate("--split", "train", "--metrics", "loss", model=model)[0] == 0
    assert result(model / "evaluation/train")["data"] == ["images/train.json"]
    code, _, err = evaluate("--split", "test", "--metrics", "loss", model=model)
    assert (code, "split:\n  the run has no set named test" in err) == (1, True)


def test_split_is_an_evaluation_set_of_its_name(evaluate, model_with_run):
    for name in ("a", "b"):
        shutil.copy("data.json", f"{name}.json")
    sets = {"test": ["a.json"], "other": ["b.json"]}
    model = model_with_run(data_path=["data.json"], eval_data_path=sets)
    words = ["--metrics", "loss", "--limit", "1"]
    assert evaluate("--split", "test", *words, model=model)[0] == 0
    assert result(model / "evaluation/a")["data"] == ["a.json"]
    assert evaluate("--split", "val", *words, model=model)[0] == 0
    assert result(model / "evaluation/a-b")["data"] == ["a.json", "b.json"]


def test_script_scores_the_metrics_of_a_stage(evaluate, model_with_run, monkeypatch, capsys):
    model = model_with_run(data_path=["data.json"], eval_data_path=["data.json"])
    words = ["--stage", "1", "--checkpoint", str(model), "--split", "val", "--metrics", "all"]
    words += ["--device", "cpu", "--limit", "2", "--max_new_tokens", "32"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="__main__")
    assert ended.value.code == 0
    found = result(model / "evaluation/data")
    assert found["stage"] == 1
    assert list(found["metrics"]) == [
        "bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l", "loss", "perplexity"
    ]  # fmt: skip
    assert list(found["left_out"]) == ["contrastive"]
    capsys.readouterr()


REFUSED = {
    "model": (["--model", "./gone"], "ModelError: model_path ", "there is no such folder"),
    "adapter": (["--adapter", "./gone"], "ModelError: adapter ", "there is no such folder"),
    "no data": ([], "ConfigError: command line, data:", "is not given"),
    "data": (["--data", "gone.json"], "DataError: ", "gone.json"),
    "empty": (["--data", "empty.json"], "DataError: empty.json", "the file is empty"),
    "images": (
        ["--data", "data.json", "--image_folder", "gone"],
        "ConfigError: command line, image_folder:",
        "there is no folder gone",
    ),
    "metric": (
        ["--data", "data.json", "--metrics", "bleu,meteor"],
        "ConfigError: command line, metrics:",
        'there is no metric "meteor"',
    ),
    "budget": (
        ["--data", "data.json", "--thinking_budget", "96"],
        "ConfigError: thinking_budget:",
        "leaves no token",
    ),
    "budget of no thought": (
        ["--data", "data.json", "--thinking_budget", "9", "--no_thinking"],
        "ConfigError: command line, thinking_budget:",
        "has no effect with --no_thinking",
    ),
    "output": (
        ["--data", "data.json", "--output", "data.json"],
        "ConfigError: output data.json:",
        "is a file",
    ),
    "output in a file": (
        ["--data", "data.json", "--output", "data.json/out"],
        "ConfigError: output data.json/out:",
        "cannot be made: Not a directory",
    ),
    "run file": (
        ["--split", "val", "--model", "images"],
        "ConfigError: command line, split:",
        "needs the vlmtune_run.json of the model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistake_is_told_before_any_work(name, evaluate):
    words, where, what = REFUSED[name]
    Path("empty.json").touch()
    before = sorted(Path().rglob("*"))
    code, out, err = evaluate(*words)
    assert (code, out) == (1, "")
    assert where in err and what in err
    assert sorted(Path().rglob("*")) == before


def test_metric_that_cannot_be_computed_is_told_before_the_model_is_loaded(
    evaluate, model_with_run
):
    model = model_with_run()
    (model / "model.safetensors").write_bytes(b"broken")
    code, _, err = evaluate("--data", "data.json", "--metrics", "contrastive", model=model)
    assert code == 1
    assert "command line, metrics, contrastive:\n  the model makes no vectors" in err


def test_mistake_is_told_without_torch(evaluate, fluent_ovis):
    words = ["evaluate", "--model", str(fluent_ovis), "--data", "gone.json", "--metrics", "all"]
    code = (
        "import sys, time\nfrom vlmtune.cli.main import main\n"
        f"print(main({words}), 'torch' in sys.modules, time.process_time() < 0.5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1 False True\n", done.stderr
    assert done.stderr.startswith("DataError: ")
