"""What an output folder lets a run do."""

import json
from pathlib import Path

import pytest
from trl.trainer.sft_config import SFTConfig

from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError
from vlmtune.sft.output import check_output_dir, check_resumable, remove_checkpoints

RUN = {
    "global_batch": 16,
    "processes": 1,
    "config": {"train_modules": "all", "freeze_llm": False, "freeze_vision_tower": False}
    | {"text_max_length": 4096},
    "training_arguments": {"train_sampling_strategy": "random", "seed": 42, "data_seed": None}
    | {"dataloader_drop_last": False},
}


@pytest.fixture
def checkpoint(tmp_path):
    def write(step: int = 3, states: str = "optimizer.pt", **run) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "global_step3").mkdir(parents=True) if "global" in states else folder.mkdir()
        (folder / "optimizer.pt").touch() if states == "optimizer.pt" else None
        (folder / "trainer_state.json").write_text("{}")
        (folder / "vlmtune_run.json").write_text(json.dumps({**RUN, **run}))
        return folder

    return write


def arguments(tmp_path, **keys) -> SFTConfig:
    keys = {"per_device_train_batch_size": 16, "bf16": False, "report_to": "none", **keys}
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, **keys)


def config(*words):
    return load_config(["--model_path=m", "--data_path=d", "--output_dir=o", *words])


def test_a_folder_with_checkpoints_of_an_unfinished_run_is_refused(checkpoint, tmp_path):
    checkpoint(3), checkpoint(12)
    with pytest.raises(ConfigError) as caught:
        check_output_dir(tmp_path, False, None)
    assert caught.value.what == "holds checkpoint-12 of a run that was not finished"
    assert "--resume_from_checkpoint true" in caught.value.fix
    assert check_output_dir(tmp_path, True, None) is None
    assert check_output_dir(tmp_path, False, True) == str(tmp_path / "checkpoint-12")


def test_a_run_that_begins_anew_leaves_no_checkpoint_and_no_finished_model(checkpoint, tmp_path):
    checkpoint(3), checkpoint(12)
    (tmp_path / ".partial-checkpoint").mkdir()
    for name in ("config.json", "vlmtune_run.json", "model.safetensors"):
        (tmp_path / name).touch()
    remove_checkpoints(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_the_run_that_wrote_a_checkpoint_may_resume_it(checkpoint, tmp_path):
    check_resumable(checkpoint(), config(), arguments(tmp_path))


@pytest.mark.parametrize(
    ("written", "words", "what"),
    [
        ({"global_batch": 8}, (), "was written with a global batch of 8, this run has 16"),
        (
            {},
            ("--train_modules=vte",),
            'was written with train_modules "all", this run has "vte"',
        ),
        ({}, ("--freeze_llm",), "was written with freeze_llm false, this run has true"),
        ({}, ("--packing=true",), "was written with packing false, this run has true"),
        (
            {},
            ("--packing=true", "--packing_length=64"),
            "was written with packing false, this run has true",
        ),
        (
            {},
            ("--text_max_length=64",),
            "was written with text_max_length 4096, this run has 64",
        ),
        (
            {"config": {"single_image_max_pixels": 4096}},
            ("--single_image_max_pixels=200704",),
            "was written with single_image_max_pixels 4096, this run has 200704",
        ),
        ({"states": "none"}, (), "holds no optimizer states without DeepSpeed"),
        ({"states": "global"}, (), "holds no optimizer states without DeepSpeed"),
    ],
)
def test_another_run_may_not(checkpoint, tmp_path, written, words, what):
    with pytest.raises(ConfigError) as caught:
        check_resumable(checkpoint(**written), config(*words), arguments(tmp_path))
    assert caught.value.where == "resume_from_checkpoint"
    assert caught.value.what == f"checkpoint-3 {what}"
    assert caught.value.fix.endswith(
        "or start a new run with the checkpoint as model_path, an adapter's as adapter_path"
    )


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"seed": 3}, "was written with seed 42, this run has 3"),
        (
            {"dataloader_drop_last": True},
            "was written with dataloader_drop_last false, this run has true",
        ),
        ({"data_seed": 3}, "was written with data_seed null, this run has 3"),
        (
            {"train_sampling_strategy": "group_by_length"},
            'was written with train_sampling_strategy "random", this run has "group_by_length"',
        ),
    ],
)
def test_a_run_of_another_order_may_not(checkpoint, tmp_path, keys, what):
    with pytest.raises(ConfigError) as caught:
        check_resumable(checkpoint(), config(), arguments(tmp_path, **keys))
    assert caught.value.what == f"checkpoint-3 {what}"


def test_a_stream_has_an_order_of_its_own_that_follows_its_seed(checkpoint, tmp_path):
    stream = config("--streaming=true", "--max_steps=9")
    folder = checkpoint(config={**RUN["config"], "streaming": True})
    check_resumable(folder, stream, arguments(tmp_path, train_sampling_strategy="sequential"))
    with pytest.raises(ConfigError, match="seed 42, this run has 3"):
        check_resumable(folder, stream, arguments(tmp_path, seed=3))
