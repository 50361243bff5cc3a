"""Keys of LoRA and QLoRA: forms they are written in, what they decide, and what is refused."""

import dataclasses
import json

import pytest

from vlmtune.configs.adapter import AdapterConfig
from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError

REQUIRED = {"model_path": "m", "data_path": "train.json", "output_dir": "out"}


@pytest.fixture
def load(tmp_path):
    """Load these keys, beside the required ones, from a file plus command-line words."""

    def load(keys=(), *argv):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**REQUIRED, **dict(keys)}))
        return load_config([str(path), *argv])

    return load


def test_defaults():
    assert dataclasses.asdict(AdapterConfig()) == {
        "use_lora": None,
        "adapter_path": None,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_parts": None,
        "lora_target_modules": None,
        "apply_lora_to_vision": None,
        "modules_to_save": [],
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": "none",
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "load_in_4bit": False,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": None,
        "unquantized_parts": "visual_tokenizer",
    }


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (" q_proj , v_proj, ", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("llm.model.layers.0.self_attn.q_proj", ["llm.model.layers.0.self_attn.q_proj"]),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        (["all-linear"], "all-linear"),
        ("all", "all-linear"),
        (["all"], "all-linear"),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (r"llm\..*\.(q|v)_proj", r"llm\..*\.(q|v)_proj"),
        ("", None),
        ([], None),
    ],
)
def test_target_modules_in_every_form_from_a_file_and_the_command_line(load, written, read):
    assert load({"lora_target_modules": written}).adapter.lora_target_modules == read
    word = written if isinstance(written, str) else json.dumps(written)
    assert load({}, "--lora_target_modules", word).adapter.lora_target_modules == read


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["vte", "embed_tokens"], ["vte", "embed_tokens"]),
        ("vte|embed_tokens", ["vte", "embed_tokens"]),
        ("vte, embed_tokens", ["vte", "embed_tokens"]),
        ("vte,", ["vte"]),
        (["vte,,embed_tokens"], ["vte", "embed_tokens"]),
    ],
)
def test_modules_to_save_in_every_form(load, written, read):
    assert load({"modules_to_save": written}).adapter.modules_to_save == read


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [
        ("init_lora_weights", "True", True),
        ("init_lora_weights", "false", False),
        ("init_lora_weights", "gaussian", "gaussian"),
        ("init_lora_weights", "orthogonal", "orthogonal"),
        ("lora_bias", "none", "none"),
        ("lora_bias", "all", "all"),
        ("lora_bias", "lora_only", "lora_only"),
        ("lora_bias", "true", True),
        ("lora_bias", "False", "none"),
        ("rank_pattern", '{"q_proj": 4}', {"q_proj": 4}),
        ("bnb_4bit_compute_dtype", "torch.bfloat16", "bfloat16"),
        ("bnb_4bit_compute_dtype", "null", None),
        ("unquantized_parts", "", ""),
        ("apply_lora_to_vision", "null", None),
        ("apply_lora_to_vision", "false", False),
        ("lora_r", "8", 8),
        ("lora_dropout", "0.05", 0.05),
    ],
)
def test_words_of_the_command_line_become_values(load, key, written, read):
    value = getattr(load({"use_lora": True}, f"--{key}", written).adapter, key)
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("key", ["init_lora_weights", "lora_bias"])
def test_booleans_in_a_file_are_booleans(load, key, value):
    read = "none" if (key, value) == ("lora_bias", False) else value
    assert getattr(load({"use_lora": True, key: value}).adapter, key) is read


# -- whether adapters are trained ------------------------------------------------------------------


