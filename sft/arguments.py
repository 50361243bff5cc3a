"""The host's settings for a run: the user's keys over what fits the machine and our collator."""

import os
import socket
import warnings
from importlib.util import find_spec

import torch
from trl.trainer.sft_config import SFTConfig

from ..configs.schema import RunConfig
from ..core.distributed import launched_by_torchrun
from ..core.errors import ConfigError
from ..core.logging import note


def training_arguments(config: RunConfig) -> SFTConfig:
    """The user's keys over our defaults: what fits the machine, and what our collator needs.

    Raises:
        ConfigError: evaluation is asked for without evaluation data, or the host refuses a value.
    """
    given = dict(config.training)
    cpu = given.get("use_cpu", not torch.cuda.is_available())
    if cpu and given.pop("tf32", False):
        note("tf32 has no effect on CPU")
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
    if config.model.trainer == "standard" and given.get("label_smoothing_factor"):
        raise ConfigError(
            "label_smoothing_factor",
            "is not shifted by the standard trainer for this model",
            'use "trainer": "trl"',
        )
    if "eval_steps" in given and "eval_strategy" not in given and config.data.eval_data_path:
        given["eval_strategy"] = "steps"
    dtype = config.model.torch_dtype
    half = dtype if dtype in ("bfloat16", "float16") else None
    if half:
        note(f"torch_dtype {dtype}: the model computes in it, its weights are kept in float32")
    defaults = {
        "use_cpu": cpu,
        "bf16": (not cpu or half == "bfloat16") and half != "float16" and not given.get("fp16"),
        "fp16": half == "float16" and not given.get("bf16"),
        # A NaN is shown, not replaced by the last good loss.
        "logging_nan_inf_filter": False,
        # Other processes wait this long, in seconds, while the first checks the data.
        "ddp_timeout": 4 * 3600,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else "none",
        # Every rank runs every trainable part (Ovis2_5._vision_must_run), so DDP need not search.
        "ddp_find_unused_parameters": False,
    }
    required = {
        "remove_unused_columns": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    if given.get("deepspeed") and not launched_by_torchrun():
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    if cpu and launched_by_torchrun():
        defaults["ddp_backend"] = "gloo"
    with warnings.catch_warnings():
        # TRL and configs use the name that transformers 5.18 knows; 5.23 warns of it.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
        try:
            args = SFTConfig(**{**defaults, **given, **required})
        except (ValueError, TypeError, ImportError) as error:
            raise host_refusal(error) from error
    if args.n_gpu > 1:
        # transformers would split one batch over the GPUs, images apart from their text.
        args._n_gpu = 1
        note("one process trains on one GPU; for more: scripts/train_launch.sh CONFIG N")
    if args.deepspeed and cpu:
        # With use_cpu, transformers starts torch.distributed but not deepspeed.comm (0.19).
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    return args


def host_refusal(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError("training settings", reason, "change or remove the key it names")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
