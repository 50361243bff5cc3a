"""Counted operations are those that torch counts, and a gradient is counted where one is made."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlmtune.models import Ovis2_5, Ovis2_5Config
from vlmtune.models.ovis2_5.configuration_ovis2_5 import (
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    VISUAL_ATOM_ID,
)
from vlmtune.models.ovis2_5.flops import STAGES, forward_flops, training_flops

LLM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 320,
}
VIT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": 32,
}


def config_of(**changes) -> Ovis2_5Config:
    llm = {"model_type": "qwen3", **LLM, **changes.pop("llm", {})}
    if llm["model_type"] == "qwen2":
        del llm["head_dim"]
    vit = {**VIT, **changes.pop("vit", {})}
    return Ovis2_5Config(llm_config=llm, vit_config=vit, visual_vocab_size=204)


def counted(model: Ovis2_5, grids: list[list[int]], text: int, backward: bool = False) -> float:
    """What torch counts for one sample of images and text, labels at every token."""
    ids = []
    for frames, rows, columns in grids:
        ids += [IMAGE_BEGIN_ID, *[VISUAL_ATOM_ID] * (frames * rows * columns // 4), IMAGE_END_ID]
    ids = torch.tensor([[*ids, *range(text)]])
    patches = sum(t * h * w for t, h, w in grids)
    images = {"pixel_values": torch.randn(patches, 48), "grid_thws": torch.tensor(grids)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, labels=ids.clamp(min=0), use_cache=False, **images)
        if backward:
            out.loss.backward()
    return counter.get_total_flops()


def counts(grids: list[list[int]], text: int) -> list[int]:
    """Tokens, trained tokens, patches and their squares of that sample."""
    patches = [(t, h * w) for t, h, w in grids]
    total = sum(t * n for t, n in patches)
    tokens = total // 4 + 2 * len(grids) + text
    return [tokens, tokens, total, sum(t * n * n for t, n in patches)]


def of_whole_rectangle(config: Ovis2_5Config, sample: list[int]) -> float:
    """Attention as torch counts it: of every pair, not of the causal half."""
    attention = forward_flops(config, *map(np.array, sample))[1]["llm"]
    return float(attention * (2 * sample[0] / (sample[0] + 1) - 1))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="qwen3"),
        pytest.param({"llm": {"model_type": "qwen2"}}, id="qwen2"),
        pytest.param({"llm": {"model_type": "llama", "num_key_value_heads": 4}}, id="llama"),
        # Windows of 2 x 2 cells, which divide these grids.
        pytest.param({"vit": {"window_size": 16, "fullatt_block_indexes": "1"}}, id="windows"),
    ],
)
def test_forward_is_what_torch_counts(changes):
    config = config_of(**changes)
    model = Ovis2_5(config).eval()
    for grids, text in ([[1, 8, 12]], 40), ([[1, 8, 8], [2, 16, 8]], 7):
        sample = counts(grids, text)
        products, attention = forward_flops(config, *map(np.array, sample))
        total = sum(products.values()) + sum(attention.values())
        with torch.no_grad():
            found = counted(model, grids, text)
        assert total + of_whole_rectangle(config, sample) == pytest.approx(found, rel=0.001)


@pytest.mark.parametrize(
    ("trained", "frozen"),
    [
        pytest.param(STAGES, (), id="all"),
        pytest.param(("llm", "head"), ("visual_tokenizer", "vte"), id="llm"),
        pytest.param(
            ("visual_head", "table", "llm", "head"), ("visual_tokenizer.vit",), id="without-vit"
        ),
    ],
)
def test_training_is_what_torch_counts(trained, frozen):
    config = config_of()
    torch.manual_seed(0)
    model = Ovis2_5(config).train()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    grids, text = [[1, 16, 16], [1, 8, 8]], 50
    sample = counts(grids, text)
    attention = of_whole_rectangle(config, sample) * 3
    total = training_flops(config, *map(np.array, sample), trained=trained) + attention
    found = counted(model, grids, text, backward=True)
    # The first layer needs no gradient of its input: more of a tiny model than of a large one.
    assert total == pytest.approx(found, rel=0.02)


def test_only_what_a_gradient_reaches_is_counted_backwards():
    config = config_of()
    sample = [np.array([100]), np.array([10]), np.array([200]), np.array([20_000])]
    products, attention = forward_flops(config, *sample)
    forward = sum(products.values()) + sum(attention.values())

    def training(**parts) -> float:
        return float(training_flops(config, *sample, **parts)[0])

    assert training() == pytest.approx(3 * forward[0])
    assert training(trained=()) == pytest.approx(forward[0])
    through = products["llm"] + products["head"] + 2 * attention["llm"]
    assert training(trained=(), adapted=("llm",)) == pytest.approx((forward + through)[0])
    weights = products["llm"] + products["head"]
    assert training(trained=("llm", "head")) == pytest.approx((forward + through + weights)[0])
    assert training(trained=("head",)) == pytest.approx((forward + products["head"])[0])


def test_samples_are_counted_one_by_one():
    config = config_of()
    columns = np.array([[100, 30, 0, 0], [100, 30, 64, 4096], [50, 30, 0, 0]]).T
    text, image, short = training_flops(config, *columns)
    assert text < image
    assert (text, short) == tuple(training_flops(config, *columns[:, [0, 2]]))
    # Twice the tokens take more than twice: attention grows with their square.
    without_head = training_flops(config, *np.array([[100, 0, 0, 0], [50, 0, 0, 0]]).T)
    assert 2 * without_head[1] < without_head[0] < 4 * without_head[1]
