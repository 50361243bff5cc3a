"""Answers at each evaluation, on a model whose answers are known: their scores, the rows that are
kept, the best model by them, and that the training is the same without them."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.cli.main import main
from vlmtune.configs.load import load_config
from vlmtune.models.loading import load_processor
from vlmtune.sft.answers import AnswerEvaluation, pick_questions
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.data import load_data
from vlmtune.sft.train import load_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PRESET = "configs/presets/quickstart.json"


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def records(fluent_ovis) -> list[dict]:
    """What the model says, word by word; three of the answers have no image, one has a thought."""
    known = json.loads((fluent_ovis / "records.json").read_text("utf-8"))
    return [record for record in known if record["id"] != "crop"]


@pytest.fixture(scope="module")
def sets(records, tmp_path_factory) -> dict[str, Path]:
    """`known`: all of them; `short`: those with the shortest answers, three with images and one of
    text, whose reference calls a tool; `wrong`: that one with another answer than the model's."""
    folder = tmp_path_factory.mktemp("sets")
    digit, larger, _, _, text, _ = records
    call = "<tool_call>Look []</tool_call><tool_response>blue</tool_response>"
    files = {
        "known": records,
        "short": [
            digit,
            {**digit, "id": "again"},
            larger,
            {**text, "answers": f"Blue{call} was the first."},
        ],
        "wrong": [{**text, "answers": "Green was the first."}],
    }
    for name, chosen in files.items():
        (folder / f"{name}.json").write_text(json.dumps(chosen), "utf-8")
    return {name: folder / f"{name}.json" for name in files}


@pytest.fixture
def keys(fluent_ovis, sets, tmp_path):
    """Of a run that changes nothing, on the model that knows the answers."""
    return {
        "model_path": fluent_ovis,
        "output_dir": tmp_path / "out",
        "data_path": sets["known"],
        "eval_data_path": sets["known"],
        "image_folder": fluent_ovis / "images",
        "eval_metrics": "exact_match",
        "eval_max_new_tokens": 80,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0,
        "max_steps": 1,
        "report_to": "none",
        "logging_steps": 1,
        "warmup_steps": 0,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "dataloader_num_workers": 0,
    }


def words(keys: dict) -> list[str]:
    return [PRESET, *(word for k, v in keys.items() for word in (f"--{k}", str(v)))]


def logged(folder: Path, key: str) -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
    return [entry[key] for entry in entries if key in entry]


def rows_of(folder: Path, step: int) -> list[dict]:
    lines = (folder / f"eval_samples/step-{step}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "more",
    [{}, {"trainer": "standard", "streaming": "true"}, {"packing": "true"}],
    ids=["padded", "standard-streaming", "packed"],
)
def test_what_the_model_knows_is_answered_and_kept(keys, records, sets, capsys, more):
    assert main(["train", *words({**keys, **more})]) == 0
    folder = keys["output_dir"]
    assert logged(folder, "eval_exact_match") == [1.0]
    assert logged(folder, "eval_unfinished_thoughts") == [0.0]
    assert "Evaluation: eval_exact_match 1.0000" in capsys.readouterr().err
    rows = rows_of(folder, 1)
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert [row["references"] for row in rows] == [
        [record["conversations"][-1]["value"]] for record in records
    ]
    assert rows[2] | {"tokens": 0} == {
        "set": "",
        "record": 3,
        "source": str(sets["known"]),
        "id": "larger-thinking",
        "prompt": "<image>\n<image>\nWhich image shows the larger digit?",
        "images": [
            str(keys["image_folder"] / name) for name in ("digit_0605.png", "digit_0654.png")
        ],
        "video": None,
        "references": [records[2]["conversations"][-1]["value"]],
        "thinking": "The first shows 6, the second shows 5.",
        "answer": "The first, since 6 is larger than 5.",
        "unfinished_thought": False,
        "ended": "stop",
        "tokens": 0,
        "error": None,
    }
    assert [file.name for file in (folder / "eval_samples").iterdir()] == ["step-1.jsonl"]


