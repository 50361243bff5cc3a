"""How many cores there are to share the work."""

import os

import pytest

from vlmtune.core import distributed
from vlmtune.core.distributed import usable_cores


@pytest.fixture
def limited(tmp_path, monkeypatch):
    """`limited(text)`: a process that may run on eight cores, in a container of that limit."""

    def limit(text: str | None) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
        monkeypatch.setattr(distributed, "CPU_LIMIT", tmp_path / "cpu.max")
        if text is not None:
            (tmp_path / "cpu.max").write_text(text)

    return limit


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        pytest.param(None, 8, id="no-such-file"),
        pytest.param("max 100000\n", 8, id="no-limit"),
        pytest.param("400000 100000\n", 4, id="limit"),
        pytest.param("1600000 100000\n", 8, id="limit-above-the-affinity"),
        pytest.param("250000 100000\n", 2, id="cores-and-a-half"),
        pytest.param("50000 100000\n", 1, id="half-a-core"),
        pytest.param("150000 50000\n", 3, id="another-period"),
    ],
)
def test_cores_are_no_more_than_the_container_may_use(limited, text, cores):
    limited(text)
    assert usable_cores() == cores