def test_without_a_key_of_the_table_nothing_is_adapted(load):
    run = load()
    assert (run.adapter.use_lora, run.notes) == (False, [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_r", 8),
        ("lora_alpha", 64),
        ("lora_dropout", 0.1),
        ("lora_parts", "llm"),
        ("lora_target_modules", "q_proj"),
        ("apply_lora_to_vision", True),
        ("apply_lora_to_vision", False),
        ("modules_to_save", ["vte"]),
        ("use_dora", True),
        ("use_rslora", True),
        ("lora_bias", "all"),
        ("init_lora_weights", "gaussian"),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("load_in_4bit", True),
        ("load_in_8bit", True),
        ("bnb_4bit_quant_type", "fp4"),
        ("bnb_4bit_use_double_quant", False),
        ("bnb_4bit_compute_dtype", "bfloat16"),
        ("unquantized_parts", ""),
        ("adapter_path", "outputs/a"),
    ],
)
def test_a_key_turns_adapters_on_unless_use_lora_says_otherwise(load, key, value):
    run = load({key: value})
    assert (run.adapter.use_lora, run.notes) == (True, [])
    off = load({key: value, "use_lora": False})
    assert off.adapter.use_lora is False
    assert off.notes == [f"{key} has no effect: use_lora is false"]


@pytest.mark.parametrize("key", ["adapter_path", "lora_parts"])
def test_an_empty_shell_variable_turns_nothing_on(load, key):
    for run in (load({key: ""}), load({}, f"--{key}", "")):
        assert (run.adapter.use_lora, getattr(run.adapter, key), run.notes) == (False, None, [])


@pytest.mark.parametrize(
    ("theirs", "ours", "value"),
    [
        ("additional_target", "modules_to_save", ["vte"]),
        ("adapter_name_or_path", "adapter_path", "outputs/a"),
        ("double_quant", "bnb_4bit_use_double_quant", False),
        ("quant_type", "bnb_4bit_quant_type", "fp4"),
    ],
)
def test_names_of_other_projects_are_read(load, theirs, ours, value):
    run = load({theirs: value})
    assert (run.adapter.use_lora, getattr(run.adapter, ours)) == (True, value)


def test_a_key_that_says_the_default_turns_nothing_on(load):
    keys = {"load_in_4bit": False, "use_dora": False, "lora_alpha": 32, "modules_to_save": []}
    run = load(keys)
    assert (run.adapter.use_lora, run.notes) == (False, [])


def test_a_rank_turns_adapters_on_even_where_it_is_the_default(load):
    assert load({"lora_r": 16}).adapter.use_lora is True
    off = load({"lora_r": 16, "use_lora": False})
    assert (off.adapter.use_lora, off.notes) == (False, [])


def test_use_lora_alone_trains_rank_16_adapters(load):
    adapter = load({"use_lora": True}).adapter
    assert (adapter.use_lora, adapter.lora_r, adapter.lora_alpha) == (True, 16, 32)


def test_train_modules_all_has_no_effect_beside_adapters(load):
    note = "train_modules all has no effect: with LoRA it names fully trained parts"
    assert load({"lora_r": 8, "train_modules": "all"}).notes == [note]
    assert load({"lora_r": 8, "train_modules": "vte"}).notes == []
    assert load({"lora_r": 8}).notes == []


def test_the_resolved_config_loads_again_as_the_same_run(load, tmp_path):
    keys = {
        "lora_r": 8,
        "lora_target_modules": "q_proj,v_proj",
        "modules_to_save": ["vte"],
        "rank_pattern": {"q_proj": 4},
        "init_lora_weights": "gaussian",
        "load_in_4bit": True,
        "unquantized_parts": "",
    }
    for given in (keys, {"lora_r": 8, "lora_bias": True}, {}):
        run = load(given)
        assert run.adapter.use_lora is bool(given)
        file = tmp_path / "again.json"
        file.write_text(json.dumps(run.to_dict()))
        again = load_config([str(file)])
        assert again.to_dict() == run.to_dict()
        assert not any("use_lora" in note for note in again.notes)


def test_settings_of_new_adapters_have_no_effect_beside_one_that_is_continued(load):
    own = {
        "lora_r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "lora_parts": "llm",
        "lora_target_modules": "q_proj",
        "apply_lora_to_vision": True,
        "use_dora": True,
        "use_rslora": True,
        "lora_bias": "all",
        "init_lora_weights": "gaussian",
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 4},
    }
    run = load({"adapter_path": "a", **own})
    assert sorted(run.notes) == sorted(
        f"{key} has no effect: the adapter of adapter_path has its own" for key in own
    )
    assert load({"adapter_path": "a", "load_in_4bit": True, "train_modules": "vte"}).notes == []


