"""The vision encoder: who sees whom, rotary angles, and the flash-attention path."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vlmtune.models.ovis2_5.configuration_ovis2_5 import Siglip2NavitConfig
from vlmtune.models.ovis2_5.vision_ovis2_5 import (
    merge_block_coordinates,
    patch_layout,
    rope_angles,
)

IMAGE_CASES = [
    "full_single_untied",
    "full_multi_tied",
    "window_mixed",
    "video_linear_norope",
    "window_video_rope",
]


def test_patches_stand_block_by_block():
    rows, columns = merge_block_coordinates(4, 4, 2)
    assert rows.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert columns.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3]


def test_windows_are_tiles_of_the_merged_grid_cut_from_the_top_left():
    config = Siglip2NavitConfig(
        patch_size=4, window_size=16, num_hidden_layers=2, fullatt_block_indexes="0"
    )
    # 2 x 3 merged cells in windows of 2 x 2: the last column is a window of its own.
    layout = patch_layout([(1, 4, 6)], config)
    assert layout.window_lengths == [16, 8]
    assert layout.window_order_N is not None
    cells = layout.window_order_N[::4] // 4
    assert cells.tolist() == [0, 1, 3, 4, 2, 5]


@pytest.mark.parametrize("blocks", [None, "0|1|2"])
def test_nothing_is_permuted_when_no_layer_is_windowed(blocks):
    config = Siglip2NavitConfig(patch_size=4, num_hidden_layers=3, fullatt_block_indexes=blocks)
    layout = patch_layout([(2, 4, 6), (1, 2, 2)], config)
    assert layout.window_order_N is None
    assert layout.window_lengths == []
    assert layout.frame_lengths == [24, 24, 4]


def test_angles_hold_the_row_then_the_column_in_float32():
    rows, columns = torch.tensor([0, 3, 111]), torch.tensor([2, 0, 110])
    angles = rope_angles(rows, columns, head_dim=8)
    assert angles.dtype == torch.float32
    # Frequencies 1 and 10000 ** -0.5 = 0.01.
    expected = [[0, 0, 2, 0.02], [3, 0.03, 0, 0], [111, 1.11, 110, 1.10]]
    torch.testing.assert_close(angles, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "cast",
    [
        pytest.param(lambda model: model.bfloat16(), id="bfloat16"),
        pytest.param(lambda model: model.half(), id="half"),
        pytest.param(lambda model: model.to(torch.bfloat16), id="to"),
        pytest.param(lambda model: torch.nn.Sequential(model).bfloat16()[0], id="wrapped"),
    ],
)
def test_casting_the_model_keeps_every_rope_table(golden, cast):
    given = golden("window_mixed")
    model = given.model()
    before = {name: table.clone() for name, table in model.named_buffers()}
    angles = rope_of_first_layer(model, given)

    cast(model)
    assert {p.dtype for p in model.parameters()} in ({torch.bfloat16}, {torch.float16})
    assert_inv_freq_is(model, before)
    for ours, exact in zip(rope_of_first_layer(model, given), angles, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact)


def test_loading_in_bfloat16_keeps_every_rope_table(golden):
    given = golden("window_mixed")
    before = dict(given.model().named_buffers())
    model = given.model(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_inv_freq_is(model, before)
    assert {table.dtype for table in rope_of_first_layer(model, given)} == {torch.float32}


def rope_of_first_layer(model, given) -> tuple[Tensor, Tensor]:
    """Cosines and sines the first vision layer is given."""
    seen = []
    layer = model.visual_tokenizer.vit.vision_model.encoder.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    model.visual_tokenizer(given.inputs["pixel_values"], given.grids)
    handle.remove()
    return seen[0]


def assert_inv_freq_is(model, expected: dict[str, Tensor]):
    tables = {n: t for n, t in model.named_buffers() if n.endswith("inv_freq")}
    assert "llm.model.rotary_emb.inv_freq" in tables
    for name, table in tables.items():
        assert table.dtype == torch.float32, name
        assert torch.equal(table, expected[name]), name


@pytest.mark.parametrize("case", IMAGE_CASES[1:])
def test_an_image_or_frame_sees_only_itself(golden, case):
    given = golden(case)
    vit = given.model().visual_tokenizer.vit
    pixels = given.inputs["pixel_values"]
    bounds = given.outputs["vit.cu_seqlens"].tolist()
    assert len(bounds) == 4  # three images or frames

    with torch.no_grad():
        features = vit(pixels, given.grids)
        for start, stop in pairwise(bounds):
            changed = pixels.clone()
            changed[start:stop] += 0.5
            differs = (vit(changed, given.grids) != features).any(dim=-1)
            inside = torch.zeros_like(differs)
            inside[start // 4 : stop // 4] = True
            assert torch.equal(differs, inside)


@pytest.mark.parametrize("case", IMAGE_CASES[1:3])
def test_images_in_one_batch_get_the_features_they_get_alone(golden, case):
    given = golden(case)
    vit = given.model().visual_tokenizer.vit
    lengths = [t * h * w for t, h, w in given.grids]
    pieces = given.inputs["pixel_values"].split(lengths)
    alone = [vit(piece, [grid]) for piece, grid in zip(pieces, given.grids, strict=True)]
    together = vit(given.inputs["pixel_values"], given.grids)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_flash_attention_gets_the_segments_and_gives_the_same_features(golden, case, monkeypatch):
    seen: list[list[int]] = []

    def kernel(module, query, key, value, attention_mask, **settings):
        """Exact attention in the layout of transformers' flash_attention_2: in `[1, H, N, K]`,
        out `[1, N, H, K]`."""
        assert attention_mask is None
        assert settings["is_causal"] is False and module.is_causal is False
        bounds = settings["cu_seq_lens_q"]
        assert bounds.dtype == torch.int32
        assert torch.equal(bounds, settings["cu_seq_lens_k"])
        longest = int(bounds.diff().max())
        assert settings["max_length_q"] == settings["max_length_k"] == longest
        seen.append(bounds.tolist())
        outputs = [
            torch.softmax(q @ k.mT * settings["scaling"], dim=-1) @ v
            for q, k, v in zip(*(split(x, bounds) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    def split(x: Tensor, bounds: Tensor) -> Sequence[Tensor]:
        return x.split(bounds.diff().tolist(), dim=2)

    monkeypatch.setattr(
        "vlmtune.models.ovis2_5.vision_ovis2_5.ALL_ATTENTION_FUNCTIONS",
        {"flash_attention_2": kernel},
    )
    given = golden(case)
    model = given.model()
    model.config.vit_config._attn_implementation = "flash_attention_2"
    features = model.visual_tokenizer.vit(given.inputs["pixel_values"], given.grids)

    expected = given.outputs["visual_tokenizer.features"]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    full = model.config.vit_config.full_attention_layers
    names = ("vit.cu_window_seqlens", "vit.cu_seqlens")
    layers = range(model.config.vit_config.num_hidden_layers)
    assert seen == [given.outputs[names[layer in full]].tolist() for layer in layers]


def test_training_works_after_evaluating_in_inference_mode(golden):
    given = golden("window_mixed")
    model = given.model()
    merge_block_coordinates.cache_clear()
    with torch.inference_mode():
        model(**given.inputs)
    loss = model(**given.inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(given.meta["loss"], abs=1e-5)
