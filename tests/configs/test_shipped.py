import json
from importlib.resources import files

import pytest
from trl import SFTConfig

from vlmtune.configs.load import load_config
from vlmtune.configs.stages import read_recipe, stage_config

CONFIGS = files("vlmtune.configs")
PRESETS = sorted(path.name for path in (CONFIGS / "presets").iterdir())
RECIPES = sorted(path.name for path in (CONFIGS / "recipes").iterdir())
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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_named_so_train_adapters_and_no_other_does(name):
    adapter = load_config([str(CONFIGS / "presets" / name)]).adapter
    assert adapter.use_lora is ("lora" in name)
    assert adapter.load_in_4bit is ("qlora" in name)
    assert adapter.lora_alpha == 2 * adapter.lora_r


def test_the_qlora_presets_differ_from_the_lora_ones_only_in_bits_optimizer_and_engine():
    for name, changed in (
        ("ovis2_5", {"deepspeed", "per_device_train_batch_size", "bnb_4bit_quant_type"}),
        ("quickstart", {"eval_strategy"}),
    ):
        lora, qlora = (
            json.loads((CONFIGS / "presets" / f"{name}_{kind}.json").read_text())
            for kind in ("lora", "qlora")
        )
        different = {key for key in lora | qlora if lora.get(key) != qlora.get(key)}
        own = {"output_dir", "load_in_4bit", "optim", "bnb_4bit_use_double_quant"}
        assert different <= changed | own
        assert {"output_dir", "load_in_4bit", "optim"} <= different
        assert qlora["optim"] == "paged_adamw_8bit"


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


def stages(name):
    recipe = read_recipe([str(CONFIGS / "recipes" / name), "--stage", "all"])
    return [stage_config(recipe, stage) for stage in recipe.names]


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_every_recipe_builds_a_real_sft_config(name, tmp_path):
    runs = stages(name)
    assert [run.training["output_dir"].rpartition("/")[2] for run in runs] == [
        "stage1",
        "stage2",
        "stage3",
    ]
    for run in runs:
        assert [note for note in run.notes if "starts from" not in note] == []
        on_cpu = {"use_cpu": True, "bf16": False, "tf32": None, "deepspeed": None}
        config = SFTConfig(**{**run.training, **on_cpu, "output_dir": str(tmp_path)})
        assert config.learning_rate == run.training["learning_rate"]


@pytest.mark.parametrize("name", RECIPES)
def test_three_stages_train_more_of_the_model_each(name):
    assert [run.model.train_modules for run in stages(name)] == [
        "visual_tokenizer",
        "visual_tokenizer|vte",
        "all",
    ]


def test_the_official_recipe_has_the_rates_of_the_document_and_else_the_preset():
    runs = stages("ovis2_5_three_stage.json")
    assert [run.training["learning_rate"] for run in runs] == [1e-4, 5e-5, 2e-5]
    preset = json.loads((CONFIGS / "presets/ovis2_5_full.json").read_text())
    recipe = json.loads((CONFIGS / "recipes/ovis2_5_three_stage.json").read_text())
    changed = {"learning_rate", "output_dir", "stages"}
    assert {k: v for k, v in recipe.items() if k not in changed} == {
        k: v for k, v in preset.items() if k not in changed
    }


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
