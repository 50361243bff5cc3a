"""Keys of existing configs that have another name, another form or no effect here.

They come from the Ovis2.5 training code (package 2.5.0), from transformers 4.51, which it pins, and
from TRL's own ways of masking. None of the removed keys is a field of transformers 5.18 to 5.23.
"""

# Key -> the keys that take its value.
RENAMED: dict[str, tuple[str, ...]] = {
    "ovis_pretrained_path": ("model_path",),
    "model_name_or_path": ("model_path",),
    "data_info_version": ("datainfo",),
    "dtype": ("torch_dtype",),
    "max_seq_length": ("multimodal_max_length", "text_max_length"),
    "max_length": ("multimodal_max_length", "text_max_length"),
    "evaluation_strategy": ("eval_strategy",),
    "warmup_ratio": ("warmup_steps",),
    "no_cuda": ("use_cpu",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size",),
    "push_to_hub_model_id": ("hub_model_id",),
    "push_to_hub_token": ("hub_token",),
    "torchdynamo": ("torch_compile_backend",),
    "use_peft": ("use_lora",),
    "lora_enable": ("use_lora",),
    "lora_rank": ("lora_r",),
    "lora_target": ("lora_target_modules",),
    "target_modules": ("lora_target_modules",),
    "lora_modules_to_save": ("modules_to_save",),
    "additional_target": ("modules_to_save",),
    "adapter_name_or_path": ("adapter_path",),
    "double_quant": ("bnb_4bit_use_double_quant",),
    "quant_type": ("bnb_4bit_quant_type",),
    "use_bnb_nested_quant": ("bnb_4bit_use_double_quant",),
}

# Renamed key -> what changed with its name.
RENAMED_HOW: dict[str, str] = {
    "data_info_version": "it is the path of the file; the reference looked a name up in its package"
}

# Switch -> the key it sets, its value when true, its value when false (None: nothing is set).
SWITCHES: dict[str, tuple[str, str | None, str | None]] = {
    "dataloader_shuffle": ("train_sampling_strategy", None, "sequential"),
    "group_by_length": ("train_sampling_strategy", "group_by_length", "random"),
    "adafactor": ("optim", "adafactor", None),
}

# Keys with one accepted value -> that value, and what to do instead of another one.
FIXED: dict[str, tuple[str | bool, str]] = {
    "data_type": (
        "conversation",
        'name the set in datainfo, with its "data_format": "caption"',
    ),
    "eval_packing": (False, "leave it out: the loss of padded samples is the same"),
    "padding_free": (False, 'use "packing": true, whose rows have no padding'),
    "chat_template_path": ("", "leave it out: the family's own rendering writes conversations"),
    "eos_token": ("", "leave it out: answers end in the family's own end-of-turn token"),
    "pad_token": ("", "leave it out: the tokenizer's own pad token is used"),
}

CHECKPOINT = "the checkpoint's own config rules"
_UNUSED = "the reference never used it either"
_MASKS = "which tokens carry loss follows from rendering the conversation"
_COLLATOR = "our collator reads the records itself"
_GONE = "transformers no longer has it"

# Accepted without effect -> why.
NO_EFFECT: dict[str, str] = {
    "conversation_formatter_class": CHECKPOINT,
    "vit_hidden_stride": CHECKPOINT,
    "vit_window_size": CHECKPOINT,
    "vit_temporal_patch_size": CHECKPOINT,
    "vit_fullatt_block_indexes": CHECKPOINT,
    "vit_preserve_original_pe": CHECKPOINT,
    "vit_use_rope": CHECKPOINT,
    "data_name": "the data is named in data_path",
    "data_type": "conversations are read as such without it",
    "stage": "only a recipe, a config with stages, has them",
    "cache_dir": _UNUSED,
    "monitor_step": "there is no callback that prints whole tensors",
    "model_init_seed": f"{_UNUSED}; seed rules",
    "overall_ratio": _UNUSED,
    "mix_data_name": _UNUSED,
    "mix_ratio": _UNUSED,
    "lora_task_type": "adapters are saved for the model's own class",
    "accepts_loss_kwargs": "the loss is always averaged over the label tokens of a whole step",
    "assistant_only_loss": _MASKS,
    "completion_only_loss": _MASKS,
    "dataset_text_field": _MASKS,
    "chat_template_path": "the family's own rendering writes conversations",
    "eos_token": "answers end in the family's own end-of-turn token",
    "pad_token": "the tokenizer's own pad token is used",
    "remove_unused_columns": _COLLATOR,
    "dataset_kwargs": _COLLATOR,
    "dataset_num_proc": "every core takes part in preparing the data",
    "shuffle_dataset": "train_sampling_strategy decides the order",
    "truncation_mode": "samples are cut at their end, never through an image",
    "pad_to_multiple_of": "samples are padded to the longest of their batch",
    "packing_strategy": "rows are filled by best fit with whole samples",
    "eval_packing": "samples are padded for an evaluation",
    "padding_free": "rows have no padding with packing, and samples are padded without it",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": f"{_GONE}; set the environment variable TENSORBOARD_LOGGING_DIR",
    "use_mps_device": _GONE,
    "jit_mode_eval": _GONE,
    "use_ipex": _GONE,
    "fp16_opt_level": f"{_GONE}, nor apex",
    "fp16_backend": f"{_GONE}, nor apex",
    "half_precision_backend": f"{_GONE}, nor apex",
    "tpu_num_cores": _GONE,
    "tpu_metrics_debug": f"{_GONE}; use debug",
    "past_index": _GONE,
    "fsdp_min_num_params": f"{_GONE}; write min_num_params in fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": (
        f"{_GONE}; write transformer_layer_cls_to_wrap in fsdp_config"
    ),
    "tp_size": f"{_GONE}; use parallelism_config",
    "use_legacy_prediction_loop": _GONE,
    "include_inputs_for_metrics": f"{_GONE}; use include_for_metrics",
    "push_to_hub_organization": f"{_GONE}; write hub_model_id as organization/name",
    "mp_parameters": _GONE,
    "ray_scope": _GONE,
    "include_tokens_per_second": f"{_GONE}; use include_num_input_tokens_seen",
}
