"""The folder a run leaves behind: complete, loadable offline, never half written."""

import json
import platform
import shutil
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from trl.trainer.sft_config import SFTConfig

from .. import __version__
from ..configs.adapter import AdapterConfig
from ..configs.schema import RunConfig
from ..core.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE, latest_checkpoint
from ..core.distributed import world_size
from ..core.errors import ConfigError
from ..core.logging import note
from ..data.images import PixelLimits
from ..models.parts import FREEZES
from .arguments import global_batch
from .curve import draw_losses
from .failures import unwritable

PARTIAL = ".partial-checkpoint"
"""Where a checkpoint is written before it is complete."""

ANSWERS = "eval_samples"
"""Where the answers of each evaluation are written."""

LAST = ("config.json", ADAPTER_CONFIG)
"""What makes a folder a model or an adapter; moved there last."""

ADAPTER_KEYS = [f.name for f in fields(AdapterConfig)]
PACKING = {"packing": False, "packing_length": None, "packing_max_patches": None}
"""Keys of packing, as they are for checkpoints written before there was any."""
ORDER_KEYS = (
    "multimodal_max_length",
    "text_max_length",
    "thinking",
    "mix",
    "streaming",
    "shuffle_buffer",
    *PixelLimits.__annotations__,
)
"""What lengths, and by them an order, follow from."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")


def check_output_dir(folder: Path, overwrite: bool, resume: str | bool | None) -> str | None:
    """Refuse to write over a finished model, or to resume from nothing.

    Returns:
        The checkpoint to resume from; for `resume` true the last complete one in the folder.

    Raises:
        ConfigError: the folder holds a model or checkpoints and `overwrite` is false, is a file,
            or `resume` names no complete checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder.resolve()}", "is a file", "name a folder")
    newest = latest_checkpoint(folder)
    if resume:
        found = Path(resume) if isinstance(resume, str) else newest
        if found is None or not (found / "trainer_state.json").is_file():
            raise ConfigError(
                "resume_from_checkpoint",
                f"there is no complete checkpoint at {found or folder}",
                "give the path of a checkpoint folder, or leave the key out",
            )
        if (folder / PARTIAL).exists():
            note(f"a checkpoint that was not written to its end is left out; resuming {found.name}")
        return str(found)
    if not overwrite and any((folder / name).exists() for name in LAST):
        raise ConfigError(
            f"output_dir {folder.resolve()}",
            "already holds a finished model or adapter",
            "choose another output_dir, or pass --overwrite_output_dir",
        )
    if not overwrite and newest:
        raise ConfigError(
            f"output_dir {folder.resolve()}",
            f"holds {newest.name} of a run that was not finished",
            "pass --resume_from_checkpoint true to go on with it, or --overwrite_output_dir to "
            "begin anew, which removes its checkpoints",
        )
    return None


def remove_checkpoints(folder: Path) -> None:
    """Of an earlier run, its answers too, so that none is taken for the run's that begins."""
    (folder / RUN_FILE).unlink(missing_ok=True)  # its model is no longer this run's result
    for stale in [*folder.glob("checkpoint-*"), folder / PARTIAL, folder / ANSWERS]:
        shutil.rmtree(stale, ignore_errors=True)


def check_resumable(checkpoint: Path, config: RunConfig, args: SFTConfig) -> None:
    """Whether this run continues the one that wrote the checkpoint: steps count samples by the
    global batch and the order of an epoch, and optimizer states belong to modules and to an engine.

    Raises:
        ConfigError: it was written with another batch, order, engine, `train_modules` or
            adapters, or without optimizer states.
    """
    states = list(checkpoint.glob("global_step*" if args.deepspeed else "optimizer.pt"))
    if not states:
        raise _other(
            checkpoint,
            f"holds no optimizer states {'of' if args.deepspeed else 'without'} DeepSpeed",
            "resume with the deepspeed setting it was written with, and without save_only_model",
        )
    file = checkpoint / RUN_FILE
    if not file.exists():
        return
    written = json.loads(file.read_text("utf-8"))
    batch = global_batch(args)
    if written["global_batch"] != batch:
        raise _other(
            checkpoint,
            f"was written with a global batch of {written['global_batch']}, this run has {batch}",
            "change per_device_train_batch_size or gradient_accumulation_steps so that the batch "
            "is the same",
        )
    if args.deepspeed and written["processes"] != world_size():
        raise _other(
            checkpoint,
            f"was written by {written['processes']} processes, this run has {world_size()}",
            "DeepSpeed needs the same number",
        )
    resolved = config.to_dict()
    now = {key: resolved[key] for key in ("train_modules", *FREEZES, *ADAPTER_KEYS, *ORDER_KEYS)}
    then = {**PACKING, **now, **written["config"]}
    now |= {key: resolved[key] for key in PACKING}
    of_host = ["seed", "data_seed", "dataloader_drop_last"]
    if not config.data.streaming:
        of_host.append("train_sampling_strategy")
    host = args.to_dict()
    now |= {key: host[key] for key in of_host}
    then |= {key: written["training_arguments"][key] for key in of_host}
    for key, value in now.items():
        if then[key] != value:
            raise _other(
                checkpoint,
                f"was written with {key} {json.dumps(then[key])}, this run has {json.dumps(value)}",
                f"give the same {key}",
            )


