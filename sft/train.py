"""One training run: `vlmtune train config.json --key value`, alone or under torchrun."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerState, set_seed
from transformers.utils.import_utils import is_flash_attn_2_available
from trl.trainer.sft_config import SFTConfig

from ..configs.recompute import parse_recompute
from ..configs.schema import RunConfig
from ..core.checkpoints import RESUMABLE
from ..core.distributed import main_process_first, of_first_process, rank, world_size
from ..core.errors import ConfigError, ModelError, VLMTuneError
from ..core.logging import note, say
from ..lora.checkpoint import Checkpoint
from ..lora.quantization import keep_unpacked
from ..models import Ovis2_5
from ..models.attention import packing_attention
from ..models.loading import load_processor
from ..models.ovis2_5.build import ensure_base
from .adapters import AdapterPlan, apply_adapters, plan_adapters
from .arguments import COMPILE_KEYS, answer_keys, host_refusal, training_arguments
from .batches import train_batches
from .callbacks import FreshAdam, JsonLinesLog, StopOnSignal
from .data import RunData, load_data
from .modules import apply_train_modules
from .output import check_output_dir, check_resumable, remove_checkpoints, save_finished
from .plan import banner
from .recompute import apply_recompute, compile_layers, recompute_line
from .rows import check_rows, plan_rows
from .trainer import make_trainer


def run(config: RunConfig) -> None:
    """Train as configured and leave a complete model in the output folder.

    Raises:
        VLMTuneError: before any training step, for what the user can mend; later for what no check
            could see.
        SystemExit: with 75, after a signal asked for the end and a checkpoint was written.
    """
    for line in config.notes:
        note(line)
    # Texts are tokenized one at a time; with threads, tokenizers warns when loaders are forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = training_arguments(config)
    stop = StopOnSignal()
    folder = Path(args.output_dir or ".")
    training = config.training.get("do_train", True)
    try:
        checkpoint = None
        if training:
            checkpoint = check_output_dir(
                folder, config.loop.overwrite_output_dir, args.resume_from_checkpoint
            )
            checkpoint = of_first_process(checkpoint)
        if checkpoint:
            check_resumable(Path(checkpoint), config, args)
        config.model.model_path = main_process_first(lambda: base_model(config, folder))
        processor = load_processor(config.model.model_path)
        base, plan, facts = None, None, {}
        if config.adapter.use_lora:
            base = Checkpoint.open(config.model.model_path)
            plan = plan_adapters(base, config, frozen_dtype(args))
            facts = plan.facts(base)
        data = main_process_first(lambda: load_data(config, args, processor))
        if config.data.packing and training:
            check_rows(config, data)
        bits = quantized(config, args, base, plan) if base and plan else {}
        model = load_model(config, frozen_dtype(args) if plan else "float32", **bits)
        check_positions(model, data)
        if plan:
            set_seed(args.seed)  # new adapters start at random, the same on every rank
            model, modules = apply_adapters(model, config, plan, args.learning_rate)
        else:
            modules = apply_train_modules(model, config.model, args.learning_rate)
        if config.loop.recompute:
            apply_recompute(model, parse_recompute(config.loop.recompute))
        batches = None
        if data.train is not None:
            packed = config.data.packing and training
            packing = plan_rows(config, model, data) if packed else None
            batches = train_batches(args, data, packing, rank(), world_size())
        try:
            switch, backend, mode = (config.training.get(key) for key in COMPILE_KEYS)
            if switch or backend or mode:
                compile_layers(model, backend or "inductor", mode)
            callbacks = [JsonLinesLog(), FreshAdam(), stop]
            trainer = make_trainer(config, model, args, data, batches, modules, callbacks, facts)
        except VLMTuneError:
            raise
        except (ValueError, ImportError, RuntimeError) as error:
            raise host_refusal(error) from error
        say(banner(config, args, model, modules, data, batches))
        if training:
            if not checkpoint and rank() == 0:
                remove_checkpoints(folder)
            begun = steps_done(checkpoint) if checkpoint else 0
            if data.stream:
                data.stream.skip(begun * args.gradient_accumulation_steps)
            trainer.train(resume_from_checkpoint=checkpoint)
            if stop.requested:
                say(f"Stopped by a signal; checkpoint-{trainer.state.global_step} is complete.")
                say("Go on with: --resume_from_checkpoint auto")
                _leave_the_group()
                raise SystemExit(RESUMABLE)
            if config.loop.recompute:
                policies = parse_recompute(config.loop.recompute)
                history = [e for e in trainer.state.log_history if e["step"] > begun]
                say(recompute_line(policies, history))
            save_finished(trainer, model, config, facts)
            say(f"Saved the {'adapter' if plan else 'model'} to {folder.resolve()}")
        if data.evaluation and config.training.get("do_eval", True):
            for name, value in final_metrics(config, trainer).items():
                say(f"Evaluation: {name} {value:.4f}")
        # Not after an error: ending the group could wait for processes that never come.
        _leave_the_group()
    finally:
        stop.release()


def _leave_the_group() -> None:
    """Without this some DeepSpeed runs abort at interpreter exit."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # gloo (torch 2.13) can hang when a rank leaves during a gather
        torch.distributed.destroy_process_group()


