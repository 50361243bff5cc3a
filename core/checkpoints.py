"""Checkpoints of a run on disk, found without the host libraries."""

import json
import re
from pathlib import Path
from typing import Any

from .errors import ModelError

RUN_FILE = "vlmtune_run.json"
"""Resolved config and versions; with config.json beside it a run has saved its model."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

MERGE_FILE = "vlmtune_merge.json"
"""What a merged model was made of, with the config of the run that trained its first adapter."""

STATE_FILE = "trainer_state.json"
"""What is written last into a checkpoint."""

RESUMABLE = 75
"""Exit status of a run that a signal stopped and that can be resumed: EX_TEMPFAIL of sysexits.h."""

MODEL_FORM = "give a folder with config.json, weights and tokenizer, or a Hub name"


def require_model(path: str) -> None:
    """Raises ModelError for a folder that is not there; whether the Hub has a name shows later."""
    folder = Path(path)
    names_a_folder = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not folder.exists() and (names_a_folder or folder.parent.is_dir()):
        what = "there is no such folder"
        raise ModelError(f"model_path {folder.resolve()}", what, MODEL_FORM)


def run_config(folder: Path) -> dict[str, Any]:
    """Config of the run that trained a model, an adapter, or the first adapter of a merged model;
    empty where no file says it.

    Raises:
        ModelError: the file is broken.
    """
    for name, key in ((RUN_FILE, "config"), (MERGE_FILE, "run")):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text("utf-8")).get(key, {})
        except (ValueError, AttributeError):
            found = None
        if not isinstance(found, dict):
            fix = "copy it again from the run, or delete it"
            raise ModelError(str(file), "is no file of a run", fix)
        return found
    return {}


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete `checkpoint-N` of the highest step N."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    }
    return found[max(found)] if found else None
