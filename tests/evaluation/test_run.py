"""Evaluations of a model whose answers are known: metrics, shares, errors, what is kept."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from vlmtune.configs.schema import ANSWER_METRICS
from vlmtune.core.distributed import rank
from vlmtune.core.errors import ConfigError
from vlmtune.data.sources import Source
from vlmtune.evaluation.folder import check_folder
from vlmtune.evaluation.run import Evaluation, evaluate, kind_of
from vlmtune.evaluation.samples import read_samples
from vlmtune.evaluation.wanted import METRICS, named_metrics, possible_metrics
from vlmtune.inference import Sampling, VLMInference
from vlmtune.models import Ovis2_5

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")


@pytest.fixture(scope="module")
def inference(fluent_ovis) -> VLMInference:
    return VLMInference(str(fluent_ovis), device="cpu")


@pytest.fixture(scope="module")
def records(fluent_ovis) -> dict[str, dict]:
    """What the model knows, by id."""
    return {r["id"]: r for r in json.loads((fluent_ovis / "records.json").read_text("utf-8"))}


@pytest.fixture
def evaluation(inference, fluent_ovis, tmp_path):
    """`evaluation(records, metrics, key=value)` of `fluent_ovis`, whose answers are known."""

    def of(content: list, metrics=("exact_match", "loss"), **changes: Any) -> Evaluation:
        data = tmp_path / "data.json"
        data.write_text(json.dumps(content), "utf-8")
        sources = [Source("data", str(data), str(fluent_ovis / "images"))]
        (tmp_path / "out").mkdir(exist_ok=True)
        sampling = changes.get("sampling", Sampling(max_new_tokens=96))
        given: dict[str, Any] = {
            "load": lambda: inference,
            "run": {},
            "sources": sources,
            "samples": read_samples(sources),
            "metrics": metrics,
            "output": tmp_path / "out",
            "settings": {"model": "fluent", "max_new_tokens": sampling.max_new_tokens},
            "sampling": sampling,
            "batch_size": 3,
            **changes,
        }
        return Evaluation(**given)

    return of


@pytest.fixture
def mixed(records) -> list:
    """Three answers that are right, one that is wrong, a file that is gone, a record without a
    reference, and one that is none."""
    question = {"id": "open", "conversations": records["colours"]["conversations"][:1]}
    return [
        records["digit"],
        {**records["larger"], "answers": ["The second image."]},
        records["larger-thinking"],
        records["colours"],
        {**records["box"], "image": "gone.png"},
        question,
        "no record",
    ]


def run(e: Evaluation) -> tuple[dict[str, Any], list[dict]]:
    done = evaluate(e)
    assert done
    return done


def not_loaded() -> Any:
    pytest.fail("the model is loaded")


def test_answers_are_scored_without_thoughts_and_errors_count_as_wrong(evaluation, mixed, tmp_path):
    result, rows = run(evaluation(mixed))
    found = result["metrics"]["exact_match"]
    assert (found["value"], found["n"]) == (3 / 5, 5)
    assert 0 <= found["low"] < 3 / 5 < found["high"] <= 1
    assert [row.get("scores", {}).get("exact_match") for row in rows] == [1, 0, 1, 1, 0, None, None]
    assert result["records"] == 7
    assert [error["record"] for error in result["errors"]] == [5, 7]
    assert "gone.png does not exist" in result["errors"][0]["error"]
    assert result["answers"] == {
        "thoughts": 1 / 5,
        "unfinished_thoughts": 0.0,  # of the one that was to have a thought
        "ended_by_length": 0.0,
        "without_reference": 1 / 5,
        "tokens": sum(row["tokens"] for row in rows) / 5,
    }
    written = (tmp_path / "out" / "metrics.json").read_text("utf-8")
    assert json.loads(written) == result
    lines = (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert rows[2]["answer"] == "The first, since 6 is larger than 5."
    assert rows[2]["thinking"] == "The first shows 6, the second shows 5."


def test_loss_and_perplexity_are_over_all_tokens_of_what_the_records_answer(evaluation, mixed):
    result, rows = run(evaluation(mixed))
    loss, perplexity = result["metrics"]["loss"], result["metrics"]["perplexity"]
    assert loss["n"] == 4
    assert 0 < loss["value"] < 0.01 < 1  # it was trained on them
    assert loss["low"] < loss["value"] < loss["high"]
    for key in ("value", "low", "high"):
        assert perplexity[key] == math.exp(loss[key])
    by_row = [row.get("scores", {}).get("loss") for row in rows]
    assert [value is not None for value in by_row] == [True] * 4 + [False] * 3


def test_every_metric_of_answers_that_are_right_is_the_best(evaluation, records):
    content = [records[name] for name in ("digit", "larger", "larger-thinking", "colours")]
    result, rows = run(evaluation(content, ANSWER_METRICS))
    found = {name: entry["value"] for name, entry in result["metrics"].items()}
    names = ["exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", *BLEU, "cider", "rouge_l"]
    assert list(found) == names
    assert found.pop("cider") == pytest.approx(10 * sum(
        row["scores"]["cider"] for row in rows) / 40)  # fmt: skip
    assert list(found.values()) == pytest.approx([1.0] * 9)
    assert list(rows[0]["scores"]) == names
    tokenizers = {name: entry.get("tokenizer") for name, entry in result["metrics"].items()}
    captions = [name for name in names if tokenizers[name] == "ptb_python"]
    assert captions == [*BLEU, "cider", "rouge_l"]


def test_thought_that_is_cut_is_no_answer_and_is_told_of(evaluation, records):
    e = evaluation(
        [records["larger-thinking"], records["digit"]],
        ["exact_match"],
        sampling=Sampling(max_new_tokens=10),
    )
    result, rows = run(e)
    assert result["answers"]["unfinished_thoughts"] == 1  # of one that was to have a thought
    assert result["answers"]["ended_by_length"] == 0.5
    assert result["metrics"]["exact_match"]["value"] == 0.5
    assert (rows[0]["answer"], rows[0]["ended"]) == ("", "length")
    assert result["errors"] == []


def test_where_no_answer_was_to_think_no_share_of_unfinished_thoughts_is_given(
    evaluation, records, tmp_path
):
    content = [records["larger-thinking"], records["digit"]]
    result, _ = run(evaluation(content, ["exact_match"], enable_thinking=False))
    assert "unfinished_thoughts" not in result["answers"]


def test_last_question_without_an_answer_has_no_reference(evaluation, records):
    """The answer to the question before is none."""
    turns = records["colours"]["conversations"]
    content = [records["digit"], {"id": "open", "conversations": turns[:3]}]
    result, rows = run(evaluation(content, ["exact_match"]))
    assert (rows[1]["references"], rows[1].get("scores")) == ([], None)
    assert result["metrics"]["exact_match"]["n"] == 1


def test_captions_of_a_record_are_references_and_count_where_it_cannot_be_read(evaluation, records):
    content = [
        {**records["digit"], "captions": ["A four.", "It is a four."]},
        {
            "id": "open",
            "conversations": records["colours"]["conversations"][:1],
            "captions": "Blue.",
        },
        {"captions": ["no question"]},
    ]
    result, rows = run(evaluation(content, ["exact_match"]))
    assert (result["metrics"]["exact_match"]["value"], len(result["errors"])) == (2 / 3, 1)
    assert [row["references"] for row in rows] == [
        ["A four.", "It is a four."],
        ["Blue."],
        ["no question"],
    ]
    assert [row["scores"]["exact_match"] for row in rows] == [1, 1, 0]


def test_where_no_record_can_be_read_the_loss_is_left_out(evaluation, records):
    result, _ = run(evaluation([{**records["digit"], "image": "gone.png"}]))
    assert result["metrics"]["exact_match"]["value"] == 0
    assert list(result["metrics"]) == ["exact_match"]
    assert result["left_out"] == {"loss": "no record could be run"}


def test_later_metrics_take_the_answers_and_losses_that_are_there(evaluation, mixed, tmp_path):
    first, _ = run(evaluation(mixed, ["exact_match", "loss"]))
    losses = (tmp_path / "out" / "losses.jsonl").stat().st_mtime_ns
    second, rows = run(evaluation(mixed, ["anls", "loss"], load=not_loaded))
    assert list(second["metrics"]) == ["exact_match", "loss", "perplexity", "anls"]
    for name in ("exact_match", "loss", "perplexity"):
        assert second["metrics"][name] == first["metrics"][name]
    assert list(rows[0]["scores"]) == ["exact_match", "loss", "anls"]
    assert second["errors"] == first["errors"]
    assert (tmp_path / "out" / "losses.jsonl").stat().st_mtime_ns == losses


def test_evaluation_that_was_stopped_goes_on(evaluation, mixed, inference, monkeypatch):
    answer, calls = VLMInference.answer, []

    def stopping(self, requests, *given, **more):
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, requests, *given, **more)

    monkeypatch.setattr(VLMInference, "answer", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation(mixed))
    result, _ = run(evaluation(mixed))
    assert result["metrics"]["exact_match"]["value"] == 3 / 5
    assert calls == [3, 3, 3, 0]  # the first three are not asked again; the last record is none


def test_two_processes_find_what_one_finds(evaluation, mixed, two_ranks, tmp_path):
    metrics = ["exact_match", "cider", "loss"]

    def of_rank() -> None:
        assert (evaluate(evaluation(mixed, metrics)) is None) == (rank() == 1)

    assert two_ranks(of_rank) == [0, 0]
    two = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    rows = (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "out").rename(tmp_path / "two")
    one, expected = run(evaluation(mixed, metrics))
    for name in ("exact_match", "cider"):
        assert two["metrics"][name] == one["metrics"][name]
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)
    assert (two["errors"], two["answers"]) == (one["errors"], one["answers"])
    assert [json.loads(row)["answer"] for row in rows] == [row["answer"] for row in expected]


def test_folder_of_other_settings_or_of_something_else_is_refused(evaluation, mixed, tmp_path):
    e = evaluation(mixed[:1])
    out = e.output
    check_folder(out, e.sources, e.settings, None)
    run(e)
    check_folder(out, e.sources, e.settings, None)
    with pytest.raises(ConfigError, match="max_new_tokens was 96, is 7"):
        check_folder(out, e.sources, {**e.settings, "max_new_tokens": 7}, None)
    for file in out.glob("predictions*"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds an evaluation with other settings: max_new_tok"):
        check_folder(out, e.sources, {**e.settings, "max_new_tokens": 7}, None)
    (tmp_path / "other").mkdir()
    for name in ("metrics.json", "report.html"):
        file = tmp_path / "other" / name
        file.write_text("{}")
        with pytest.raises(ConfigError, match=f"holds a {name} of something else"):
            check_folder(file.parent, e.sources, e.settings, None)
        file.unlink()
    with pytest.raises(ConfigError, match="is a file"):
        check_folder(Path(e.sources[0].path), e.sources, e.settings, None)


def test_names_of_metrics():
    assert named_metrics("all") == (METRICS, False)
    assert named_metrics("cider, loss,cider") == (("cider", "loss"), True)
    assert named_metrics("all", 1)[0] == ("bleu", "cider", "rouge_l", "contrastive", "loss")
    assert named_metrics("all", 2) == ((*ANSWER_METRICS, "loss"), False)
    with pytest.raises(ConfigError, match='there is no metric "bleu_4"'):
        named_metrics("cider,bleu_4")


def test_metrics_that_are_not_possible_are_left_out_or_refused(evaluation, mixed):
    samples = evaluation(mixed).samples
    names, left_out = possible_metrics(METRICS, "ovis2_5", samples, required=False)
    assert names == [*ANSWER_METRICS, "loss"]
    assert list(left_out) == ["contrastive"]
    names, left_out = possible_metrics(METRICS, "vlm", samples, required=False)
    assert (names, list(left_out)) == ([*ANSWER_METRICS], ["loss", "contrastive"])
    with pytest.raises(ConfigError, match="metrics, contrastive:\n  the model makes no vectors"):
        possible_metrics(("cider", "contrastive"), "ovis2_5", samples, required=True)
    open_question = evaluation(mixed[5:6]).samples
    with pytest.raises(ConfigError, match="metrics, exact_match:\n  no record has an answer"):
        possible_metrics(METRICS, "ovis2_5", open_question, required=False)
    answered = evaluation([{**mixed[5], "answers": "Blue."}]).samples
    names, left_out = possible_metrics(METRICS, "ovis2_5", answered, required=False)
    assert names == [*ANSWER_METRICS]
    assert left_out["loss"] == "no record has an answer of its own"


def test_texts_of_a_record_are_its_references_without_thoughts(evaluation, mixed):
    content = [
        mixed[2],
        {**mixed[1], "references": ["<think>\na\n</think>\n\nb", "c"], "answers": ["d"]},
        {**mixed[1], "answers": "e<tool_call>f []</tool_call><tool_response>g</tool_response>"},
        {**mixed[1], "answers": [{"answer": "yes"}, {"answer": "no"}, 3]},
        {"image": "digit_0675.png", "captions": ["one", "two"]},
        {"image": "digit_0675.png", "caption": "three"},
        mixed[5],
    ]
    samples = evaluation(content).samples
    assert [sample.texts for sample in samples] == [
        ["The first, since 6 is larger than 5."],
        ["b", "c"],
        ["e"],
        ["yes", "no", "3"],
        ["one", "two"],
        ["three"],
        [],
    ]
    images = [sample.described_image and Path(sample.described_image).name for sample in samples]
    assert images == [None, None, None, None, "digit_0675.png", "digit_0675.png", None]


def test_kind_of_a_model_is_that_of_its_config_or_of_its_base(tiny_ovis, tiny_clip, tmp_path):
    assert kind_of(str(tiny_ovis)) == "ovis2_5"
    assert kind_of(str(tiny_clip)) == "dual_encoder"
    adapted: Any = get_peft_model(Ovis2_5.from_pretrained(tiny_ovis), LoraConfig(
        target_modules=["q_proj"]))  # fmt: skip
    adapted.save_pretrained(tmp_path / "adapter")
    assert kind_of(str(tmp_path / "adapter")) == "ovis2_5"
    assert kind_of(str(tmp_path)) == "vlm"
