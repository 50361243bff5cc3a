"""One training run: `vlmtune train config.json --key value`, alone or under torchrun."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, Trainer
from transformers.utils.import_utils import is_flash_attn_2_available
from trl.trainer.sft_config import SFTConfig

from ..collators.padded import PaddedCollator
from ..collators.rendering import Thinking
from ..collators.sample import SampleEncoder
from ..configs.schema import RunConfig
from ..core.distributed import main_process_first, rank
from ..core.errors import ModelError
from ..core.logging import note, say
from ..data.dataset import PreparedData, prepare_dataset
from ..data.images import PixelLimits
from ..models import Ovis2_5, Ovis2_5Config, Ovis2_5Processor
from .arguments import host_refusal, training_arguments
from .callbacks import JsonLinesLog
from .output import check_output_dir, save_finished, write_ledger
from .plan import banner
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
