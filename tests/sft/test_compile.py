"""Layers compiled one by one give the losses of layers that are not, under the same names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters

from vlmtune.configs.recompute import parse_recompute
from vlmtune.models import Ovis2_5
from vlmtune.sft.recompute import apply_recompute, compile_layers

pytestmark = pytest.mark.slow

TELLS = """
import logging, torch
torch._logging.set_logs(dynamo=logging.INFO)
"""
"""Run first, so that what is compiled is told."""


# On a CPU the vision layers attend segment by segment, so with a policy of their own they would be
# computed uncompiled.
@pytest.mark.parametrize("policy", ["none", "llm:full", "llm:selective"])
def test_compiled_layers_keep_losses_gradients_and_names(tiny_ovis, policy):
    # aot_eager traces and differentiates as inductor does, and runs the same kernels: equal bits
    # but for the order of sums, hence 1e-5.
    torch._dynamo.reset()
    counters.clear()
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        model = Ovis2_5.from_pretrained(tiny_ovis, dtype=torch.float32).train()
        names = list(model.state_dict())
        apply_recompute(model, parse_recompute(policy))
        if compiled:
            compile_layers(model, backend="aot_eager")
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert list(model.state_dict()) == names
        # More operations than one tower has outside of its attention.
        assert (counters["stats"]["calls_captured"] > 40) == compiled
        found.append((loss.item(), model.get_decoder().layers[0].mlp.up_proj.weight.grad))
    (loss, gradient), (own, other) = found
    assert own == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6)


def logged(folder: Path) -> list[tuple[float, float]]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(e["loss"], e["grad_norm"]) for e in entries if "loss" in e]


def tensors(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return list(weights.keys())


@pytest.mark.parametrize(
    ("mode", "packing", "backend"),
    [
        ("trl", "true", "aot_eager"),
        pytest.param("standard", "false", "aot_eager", marks=pytest.mark.long),
        pytest.param("trl", "false", None, marks=pytest.mark.long),
        pytest.param("standard", "true", None, marks=pytest.mark.long),
    ],
)
def test_compiled_runs_train_with_the_same_numbers(forked, mixed, mode, packing, backend):
    keys = {"data_path": mixed, "packing": packing, "max_steps": 3, "learning_rate": 1e-4}
    keys |= {"per_device_train_batch_size": 2, "multimodal_max_length": 128}
    plain, folder = forked(mode=mode, before=TELLS, **keys)
    compiled, other = forked(
        mode=mode, before=TELLS, torch_compile="true", torch_compile_backend=backend, **keys
    )
    assert plain.returncode == compiled.returncode == 0, compiled.stderr
    assert "start tracing" not in plain.stderr
    assert "start tracing" in compiled.stderr
    assert len(logged(folder)) == 3
    # Fused kernels sum in another order: float32 rounding, carried over three steps.
    for own, expected in zip(logged(other), logged(folder), strict=True):
        assert own == pytest.approx(expected, rel=1e-5)
    assert tensors(other) == tensors(folder)
