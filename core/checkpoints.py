"""Checkpoints of a run on disk, found without the host libraries."""

import re
from pathlib import Path

RUN_FILE = "vlmtune_run.json"
"""Resolved config and versions; with config.json beside it a run has saved its model."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

MERGE_FILE = "vlmtune_merge.json"
"""What a merged model was made of."""

STATE_FILE = "trainer_state.json"
"""What is written last into a checkpoint."""

RESUMABLE = 75
"""Exit status of a run that a signal stopped and that can be resumed: EX_TEMPFAIL of sysexits.h."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete `checkpoint-N` of the highest step N."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    }
    return found[max(found)] if found else None
