"""Evaluation: the loss of the whole set, early stopping, the best model, bounded memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmtune.cli.main import main
from vlmtune.collators.padded import PaddedCollator
from vlmtune.configs.load import load_config
from vlmtune.models.loading import load_processor
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.data import load_data
from vlmtune.sft.train import load_model
from vlmtune.sft.trainer import VLMTrainerMixin, evaluations_without_progress

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PRESET = "configs/presets/quickstart.json"


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Seven samples of one image, two images or none, of different lengths; and five of text."""
    records = json.loads((ROOT / "sample_data/eval.json").read_text("utf-8"))
    one = [r for r in records if isinstance(r.get("image"), str)]
    two = [r for r in records if isinstance(r.get("image"), list)]
    text = [r for r in records if "image" not in r]
    folder = tmp_path_factory.mktemp("sets")
    files = {"mixed": [*one[:3], two[0], text[0], *one[3:5]], "text": text[1:6]}
    for name, chosen in files.items():
        (folder / name).write_text(json.dumps(chosen), "utf-8")
    return {name: folder / name for name in files}


@pytest.fixture
def words(tiny_ovis, sets, tmp_path):
    """`words(key=value)` of the command line; evaluates on `mixed`."""

    def of(**keys) -> list[str]:
        given = {
            "model_path": tiny_ovis,
            "output_dir": tmp_path / "out",
            "eval_data_path": sets["mixed"],
            "report_to": "none",
            "logging_steps": 1,
            "warmup_steps": 0,
            "use_cpu": "true",
            "disable_tqdm": "true",
            "dataloader_num_workers": 0,
            **keys,
        }
        return [PRESET, *(w for k, v in given.items() for w in (f"--{k}", str(v)))]

    return of


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def losses_by_hand(words: list[str]) -> dict[str, tuple[float, int]]:
    """Set -> loss per trained token of the untrained model, sample by sample, and its tokens."""
    config = load_config(words)
    args = training_arguments(config)
    data = load_data(config, args, load_processor(config.model.model_path))
    collator, model = PaddedCollator(data.encoder), load_model(config, "float32").eval()
    found = {}
    for name, prepared in data.evaluation.items():
        total, tokens = 0.0, 0
        for row in prepared.dataset:
            batch = collator([row])
            if "pixel_values" in batch:
                normalise = data.encoder.processor.image_processor.normalise
                batch["pixel_values"] = normalise(batch["pixel_values"])
            labels = batch.pop("labels")[0]
            del batch["sample_ids"]
            with torch.no_grad():
                log_probabilities = model(**batch).logits[0].double().log_softmax(-1)
            for position in range(1, len(labels)):
                if labels[position] != -100:
                    total -= log_probabilities[position - 1, labels[position]].item()
                    tokens += 1
        found[name] = (total / tokens, tokens)
    return found


