import json
import os
import subprocess
import sys

import pytest

from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError

REQUIRED = {"model_path": "m", "data_path": "train.json", "output_dir": "out"}
REQUIRED_ARGV = ["--model_path", "m", "--data_path", "train.json", "--output_dir", "out"]


@pytest.fixture
def load(tmp_path):
    """Load these keys, beside the required ones, from a JSON file plus command-line words."""

    def load(keys=(), *argv):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**REQUIRED, **dict(keys)}))
        return load_config([str(path), *argv])

    return load


@pytest.fixture
def failure(tmp_path):
    """The ConfigError of loading a file with this text."""

    def failure(text, name="run.json", argv=()):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config([str(path), *argv])
        return caught.value

    return failure


def test_a_whole_process_that_loads_imports_no_host_library_and_takes_less_than_300_ms():
    script = (
        "import sys, time; import vlmtune.configs.load as load; "
        f"load.load_config({REQUIRED_ARGV!r}); "
        "print([m for m in ('torch', 'transformers', 'trl', 'yaml') if m in sys.modules], "
        "time.process_time() < 0.3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[] True\n", "")


# -- reading ---------------------------------------------------------------------------------------


def test_keys_go_to_model_data_or_training_and_only_given_training_keys_are_held(load):
    run = load({"freeze_llm": True, "text_max_length": 9, "seed": 7})
    assert (run.model.model_path, run.model.freeze_llm) == ("m", True)
    assert (run.data.data_path, run.data.text_max_length) == (["train.json"], 9)
    assert run.training == {"output_dir": "out", "seed": 7}
    assert run.notes == []


@pytest.mark.parametrize(
    "argv",
    [["--text_max_length", "9"], ["--text_max_length=9"], ["--text-max-length", "9"]],
)
def test_the_command_line_wins_over_the_file(load, argv):
    assert load({"text_max_length": 5}, *argv).data.text_max_length == 9


def test_sources_say_where_each_given_key_came_from(load, tmp_path):
    run = load({"seed": 1, "max_steps": 2}, "--seed", "3")
    assert run.sources == {
        "model_path": f"file {tmp_path}/run.json",
        "data_path": f"file {tmp_path}/run.json",
        "output_dir": f"file {tmp_path}/run.json",
        "max_steps": f"file {tmp_path}/run.json",
        "seed": "command line",
    }


def test_flags_negative_numbers_json_and_nulls_are_read_from_the_command_line(load):
    run = load(
        {"deepspeed": "zero1.json", "image_folder": "images", "report_to": "tensorboard"},
        *["--bf16", "--freeze_llm", "--video_min_pixels", "-1", "--max_steps=-1"],
        *["--lr_scheduler_kwargs", '{"num_cycles":1}', "--deepspeed", "null"],
        *["--image_folder", "none", "--report_to", "none", "--logging_steps", "0.5"],
    )
    assert run.model.freeze_llm is True
    assert run.data.video_min_pixels == -1
    assert run.data.image_folder is None
    assert run.training == {
        "output_dir": "out",
        "bf16": True,
        "max_steps": -1,
        "lr_scheduler_kwargs": {"num_cycles": 1},
        "deepspeed": None,
        "report_to": "none",
        "logging_steps": 0.5,
    }


@pytest.mark.parametrize("given", ["a.json|b.json", ["a.json", "b.json"]])
def test_data_path_is_one_string_a_list_or_joined_paths(load, given):
    run = load({"data_path": given, "eval_data_path": given})
    assert run.data.data_path == run.data.eval_data_path == ["a.json", "b.json"]


def test_null_in_the_file_is_as_if_absent(load):
    run = load({"text_max_length": None, "deepspeed": None, "stage": None, "cache_dir": None})
    assert run.data.text_max_length == 4096
    assert run.training == {"output_dir": "out"}
    assert run.notes == []


def test_yaml_reads_as_json_does(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_path: m\ndata_path: [a, b]\noutput_dir: out\nlearning_rate: 1e-5\n"
        "eval_strategy: no\nimage_folder:\nlr_scheduler_kwargs: {num_cycles: 1}\n"
    )
    run = load_config([str(path)])
    assert run.data.data_path == ["a", "b"]
    assert run.training == {
        "output_dir": "out",
        "learning_rate": 1e-5,
        "eval_strategy": "no",
        "lr_scheduler_kwargs": {"num_cycles": 1},
    }


def test_the_saved_config_loads_to_the_same_run(load, tmp_path):
    run = load(
        {"ovis_pretrained_path": "m", "min_lr_rate": 0.1, "save_steps": 0.4, "bf16": "true"}
        | {"eval_data_path": {"a": "b|c"}, "mix": {"train": 0.5}, "train_modules": "vte:1e-4"}
        | {"base_learning_rate": 1e-5, "base_batch_size": 64, "llm_name_or_path": "l"}
    )
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(run.to_dict()))
    again = load_config([str(saved)])
    assert (again.model, again.data) == (run.model, run.data)
    assert (again.loop, again.training) == (run.loop, run.training)
    assert again.notes == []


