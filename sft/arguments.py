"""The host's settings for a run: the user's keys over what fits the machine and our collator."""

import json
import math
import os
import socket
import warnings
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from ..configs.schema import RunConfig
from ..core.distributed import launched_by_torchrun, usable_cores, world_size
from ..core.errors import ConfigError
from ..core.logging import note

COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def training_arguments(config: RunConfig) -> SFTConfig:
    """The user's keys over our defaults, and what a process needs before it trains: the start of
    torch.distributed on a CPU, and of DeepSpeed.

    Raises:
        ConfigError: as `host_settings`, or the host refuses a value.
    """
    cpu = config.training.get("use_cpu", not torch.cuda.is_available())
    settings = host_settings(config, cpu)
    if settings.get("deepspeed") and not launched_by_torchrun():
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    if cpu and launched_by_torchrun():
        settings.setdefault("ddp_backend", "gloo")
        if not torch.distributed.is_initialized():
            # With use_cpu the host (transformers 5.23) leaves ddp_timeout out.
            waiting = timedelta(seconds=settings["ddp_timeout"])
            torch.distributed.init_process_group("gloo", timeout=waiting)
    args = _host_arguments(config, settings, world_size())
    if args.n_gpu > 1:
        # transformers would split one batch over the GPUs, images apart from their text.
        args._n_gpu = 1
        note("one process trains on one GPU; for more: scripts/train_launch.sh CONFIG N")
    if args.deepspeed and cpu:
        # With use_cpu, transformers starts torch.distributed but not deepspeed.comm (0.19).
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    return args


def planned_arguments(config: RunConfig, gpus: int) -> tuple[SFTConfig, dict[str, Any]]:
    """The arguments that a run on so many GPUs will have, and the settings they are made of, on a
    machine that has none: nothing is started, and `use_cpu` stands for no device.

    Raises:
        ConfigError: as `training_arguments`.
    """
    settings = host_settings(config, cpu=False)
    inert = {"use_cpu": True, "tf32": None, "deepspeed": None}
    return _host_arguments(config, {**settings, **inert}, gpus), settings