def metrics_of(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> what was logged of answers."""
    entries = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
    return {
        entry["step"]: {k: v for k, v in entry.items() if k.startswith("eval_")}
        for entry in entries
        if any(key.endswith("exact_match") for key in entry)
    }


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"deepspeed": "configs/zero/zero3.json", "lora_r": 4}, id="zero3-lora"),
        *(
            pytest.param(
                {"deepspeed": f"configs/zero/{name}.json", **lora},
                marks=pytest.mark.long,
                id=f"{name}{'-lora' if lora else ''}",
            )
            for name in ("zero0", "zero1", "zero2", "zero3")
            for lora in ({}, {"lora_r": 4})
            if (name, lora) != ("zero3", {"lora_r": 4})
        ),
    ],
)
def test_two_ranks_answer_as_one_does(keys, sets, forked, more):
    # Three samples for one rank and two for the other; at the second batch one of them has text.
    named = {name: str(sets[name]) for name in ("short", "wrong")}
    keys |= {
        "eval_data_path": json.dumps(named),
        "eval_metrics": "exact_match|bleu|cider",
        "per_device_eval_batch_size": 1,
    }
    assert main(["train", *words({**keys, "do_train": "false"})]) == 0
    expected, rows = metrics_of(keys["output_dir"])[0], rows_of(keys["output_dir"], 0)
    assert len(expected) == 2 * 6
    assert expected["eval_short_exact_match"] == 1.0
    assert expected["eval_wrong_exact_match"] == 0.0
    assert [row["set"] for row in rows] == ["short"] * 4 + ["wrong"]
    assert [row["record"] for row in rows] == [1, 2, 3, 4, 1]
    given = {k: v for k, v in keys.items() if k != "output_dir"}
    done, folder = forked(2, **{**given, **more})
    assert done.returncode == 0, done.stderr
    assert metrics_of(folder) == {1: expected}
    assert rows_of(folder, 1) == rows


def test_the_model_with_the_best_answers_is_kept(keys, fluent_ovis, capsys):
    # The first step is of rate 0, the next ones destroy what was learned.
    keys |= {
        "eval_metrics": "exact_match|rouge_l",
        "metric_for_best_model": "exact_match",
        "early_stopping_patience": 2,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 1,
        "learning_rate": 0.3,
        "save_strategy": "steps",
        "max_steps": 9,
    }
    assert main(["train", *words(keys)]) == 0
    folder = keys["output_dir"]
    found = logged(folder, "eval_exact_match")
    assert (found[0], len(found)) == (1.0, 3)
    assert max(found[1:]) < 1.0
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    assert (state["best_global_step"], state["global_step"]) == (1, 3)
    told = capsys.readouterr().err
    assert "Evaluation: eval_exact_match 1.0000\nEvaluation: eval_rouge_l 1.0000\n" in told
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, fluent_ovis))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    # What a resumed run has waited before it was stopped counts too.
    again = keys["output_dir"].parent / "again"
    keys |= {"output_dir": again, "resume_from_checkpoint": folder / "checkpoint-2"}
    assert main(["train", *words(keys)]) == 0
    assert logged(again, "eval_exact_match") == found[2:]


@pytest.mark.parametrize(
    "more",
    [
        {"lora_r": 4, "lora_dropout": 0.2, "packing": "true", "gradient_checkpointing": "true"},
        {"train_modules": "all", "recompute": "selective"},
    ],
    ids=["lora-packed", "full"],
)
def test_answering_changes_nothing_of_the_training(keys, more):
    keys |= {"learning_rate": 1e-3, "max_steps": 2, "eval_on_start": "true", **more}
    folders = keys["output_dir"], keys["output_dir"].parent / "without"
    assert main(["train", *words(keys)]) == 0
    keys |= {"output_dir": folders[1], "eval_strategy": "no", "do_eval": "false"}
    del keys["eval_on_start"]
    assert main(["train", *words(keys)]) == 0
    assert len(logged(folders[0], "eval_exact_match")) == 3
    assert max(logged(folders[0], "data_wait_share")) <= 1  # of time without evaluations
    assert logged(folders[0], "loss") == logged(folders[1], "loss")
    name = "adapter_model.safetensors" if "lora_r" in more else "model.safetensors"
    ours, theirs = (load_file(folder / name) for folder in folders)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_answering_changes_nothing_of_the_training_of_two_ranks(keys, forked, engine):
    del keys["output_dir"]
    keys |= {"learning_rate": 1e-3, "max_steps": 3, "eval_max_new_tokens": 8}
    keys |= {"lora_r": 4, "lora_dropout": 0.2, "train_modules": "vte"}
    if engine != "ddp":
        keys["deepspeed"] = f"configs/zero/{engine}.json"
    answering, folder = forked(2, **keys)
    assert answering.returncode == 0, answering.stderr
    assert len(logged(folder, "eval_exact_match")) == 3
    silent, other = forked(2, **{**keys, "eval_strategy": "no", "do_eval": "false"})
    assert silent.returncode == 0, silent.stderr
    assert logged(folder, "loss") == logged(other, "loss")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def prepared(keys):
    """`prepared(keys)`: arguments, data and model of a run, before its answers."""

    def of(keys: dict):
        config = load_config(words(keys))
        args = training_arguments(config)
        return config, args, load_data(config, args, load_processor(config.model.model_path))

    return of


def test_an_image_that_is_gone_costs_its_own_answer(keys, prepared, fluent_ovis, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for file in keys["image_folder"].iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    config, args, data = prepared({**keys, "image_folder": images})
    answers, model = AnswerEvaluation(config, data), load_model(config, "float32").eval()
    (images / "digit_0654.png").unlink()
    found = answers.evaluate(model, args, 7, nullcontext())
    # Two of six need it, one of them the only one with a thought: no answer was to have one.
    assert found == {"eval_exact_match": pytest.approx(4 / 6)}
    rows = rows_of(keys["output_dir"], 7)
    failed = [row for row in rows if row["error"]]
    assert [(row["id"], row["answer"], row["ended"]) for row in failed] == [
        ("larger", "", "error"),
        ("larger-thinking", "", "error"),
    ]
    assert all("digit_0654.png does not exist" in row["error"] for row in failed)
    assert "note: 2 of 6 answers failed, see" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1]), (3, [1, 3, 5]), (4, [1, 2, 4, 5]), (9, [1, 2, 3, 4, 5, 6])]
)
def test_samples_are_spread_evenly_over_a_set_of_several_files(
    keys, prepared, records, tmp_path, count, expected
):
    files = [tmp_path / "a.json", tmp_path / "b.jsonl"]
    files[0].write_text(json.dumps(records[:4]), "utf-8")
    files[1].write_text("".join(json.dumps(r) + "\n" for r in records[4:]), "utf-8")
    sets = json.dumps({"x": list(map(str, files))})
    config, _, data = prepared({**keys, "eval_data_path": sets, "eval_generate_samples": count})
    found = list(pick_questions(config, "x", data.evaluation["x"]))
    places = [q.row["record"] + 4 * q.row["source"].endswith("b.jsonl") for q in found]
    assert places == expected
    assert [q.row["id"] for q in found] == [records[i - 1]["id"] for i in expected]
    assert [q.thinking for q in found] == [i == 3 for i in expected]


@pytest.mark.parametrize(
    ("after", "thinking"),
    [
        ([{"from": "human", "value": "Sure?"}], True),
        ([{"from": "human", "value": "Sure?"}, {"from": "ignored_gpt", "value": "Yes."}], True),
        ([{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}], False),
    ],
)
def test_the_last_trained_answer_is_given_again(keys, prepared, records, tmp_path, after, thinking):
    file, asked = tmp_path / "turns.json", records[2]["conversations"]
    turns = [*asked, *after]
    file.write_text(json.dumps([{**records[2], "conversations": turns}]), "utf-8")
    config, _, data = prepared({**keys, "eval_data_path": file})
    [question] = pick_questions(config, "", data.evaluation[""])
    given = 1 if thinking else 3
    assert [turn.text for turn in question.request.turns] == [t["value"] for t in turns[:given]]
    assert question.row["references"] == [turns[given]["value"]]
    assert (question.thinking, len(question.request.images)) == (thinking, 2)


@pytest.mark.parametrize("references", [[], [["nested"]]])
def test_references_that_cannot_be_scored_stop_before_training(
    keys, records, tmp_path, capsys, references
):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps([{**records[0], "references": references}]), "utf-8")
    assert main(["train", *words({**keys, "eval_data_path": file})]) == 1
    told = capsys.readouterr().err
    assert f'DataError: {file}, record 1 (id "digit"), references:' in told
    assert not (keys["output_dir"] / "log.jsonl").exists()