@pytest.mark.parametrize(
    ("trainer", "batch"), [("trl", 1), ("trl", 3), ("trl", 8), ("standard", 3)]
)
def test_the_loss_is_that_of_all_trained_tokens_for_any_batch(trainer, batch, words, tmp_path):
    given = words(do_train="false", trainer=trainer, per_device_eval_batch_size=batch)
    assert main(["train", *given]) == 0
    [(loss, tokens)] = losses_by_hand(given).values()
    [logged] = [e for e in entries(tmp_path / "out") if "eval_loss" in e]
    assert logged["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["eval_trained_tokens"] == tokens


def test_two_ranks_give_the_loss_of_one_for_each_set_and_for_all(words, forked, sets):
    named = json.dumps({name: str(file) for name, file in sets.items()})
    expected = losses_by_hand(words(eval_data_path=named))
    # 7 and 5 samples, 2 x 2 at a time: a batch of one sample, and a rank without any.
    done, folder = forked(
        2, do_train="false", eval_data_path=named, per_device_eval_batch_size=2, use_cpu="true"
    )
    assert done.returncode == 0, done.stderr
    logged = {k: v for entry in entries(folder) for k, v in entry.items()}
    for name, (loss, tokens) in expected.items():
        assert logged[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-5)
        assert logged[f"eval_{name}_trained_tokens"] == tokens
    total = sum(loss * tokens for loss, tokens in expected.values())
    of_all = total / sum(tokens for _, tokens in expected.values())
    assert logged["eval_loss"] == pytest.approx(of_all, rel=1e-5)
    assert f"Evaluation: eval_loss {of_all:.4f}" in done.stderr


@pytest.mark.parametrize(
    ("values", "greater", "threshold", "expected"),
    [
        ([], False, 0.0, 0),
        ([2.0], False, 0.0, 0),
        ([2.0, 1.0], False, 0.0, 0),
        ([2.0, 2.0], False, 0.0, 1),
        ([2.0, 3.0, 2.5], False, 0.0, 2),
        ([2.0, 3.0, 1.5], False, 0.0, 0),
        ([2.0, 1.75, 1.5], False, 0.25, 0),
        ([2.0, 1.75, 1.5, 1.25], False, 0.25, 1),
        ([2.0, 1.75], False, 0.25, 1),
        ([2.0, 1.0, 0.875], False, 0.25, 1),
        ([0.5, 0.75, 0.625], True, 0.0, 1),
        ([0.5, 0.25, 0.125], True, 0.0, 2),
        ([0.5, 0.625, 0.875], True, 0.25, 0),
        ([2.0, float("nan"), float("nan")], False, 0.0, 2),
    ],
)
def test_evaluations_without_progress(values, greater, threshold, expected):
    assert evaluations_without_progress(values, greater, threshold) == expected


def test_a_run_that_gets_worse_stops_and_saves_its_best_model(words, sets, tmp_path, capsys):
    named = json.dumps({name: str(file) for name, file in sets.items()})
    keys = {
        "eval_data_path": named,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "early_stopping_patience": 2,
        "metric_for_best_model": "eval_text_loss",
        "learning_rate": 0.3,
        "max_steps": 12,
    }
    assert main(["train", *words(**keys)]) == 0
    folder = tmp_path / "out"
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    values = [e["eval_text_loss"] for e in state["log_history"] if "eval_text_loss" in e]
    waited = [evaluations_without_progress(values[:n], False, 0.0) for n in range(len(values) + 1)]
    assert waited[-1] == 2 and max(waited[:-1]) < 2 and len(values) < 12
    best = values.index(min(values)) + 1
    assert (best, state["global_step"]) == (len(values) - 2, len(values))
    assert f"Evaluation: eval_text_loss {min(values):.4f}" in capsys.readouterr().err
    saved, kept, last = (
        load_file(f / "model.safetensors")
        for f in (folder, folder / f"checkpoint-{best}", folder / f"checkpoint-{len(values)}")
    )
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    assert any(not torch.equal(saved[name], last[name]) for name in last)

    # What a resumed run has waited before it was stopped counts too.
    resumed = {"output_dir": tmp_path / "again", "resume_from_checkpoint": folder / "checkpoint-2"}
    assert main(["train", *words(**keys, **resumed)]) == 0
    again = json.loads((tmp_path / "again" / "trainer_state.json").read_text("utf-8"))
    assert (again["global_step"], again["best_global_step"]) == (len(values), best)
    weights = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


def test_evaluating_changes_nothing_of_the_training(words, tmp_path):
    keys = {"max_steps": 3, "data_path": "sample_data/eval.json"}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    assert main(["train", *words(output_dir=tmp_path / "with", **keys, **evaluated)]) == 0
    assert main(["train", *words(output_dir=tmp_path / "without", do_eval="false", **keys)]) == 0
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [e["step"] for e in entries(tmp_path / "with") if "eval_loss" in e] == [1, 2, 3]


@pytest.mark.parametrize("content", [None, "[{", '[{"id": "a", "conversations": []}]'])
def test_an_eval_file_that_cannot_be_read_stops_before_training(content, words, tmp_path, capsys):
    file = tmp_path / "held_out.json"
    if content is not None:
        file.write_text(content, "utf-8")
    given = words(eval_data_path=file, eval_strategy="steps", eval_steps=1, max_steps=2)
    assert main(["train", *given]) == 1
    told = capsys.readouterr().err
    assert "DataError: " in told and str(file) in told
    assert not (tmp_path / "out" / "log.jsonl").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_evaluation_makes_no_logits(words, monkeypatch):
    made: list[list[str]] = []
    outputs = []
    step, loop = VLMTrainerMixin.prediction_step, VLMTrainerMixin.evaluation_loop

    def watched_step(trainer, model, *args, **kwargs):
        hook = model.register_forward_hook(lambda module, inputs, output: made.append([*output]))
        result = step(trainer, model, *args, **kwargs)
        hook.remove()
        return result

    def watched_loop(*args, **kwargs):
        outputs.append(loop(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(VLMTrainerMixin, "prediction_step", watched_step)
    monkeypatch.setattr(VLMTrainerMixin, "evaluation_loop", watched_loop)
    given = words(do_train="false", trainer="standard", per_device_eval_batch_size=2)
    assert main(["train", *given]) == 0
    assert made == [["loss", "log_probs", "entropy", "is_top1", "label_mask"]] * 4
    assert [(o.predictions, o.label_ids, o.num_samples) for o in outputs] == [(None, None, 7)]
