"""The report of `vlmtune env` says what is there, what is missing and what is broken."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from vlmtune import __version__
from vlmtune.cli.env import PACKAGES, state_of, variables
from vlmtune.core.distributed import usable_cores


def report(**environment):
    """Title of each table -> its rows, from a process with these variables."""
    done = subprocess.run(
        [sys.executable, "-m", "vlmtune.cli.main", "env"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    tables = {}
    for title, _, text in re.findall(
        r"### (.+)\n\n(\| \| \|\n\| --- \| --- \|)\n((?:\|.+\n)+)", done.stdout
    ):
        tables[title] = dict(re.findall(r"^\| (.+?) \| (.*) \|$", text, re.MULTILINE))
    return done.stdout, tables


@pytest.fixture
def broken(tmp_path):
    """A folder for PYTHONPATH where torch cannot be imported and flash-attn is broken."""
    for distribution, module, reason in (
        ("torch", "torch", "libcudart.so.13: cannot open shared object file"),
        ("flash_attn", "flash_attn", "undefined symbol: _ZN3c105Error\\nmore"),
    ):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(f'raise ImportError("{reason}")\n')
        info = tmp_path / f"{distribution}-9.8.7.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.8.7\n"
        )
    return str(tmp_path)


@pytest.mark.slow
def test_the_report_is_markdown_with_versions_machine_engines_and_variables():
    text, tables = report(NCCL_DEBUG="INFO", HF_TOKEN="hf_secret", WANDB_API_KEY="abcdef")
    first, *others = tables
    assert first.startswith(f"vlmtune {__version__}")
    assert others == ["Packages", "Engines", "Environment"]
    machine, packages, engines, variables = tables.values()
    assert machine["Python"] == f"{platform.python_version()} ({platform.python_implementation()})"
    assert machine["CPU"].endswith(f"{usable_cores()} usable cores of {os.cpu_count()}")
    assert any(row.startswith("GPU") for row in machine)
    assert set(packages) == set(PACKAGES)
    for name in ("torch", "transformers", "trl", "peft", "deepspeed", "bitsandbytes"):
        assert packages[name] == version(name)
    assert engines["DeepSpeed"].startswith("operators installed: ")
    assert engines["bitsandbytes"] in ("CPU library", "CUDA library")
    assert variables["NCCL_DEBUG"] == "INFO"
    assert variables["HF_TOKEN"] == variables["WANDB_API_KEY"] == "set, not shown"
    assert "hf_secret" not in text and "abcdef" not in text


@pytest.mark.slow
def test_broken_packages_are_reported_with_their_reason(broken):
    _, tables = report(PYTHONPATH=broken)
    machine, packages, engines, _ = tables.values()
    reason = "ImportError: libcudart.so.13: cannot open shared object file"
    assert packages["torch"] == f"9.8.7, cannot be imported: {reason}"
    assert machine["GPU"] == f"none: {reason}"
    assert packages["flash-attn"] == (
        "9.8.7, cannot be imported: ImportError: undefined symbol: _ZN3c105Error"
    )
    assert engines["attention"] == "eager, sdpa"
    assert {"DeepSpeed", "bitsandbytes"}.isdisjoint(engines)
    assert packages["pillow"] == version("pillow")


def test_a_missing_package_is_said_to_be_missing():
    assert state_of("vlmtune-nothing", "vlmtune_nothing") == "not installed"


def test_secrets_and_addresses_with_passwords_are_not_shown_and_home_is_shortened(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    assert variables(
        {
            "HF_ENDPOINT": "https://user:pw@hub.example",
            "HF_HOME": "/home/alice/hf",
            "HF_TOKEN_PATH": "/home/alice/token",
            "HTTPS_PROXY": "http://proxy:3128",
            "HUGGING_FACE_HUB_TOKEN": "hf_x",
            "LANG": "C",
            "TOKENIZERS_PARALLELISM": "false",
            "MASTER_ADDR": "10.0.0.1",
        }
    ) == {
        "HF_ENDPOINT": "set, not shown",
        "HF_HOME": "~/hf",
        "HF_TOKEN_PATH": "set, not shown",
        "HTTPS_PROXY": "set, not shown",
        "HUGGING_FACE_HUB_TOKEN": "set, not shown",
        "MASTER_ADDR": "10.0.0.1",
        "TOKENIZERS_PARALLELISM": "false",
    }