# -- errors ----------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest_keys(failure, tmp_path):
    error = failure(json.dumps(REQUIRED | {"learning_rat": 1}))
    assert error.where == f"file {tmp_path}/run.json"
    assert error.what == 'unknown key "learning_rat"'
    assert error.fix == 'did you mean "learning_rate", "base_learning_rate"?'


@pytest.mark.parametrize("key", ["//", "_zzz"])
def test_a_comment_key_is_unknown_too(failure, key):
    error = failure(json.dumps(REQUIRED | {key: "text"}))
    assert error.what == f'unknown key "{key}"'
    assert error.fix == "remove it; no key has a similar name"


def test_an_unknown_key_on_the_command_line_says_so():
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED_ARGV, "--sed", "1"])
    assert str(caught.value).startswith(
        'command line:\n  unknown key "sed".\n  Fix: did you mean "'
    )
    assert '"seed"' in caught.value.fix


def test_a_word_without_a_key_is_an_error():
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED_ARGV, "--bf16", "true", "stray.json"])
    assert caught.value.where == "command line"
    assert caught.value.what == '"stray.json" follows no key'
    assert caught.value.fix.startswith("write the config file first, then --key value")


@pytest.mark.parametrize(
    "text", ['{"seed": 1, "seed": 1}', '{"lr_scheduler_kwargs": {"seed": 1, "seed": 2}}']
)
def test_a_key_given_twice_in_json_is_an_error(failure, tmp_path, text):
    error = failure(text)
    assert error.where == f"file {tmp_path}/run.json"
    assert error.what == '"seed" is given twice'
    assert error.fix == "keep one of them"


def test_a_key_given_twice_in_yaml_is_an_error(failure):
    assert failure("seed: 1\nseed: 2\n", "run.yml").what == '"seed" is given twice'


def test_broken_json_gives_line_and_column(failure, tmp_path):
    error = failure('{\n  "seed": 1,\n}')
    assert error.where.startswith(f"file {tmp_path}/run.json, line ")
    assert error.what.startswith("broken JSON: ")
    error = failure('{\n  "seed" 1\n}')
    assert error.where == f"file {tmp_path}/run.json, line 2, column 10"
    assert error.what == "broken JSON: Expecting ':' delimiter"
    assert error.fix == "correct it there, or just before"


def test_broken_yaml_gives_line_and_column(failure, tmp_path):
    error = failure("seed: 1\nname: [a\n", "run.yaml")
    assert error.where == f"file {tmp_path}/run.yaml, line 3, column 1"
    assert error.what.startswith("broken YAML: ")


@pytest.mark.parametrize(
    ("name", "reason"), [("absent.json", "No such file or directory"), ("", "Is a directory")]
)
def test_a_file_that_cannot_be_read_is_named_by_its_resolved_path(
    tmp_path, monkeypatch, name, reason
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError) as caught:
        load_config([f"../{name}"])
    assert caught.value.where == f"file {(tmp_path / name).resolve()}"
    assert caught.value.what == f"cannot be read: {reason}"
    assert caught.value.fix.startswith("give the path of a .json, .yaml or .yml file")


