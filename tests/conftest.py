"""Fixtures for every room: the golden numbers, and checkpoint folders made from them."""

import json
import os
import shutil
import tempfile
from pathlib import Path

# Read by huggingface_hub when it is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Prepared data of the runs that tests start.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vlmtune-datasets-")

import pytest

OVIS_GOLDENS = Path(__file__).parent / "goldens" / "ovis2_5"


@pytest.fixture(scope="session")
def ovis_goldens() -> Path:
    return OVIS_GOLDENS


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(case, key=value, llm_config={...})` is a folder in the published layout: one
    case's model and preprocessor beside the tokenizer, with those keys of config.json changed."""

    def build(case: str = "full_single_untied", **changes) -> Path:
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.glob('checkpoint-*')))}"
        shutil.copytree(OVIS_GOLDENS / "tokenizer", folder)
        for name in ("model.safetensors", "preprocessor_config.json"):
            shutil.copy(OVIS_GOLDENS / case / name, folder)
        config = json.loads((OVIS_GOLDENS / case / "config.json").read_text("utf-8"))
        for key, value in changes.items():
            config[key] = {**config[key], **value} if key.endswith("_config") else value
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return folder

    return build
