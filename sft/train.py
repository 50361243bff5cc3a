"""One training run: `vlmtune train config.json --key value`, alone or under torchrun."""

import hashlib
import json
import math
import os
import socket
import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, Trainer
from transformers.utils.import_utils import is_flash_attn_2_available
from trl.trainer.sft_config import SFTConfig

from ..collators.padded import PaddedCollator
from ..collators.rendering import Thinking
from ..collators.sample import SampleEncoder
from ..configs.schema import RunConfig
from ..core.distributed import launched_by_torchrun, main_process_first, rank, world_size
from ..core.errors import ConfigError, ModelError
from ..core.logging import note, say
from ..data.dataset import PreparedData, prepare_dataset
from ..data.images import PixelLimits
from ..models import Ovis2_5, Ovis2_5Config, Ovis2_5Processor
from .callbacks import JsonLinesLog
from .output import check_output_dir, save_finished, write_ledger
from .trainer import make_trainer


def run(config: RunConfig) -> None:
    """Train as configured and leave a complete model in the output folder.

    Raises:
        VLMTuneError: before any training step, for what the user can mend.
    """
    for line in config.notes:
        note(line)
    args = training_arguments(config)
    folder = Path(args.output_dir or ".")
    try:
        encoder, train, evaluation = main_process_first(lambda: load_data(config, args))
        model = load_model(config)
        try:
            trainer = make_trainer(
                config.model.trainer,
                model,
                args,
                PaddedCollator(encoder),
                train.dataset,
                evaluation.dataset if evaluation else None,
                [JsonLinesLog()],
            )
        except (ValueError, ImportError) as error:
            raise host_refusal(error) from error
        say(banner(config, args, model, train, evaluation))
        if config.training.get("do_train", True):
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            save_finished(trainer, model, config)
            say(f"Saved the model to {folder.resolve()}")
        if evaluation and config.training.get("do_eval", True):
            say(f"Evaluation: loss {final_loss(trainer):.4f}")
    finally:
        # Without this some DeepSpeed runs abort at interpreter exit.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def final_loss(trainer: Trainer) -> float:
    """Evaluation loss of the model as saved, computed unless the last step was just evaluated."""
    state = trainer.state
    for entry in reversed(state.log_history if not trainer.args.load_best_model_at_end else []):
        if "eval_loss" in entry and entry["step"] == state.global_step:
            return entry["eval_loss"]
    return trainer.evaluate()["eval_loss"]


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


def load_data(
    config: RunConfig, args: SFTConfig
) -> tuple[SampleEncoder, PreparedData, PreparedData | None]:
    """The checked data of a run, with samples that were left out in the ledger.

    Raises:
        VLMTuneError: the output folder is taken, the processor cannot be loaded, or a sample is
            bad.
    """
    folder = Path(args.output_dir or ".")
    if rank() == 0 and config.training.get("do_train", True):
        check_output_dir(folder, config.model.overwrite_output_dir, args.resume_from_checkpoint)
    encoder = sample_encoder(config, load_processor(config.model.model_path))
    train = prepare(config, config.data.data_path, encoder)
    evaluation = None
    if config.data.eval_data_path:
        evaluation = prepare(config, config.data.eval_data_path, encoder)
    if rank() == 0:
        write_ledger(folder, train.left_out + (evaluation.left_out if evaluation else []))
    return encoder, train, evaluation


def load_processor(path: str) -> Ovis2_5Processor:
    """Raises ModelError when the checkpoint cannot be read or is of another family."""
    where = f"model_path {path}"
    fix = "give a folder with config.json, weights and tokenizer, or a Hub name"
    names_a_folder = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not Path(path).exists() and (names_a_folder or Path(path).parent.is_dir()):
        raise ModelError(f"model_path {Path(path).resolve()}", "there is no such folder", fix)
    try:
        config = AutoConfig.from_pretrained(path)
        if isinstance(config, Ovis2_5Config):
            return AutoProcessor.from_pretrained(path)
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(where, f"cannot be loaded: {reason}", fix) from error
    raise ModelError(
        where,
        f'has model_type "{config.model_type}"',
        'use an Ovis2.5 checkpoint (model_type "ovis2_5" or "ovis")',
    )


