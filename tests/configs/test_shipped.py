import json
from importlib.resources import files

import pytest
from trl import SFTConfig

from vlmtune.configs.load import load_config

CONFIGS = files("vlmtune.configs")
PRESETS = sorted(path.name for path in (CONFIGS / "presets").iterdir())
OFFICIAL = [name for name in PRESETS if name.startswith("ovis2_5_full")]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_uses_present_names_only(name):
    run = load_config([str(CONFIGS / "presets" / name)])
    assert run.notes == []


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipe_runs_under_zero_1_and_reports_nowhere(name):
    run = load_config([str(CONFIGS / "presets" / name)])
    assert run.training["deepspeed"] == "configs/zero/zero1.json"
    assert "report_to" not in run.training


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_a_real_sft_config(name, tmp_path):
    training = load_config([str(CONFIGS / "presets" / name)]).training
    on_cpu = {"use_cpu": True, "bf16": False, "tf32": None, "deepspeed": None}
    config = SFTConfig(**{**training, **on_cpu, "output_dir": str(tmp_path)})
    assert config.learning_rate == training["learning_rate"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipe_keeps_the_reference_schedule(name, tmp_path):
    training = load_config([str(CONFIGS / "presets" / name)]).training
    del training["deepspeed"]
    on_cpu = {"use_cpu": True, "bf16": False, "tf32": None, "output_dir": str(tmp_path)}
    config = SFTConfig(**{**training, **on_cpu})
    assert config.get_warmup_steps(200) == 20
    assert config.save_steps == 0.4
    assert config.learning_rate == 2e-5


def test_the_presets_differ_only_in_the_model_its_pixels_and_the_output():
    large, small = (
        json.loads((CONFIGS / "presets" / name).read_text())
        for name in ("ovis2_5_full.json", "ovis2_5_full_2b.json")
    )
    assert {key: small[key] for key in large if large[key] != small[key]} == {
        "model_path": "AIDC-AI/Ovis2.5-2B",
        "output_dir": "outputs/ovis2_5_full_2b",
        "single_image_max_pixels": 2408448,
    }
    assert large["single_image_max_pixels"] == 3211264


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_configs_leave_precision_batches_optimizer_and_schedule_to_the_trainer(stage):
    # An optimizer block would make transformers skip create_optimizer and lose parameter groups.
    config = json.loads((CONFIGS / "zero" / f"zero{stage}.json").read_text())
    zero = config.pop("zero_optimization")
    assert zero["stage"] == stage
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) is (stage == 3)
    assert config == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