def test_a_file_that_is_not_text_is_an_error(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config([str(path)])


def test_another_file_type_is_an_error(failure):
    error = failure("seed = 1", "run.toml")
    assert error.what == 'cannot tell the format of "run.toml"'
    assert error.fix == "name it .json, .yaml or .yml"


@pytest.mark.parametrize(
    ("name", "text", "kind"), [("a.json", "[1]", "list"), ("a.yaml", "", "NoneType")]
)
def test_the_top_level_holds_keys_and_values(failure, name, text, kind):
    assert failure(text, name).what == f"holds a {kind}, not keys and values"


@pytest.mark.parametrize("key", list(REQUIRED))
def test_a_missing_required_key_is_named(failure, tmp_path, key):
    error = failure(json.dumps({**REQUIRED, key: ""}))
    assert error.where == f"file {tmp_path}/run.json"
    assert error.what == f"missing: {key}"
    assert error.fix.startswith(f'add "{key}": "')


def test_a_model_of_two_parts_stands_for_model_path():
    parts = ["--llm_name_or_path", "~/l", "--vit_name_or_path=v"]
    run = load_config([*REQUIRED_ARGV, "--model_path=", *parts])
    assert (run.model.model_path, run.model.vit_name_or_path) == ("", "v")
    assert run.model.llm_name_or_path == os.path.expanduser("~/l")
    assert run.notes == []


@pytest.mark.parametrize(
    ("given", "missing"),
    [("llm_name_or_path", "vit_name_or_path"), ("vit_name_or_path", "llm_name_or_path")],
)
def test_one_part_of_a_model_is_not_enough(given, missing):
    with pytest.raises(ConfigError) as caught:
        load_config([f"--{given}", "x", "--data_path", "a", "--output_dir", "o"])
    assert caught.value.what == f"missing: {missing}"
    assert caught.value.fix.startswith(f'add "{missing}": "')


def test_parts_beside_a_model_path_have_no_effect(load):
    run = load({"vit_name_or_path": "v"}, "--llm_name_or_path", "l")
    assert (run.model.llm_name_or_path, run.model.vit_name_or_path) == (None, None)
    assert run.notes == [
        "llm_name_or_path has no effect: the checkpoint's own config rules",
        "vit_name_or_path has no effect: the checkpoint's own config rules",
    ]
    assert "vit_name_or_path" not in run.sources


def test_two_learning_rates_are_an_error(load, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load({"learning_rate": 1e-5, "base_batch_size": 64}, "--base_learning_rate", "1e-4")
    assert caught.value.where == "command line, base_learning_rate"
    assert caught.value.what == f"learning_rate is given too, in file {tmp_path}/run.json"


def test_a_stream_needs_a_number_of_steps(load, tmp_path):
    assert load({"streaming": True, "max_steps": 5}).data.streaming is True
    with pytest.raises(ConfigError) as caught:
        load({"streaming": True})
    assert caught.value.where == f"file {tmp_path}/run.json, streaming"
    assert caught.value.what == "a stream has no known end, and max_steps is not given"


def test_evaluation_sets_and_a_mix_are_read_from_the_command_line(load):
    run = load({}, "--eval_data_path", '{"a": "x|y"}', "--mix", '{"train": 0.5}')
    assert run.data.eval_data_path == {"a": ["x", "y"]}
    assert run.data.mix == {"train": 0.5}


def test_automatic_resume_is_true_where_a_complete_checkpoint_stands(load, tmp_path):
    keys = {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": "auto"}
    run = load(keys)
    assert run.training == {"output_dir": str(tmp_path / "out")}
    assert run.notes == []
    for step, file in (2, "trainer_state.json"), (10, "trainer_state.json"), (12, "model"):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "out" / f"checkpoint-{step}" / file).touch()
    run = load(keys)
    assert run.training["resume_from_checkpoint"] is True
    assert run.notes == [f"resumes from {tmp_path}/out/checkpoint-10"]


def test_all_missing_keys_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config([])
    assert caught.value.where == "command line"
    assert caught.value.what == "missing: model_path, data_path, output_dir"


def test_a_wrong_value_names_its_source_key_and_type(failure, tmp_path):
    error = failure(json.dumps(REQUIRED | {"max_steps": 1.5}))
    assert str(error) == (
        f"file {tmp_path}/run.json, max_steps:\n"
        "  1.5 is not a whole number.\n"
        '  Fix: give "max_steps" a whole number.'
    )


def test_a_value_the_schema_refuses_names_its_source(load):
    with pytest.raises(ConfigError) as caught:
        load({"single_image_max_pixels": 1000}, "--thinking", "never")
    assert caught.value.where == "command line, thinking"
    with pytest.raises(ConfigError) as caught:
        load({}, "--single_image_min_pixels", "9999999")
    assert caught.value.where == "default, single_image_max_pixels"
    assert caught.value.what == (
        "single_image_max_pixels 2408448 is below single_image_min_pixels 9999999"
    )


@pytest.mark.parametrize(
    ("keys", "key", "what"),
    [
        (
            {"streaming": True, "max_steps": 5, "mix": {"a": 2}},
            "mix",
            "a stream does not know how many records a set has",
        ),
        (
            {"mix": {"a": 2}, "train_sampling_strategy": "sequential"},
            "train_sampling_strategy",
            '"sequential" does not go with mix, which has an order of its own',
        ),
        (
            {"packing": True, "train_sampling_strategy": "sequential"},
            "train_sampling_strategy",
            '"sequential" does not go with packing, which has an order of its own',
        ),
        (
            {"packing": True, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy",
            '"group_by_length" does not go with packing, which has an order of its own',
        ),
        ({"packing_length": 64}, "packing_length", "is given, but nothing is packed"),
        (
            {"packing": False, "packing_max_patches": 64},
            "packing_max_patches",
            "is given, but nothing is packed",
        ),
        (
            {"packing": True, "base_learning_rate": 1e-5, "base_batch_size": 8},
            "base_learning_rate",
            "is scaled by the samples of a batch, and with packing a batch is counted in rows",
        ),
        (
            {"packing": True, "streaming": True, "max_steps": 5},
            "packing",
            "rows are planned from the lengths of all samples, which a stream does not know",
        ),
        (
            {"streaming": True, "max_steps": 5, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy",
            '"group_by_length" does not go with streaming, which has an order of its own',
        ),
    ],
)
def test_keys_that_do_not_go_together(failure, keys, key, what):
    error = failure(json.dumps(REQUIRED | keys))
    assert error.where.endswith(f", {key}")
    assert error.what == what
