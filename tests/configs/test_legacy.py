import json

import pytest

from vlmtune.configs.legacy import CHECKPOINT, FIXED, NO_EFFECT, RENAMED_HOW
from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError

REQUIRED = {"model_path": "m", "data_path": "train.json", "output_dir": "out"}


@pytest.fixture
def load(tmp_path):
    def load(keys, *argv):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**REQUIRED, **keys}))
        return load_config([str(path), *argv])

    return load


@pytest.mark.parametrize("old", ["ovis_pretrained_path", "model_name_or_path"])
def test_old_names_of_the_model_path(tmp_path, old):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({old: "ovis", "data_path": "a", "output_dir": "o"}))
    run = load_config([str(path)])
    assert run.model.model_path == "ovis"
    assert run.sources["model_path"] == f"file {path}"
    assert run.notes == [f"{old} is read as model_path"]


def test_dtype_is_torch_dtype(load):
    run = load({"dtype": "torch.bfloat16"})
    assert run.model.torch_dtype == "bfloat16"
    assert run.notes == ["dtype is read as torch_dtype"]


@pytest.mark.parametrize(
    ("old", "value", "training", "note"),
    [
        ("evaluation_strategy", "steps", {"eval_strategy": "steps"}, "is read as eval_strategy"),
        ("no_cuda", "true", {"use_cpu": True}, "is read as use_cpu"),
        ("warmup_ratio", "0.1", {"warmup_steps": 0.1}, "is read as warmup_steps"),
        ("push_to_hub_token", "t", {"hub_token": "t"}, "is read as hub_token"),
        ("push_to_hub_model_id", "u/m", {"hub_model_id": "u/m"}, "is read as hub_model_id"),
        (
            "per_gpu_train_batch_size",
            4,
            {"per_device_train_batch_size": 4},
            "is read as per_device_train_batch_size",
        ),
        (
            "torchdynamo",
            "inductor",
            {"torch_compile_backend": "inductor"},
            "is read as torch_compile_backend",
        ),
        (
            "min_lr_rate",
            0.1,
            {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            "is read as lr_scheduler_kwargs.min_lr_rate",
        ),
        (
            "dataloader_shuffle",
            True,
            {},
            "true has no effect: it is the default",
        ),
        (
            "dataloader_shuffle",
            "false",
            {"train_sampling_strategy": "sequential"},
            'false is read as train_sampling_strategy "sequential"',
        ),
        (
            "group_by_length",
            True,
            {"train_sampling_strategy": "group_by_length"},
            'true is read as train_sampling_strategy "group_by_length"',
        ),
        (
            "group_by_length",
            False,
            {"train_sampling_strategy": "random"},
            'false is read as train_sampling_strategy "random"',
        ),
        ("adafactor", False, {}, "false has no effect: it is the default"),
        ("adafactor", True, {"optim": "adafactor"}, 'true is read as optim "adafactor"'),
    ],
)
def test_old_training_keys_set_their_present_ones_with_a_note(load, old, value, training, note):
    run = load({old: value})
    assert run.training == {"output_dir": "out", **training}
    assert run.notes == [f"{old} {note}"]


@pytest.mark.parametrize(
    ("old", "value", "key", "read"),
    [
        ("lora_rank", 8, "lora_r", 8),
        ("use_peft", True, "use_lora", True),
        ("lora_enable", "true", "use_lora", True),
        ("lora_target", "q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("target_modules", ["q_proj"], "lora_target_modules", ["q_proj"]),
        ("lora_modules_to_save", ["vte"], "modules_to_save", ["vte"]),
        ("use_bnb_nested_quant", False, "bnb_4bit_use_double_quant", False),
    ],
)
def test_old_names_of_adapter_keys_turn_adapters_on(load, old, value, key, read):
    run = load({old: value})
    assert getattr(run.adapter, key) == read
    assert run.adapter.use_lora is True
    assert run.notes == [f"{old} is read as {key}"]


@pytest.mark.parametrize("old", ["max_seq_length", "max_length"])
def test_one_length_sets_both_unless_they_are_given(load, old):
    both = "multimodal_max_length and text_max_length"
    run = load({old: 100})
    assert (run.data.multimodal_max_length, run.data.text_max_length) == (100, 100)
    assert run.notes == [f"{old} is read as {both}"]

    run = load({old: 100, "multimodal_max_length": 7})
    assert (run.data.multimodal_max_length, run.data.text_max_length) == (7, 100)
    assert run.notes == [f"{old} is read as text_max_length"]

    run = load({old: 100, "multimodal_max_length": 7, "text_max_length": 8})
    assert (run.data.multimodal_max_length, run.data.text_max_length) == (7, 8)
    assert run.notes == [f"{old} has no effect: {both} are given"]
    assert "max_length" not in run.training


def test_an_old_name_on_the_command_line_wins_over_the_present_one_in_the_file(load):
    run = load(
        {"text_max_length": 7, "warmup_steps": 100},
        *["--max_length", "9", "--warmup_ratio", "0.2"],
    )
    assert (run.data.multimodal_max_length, run.data.text_max_length) == (9, 9)
    assert run.training["warmup_steps"] == 0.2
    assert run.sources["text_max_length"] == "command line"


def test_an_old_name_beside_an_equal_present_one_is_accepted(load):
    assert load({"ovis_pretrained_path": "m"}).model.model_path == "m"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (
            {"ovis_pretrained_path": "n"},
            '"model_path" and "ovis_pretrained_path" set the same thing but differ: '
            "'m' and 'n'",
        ),
        (
            {"max_seq_length": 5, "max_length": 6},
            '"max_seq_length" and "max_length" set the same thing but differ: 5 and 6',
        ),
        (
            {"warmup_ratio": 0.1, "warmup_steps": 50},
            '"warmup_steps" and "warmup_ratio" set the same thing but differ: 50 and 0.1',
        ),
        (
            {"group_by_length": True, "dataloader_shuffle": False},
            '"group_by_length" and "dataloader_shuffle" set the same thing but differ: '
            "'group_by_length' and 'sequential'",
        ),
        (
            {"min_lr_rate": 0.1, "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
            '"min_lr_rate" and "lr_scheduler_kwargs.min_lr_rate" set the same thing but differ: '
            "0.1 and 0.2",
        ),
    ],
)
def test_two_names_with_different_values_are_both_named(load, tmp_path, keys, what):
    with pytest.raises(ConfigError) as caught:
        load(keys)
    assert caught.value.where == f"file {tmp_path}/run.json"
    assert caught.value.what == what
    assert caught.value.fix == "keep one of them"


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, 0.1),
        ({"warmup_ratio": 0.0, "warmup_steps": 50}, 50),
        ({"warmup_ratio": 0.0, "warmup_steps": 0}, 0),
    ],
)
def test_of_two_warmup_keys_a_zero_yields(load, keys, steps):
    assert load(keys).training["warmup_steps"] == steps


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_a_warmup_ratio_is_a_fraction(load, tmp_path, ratio):
    with pytest.raises(ConfigError) as caught:
        load({"warmup_ratio": ratio})
    assert caught.value.where == f"file {tmp_path}/run.json, warmup_ratio"
    assert caught.value.what == f"{ratio} is not a fraction of the steps"


