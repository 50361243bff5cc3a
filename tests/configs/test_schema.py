import dataclasses

import pytest

from vlmtune.configs.adapter import AdapterConfig
from vlmtune.configs.schema import DataConfig, LoopConfig, ModelConfig, RunConfig
from vlmtune.core.errors import ConfigError

REQUIRED = {ModelConfig: {}, DataConfig: {"data_path": ["x"]}, LoopConfig: {}}
DERIVE = ", or -1 to derive it from the single-image limits"


def test_defaults_are_those_of_the_reference():
    assert dataclasses.asdict(DataConfig(["a.json"])) == {
        "data_path": ["a.json"],
        "eval_data_path": [],
        "datainfo": None,
        "mix": {},
        "streaming": False,
        "shuffle_buffer": 1000,
        "image_folder": None,
        "multimodal_max_length": 4096,
        "text_max_length": 4096,
        "single_image_min_pixels": 200704,
        "single_image_max_pixels": 2408448,
        "multiple_image_min_pixels": 200704,
        "multiple_image_max_pixels": 200704,
        "video_min_pixels": 200704,
        "video_max_pixels": 200704,
        "min_frames": 8,
        "max_frames": 8,
        "thinking": "every_turn",
        "packing": False,
        "packing_length": None,
        "packing_max_patches": None,
        "jpeg_draft": False,
        "on_bad_sample": "error",
    }
    assert dataclasses.asdict(ModelConfig("m")) == {
        "model_path": "m",
        "llm_name_or_path": None,
        "vit_name_or_path": None,
        "visual_vocab_size": None,
        "attn_implementation": None,
        "torch_dtype": "float32",
        "train_modules": "all",
        "freeze_llm": False,
        "freeze_vision_tower": False,
    }
    assert dataclasses.asdict(LoopConfig()) == {
        "trainer": "trl",
        "overwrite_output_dir": False,
        "base_learning_rate": None,
        "base_batch_size": None,
        "early_stopping_patience": None,
        "early_stopping_threshold": 0.0,
        "eval_metrics": [],
        "eval_generate_samples": 64,
        "eval_max_new_tokens": 512,
        "recompute": None,
        "max_empty_batches": 10,
        "probe": False,
    }


@pytest.mark.parametrize("config", [ModelConfig, DataConfig, LoopConfig, AdapterConfig])
def test_every_key_explains_itself_in_a_sentence(config):
    for f in dataclasses.fields(config):
        assert f.metadata["help"].endswith("."), f.name


def test_torch_dtype_may_carry_its_module():
    assert ModelConfig("m", torch_dtype="torch.bfloat16").torch_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "key", "value", "fix"),
    [
        (ModelConfig, "torch_dtype", "int8", "give auto or float32 or bfloat16 or float16"),
        (LoopConfig, "trainer", "hf", "give trl or standard"),
        (DataConfig, "thinking", "never", "give every_turn or last_turn or as_is"),
        (DataConfig, "on_bad_sample", "drop", "give error or skip"),
    ],
)
def test_a_value_outside_the_choices_lists_them(config, key, value, fix):
    with pytest.raises(ConfigError) as caught:
        config(**REQUIRED[config], **{key: value})
    assert caught.value.where == key
    assert caught.value.what == f'"{value}" is not a choice of {key}'
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (DataConfig, "multimodal_max_length"),
        (DataConfig, "text_max_length"),
        (DataConfig, "min_frames"),
        (DataConfig, "max_frames"),
        (DataConfig, "shuffle_buffer"),
        (DataConfig, "packing_length"),
        (DataConfig, "packing_max_patches"),
        (LoopConfig, "early_stopping_patience"),
        (LoopConfig, "max_empty_batches"),
        (LoopConfig, "eval_generate_samples"),
        (LoopConfig, "eval_max_new_tokens"),
    ],
)
def test_lengths_and_counts_start_at_one(config, key):
    config(**REQUIRED[config], **{key: 8})
    with pytest.raises(ConfigError) as caught:
        config(**REQUIRED[config], **{key: 0})
    assert (caught.value.where, caught.value.what) == (key, "0 is below 1")


def test_min_frames_above_max_frames_is_an_error():
    with pytest.raises(ConfigError, match="max_frames 8 is below min_frames 9"):
        DataConfig(["a"], min_frames=9)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("single_image_min_pixels", 0, ""),
        ("single_image_max_pixels", -1, ""),
        ("multiple_image_min_pixels", 0, DERIVE),
        ("video_max_pixels", 0, DERIVE),
    ],
)
def test_pixel_limits_are_positive_numbers(key, value, hint):
    with pytest.raises(ConfigError) as caught:
        DataConfig(["a"], **{key: value})
    assert caught.value.where == key
    assert caught.value.what == f"{value} is not a number of pixels"
    assert caught.value.fix == f"give a positive number, for example 200704 (448 x 448){hint}"


