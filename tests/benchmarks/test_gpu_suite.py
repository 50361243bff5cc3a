"""benchmarks/gpu_suite.py on a CPU with tiny models: the same code as on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINING = ("packed_2b", "lora_9b", "padded_2b", "trl_tuned_2b", "trl_default_2b")


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(("lora_9b", "parity"), marks=pytest.mark.slow, id="some"),
        pytest.param(("matmul", *TRAINING, "parity"), marks=pytest.mark.long, id="all"),
    ],
)
def test_the_suite_runs_and_both_sides_agree(parts, tmp_path):
    output = tmp_path / "result.json"
    words = ["--device", "cpu", "--tiny", "--parts", ",".join(parts), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_suite.py"), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(output.read_text("utf-8"))
    found = result["parts"]
    assert list(found) == list(parts)
    for name in set(parts) & set(TRAINING):
        part = found[name]
        assert part["steps"] == 2
        assert part["tokens_per_second"] > 0 and part["tflops"] > 0
        assert (part["padding_share"] == 0) == (name in ("packed_2b", "lora_9b"))
        # On a CPU there is no peak to compare it with.
        assert part.get("planned_peak_gib", 0) > 0 or name.startswith("trl")
    parity = found["parity"]
    assert all(parity["equal_to_trl"].values())
    losses = parity["losses"]
    assert losses["padded"] == pytest.approx(losses["trl"], abs=1e-4)
    assert losses["packed"] == pytest.approx(losses["trl"], abs=1e-4)
    assert parity["packed_from_alone_fp32"]["largest_difference"] <= 1e-6
    assert parity["attention"]["difference"] <= 1e-5
    if "matmul" in parts:
        assert result["compared"].keys() >= {f"mfu_{name}" for name in TRAINING}
        assert result["compared"]["packed_2b_over_padded_2b"] > 0


def test_a_part_that_does_not_exist_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_suite.py"), "--parts", "matmul,wings"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no such parts: wings" in done.stderr
