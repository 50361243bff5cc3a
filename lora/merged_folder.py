"""The folder a merge writes: whole or not there, with every file of the base but its weights."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from transformers import AutoConfig

from .. import __version__
from ..core.checkpoints import MERGE_FILE, RUN_FILE, STATE_FILE
from ..core.errors import ModelError
from ..core.logging import note
from .checkpoint import INDEX, OTHER_WEIGHTS, WEIGHTS, empty_model

LEFT_BEHIND = (
    *("*.safetensors", "*.index.json", *OTHER_WEIGHTS, "*.onnx_data", "*.distcp"),
    *("checkpoint-*", "global_step*", "runs", "base", "logs", "events.out.tfevents.*", "latest"),
    *(RUN_FILE, MERGE_FILE, STATE_FILE, "build.json", "README.md", "zero_to_fp32.py"),
    *("log.jsonl", "loss.png", "score.json", "predictions.json", "bad_samples.jsonl"),
    *("all_results.json", "train_results.json", "eval_results.json", ".*", "__pycache__"),
)
"""Of the base's files: weights in any format, and what tells of its own making."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that would destroy something. What a merge that was killed between two names
    had moved aside gets its name back.

    Raises:
        ModelError: it is a file, holds a model and `overwrite` is false, holds something else, or
            shares files with a source.
    """
    where, place = f"output {output}", output.resolve()
    for source in (folder.resolve() for folder in sources):
        if place == source or source in place.parents or place in source.parents:
            raise ModelError(
                where,
                f"and {source} are one folder, or one is inside the other",
                "name a folder beside it",
            )
    replaced = _beside(output, "replaced")
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    if output.exists() and not output.is_dir():
        raise ModelError(where, "is a file", "name a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / "config.json").exists():
        raise ModelError(
            where, "holds other files and no model", "name another folder, or empty this one"
        )
    if not overwrite:
        raise ModelError(where, "already holds a model", "name another folder, or pass --overwrite")


@contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `output` when all went well and is removed when
    not. An earlier output keeps the name until then.

    Raises:
        ModelError: the disk is full, or the folder cannot be written.
    """
    partial, replaced = _beside(output, "partial"), _beside(output, "replaced")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        partial.mkdir()
        yield partial
        for folder, _, names in os.walk(partial):
            for name in (*names, "."):
                _flush(os.path.join(folder, name))
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        _flush(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        full = error.errno in NO_SPACE
        free = shutil.disk_usage(_existing(output)).free / 2**30
        raise ModelError(
            f"output {output}",
            f"cannot be written: {'the disk is full' if full else error.strerror} "
            f"({free:.2f} GiB are free); nothing was written there",
            "free space or name a folder on another disk"
            if full
            else "name a folder that can be written",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError where `needed` bytes do not fit into the folder's disk."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kept_files(base: Path) -> list[Path]:
    """Paths in the base of what a merged model has too."""
    kept = []
    for folder, folders, names in os.walk(base, followlinks=True):
        folders[:] = [name for name in folders if not _left_behind(name)]
        inside = Path(folder).relative_to(base)
        kept += [inside / name for name in names if not _left_behind(name)]
    return sorted(kept)


def copy_files(base: Path, files: Sequence[Path], folder: Path) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(base / file, folder / file)
        except OSError as error:
            if error.filename != str(base / file):
                raise
            raise ModelError(
                f"base {base}",
                f"{file} cannot be read: {error.strerror}",
                "download or copy the model again",
            ) from None


def change_config(folder: Path, dtype: str | None, untie: bool) -> None:
    """Write a new dtype into config.json, and that no weights are tied, wherever it says so."""
    file = folder / "config.json"
    settings = json.loads(file.read_text("utf-8"))
    values: dict[str, Any] = {"torch_dtype": dtype, "dtype": dtype} if dtype else {}
    if untie:
        values["tie_word_embeddings"] = False
    _write_json(file, _with_values(settings, values))
    if not untie or not _tied(folder):
        return
    # The config class ties by default.
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    for key in config.sub_configs:
        if getattr(config, key) is text:
            settings.setdefault(key, {})["tie_word_embeddings"] = False
    _write_json(file, _with_values({**settings, "tie_word_embeddings": False}, values))
    if _tied(folder):
        raise ModelError(
            str(file),
            "ties the output head to the embeddings, which the adapter changed apart, and has no "
            "setting against it",
            "train the adapter without the embeddings and the head",
        )


def write_index(base: Path, folder: Path, sizes: dict[str, int], added: dict[str, Any]) -> None:
    """The base's index, if it has one, with today's sizes.

    Args:
        sizes: Bytes and parameters of all tensors, as `total_size` and `total_parameters`.
        added: File of each tensor that the base does not store.
    """
    if not (base / INDEX).exists() or (base / WEIGHTS).exists():
        return
    index = json.loads((base / INDEX).read_text("utf-8"))
    metadata = index.get("metadata") or {}
    metadata.update({key: value for key, value in sizes.items() if key in metadata})
    index["metadata"] = {**metadata, "total_size": sizes["total_size"]}
    index["weight_map"] = {**index["weight_map"], **added}
    _write_json(folder / INDEX, index)


def write_origin(folder: Path, origin: dict[str, Any]) -> None:
    """What the model was made of."""
    _write_json(folder / MERGE_FILE, origin)


def model_card(name: str, base: Path, origin: dict[str, Any]) -> str:
    """README.md: front matter of the Hub, with the base's licence, and what was merged."""
    source, adapters = origin["base"]["source"], origin["adapters"]
    card = base / "README.md"
    try:
        told = (metadata_load(card) if card.exists() else None) or {}
    except (ValueError, yaml.YAMLError):
        note(f"{card} cannot be read, so the model card names no licence")
        told = {}
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": told.get("pipeline_tag", "image-text-to-text"),
        "base_model": [source] if not Path(source).exists() else None,
        **{key: told.get(key) for key in ("license", "license_name", "license_link")},
        "tags": ["vlmtune", "merge"],
    }
    front = yaml.safe_dump({k: v for k, v in header.items() if v}, sort_keys=False)
    listed = "\n".join(f"- `{a['source']}`, weight {a['weight']:g}" for a in adapters)
    weights = "the weights it was trained on, quantised and dequantised again,"
    onto = weights if origin["onto"] == "dequantized" else "the original weights"
    libraries = ", ".join(f"{k} {v}" for k, v in origin["versions"].items())
    return (
        f"---\n{front}---\n\n# {name}\n\n"
        f"`{source}` with these LoRA adapters merged into it:\n\n{listed}\n\n"
        f"They were added to {onto} in float32 and rounded once"
        f"{' to ' + origin['dtype'] if origin['dtype'] else ''}. `{MERGE_FILE}` has the details.\n"
        f"Load it as you load its base; an Ovis2.5 after `import vlmtune.models`.\n\n"
        f"Merged with {libraries}.\n"
    )


def libraries() -> dict[str, str]:
    """Versions of what computes a merge."""
    return {"vlmtune": __version__} | {n: version(n) for n in ("torch", "transformers", "peft")}


def _beside(output: Path, name: str) -> Path:
    output = output.absolute()
    return output.with_name(f".{output.name}.{name}")


def _left_behind(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_BEHIND)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _flush(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tied(folder: Path) -> bool:
    config = AutoConfig.from_pretrained(folder)
    return bool(empty_model(config, str(folder)).all_tied_weights_keys)


def _with_values(settings: Any, values: dict[str, Any]) -> Any:
    """A copy with `values` wherever one of their keys stands."""
    if isinstance(settings, list):
        return [_with_values(item, values) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {k: values[k] if k in values else _with_values(v, values) for k, v in settings.items()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
