"""What a plan doubts, of real plans of the tiny model: each mistake is named, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from vlmtune.configs.load import load_config
from vlmtune.sft.forecast import Forecast
from vlmtune.sft.run_forecast import forecast

PRESET = "configs/presets/quickstart.json"


@pytest.fixture
def plan(tiny_ovis, tmp_path):
    """`plan(key=value)` is of the quickstart with those keys, on a GPU of `gpu_memory` bytes."""

    def of(gpus: int = 1, gpu_memory: int = 80 * 10**9, mfu: float = 0.4, **keys) -> Forecast:
        given = {"model_path": str(tiny_ovis), "output_dir": str(tmp_path / "out"), **keys}
        flags = [(f"--{k}", v if isinstance(v, str) else json.dumps(v)) for k, v in given.items()]
        config = load_config([PRESET, *(word for flag in flags for word in flag)])
        return forecast(config, gpus, gpu_memory, mfu)

    return of


def told(plan: Forecast) -> dict[str, str]:
    found = {doubt.key: doubt.what for doubt in plan.doubts}
    assert len(found) == len(plan.doubts)
    assert all(doubt.fix for doubt in plan.doubts)
    return found


def test_a_sound_run_is_not_doubted(plan):
    # 700 samples in batches of 14.
    assert told(plan(eval_strategy="epoch", per_device_train_batch_size=14)) == {}


def test_intervals_longer_than_the_run(plan):
    found = plan(
        **{"max_steps": 3, "warmup_steps": 5, "logging_steps": 20, "eval_strategy": "steps"},
        **{"eval_steps": 9, "save_strategy": "steps", "save_steps": 99},
        early_stopping_patience=5,
    )
    assert told(found) == {
        "num_train_epochs": "has no effect: max_steps 3 ends the run after 0.07 epochs",
        "warmup_steps": "the rate rises for 5 steps, the run has 3: it never reaches the learning "
        "rate",
        "logging_steps": "is 20, the run has 3 steps: no loss is logged",
        "eval_steps": "is 9, the run has 3 steps: it evaluates at the end alone",
        "early_stopping_patience": "is 5, and there are 1 evaluations: nothing can stop the run "
        "before its end",
        "save_steps": "is 99, the run has 3 steps: a checkpoint is written at the end alone",
    }


def test_batch_that_does_not_divide_the_samples(plan):
    keys = {"eval_strategy": "epoch", "num_train_epochs": 1}
    assert told(plan(**keys)) == {
        "per_device_train_batch_size": "the last of 44 steps of an epoch has 12 samples, the "
        "others 16, and it moves the weights as far as they do"
    }
    assert told(plan(**{**keys, "num_train_epochs": 0.9})) == {}
    assert told(plan(64, **{**keys, "num_train_epochs": 40})) == {
        "per_device_train_batch_size": "a step is of 1,024 samples, and an epoch has 700, which "
        "make one smaller step"
    }
    # 175 micro-batches of 4, 4 to a step: dropping the last batch drops none, and 3 are left.
    drop = {**keys, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    found = plan(**drop, dataloader_drop_last=True)
    assert told(found) == {
        "per_device_train_batch_size": "the last of 44 steps of an epoch has 12 samples, the "
        "others 16, and it moves the weights as far as they do"
    }
    assert found.doubts[0].fix == "choose a batch that divides the samples"


def test_keys_without_effect_and_samples_without_use(plan):
    found = plan(
        **{"train_modules": "vte:1e-4|llm:1e-3", "eval_data_path": "[]", "eval_steps": 5},
        **{"single_image_min_pixels": 100, "multiple_image_min_pixels": 50000},
        **{"multiple_image_max_pixels": 60000, "dataloader_drop_last": True},
        per_device_train_batch_size=64,
    )
    assert told(found) == {
        "single_image_min_pixels": "is less than the 16 x 16 pixels of one visual token, and no "
        "image becomes smaller than that",
        "multiple_image_min_pixels": "46 of 46 images looked at are smaller and will be enlarged, "
        "which costs tokens and shows nothing new",
        "learning_rate": "is used by no module: each of train_modules has a rate of its own",
        "dataloader_drop_last": "leaves out 60 of 700 samples of every epoch, which fill no batch",
        "eval_steps": "has no effect: there is no eval_data_path",
    }


def test_what_training_refuses_and_what_is_lost(plan, tiny_ovis, tmp_path):
    model, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_ovis, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["llm_config"]["max_position_embeddings"] = 75
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    folder.mkdir()
    (folder / "config.json").write_text("{}", "utf-8")
    records = json.loads(Path("sample_data/train.json").read_text("utf-8"))
    bad = {"id": "x", "image": "nowhere.png", "conversations": records[0]["conversations"]}
    data = tmp_path / "train.json"
    data.write_text(json.dumps([*records, bad]), "utf-8")
    found = plan(
        **{"model_path": str(model), "data_path": str(data), "on_bad_sample": "skip"},
        **{"multimodal_max_length": 80, "train_sampling_strategy": "random"},
        **{"overwrite_output_dir": False, "eval_strategy": "epoch"},
        per_device_train_batch_size=14,
    )
    lengths = "multimodal_max_length, text_max_length"
    # 6 and 2 samples of two images have 82 tokens.
    assert [(doubt.key, doubt.what) for doubt in found.doubts] == [
        (
            f"output_dir {folder}",
            "already holds a finished model or adapter, so training is refused",
        ),
        (
            lengths,
            "training is refused: a sample has 80 tokens, the language model 75 positions",
        ),
        (lengths, "6 of 700 samples are cut and lose 12 tokens of their ends"),
        ("data_path", "1 of the records are left out, most because: image: … does not exist"),
        (lengths, "2 of 114 samples of eval are cut and lose 4 tokens of their ends"),
        ("train_sampling_strategy", "34% of the computed tokens are padding"),
    ]
    assert found.doubts[2].fix.startswith("raise them to 82, the longest sample, ")


def test_memory_that_is_not_there(plan):
    keys = {"eval_strategy": "epoch", "per_device_train_batch_size": 14}
    sizes = {engine.name: engine.peak for engine in plan(2, **keys).engines}
    fitting = [name for name, size in sizes.items() if size <= sizes["zero3"] + 1]
    [doubt] = plan(2, gpu_memory=round((sizes["zero3"] + 1) / 0.9), **keys).doubts
    assert sizes["none"] > sizes["zero3"]
    assert doubt.key == "deepspeed"
    assert doubt.fix.startswith(f'"deepspeed": "configs/zero/{fitting[0]}.json" needs ')
    [doubt] = plan(2, gpu_memory=1000, **keys).doubts
    assert doubt.key == "per_device_train_batch_size"
    assert "the costliest batch needs 0.0 GB of a GPU's 0" in doubt.what


def test_evaluation_and_checkpoints_of_a_long_run(plan):
    # At this share of a GPU the run takes days.
    found = told(plan(mfu=1e-9, per_device_train_batch_size=14))
    hours = plan(mfu=1e-9, per_device_train_batch_size=14).compute.hours
    assert found == {
        "eval_strategy": "is no: eval_data_path is used once, after the last step",
        "save_strategy": f"is no: a run of {hours:.1f} hours that fails has nothing to go on from",
    }
    found = told(
        plan(
            **{"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 14},
            **{"save_strategy": "steps", "save_steps": 20},
        )
    )
    assert found.keys() == {"eval_steps", "save_total_limit"}
    assert found["eval_steps"] == "1,000 evaluations take longer than the training itself"
    assert found["save_total_limit"].startswith("is not given: all 50 checkpoints stay, ")