def load_model(config: RunConfig) -> Ovis2_5:
    """The model in float32, with the configured parts frozen.

    Raises:
        ModelError: weights are missing, broken or of another shape.
    """
    settings, attention = config.model, config.model.attn_implementation
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        note("attn_implementation is sdpa: flash-attn 2 is not installed, or there is no GPU")
        attention = "sdpa"
    try:
        loaded: Any = Ovis2_5.from_pretrained(
            settings.model_path,
            dtype="float32",
            attn_implementation=attention,
            output_loading_info=True,
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model_path {settings.model_path}",
            f"the weights cannot be loaded: {' '.join(str(error).split())}",
            "give a folder with complete .safetensors files that fit its config.json",
        ) from error
    if settings.freeze_llm:
        model.llm.requires_grad_(False)
    if settings.freeze_vision_tower:
        model.visual_tokenizer.vit.requires_grad_(False)
    return model


def sample_encoder(config: RunConfig, processor: Ovis2_5Processor) -> SampleEncoder:
    data = config.data
    return SampleEncoder(
        processor=processor,
        limits=PixelLimits(**{name: getattr(data, name) for name in PixelLimits.__annotations__}),
        multimodal_max_length=data.multimodal_max_length,
        text_max_length=data.text_max_length,
        thinking=cast(Thinking, data.thinking),
    )


def prepare(config: RunConfig, paths: list[str], encoder: SampleEncoder) -> PreparedData:
    processor = encoder.processor
    settings = {
        "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
        "image_processor": processor.image_processor.to_dict(),
        "limits": asdict(encoder.limits),
        "lengths": [encoder.multimodal_max_length, encoder.text_max_length],
        "thinking": encoder.thinking,
    }

    def measure(conversation, sizes) -> tuple[int, int]:
        encoded = encoder.encode(conversation, sizes)
        return len(encoded.ids), encoded.trained_tokens

    return prepare_dataset(
        paths,
        config.data.image_folder,
        check_files=encoder.check_files,
        measure=measure,
        skip_bad=config.data.on_bad_sample == "skip",
        fingerprint=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    )


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a run, as the trainer will count them."""

    batch: int
    per_epoch: int
    total: int


def schedule(samples: int, args: SFTConfig) -> Schedule:
    """Effective batch and steps: per-device batch x accumulation x processes.

    Raises:
        ConfigError: there is no whole batch.
    """
    ranks, accumulation = world_size(), args.gradient_accumulation_steps
    batch = args.per_device_train_batch_size
    if batch < 1:
        raise ConfigError("per_device_train_batch_size", f"is {batch}", "give 1 or more")
    if args.dataloader_drop_last:
        batches = samples // batch // ranks
    else:
        batches = math.ceil(math.ceil(samples / batch) / ranks)
    if batches == 0:
        raise ConfigError(
            "dataloader_drop_last",
            f"drops everything: {samples} samples fill no batch of {batch} on {ranks} processes",
            "lower per_device_train_batch_size, or leave dataloader_drop_last out",
        )
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Schedule(batch * accumulation * ranks, per_epoch, total)


def banner(
    config: RunConfig,
    args: SFTConfig,
    model: PreTrainedModel,
    train: PreparedData,
    evaluation: PreparedData | None,
) -> str:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
    plan = schedule(len(train.dataset), args)
    held_out = len(evaluation.dataset) if evaluation else 0
    left_out = len(train.left_out) + (len(evaluation.left_out) if evaluation else 0)
    lengths = train.dataset["length"]
    lines = {
        "model": f"{config.model.model_path} ({type(model).__name__}, {model.dtype})",
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.1%})",
        "samples": f"{len(train.dataset):,} train, {held_out:,} eval"
        + (f", {left_out:,} left out (bad_samples.jsonl)" if left_out else ""),
        "tokens": f"{sum(lengths):,} in all, longest sample {max(lengths):,}, "
        f"{sum(train.dataset['trained_tokens']) / sum(lengths):.1%} trained",
        "batch": f"{plan.batch} = {args.per_device_train_batch_size} per device x "
        f"{args.gradient_accumulation_steps} accumulation x {world_size()} processes",
        "steps": f"{plan.total:,} = {plan.per_epoch:,} per epoch, "
        f"{plan.total / plan.per_epoch:.2f} epochs",
        "trainer": f"{config.model.trainer}, learning rate {args.learning_rate:g}, "
        f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'} on {args.device.type}",
        "output": str(Path(args.output_dir or ".").resolve()),
    }
    return "\n".join(f"  {key:8} {value}" for key, value in lines.items())