@pytest.mark.parametrize(
    ("keys", "argv", "kwargs", "source"),
    [
        pytest.param(
            {"lr_scheduler_kwargs": {"a": 1}},
            ["--min_lr_rate", "0.1"],
            {"a": 1, "min_lr_rate": 0.1},
            "command line",
            id="joined-across-sources",
        ),
        pytest.param(
            {"lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
            ["--min_lr_rate", "0.1"],
            {"min_lr_rate": 0.1},
            "command line",
            id="command-line-rate-wins",
        ),
        pytest.param(
            {"min_lr_rate": 0.1},
            ["--lr_scheduler_kwargs", '{"min_lr_rate":0.2}'],
            {"min_lr_rate": 0.2},
            "command line",
            id="command-line-arguments-win",
        ),
        pytest.param(
            {"min_lr_rate": 0.1, "lr_scheduler_kwargs": {"a": 1}},
            [],
            {"a": 1, "min_lr_rate": 0.1},
            "file",
            id="joined-in-the-file",
        ),
    ],
)
def test_min_lr_rate_joins_the_scheduler_arguments(load, keys, argv, kwargs, source):
    run = load(keys, *argv)
    assert run.training["lr_scheduler_kwargs"] == kwargs
    assert run.sources["lr_scheduler_kwargs"].startswith(source)
    assert "min_lr_rate" not in run.sources


@pytest.mark.parametrize("key", sorted(NO_EFFECT))
def test_a_key_without_effect_is_accepted_and_says_why(load, key):
    run = load({key: FIXED[key][0] if key in FIXED else "anything"})
    assert run.training == {"output_dir": "out"}
    assert run.notes == [f"{key} has no effect: {NO_EFFECT[key]}"]


@pytest.mark.parametrize(
    ("key", "value", "what", "fix"),
    [
        (
            "data_type",
            "caption",
            'data_type "caption" is not supported',
            'name the set in datainfo, with its "data_format": "caption"',
        ),
        (
            "eval_packing",
            True,
            "eval_packing true is not supported",
            "leave it out: the loss of padded samples is the same",
        ),
        (
            "padding_free",
            "true",
            "padding_free true is not supported",
            'use "packing": true, whose rows have no padding',
        ),
    ],
)
def test_a_key_that_asks_for_what_is_missing_is_an_error(load, tmp_path, key, value, what, fix):
    with pytest.raises(ConfigError) as caught:
        load({key: value})
    assert caught.value.where == f"file {tmp_path}/run.json, {key}"
    assert (caught.value.what, caught.value.fix) == (what, fix)


def test_data_info_version_is_the_path_of_a_datainfo_file(load):
    run = load({"data_info_version": "sets.json"})
    assert run.data.datainfo == "sets.json"
    assert run.notes == [
        f"data_info_version is read as datainfo: {RENAMED_HOW['data_info_version']}"
    ]


@pytest.mark.parametrize("key", ["datainfo", "data_info_version"])
def test_data_name_names_the_sets_of_datainfo(load, key):
    run = load({"data_path": None, key: "sets.json", "data_name": "a|b"})
    assert run.data.data_path == ["a", "b"]
    assert run.notes[-1] == "data_name is read as data_path: it names sets of datainfo"


def test_data_name_on_the_command_line_wins_over_the_data_path_of_a_file_with_datainfo(load):
    assert load({"datainfo": "sets.json"}, "--data_name", "b").data.data_path == ["b"]


def test_data_name_beside_data_path_or_without_datainfo_is_a_label(load):
    for keys in ({"datainfo": "sets.json", "data_name": "b"}, {"data_name": "b"}):
        run = load(keys)
        assert run.data.data_path == ["train.json"]
        assert run.notes == ["data_name has no effect: the data is named in data_path"]


def test_a_note_is_given_once_when_file_and_command_line_agree(load):
    assert load({"stage": 3}, "--stage", "3").notes == [
        "stage has no effect: only a recipe, a config with stages, has them"
    ]


def test_a_config_of_the_reference_runs_as_it_is(tmp_path):
    path = tmp_path / "ovis.json"
    path.write_text(
        json.dumps(
            {
                "deepspeed": "scripts/zero_configs/zero1_cp.json",
                "stage": 3,
                "data_info_version": "ovis2_5_sft_datainfo",
                "data_name": "geometry3k_local|coco",
                "data_type": "conversation",
                "data_path": "geometry3k.json|coco.json",
                "image_folder": "images",
                "accepts_loss_kwargs": True,
                "ovis_pretrained_path": "AIDC-AI/Ovis2.5-9B",
                "attn_implementation": "flash_attention_2",
                "llm_name_or_path": "Qwen/Qwen3-8B",
                "vit_name_or_path": None,
                "visual_vocab_size": 65536,
                "conversation_formatter_class": "Qwen3ConversationFormatter",
                "vit_hidden_stride": 2,
                "vit_window_size": 112,
                "vit_temporal_patch_size": 1,
                "vit_fullatt_block_indexes": None,
                "vit_preserve_original_pe": True,
                "vit_use_rope": True,
                "single_image_min_pixels": 200704,
                "single_image_max_pixels": 3211264,
                "multiple_image_max_pixels": -1,
                "video_min_pixels": -1,
                "video_max_pixels": -1,
                "min_frames": 10,
                "max_frames": 10,
                "train_modules": "all",
                "multimodal_max_length": 6000,
                "text_max_length": 6000,
                "output_dir": "checkpoints/ovis2_5_sft",
                "overwrite_output_dir": True,
                "cache_dir": None,
                "monitor_step": 100,
                "model_init_seed": 0,
                "overall_ratio": 1.0,
                "mix_data_name": None,
                "mix_ratio": None,
                "min_lr_rate": 0.1,
                "optim": "adamw_torch",
                "num_train_epochs": 1,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 16,
                "evaluation_strategy": "no",
                "learning_rate": "2e-5",
                "lr_scheduler_type": "cosine_with_min_lr",
                "warmup_ratio": 0.1,
                "warmup_steps": 0,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "save_strategy": "steps",
                "save_steps": 0.4,
                "save_total_limit": 10,
                "save_safetensors": True,
                "logging_dir": "runs",
                "logging_steps": 1,
                "group_by_length": False,
                "no_cuda": False,
                "use_mps_device": False,
                "fp16_backend": "auto",
                "bf16": True,
                "tf32": True,
                "gradient_checkpointing": True,
                "dataloader_num_workers": 8,
                "dataloader_drop_last": True,
                "dataloader_persistent_workers": True,
                "data_seed": 5171,
                "do_train": True,
                "report_to": "none",
                "packing": False,
                "assistant_only_loss": False,
            }
        )
    )
    run = load_config([str(path)])
    assert run.model.model_path == "AIDC-AI/Ovis2.5-9B"
    assert run.model.attn_implementation == "flash_attention_2"
    assert run.data.data_path == ["geometry3k.json", "coco.json"]
    assert (run.data.datainfo, run.model.train_modules) == ("ovis2_5_sft_datainfo", "all")
    assert run.model.llm_name_or_path is None
    assert (run.data.multiple_image_max_pixels, run.data.video_min_pixels) == (-1, -1)
    assert run.training == {
        "deepspeed": "scripts/zero_configs/zero1_cp.json",
        "output_dir": "checkpoints/ovis2_5_sft",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "optim": "adamw_torch",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 16,
        "eval_strategy": "no",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine_with_min_lr",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": 0.4,
        "save_total_limit": 10,
        "logging_steps": 1,
        "train_sampling_strategy": "random",
        "use_cpu": False,
        "bf16": True,
        "tf32": True,
        "gradient_checkpointing": True,
        "dataloader_num_workers": 8,
        "dataloader_drop_last": True,
        "dataloader_persistent_workers": True,
        "data_seed": 5171,
        "do_train": True,
        "report_to": "none",
    }
    assert run.notes == [
        "stage has no effect: only a recipe, a config with stages, has them",
        "data_info_version is read as datainfo: "
        "it is the path of the file; the reference looked a name up in its package",
        "data_name has no effect: the data is named in data_path",
        "data_type has no effect: conversations are read as such without it",
        "accepts_loss_kwargs has no effect: "
        "the loss is always averaged over the label tokens of a whole step",
        "ovis_pretrained_path is read as model_path",
        f"conversation_formatter_class has no effect: {CHECKPOINT}",
        f"vit_hidden_stride has no effect: {CHECKPOINT}",
        f"vit_window_size has no effect: {CHECKPOINT}",
        f"vit_temporal_patch_size has no effect: {CHECKPOINT}",
        f"vit_preserve_original_pe has no effect: {CHECKPOINT}",
        f"vit_use_rope has no effect: {CHECKPOINT}",
        "monitor_step has no effect: there is no callback that prints whole tensors",
        "model_init_seed has no effect: the reference never used it either; seed rules",
        "overall_ratio has no effect: the reference never used it either",
        "evaluation_strategy is read as eval_strategy",
        "warmup_ratio is read as warmup_steps",
        "save_safetensors has no effect: weights are always saved as safetensors",
        "logging_dir has no effect: transformers no longer has it; "
        "set the environment variable TENSORBOARD_LOGGING_DIR",
        'group_by_length false is read as train_sampling_strategy "random"',
        "no_cuda is read as use_cpu",
        "use_mps_device has no effect: transformers no longer has it",
        "fp16_backend has no effect: transformers no longer has it, nor apex",
        "assistant_only_loss has no effect: "
        "which tokens carry loss follows from rendering the conversation",
        "min_lr_rate is read as lr_scheduler_kwargs.min_lr_rate",
        f"llm_name_or_path has no effect: {CHECKPOINT}",
        f"visual_vocab_size has no effect: {CHECKPOINT}",
    ]
