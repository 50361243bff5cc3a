"""The schema accepts what the loader accepts, written plainly, and no more; explanations hold."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from trl import SFTConfig

from vlmtune import __version__
from vlmtune.configs.coercion import coerce
from vlmtune.configs.explain import DEFAULTS, REMARKS, config_keys, explain, schema
from vlmtune.configs.legacy import NO_EFFECT, RENAMED, SWITCHES
from vlmtune.configs.load import annotations, load_config
from vlmtune.core.errors import ConfigError
from vlmtune.sft.arguments import training_arguments

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("presets/*.json")) + sorted(
    (ROOT / "configs").glob("recipes/*.json")
)
VALIDATOR = Draft202012Validator(schema())


def faults(config):
    return [error.message for error in VALIDATOR.iter_errors(config)]


def test_the_schema_is_a_valid_schema_and_json():
    Draft202012Validator.check_schema(schema())
    assert json.loads(json.dumps(schema())) == schema()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_preset_and_recipe_is_valid(path):
    assert faults(json.loads(path.read_text("utf-8"))) == []


def test_every_key_that_the_loader_knows_is_described_once():
    described = schema()["$defs"]
    assert set(described) == {*annotations(), *RENAMED, *SWITCHES, *NO_EFFECT}
    assert set(schema()["properties"]) == {*described, "$schema", "stages"}
    old = {name for name, key in described.items() if key.get("deprecated")}
    assert old == {*RENAMED, *SWITCHES, *NO_EFFECT}


@pytest.mark.parametrize(
    "config",
    [
        {"learnin_rate": 1e-5},
        {"learning_rate": "fast"},
        {"bf16": "yes"},
        {"max_steps": 1.5},
        {"trainer": "TRL"},
        {"optim": "adam"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"modules_to_save": [1]},
        {"eval_packing": True},
        {"stages": []},
        {"stages": [{"seed": 1}]},
        {"stages": [{"name": "stage1", "sed": 1}]},
        {"stages": [{"name": "../stage1"}]},
        ["model_path"],
    ],
    ids=json.dumps,
)
def test_a_wrong_config_has_one_fault(config):
    assert len(faults(config)) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"$schema": "vlmtune.schema.json"},
        {"data_path": "a.json|b.json", "eval_data_path": {"charts": ["a.json"]}},
        {"lora_target_modules": "all-linear", "init_lora_weights": "gaussian", "lora_bias": True},
        {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "min_lr_rate": 0.1},
        {"eval_strategy": False, "image_folder": None, "deepspeed": {"bf16": {"enabled": "auto"}}},
        {"group_by_length": False, "max_seq_length": 6000, "vit_use_rope": True},
        {"stages": [{"name": "stage1", "learning_rate": 1}, {"name": "s2", "max_length": 9}]},
    ],
    ids=json.dumps,
)
def test_a_right_config_has_none(config):
    assert faults(config) == []


@pytest.mark.parametrize("name", config_keys())
def test_what_the_schema_takes_the_loader_takes(name):
    described = schema()["$defs"][name]
    candidates = [
        True,
        False,
        3,
        0.5,
        "x",
        "no",
        ["a"],
        [],
        [1],
        {"a": 1},
        *described.get("enum", []),
    ]
    own = Draft202012Validator(described)
    taken = [value for value in candidates if value is not None and own.is_valid(value)]
    for value in taken:
        coerce(value, annotations()[name], key=name, source="test", from_command_line=False)
    assert taken or name == "parallelism_config"  # an object of Python, not of JSON
    assert own.is_valid(None)
    if described.get("default") is not None:
        assert own.is_valid(described["default"])


def test_a_config_may_name_its_schema(tmp_path):
    path = tmp_path / "run.json"
    keys = {"model_path": "m", "data_path": "d", "output_dir": "o"}
    path.write_text(json.dumps({"$schema": "vlmtune.schema.json", **keys}))
    run = load_config([str(path)])
    assert (set(run.sources), run.notes) == (set(keys), [])


def test_a_key_is_explained_with_its_values_default_owner_and_other_names():
    assert explain("multimodal_max_length") == (
        "multimodal_max_length\n"
        "  Longest sample with images or video, in tokens.\n"
        "  value           a whole number\n"
        "  default         4096\n"
        f"  declared by     vlmtune {__version__}\n"
        "  other names     max_seq_length, max_length"
    )


def test_a_key_of_the_host_has_our_default_beside_its_own():
    lines = explain("train_sampling_strategy").splitlines()
    assert "  value           random, sequential, group_by_length" in lines
    assert (
        "  default         group_by_length: batches of samples of like length, in random order;"
        in lines
    )
    assert "  host's default  random" in lines
    assert f"  declared by     transformers {version('transformers')}" in lines
    assert "  other names     dataloader_shuffle, group_by_length" in lines


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("ovis_pretrained_path", "ovis_pretrained_path: Read as model_path."),
        ("max_length", "max_length: Read as multimodal_max_length and text_max_length."),
        (
            "data_info_version",
            "data_info_version: Read as datainfo; it is the path of the file; the reference looked",
        ),
        (
            "group_by_length",
            'group_by_length: Read as train_sampling_strategy: true is "group_by_length"; false is',
        ),
        (
            "dataloader_shuffle",
            'dataloader_shuffle: Read as train_sampling_strategy: false is "sequential".',
        ),
        ("vit_use_rope", "vit_use_rope: No effect: the checkpoint's own config rules."),
        (
            "eval_packing",
            "eval_packing: No effect: samples are padded for an evaluation. Another value than ",
        ),
    ],
)
def test_an_old_name_says_what_it_became(name, first):
    assert explain(name).startswith(first)


def test_every_key_is_explained_in_lines_of_a_terminal():
    for name in [*config_keys(), *RENAMED, *SWITCHES, *NO_EFFECT, "stages"]:
        assert explain(name).startswith(name)
        assert max(map(len, explain(name).splitlines())) <= 92, name


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "learning_rate"'):
        explain("learnin_rate")


def test_texts_are_about_keys_that_exist():
    assert {*DEFAULTS, *REMARKS} <= {*config_keys(), *NO_EFFECT}


def test_defaults_over_the_hosts_are_those_of_a_run_and_of_the_page(tmp_path):
    words = [f"--{key}={tmp_path}" for key in ("model_path", "data_path", "output_dir")]
    ours = training_arguments(load_config([*words, "--use_cpu", "true"]))
    hosts = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert ours.bf16 is False
    different = {
        name for name in vars(hosts) if getattr(ours, name, None) != getattr(hosts, name, None)
    }
    conditional = {"bf16", "use_cpu", "gradient_checkpointing", "eval_strategy"}
    own = {name for name in different if not name.startswith("_") and name in config_keys()}
    assert own - {"logging_dir"} == {*DEFAULTS} - conditional
    page = (ROOT / "docs/config.md").read_text("utf-8")
    for name, (default, why) in DEFAULTS.items():
        assert f"| `{name}` | {default} | {f'{why} |' if why else '|'}\n" in page


def test_a_whole_process_imports_no_host_library_and_takes_less_than_300_ms():
    script = (
        "import sys, time\n"
        "from vlmtune.cli.main import main\n"
        "code = main(['config', '--schema']) or main(['config', '--explain', 'learning-rate'])\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'numpy') if m in sys.modules],\n"
        "      code, time.process_time() < 0.3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("[] 0 True", "")