@pytest.mark.parametrize("media", ["single_image", "multiple_image", "video"])
def test_max_pixels_below_min_pixels_is_an_error(media):
    with pytest.raises(ConfigError) as caught:
        DataConfig(["a"], **{f"{media}_min_pixels": 2000, f"{media}_max_pixels": 1000})
    assert caught.value.where == f"{media}_max_pixels"
    assert caught.value.what == f"{media}_max_pixels 1000 is below {media}_min_pixels 2000"
    assert caught.value.fix == f"raise {media}_max_pixels or lower {media}_min_pixels"


@pytest.mark.parametrize("media", ["multiple_image", "video"])
def test_negative_limits_of_several_images_and_video_mean_derive(media):
    DataConfig(["a"], **{f"{media}_max_pixels": -1})
    DataConfig(["a"], **{f"{media}_min_pixels": -1, f"{media}_max_pixels": 1000})


@pytest.mark.parametrize(
    ("keys", "where", "what"),
    [
        (
            {"base_learning_rate": 1e-4},
            "base_learning_rate",
            "base_learning_rate and base_batch_size go together",
        ),
        (
            {"base_batch_size": 64},
            "base_learning_rate",
            "base_learning_rate and base_batch_size go together",
        ),
        (
            {"base_learning_rate": 0.0, "base_batch_size": 64},
            "base_learning_rate",
            "0.0 is not above 0",
        ),
        (
            {"base_learning_rate": 1e-4, "base_batch_size": 0},
            "base_batch_size",
            "0 is below 1",
        ),
        ({"early_stopping_threshold": -0.1}, "early_stopping_threshold", "-0.1 is below 0"),
    ],
)
def test_loop_keys_that_cannot_work_are_errors(keys, where, what):
    with pytest.raises(ConfigError) as caught:
        LoopConfig(**keys)
    assert (caught.value.where, caught.value.what) == (where, what)


def test_answers_are_scored_with_known_metrics():
    assert LoopConfig(eval_metrics=["cider", "bleu"]).eval_metrics == ["cider", "bleu"]
    with pytest.raises(ConfigError) as caught:
        LoopConfig(eval_metrics=["cider", "bleu_4"])
    assert (caught.value.where, caught.value.what) == (
        "eval_metrics",
        '"bleu_4" is not a metric of answers',
    )
    assert caught.value.fix == (
        "give exact_match or vqa_accuracy or anls or relaxed_accuracy or bleu or cider or rouge_l, "
        "or several of them"
    )


def test_named_evaluation_sets_become_lists_of_files(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    data = DataConfig(["a"], eval_data_path={"easy-1": "a.json | ~/b.json", "x.y_Z": ["c|d.json"]})
    assert data.eval_data_path == {
        "easy-1": ["a.json", "/home/me/b.json"],
        "x.y_Z": ["c|d.json"],
    }


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        (
            {"held out": "a"},
            'the name of a set "held out" cannot be part of a metric\'s name',
        ),
        ({"": "a"}, 'the name of a set "" cannot be part of a metric\'s name'),
        ({"ä": "a"}, 'the name of a set "ä" cannot be part of a metric\'s name'),
        ({"a": []}, 'the set "a" names no files: []'),
        ({"a": " | "}, 'the set "a" names no files: []'),
        ({"a": [1]}, 'the set "a" names no files: [1]'),
        ({"a": 1}, 'the set "a" names no files: 1'),
    ],
)
def test_an_evaluation_set_has_a_usable_name_and_files(sets, what):
    with pytest.raises(ConfigError) as caught:
        DataConfig(["a"], eval_data_path=sets)
    assert (caught.value.where, caught.value.what) == ("eval_data_path", what)


def test_a_mix_may_leave_a_set_out():
    assert DataConfig(["a"], mix={"a": 2, "b": 0.5, "c": 0}).mix == {"a": 2, "b": 0.5, "c": 0}


@pytest.mark.parametrize("passes", [-1, "2", True, None, float("nan"), float("inf")])
def test_a_mix_counts_passes(passes):
    with pytest.raises(ConfigError) as caught:
        DataConfig(["a"], mix={"b": passes})
    assert caught.value.what == f'{passes!r} is not how often "b" is passed in an epoch'


def test_to_dict_is_flat_with_own_defaults_and_the_given_training_keys():
    training = {"output_dir": "o", "seed": 7}
    run = RunConfig(
        ModelConfig("m"), DataConfig(["a"]), LoopConfig(), AdapterConfig(), training, {}, []
    )
    flat = run.to_dict()
    assert flat["model_path"] == "m"
    assert flat["text_max_length"] == 4096
    assert (flat["trainer"], flat["output_dir"], flat["seed"]) == ("trl", "o", 7)
    assert len(flat) == 9 + 23 + 12 + 21 + 2