def _other(checkpoint: Path, what: str, fix: str) -> ConfigError:
    anew = "or start a new run with the checkpoint as model_path, an adapter's as adapter_path"
    return ConfigError("resume_from_checkpoint", f"{checkpoint.name} {what}", f"{fix}, {anew}")


def save_finished(
    trainer: Trainer,
    model: PreTrainedModel | PeftModel,
    config: RunConfig,
    facts: dict[str, Any],
) -> None:
    """Save the model or adapter, processor, run settings, card and loss curve into the output
    folder.

    Everything is written beside its place and moved there at the end, config.json or
    adapter_config.json last, so a killed save leaves no folder that looks finished.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
    """
    folder = Path(trainer.args.output_dir or ".")
    partial = folder / ".partial"
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    model.config.use_cache = True  # type: ignore[union-attr]
    with unwritable(partial, "final model"):
        trainer.save_model(str(partial), _internal_call=True)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(partial / "trainer_state.json"))
            describe_run(trainer, config, facts, partial)
            draw_losses(trainer.state.log_history, partial / "loss.png")
    if trainer.is_world_process_zero():
        weights = [f.name for f in folder.glob("model*.safetensors*")]
        for stale in [*LAST, ADAPTER_WEIGHTS, "generation_config.json", *weights]:
            (folder / stale).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda f: f.name in LAST):
            file.chmod(0o644)  # the host writes weights for their owner alone
            file.replace(folder / file.name)
        partial.rmdir()
        if trainer.args.push_to_hub:
            upload_folder(
                repo_id=str(trainer.hub_model_id),
                folder_path=folder,
                token=trainer.args.hub_token,
                ignore_patterns=["checkpoint-*", ".partial*", "base/*", f"{ANSWERS}/*"],
            )
    trainer.accelerator.wait_for_everyone()
    model.config.use_cache = False  # type: ignore[union-attr] # an evaluation that follows needs none


def describe_run(trainer: Trainer, config: RunConfig, facts: dict[str, Any], folder: Path) -> None:
    """Write the resolved config with the versions, and the model card, beside the weights."""
    run = {
        **facts,
        "config": {k: v for k, v in config.to_dict().items() if k != "hub_token"},
        "training_arguments": trainer.args.to_dict(),
        "processes": world_size(),
        "global_batch": global_batch(trainer.args),
        "step": trainer.state.global_step,
        "versions": versions(),
    }
    (folder / RUN_FILE).write_text(json.dumps(run, indent=2, default=str) + "\n", "utf-8")
    name = Path(trainer.args.output_dir or ".").name
    (folder / "README.md").write_text(model_card(config, name), "utf-8")


def versions() -> dict[str, str]:
    found = {"vlmtune": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_card(config: RunConfig, name: str) -> str:
    base = config.model.model_path
    adapter = config.adapter.use_lora
    library = "peft" if adapter else "transformers"
    kind = "- lora\n" if adapter else ""
    header = f"base_model: {base}\n" if not Path(base).exists() else ""
    data = "\n".join(f"- `{path}`" for path in config.data.data_path)
    libraries = ", ".join(f"{k} {v}" for k, v in versions().items())
    loading = (
        "Load the model after `import vlmtune.models` with\n`AutoModelForImageTextToText`, then "
        "the adapter with `PeftModel.from_pretrained`,\nor make one model of both with "
        "`vlmtune merge`."
        if adapter
        else "Load it after `import vlmtune.models` with\n"
        "`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained`."
    )
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: image-text-to-text\n{header}"
        f"tags:\n- vlmtune\n- sft\n{kind}---\n\n# {name}\n\n"
        f"{'An adapter of' if adapter else 'Fine-tuned from'} `{base}`, trained with vlmtune on:"
        f"\n\n{data}\n\nEvery setting is in `{RUN_FILE}`. {loading}\n\n"
        f"Trained with {libraries}.\n"
    )
