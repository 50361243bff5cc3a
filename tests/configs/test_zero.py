"""The DeepSpeed files that ship: what they say, and that DeepSpeed takes them as they are."""

import json
from importlib.resources import files
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments
from transformers.integrations import HfTrainerDeepSpeedConfig

FOLDER = files("vlmtune.configs") / "zero"
NAMES = sorted(path.name.removesuffix(".json") for path in FOLDER.iterdir())
ON_CPU = {"device": "cpu", "pin_memory": True}


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def filled(name: str, tmp_path, width: int = 2048) -> dict:
    """The file after transformers has replaced every "auto"."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    config = HfTrainerDeepSpeedConfig(read(name))
    config.trainer_config_process(args)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    config.trainer_config_finalize(args, model, num_training_steps=10)
    return config.config


def test_the_files_that_ship():
    assert NAMES == [
        "zero0",
        "zero1",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
        "zero3_offload_all",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_file_has_an_optimizer_or_a_schedule(name):
    # transformers would then skip create_optimizer, and parameter groups with their rates are lost.
    assert {key: value for key, value in read(name).items() if key != "zero_optimization"} == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }


@pytest.mark.parametrize(
    ("name", "base", "changes"),
    [
        ("zero2_offload", "zero2", {"offload_optimizer": ON_CPU}),
        ("zero3_offload", "zero3", {"offload_optimizer": ON_CPU}),
        (
            "zero3_offload_all",
            "zero3",
            {
                "offload_optimizer": ON_CPU,
                "offload_param": ON_CPU,
                "sub_group_size": 100_000_000,
                "stage3_max_live_parameters": 100_000_000,
                "stage3_max_reuse_distance": 0,
            },
        ),
    ],
)
def test_an_offload_file_differs_from_its_stage_in_these_keys_only(name, base, changes):
    expected = read(base)
    expected["zero_optimization"] |= changes
    assert read(name) == expected


@pytest.mark.parametrize("name", NAMES)
def test_transformers_fills_in_every_auto(name, tmp_path):
    config = filled(name, tmp_path)
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 2 * 4
    zero = config["zero_optimization"]
    if zero["stage"] >= 2:
        assert zero["reduce_bucket_size"] == 2048**2
    if zero["stage"] == 3:
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 2048**2)
        assert zero["stage3_param_persistence_threshold"] == 10 * 2048


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_knows_every_key_and_offloads_what_the_name_says(name, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = filled(name, tmp_path)
    zero = DeepSpeedConfig(config).zero_config
    assert zero.stage == config["zero_optimization"]["stage"]
    devices = {
        "optimizer": zero.offload_optimizer and zero.offload_optimizer.device,
        "parameters": zero.offload_param and zero.offload_param.device,
    }
    assert devices == {
        "optimizer": "cpu" if "offload" in name else None,
        "parameters": "cpu" if name == "zero3_offload_all" else None,
    }


@pytest.mark.parametrize("name", [name for name in NAMES if "offload" in name])
def test_offloading_keeps_the_compiled_adam_that_deepspeed_asks_for(name):
    # accelerate then turns our AdamW into DeepSpeedCPUAdam, with its groups.
    assert "zero_force_ds_cpu_optimizer" not in read(name)
