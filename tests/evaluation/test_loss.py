"""The teacher-forced loss: that of the trainer, for any batch, adapter and process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vlmtune.cli.main import main
from vlmtune.collators.sample import SampleEncoder
from vlmtune.core.errors import ConfigError, TrainingError
from vlmtune.data.images import PixelLimits
from vlmtune.data.sources import Source
from vlmtune.evaluation.loss import SampleLoss, loss_file, sample_losses
from vlmtune.evaluation.samples import read_samples
from vlmtune.models import Ovis2_5, Ovis2_5Processor

ROOT = Path(__file__).parents[2]
FORM = 'write {"id": ..., "conversations": [...]}.'
LIMITS = PixelLimits(*[64 * 64] * 6, 2, 2)


@pytest.fixture(scope="module")
def model(tiny_ovis) -> Ovis2_5:
    return Ovis2_5.from_pretrained(tiny_ovis).eval()


@pytest.fixture(scope="module")
def encoder(tiny_ovis) -> SampleEncoder:
    return SampleEncoder(Ovis2_5Processor.from_pretrained(tiny_ovis), LIMITS, 512, 512)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    """Samples of one image, two images or none, of different lengths."""
    records = json.loads((ROOT / "sample_data/eval.json").read_text("utf-8"))
    one = [r for r in records if isinstance(r.get("image"), str)]
    two = [r for r in records if isinstance(r.get("image"), list)]
    text = [r for r in records if "image" not in r]
    file = tmp_path_factory.mktemp("sets") / "mixed.json"
    file.write_text(json.dumps([*one[:3], two[0], text[0], *one[3:5]]), "utf-8")
    return Source("mixed", str(file), str(ROOT / "sample_data/images"))


@pytest.fixture(scope="module")
def losses(model, encoder, source) -> list[SampleLoss]:
    """One sample at a time."""
    return sample_losses(model, encoder, conversations(source), batch_size=1)


def conversations(source: Source) -> list[Any]:
    return [sample.conversation for sample in read_samples([source])]


def totals(losses: list[SampleLoss]) -> list[float]:
    return [loss.total for loss in losses]


def test_loss_of_a_set_is_the_eval_loss_of_a_training_run(
    losses, source, tiny_ovis, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    flags = {
        "model_path": tiny_ovis,
        "eval_data_path": source.path,
        "output_dir": tmp_path / "out",
        "do_train": "false",
        "report_to": "none",
        "use_cpu": "true",
        "per_device_eval_batch_size": 3,
        "dataloader_num_workers": 0,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert main(["train", "configs/presets/quickstart.json", *words]) == 0
    lines = (tmp_path / "out" / "log.jsonl").read_text("utf-8").splitlines()
    [logged] = [entry for line in lines if "eval_loss" in (entry := json.loads(line))]
    tokens = sum(loss.tokens for loss in losses)
    assert tokens == logged["eval_trained_tokens"] > 30
    assert sum(totals(losses)) / tokens == pytest.approx(logged["eval_loss"], rel=1e-5)


def test_loss_does_not_depend_on_the_batch(losses, model, encoder, source):
    found = sample_losses(model, encoder, conversations(source), batch_size=4)
    assert totals(found) == pytest.approx(totals(losses), rel=1e-5)
    assert [loss.tokens for loss in found] == [loss.tokens for loss in losses]


def test_model_with_an_adapter_has_the_loss_of_the_merged_one(losses, encoder, source, tiny_ovis):
    torch.manual_seed(0)
    settings = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted: Any = get_peft_model(Ovis2_5.from_pretrained(tiny_ovis), settings).eval()
    found = totals(sample_losses(adapted, encoder, conversations(source)[:4]))
    merged = adapted.merge_and_unload()
    assert totals(sample_losses(merged, encoder, conversations(source)[:4])) == pytest.approx(
        found, rel=1e-4
    )
    assert found != pytest.approx(totals(losses[:4]), rel=1e-3)


def test_sample_that_is_too_long_is_cut_as_in_training(losses, model, encoder, source):
    text = conversations(source)[4]
    length = encoder.row(text)["length"]
    short = SampleEncoder(encoder.processor, LIMITS, 512, length - 1)
    [cut] = sample_losses(model, short, [text])
    assert (cut.cut, cut.tokens) == (1, losses[4].tokens - 1)
    assert losses[4].total - 20 < cut.total < losses[4].total - 1  # a random model, 401 words


def test_model_without_numbers_is_an_error_of_the_record(encoder, source, tiny_ovis):
    broken = Ovis2_5.from_pretrained(tiny_ovis).eval()
    broken.get_output_embeddings().weight.data[0] = torch.nan
    [loss] = sample_losses(broken, encoder, conversations(source)[4:5])
    assert (loss.tokens, loss.total) == (0, 0.0)
    assert loss.error and loss.error.endswith("loss: is nan. Fix: look for NaN in the weights.")


def test_gpu_without_memory_is_an_error_that_says_what_to_lower(model, encoder, source, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")

    hook = model.get_decoder().register_forward_pre_hook(full)
    given: dict[str, Any] = {"batch_size": 2, "settings": {}}
    try:
        with pytest.raises(TrainingError, match=r"loss of records 1 to \d+:\n .*GiB\.\n .* batch_"):
            loss_file(model, encoder, read_samples([source]), tmp_path / "losses.jsonl", **given)
    finally:
        hook.remove()
    assert not (tmp_path / "losses.jsonl").exists()


def test_file_has_a_line_for_each_record_with_what_is_wrong_with_it(
    losses, model, encoder, source, tmp_path
):
    records = json.loads(Path(source.path).read_text("utf-8"))
    gone = {**records[0], "image": "gone.png"}
    question = {"id": "q", "conversations": [{"from": "human", "value": "Well?"}]}
    data = tmp_path / "data.json"
    data.write_text(json.dumps([gone, "text", records[4], question]), "utf-8")
    samples = read_samples([Source("data", str(data), source.folder)])
    output = tmp_path / "losses.jsonl"
    settings: dict[str, Any] = {"batch_size": 2, "settings": {"a": 1}}
    loss_file(model, encoder, samples, output, **settings)
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [row["record"] for row in rows] == [1, 2, 3, 4]
    assert f"{data}, record 1" in rows[0]["error"] and "does not exist" in rows[0]["error"]
    assert rows[1]["error"] == f"{data}, record 2: is a string, not an object. Fix: {FORM}"
    assert rows[2] == {
        "record": 3,
        "total": pytest.approx(losses[4].total, rel=1e-5),
        "tokens": losses[4].tokens,
        "cut": 0,
        "error": None,
    }
    assert rows[3] == {"record": 4, "total": 0.0, "tokens": 0, "cut": 0, "error": None}

    loss_file(None, encoder, samples, output, **settings)  # nothing is left to compute
    with pytest.raises(ConfigError, match="a was 1, is 2"):
        loss_file(None, encoder, samples, output, batch_size=2, settings={"a": 2})