def final_metrics(config: RunConfig, trainer: Trainer) -> dict[str, float]:
    """Evaluation losses of the model as saved, and what its answers were worth: computed unless
    they are in the log."""
    state = trainer.state
    step = state.global_step
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        step = state.best_global_step
    found: dict[str, float] = {}
    for entry in state.log_history:
        if entry["step"] == step:
            found.update(entry)
    answers = answer_keys(config)
    if not {"eval_loss", *answers} <= found.keys():
        found = trainer.evaluate()
    losses = [key for key in found if key.startswith("eval_") and key.endswith("loss")]
    return {key: found[key] for key in (*losses, *answers)}


def base_model(config: RunConfig, folder: Path) -> str:
    """The model to start from; one built of `llm_name_or_path` and `vit_name_or_path` where no
    `model_path` is given."""
    settings = config.model
    if settings.model_path:
        return settings.model_path
    assert settings.llm_name_or_path and settings.vit_name_or_path
    base = ensure_base(
        settings.llm_name_or_path,
        settings.vit_name_or_path,
        folder / "base",
        visual_vocab_size=settings.visual_vocab_size or 65536,
    )
    return str(base)


def check_positions(model: Ovis2_5, data: RunData) -> None:
    """Raises ConfigError for samples longer than the language model has positions."""
    limit = getattr(model.config.llm_config, "max_position_embeddings", None)
    encoder = data.encoder
    longest = max(
        data.train.longest if data.train else encoder.multimodal_max_length,
        0 if data.train else encoder.text_max_length,
        *(prepared.longest for prepared in data.evaluation.values()),
    )
    if limit and longest > limit:
        raise ConfigError(
            "multimodal_max_length, text_max_length",
            f"a sample may have {longest:,} tokens, the language model has {limit:,} positions",
            f"set both to {limit} or less",
        )


def steps_done(checkpoint: str) -> int:
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    return state.global_step


def frozen_dtype(args: SFTConfig) -> str:
    """What weights that are not trained are kept in: what the run computes in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def quantized(
    config: RunConfig, args: SFTConfig, base: Checkpoint, plan: AdapterPlan
) -> dict[str, Any]:
    """What makes `from_pretrained` quantise as planned."""
    if not plan.quantization:
        return {}
    compute = config.adapter.bnb_4bit_compute_dtype or frozen_dtype(args)
    settings = plan.quantization.host_config(base.model, compute)
    return {"quantization_config": settings, "device_map": {"": args.device}}


def load_model(config: RunConfig, dtype: str, **bits: Any) -> Ovis2_5:
    """The model in `dtype`; `bits` is passed on to `from_pretrained`.

    Raises:
        ModelError: weights are missing, broken or of another shape.
    """
    settings, attention = config.model, config.model.attn_implementation
    if config.data.packing:
        attention = packing_attention(attention)
    elif attention == "flash_attention_2" and not is_flash_attn_2_available():
        note("attn_implementation is sdpa: flash-attn 2 is not installed, or there is no GPU")
        attention = "sdpa"
    try:
        loaded: Any = Ovis2_5.from_pretrained(
            settings.model_path,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            **bits,
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
    keep_unpacked(model)
    return model
