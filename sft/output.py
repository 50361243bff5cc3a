"""The folder a run leaves behind: complete, loadable offline, never half written."""

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from .. import __version__
from ..configs.schema import RunConfig
from ..core.distributed import world_size
from ..core.errors import ConfigError

RUN_FILE = "vlmtune_run.json"
LEDGER_FILE = "bad_samples.jsonl"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")


def check_output_dir(folder: Path, overwrite: bool, resume: str | bool | None) -> None:
    """Refuse to write over a finished model, or to resume from nothing.

    Raises:
        ConfigError: the folder holds a model and `overwrite` is false, is a file, or `resume`
            names no checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder.resolve()}", "is a file", "name a folder")
    if resume:
        named = Path(resume) if isinstance(resume, str) else None
        if not (named.is_dir() if named else any(folder.glob("checkpoint-*"))):
            raise ConfigError(
                "resume_from_checkpoint",
                f"there is no checkpoint at {named or folder}",
                "give the path of a checkpoint folder, or leave the key out",
            )
        return
    if not overwrite and (folder / "config.json").exists():
        raise ConfigError(
            f"output_dir {folder.resolve()}",
            "already holds a finished model",
            "choose another output_dir, or pass --overwrite_output_dir",
        )


def write_ledger(folder: Path, left_out: list[dict[str, Any]]) -> None:
    """Each sample left out, with its reason, one object per line."""
    path = folder / LEDGER_FILE
    if not left_out:
        path.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out)
    path.write_text(lines, "utf-8", errors="backslashreplace")


def save_finished(trainer: Trainer, model: PreTrainedModel, config: RunConfig) -> None:
    """Save model, processor, run settings and model card into the output folder.

    Everything is written beside its place and moved there at the end, config.json last, so a
    killed save leaves no folder that looks finished.
    """
    folder = Path(trainer.args.output_dir or ".")
    partial = folder / ".partial"
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    model.config.use_cache = True
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(partial / "trainer_state.json"))
        run = {
            "config": config.to_dict(),
            "training_arguments": trainer.args.to_dict(),
            "processes": world_size(),
            "versions": versions(),
        }
        (partial / RUN_FILE).write_text(json.dumps(run, indent=2, default=str) + "\n", "utf-8")
        (partial / "README.md").write_text(model_card(config, folder.name), "utf-8")
        for stale in ["config.json", *(f.name for f in folder.glob("model*.safetensors*"))]:
            (folder / stale).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda f: f.name == "config.json"):
            file.chmod(0o644)  # the host writes weights for their owner alone
            file.replace(folder / file.name)
        partial.rmdir()
    trainer.accelerator.wait_for_everyone()


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
    header = f"base_model: {base}\n" if not Path(base).exists() else ""
    data = "\n".join(f"- `{path}`" for path in config.data.data_path)
    libraries = ", ".join(f"{k} {v}" for k, v in versions().items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n{header}"
        f"tags:\n- vlmtune\n- sft\n---\n\n# {name}\n\n"
        f"Fine-tuned from `{base}` with vlmtune on:\n\n{data}\n\n"
        f"Every setting is in `{RUN_FILE}`. Load it after `import vlmtune.models` with\n"
        f"`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained`.\n\n"
        f"Trained with {libraries}.\n"
    )
