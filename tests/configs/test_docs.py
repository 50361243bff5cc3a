"""docs/config.md names every key with its present help text."""

from dataclasses import fields
from pathlib import Path

import pytest

from vlmtune.configs.adapter import AdapterConfig
from vlmtune.configs.schema import DataConfig, LoopConfig, ModelConfig

PAGE = (Path(__file__).parents[2] / "docs/config.md").read_text("utf-8").replace(r"\|", "|")
CONFIGS = (ModelConfig, DataConfig, LoopConfig, AdapterConfig)
KEYS = [field for config in CONFIGS for field in fields(config)]


@pytest.mark.parametrize("field", KEYS, ids=lambda f: f.name)
def test_page_has_the_key_and_its_help(field):
    assert f"| `{field.name}` |" in PAGE
    assert field.metadata["help"] in PAGE
