"""Every kind of finding on a small broken input of its own: tests/bad_data/CODE/ holds the data
and, in expected.json, the findings of its report."""

import json
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoProcessor

import vlmtune.models  # noqa: F401  registers Ovis2.5
from vlmtune.collators.sample import SampleEncoder
from vlmtune.collators.sample_checks import check_sample
from vlmtune.configs.schema import DataConfig
from vlmtune.data.findings import CODES
from vlmtune.data.images import PixelLimits
from vlmtune.data.validate import arguments, run

FOLDERS = sorted((Path(__file__).parent / "bad_data").iterdir())


@pytest.fixture(scope="module")
def processor(tiny_ovis):
    return AutoProcessor.from_pretrained(tiny_ovis)


def checks_of(data: DataConfig, processor):
    """The checks that a run's config adds."""
    encoder = SampleEncoder(
        processor,
        PixelLimits(**{key: getattr(data, key) for key in PixelLimits.__annotations__}),
        data.multimodal_max_length,
        data.text_max_length,
        data.thinking,
    )
    return partial(check_sample, encoder)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_findings_are_the_expected_ones(folder, tmp_path, monkeypatch, processor):
    monkeypatch.chdir(folder)
    words, config, checks = ["--report", str(tmp_path / "report.json"), "--jobs", "1"], None, None
    if Path("config.json").exists():
        keys = json.loads(Path("config.json").read_text("utf-8"))
        config = DataConfig(**{"data_path": ["data.json"], **keys})
        checks = checks_of(config, processor)
    else:
        words += [str(next(Path().glob("data.json*")))]
    if Path("eval.json").exists():
        words += ["--eval_data_path", "eval.json"]
    summary = run(arguments("validate").parse_args(words), config, checks)
    findings = json.loads((tmp_path / "report.json").read_text("utf-8"))["findings"]
    assert findings == json.loads(Path("expected.json").read_text("utf-8"))
    assert folder.name.removesuffix("-array") in summary.counts


def test_every_code_has_an_input():
    # A file that is missing or cannot be read ends the command before there is a report.
    assert {folder.name for folder in FOLDERS} >= CODES.keys() - {"file-unreadable"}
    assert len(FOLDERS) >= 40