def test_a_home_folder_is_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load({"adapter_path": "~/a"}).adapter.adapter_path == "/home/someone/a"


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "what", "fix"),
    [
        ("lora_r", 0, "0 is below 1", "give 1 or more"),
        ("lora_alpha", -1, "-1 is below 1", "give 1 or more"),
        ("lora_dropout", 1, "1 is no probability", "give 0 or more, below 1"),
        ("lora_dropout", -0.1, "-0.1 is no probability", "give 0 or more, below 1"),
        (
            "rank_pattern",
            {"q_proj": 0},
            '0 of "q_proj" is no whole number above 0',
            "give 1 or more",
        ),
        (
            "alpha_pattern",
            {"q_proj": True},
            'True of "q_proj" is no whole number above 0',
            "give 1 or more",
        ),
        (
            "lora_bias",
            "some",
            '"some" is not a choice of lora_bias',
            "give none, all, lora_only or true",
        ),
        (
            "bnb_4bit_quant_type",
            "int4",
            '"int4" is not a choice of bnb_4bit_quant_type',
            "give nf4 or fp4",
        ),
        (
            "bnb_4bit_compute_dtype",
            "float64",
            '"float64" is not a choice of bnb_4bit_compute_dtype',
            "give null or float32 or bfloat16 or float16",
        ),
        (
            "lora_parts",
            "llm:1e-4",
            "gives llm a learning rate",
            "write names alone; adapters learn at learning_rate",
        ),
        (
            "unquantized_parts",
            "vte:1e-4",
            "gives vte a learning rate",
            "write names alone; adapters learn at learning_rate",
        ),
        ("lora_parts", "llm|", '"llm|" has an entry without a name', 'write names joined by "|"'),
        (
            "unquantized_parts",
            "llm|llm",
            '"llm" is given twice',
            "keep one of them",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_what_to_write(load, key, value, what, fix):
    with pytest.raises(ConfigError) as error:
        load({"use_lora": True, key: value})
    where = error.value.where
    assert where.startswith("file ") and where.endswith(f"run.json, {key}")
    assert (error.value.what, error.value.fix) == (what, fix)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva"])
def test_what_rewrites_the_base_is_refused_with_the_reason(load, name):
    with pytest.raises(ConfigError) as error:
        load({"init_lora_weights": name})
    assert error.value.what.startswith(f'"{name}" is not supported: what starts from the model')
    assert "the saved adapter would not fit the published ones" in error.value.what
    assert error.value.fix == "give true, false, gaussian or orthogonal"


def test_4_and_8_bits_at_once_are_refused(load):
    with pytest.raises(ConfigError) as error:
        load({"load_in_4bit": True, "load_in_8bit": True})
    assert error.value.what == "load_in_4bit is given too"
    assert error.value.fix == "keep one of them"


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("bias", ["all", "lora_only", True])
def test_biases_are_not_trained_on_quantised_layers(load, bits, bias):
    with pytest.raises(ConfigError) as error:
        load({bits: True, "lora_bias": bias})
    assert error.value.where.endswith("run.json, lora_bias")
    assert "bitsandbytes rounds the biases of quantised layers" in error.value.what
    assert error.value.fix == "set it to none, or leave load_in_4bit and load_in_8bit out"
    assert load({bits: True, "lora_bias": "none"}).adapter.use_lora is True


def test_dora_does_not_go_with_8_bits(load):
    with pytest.raises(ConfigError) as error:
        load({"load_in_8bit": True, "use_dora": True})
    assert error.value.where.endswith(", use_dora")
    assert error.value.what == "cannot read weights of 8 bits again (PEFT 0.21)"
    assert load({"load_in_4bit": True, "use_dora": True}).adapter.use_dora is True


@pytest.mark.parametrize("key", ["lora_target_modules", "rank_pattern", "alpha_pattern"])
def test_a_broken_expression_is_refused(load, key):
    broken = "layers.(0"
    with pytest.raises(ConfigError) as error:
        load({key: broken if key == "lora_target_modules" else {broken: 4}})
    assert error.value.what.startswith(
        '"layers.(0" is neither names nor a regular expression: missing )'
    )
    assert error.value.fix == (
        "write names joined by commas, or an expression that matches whole paths"
    )
