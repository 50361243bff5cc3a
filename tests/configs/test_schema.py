import dataclasses

import pytest

from vlmtune.configs.schema import DataConfig, ModelConfig, RunConfig
from vlmtune.core.errors import ConfigError

DERIVE = ", or -1 to derive it from the single-image limits"


def test_defaults_are_those_of_the_reference():
    assert dataclasses.asdict(DataConfig(["a.json"])) == {
        "data_path": ["a.json"],
        "eval_data_path": [],
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
        "on_bad_sample": "error",
    }
    assert dataclasses.asdict(ModelConfig("m")) == {
        "model_path": "m",
        "attn_implementation": None,
        "torch_dtype": "float32",
        "freeze_llm": False,
        "freeze_vision_tower": False,
        "trainer": "trl",
        "overwrite_output_dir": False,
    }


@pytest.mark.parametrize("config", [ModelConfig, DataConfig])
def test_every_key_explains_itself_in_a_sentence(config):
    for f in dataclasses.fields(config):
        assert f.metadata["help"].endswith("."), f.name


def test_torch_dtype_may_carry_its_module():
    assert ModelConfig("m", torch_dtype="torch.bfloat16").torch_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "key", "value", "fix"),
    [
        (ModelConfig, "torch_dtype", "int8", "give auto or float32 or bfloat16 or float16"),
        (ModelConfig, "trainer", "hf", "give trl or standard"),
        (DataConfig, "thinking", "never", "give every_turn or last_turn or as_is"),
        (DataConfig, "on_bad_sample", "drop", "give error or skip"),
    ],
)
def test_a_value_outside_the_choices_lists_them(config, key, value, fix):
    with pytest.raises(ConfigError) as caught:
        config("x", **{key: value})
    assert caught.value.where == key
    assert caught.value.what == f'"{value}" is not a choice of {key}'
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    "key", ["multimodal_max_length", "text_max_length", "min_frames", "max_frames"]
)
def test_lengths_and_frames_start_at_one(key):
    with pytest.raises(ConfigError) as caught:
        DataConfig(["a"], **{key: 0})
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


def test_to_dict_is_flat_with_own_defaults_and_the_given_training_keys():
    run = RunConfig(ModelConfig("m"), DataConfig(["a"]), {"output_dir": "o", "seed": 7}, {}, [])
    flat = run.to_dict()
    assert flat["model_path"] == "m"
    assert flat["text_max_length"] == 4096
    assert (flat["output_dir"], flat["seed"]) == ("o", 7)
    assert len(flat) == 7 + 15 + 2