def host_settings(config: RunConfig, cpu: bool) -> dict[str, Any]:
    """The user's keys over our defaults: what fits the machine, and what our collator needs.

    Raises:
        ConfigError: evaluation is asked for without evaluation data, or what we do not follow.
    """
    given = dict(config.training)
    if cpu and given.pop("tf32", False):
        note("tf32 has no effect on CPU")
    if cpu and (given.get("fp16") or config.model.torch_dtype == "float16"):
        raise ConfigError(
            "fp16" if given.get("fp16") else "torch_dtype",
            "float16 is not computed on a CPU",
            "use bf16, or leave it out",
        )
    if given.get("eval_strategy", "no") != "no" and not config.data.eval_data_path:
        raise ConfigError(
            "eval_strategy",
            f'is "{given["eval_strategy"]}", but there is no eval_data_path',
            "give eval_data_path, or set eval_strategy to no",
        )
    if not given.get("do_train", True) and not config.data.eval_data_path:
        raise ConfigError(
            "do_train",
            "is false, and there is no eval_data_path",
            "leave do_train out, or give one",
        )
    if given.get("do_eval") and not config.data.eval_data_path:
        note("do_eval has no effect: there is no eval_data_path")
    _check_answers(config)
    if config.loop.trainer == "standard" and given.get("label_smoothing_factor"):
        raise ConfigError(
            "label_smoothing_factor",
            "is not shifted by the standard trainer for this model",
            'use "trainer": "trl"',
        )
    if "eval_steps" in given and "eval_strategy" not in given and config.data.eval_data_path:
        given["eval_strategy"] = "steps"
    _keep_the_best(config, given)
    adapter = config.adapter
    quantized = bool(adapter.use_lora) and (adapter.load_in_4bit or adapter.load_in_8bit)
    _check_deepspeed(given, quantized)
    _check_unsupported(given)
    if config.loop.recompute is not None:
        for key in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            if given.pop(key, None) is not None:
                note(f"{key} has no effect: recompute is given")
        given["gradient_checkpointing"] = False
    if config.data.packing and given.pop("dataloader_drop_last", False):
        note("dataloader_drop_last has no effect: with packing each sample of an epoch has a row")
    # compile_layers does it: the host would compile the whole model, under other tensor names.
    for key in COMPILE_KEYS:
        given.pop(key, None)
    dtype = config.model.torch_dtype
    half = dtype if dtype in ("bfloat16", "float16") else None
    if half:
        note(
            f"torch_dtype {dtype}: the model computes in it; weights are kept in float32, "
            "under DeepSpeed only until they are saved"
        )
    workers = given.get("dataloader_num_workers", _loader_processes())
    defaults = {
        "use_cpu": cpu,
        "bf16": (not cpu or half == "bfloat16") and half != "float16" and not given.get("fp16"),
        "fp16": half == "float16" and not given.get("bf16"),
        # A NaN is shown, not replaced by the last good loss.
        "logging_nan_inf_filter": False,
        # Other processes wait this long, in seconds, while the first checks the data.
        "ddp_timeout": 4 * 3600,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else "none",
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "train_sampling_strategy": "group_by_length",
        # Every rank runs every trainable part (Ovis2_5._vision_must_run), so DDP need not search.
        "ddp_find_unused_parameters": False,
    }
    required = {
        "remove_unused_columns": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return {**defaults, **given, **required}


def _host_arguments(config: RunConfig, settings: dict[str, Any], world: int) -> SFTConfig:
    """The host's object of these settings, for so many processes."""
    with warnings.catch_warnings():
        # TRL and configs use the name that transformers 5.18 knows; 5.23 warns of it.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
        try:
            args = SFTConfig(**settings)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise host_refusal(error) from error
    _check_four_bits(config, args)
    if config.loop.base_learning_rate and config.loop.base_batch_size:
        scale = math.sqrt(global_batch(args, world) / config.loop.base_batch_size)
        args.learning_rate = config.loop.base_learning_rate * scale
    if config.data.streaming:
        # The stream leaves out what a resumed run has seen; the host would decode it.
        args.ignore_data_skip = True
    return args


def global_batch(args: TrainingArguments, world: int | None = None) -> int:
    """Samples of an optimizer step: per device x accumulation x processes, this run's unless
    `world` is given."""
    processes = world or world_size()
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def _loader_processes() -> int:
    """One less than the cores of a process, 1 to 4."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, usable_cores() // processes - 1))


def _keep_the_best(config: RunConfig, given: dict[str, Any]) -> None:
    """Settings that early stopping implies, where the user left them open.

    Raises:
        ConfigError: nothing is evaluated, or the metric is none that an evaluation has.
    """
    if config.loop.early_stopping_patience:
        if given.get("eval_strategy", "no") == "no":
            raise ConfigError(
                "early_stopping_patience",
                "nothing is evaluated during training",
                'add eval_data_path and "eval_strategy": "steps" or "epoch"',
            )
        given.setdefault("load_best_model_at_end", True)
        given.setdefault("metric_for_best_model", "eval_loss")
    if given.get("load_best_model_at_end"):
        given.setdefault("metric_for_best_model", "eval_loss")
        given.setdefault("save_strategy", given.get("eval_strategy", "no"))
        if given["save_strategy"] == "steps" and "eval_steps" in given:
            given.setdefault("save_steps", given["eval_steps"])
    if metric := given.get("metric_for_best_model"):
        sets = config.data.eval_data_path
        known = ["eval_loss"]
        if isinstance(sets, dict):
            known += [f"eval_{name}_loss" for name in sets]
        elif config.loop.trainer == "trl":
            known += ["eval_mean_token_accuracy", "eval_entropy"]
        answers = answer_keys(config)
        key = f"eval_{metric.removeprefix('eval_')}"
        if key not in [*known, *answers]:
            raise ConfigError(
                "metric_for_best_model",
                f'"{metric}" is no metric of an evaluation',
                f"give {' or '.join([*known, *answers])}",
            )
        given.setdefault("greater_is_better", key in answers or metric.endswith("accuracy"))


def _check_answers(config: RunConfig) -> None:
    """Raises ConfigError for `eval_metrics` without anything to answer."""
    if config.loop.eval_metrics and not config.data.eval_data_path:
        raise ConfigError(
            "eval_metrics",
            "are given, but there is no eval_data_path",
            "give eval_data_path, or leave eval_metrics out",
        )
    for key in ("eval_generate_samples", "eval_max_new_tokens"):
        if key in config.sources and not config.loop.eval_metrics:
            note(f"{key} has no effect: there are no eval_metrics")


def answer_keys(config: RunConfig) -> list[str]:
    """What each evaluation logs of `eval_metrics`, by set: eval_cider, eval_charts_bleu_1."""
    return [
        f"{answer_prefix(name)}{key}"
        for name in config.data.eval_sets
        for metric in config.loop.eval_metrics
        for key in ([f"bleu_{n}" for n in range(1, 5)] if metric == "bleu" else [metric])
    ]


def answer_prefix(name: str) -> str:
    """What the metrics of an evaluation set begin with."""
    return f"eval_{name}_" if name else "eval_"


def _check_deepspeed(given: dict[str, Any], quantized: bool) -> None:
    """Raises ConfigError for a DeepSpeed file that cannot be read, builds the optimizer itself,
    saves no weights, or would split quantised or compiled ones."""
    settings = given.get("deepspeed")
    if isinstance(settings, str):
        try:
            settings = json.loads(Path(settings).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"deepspeed {Path(str(settings)).resolve()}",
                f"cannot be read: {error}",
                "give one of configs/zero/*.json, or a DeepSpeed config of your own",
            ) from None
    if not settings:
        return
    for block, keys in {
        "optimizer": "optim, learning_rate and weight_decay",
        "scheduler": "lr_scheduler_type and warmup_steps",
    }.items():
        if block in settings:
            raise ConfigError(
                f"deepspeed, {block}",
                "takes the place of ours, and the learning rates of train_modules would be lost",
                f"remove the block; {keys} set the same",
            )
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") == 3 and quantized:
        raise ConfigError(
            "deepspeed, zero_optimization.stage",
            "is 3, and ZeRO-3 cannot split weights of 4 or 8 bits",
            "use configs/zero/zero2.json, or leave load_in_4bit and load_in_8bit out",
        )
    if zero.get("stage") == 3 and any(given.get(key) for key in COMPILE_KEYS):
        raise ConfigError(
            "deepspeed, zero_optimization.stage",
            "is 3, and torch_compile would compile each layer in pieces between its gatherings",
            "use configs/zero/zero2.json, or leave torch_compile out",
        )
    gathers = "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and not zero.get(gathers):
        raise ConfigError(
            f"deepspeed, zero_optimization.{gathers}",
            "is not true, so the saved model would have no weights",
            "set it to true",
        )
    if not given.get("do_train", True) and zero.get("stage") != 3:
        note("deepspeed has no effect: evaluation alone can use stage 3 only")
        del given["deepspeed"]


def _check_unsupported(given: dict[str, Any]) -> None:
    """Raises ConfigError for host settings that our batches and saves do not follow."""
    if given.get("auto_find_batch_size"):
        raise ConfigError(
            "auto_find_batch_size",
            "would change the global batch, by which a run is resumed",
            "set per_device_train_batch_size; the error of a batch too large names its size",
        )
    if given.get("push_to_hub") and given.setdefault("hub_strategy", "end") != "end":
        raise ConfigError(
            "hub_strategy",
            f'"{given["hub_strategy"]}" would push unfinished models',
            'leave it out: the finished model is pushed ("end")',
        )
    order = given.get("train_sampling_strategy", "random")
    if order not in ("random", "sequential", "group_by_length"):
        raise ConfigError(
            "train_sampling_strategy",
            f'"{order}" is an order of the host, which our batches do not follow',
            "use group_by_length, which puts similar lengths side by side, or packing, whose rows "
            "cost every process the same",
        )
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if given.get(key, 1) < 1:
            raise ConfigError(key, f"is {given[key]}", "give 1 or more")
    for key in ("max_steps", "num_train_epochs"):
        if given.get(key) == 0 and given.get("do_train", True):
            raise ConfigError(key, "is 0, so nothing would be trained", "give a number above 0")


def _check_four_bits(config: RunConfig, args: SFTConfig) -> None:
    """Raises ConfigError where 4-bit layers would multiply in another type than without `selective`
    or `torch_compile`: those run bitsandbytes' products outside of autocast, which elsewhere casts
    their inputs (bitsandbytes 0.50)."""
    compute = config.adapter.bnb_4bit_compute_dtype
    cast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    changed = "selective" in (config.loop.recompute or "") or any(
        config.training.get(key) for key in COMPILE_KEYS
    )
    quantized = config.adapter.use_lora and config.adapter.load_in_4bit
    if quantized and changed and cast and compute not in (None, cast):
        raise ConfigError(
            "bnb_4bit_compute_dtype",
            f"is {compute} in a {cast} run, and recompute: selective or torch_compile would change "
            "the losses",
            f"leave it out or give {cast}, or set recompute to none or full and torch_compile to "
            "false",
        )


def host_refusal(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError("training settings", reason, "change or remove the key it names")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
