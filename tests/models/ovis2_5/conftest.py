"""The golden model cases: what went into the reference and what came out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import vlmtune.models  # noqa: F401  registers Ovis2.5


@dataclass
class Golden:
    """One run of the reference; `suffix` tells apart the runs of one folder."""

    folder: Path
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [(t, h, w) for t, h, w in self.inputs["grid_thws"].tolist()]

    def model(self, **kwargs) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.folder, **kwargs)


@pytest.fixture(scope="session")
def golden(ovis_goldens):
    """`golden(case, suffix)`, read afresh at each call, so no test can spoil another's numbers."""

    def read(case: str = "full_single_untied", suffix: str = "") -> Golden:
        folder = ovis_goldens / case
        return Golden(
            folder=folder,
            inputs=load_file(folder / f"inputs{suffix}.safetensors"),
            outputs=load_file(folder / f"outputs{suffix}.safetensors"),
            meta=json.loads((folder / f"meta{suffix}.json").read_text("utf-8")),
        )

    return read
