"""The model in its host's hands: freezing, checkpointing, backbone, fused head, bad inputs."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from vlmtune.core.errors import ModelError
from vlmtune.models.ovis2_5.modeling_ovis2_5 import causal_lm_loss

RUNS = [
    ("full_single_untied", ""),
    ("full_multi_tied", ""),
    ("window_mixed", ""),
    ("video_linear_norope", ""),
    ("window_video_rope", ""),
    ("full_single_untied", "_text_only_train"),
    ("full_single_untied", "_text_only_eval"),
]
UNUSED = {
    "visual_tokenizer.vit.vision_model.post_layernorm.weight",
    "visual_tokenizer.vit.vision_model.post_layernorm.bias",
}


def random_model(folder) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize(
    "build", [AutoModelForImageTextToText.from_pretrained, random_model], ids=["loaded", "random"]
)
def test_exactly_the_unused_norm_is_frozen(golden, build):
    model = build(golden().folder)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == UNUSED


@pytest.mark.parametrize("case", ["full_single_untied", "video_linear_norope"])
def test_random_initialisation_is_finite_and_spread(golden, case):
    given = golden(case)
    model = random_model(given.folder)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.002, name
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, value)), name

    loss = model(**given.inputs).loss
    assert loss.item() == pytest.approx(5.864, abs=0.1)  # log of 352 words
    loss.backward()
    silent = {
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.count_nonzero()
    }
    assert silent == UNUSED


def test_gradient_checkpointing_recomputes_both_towers_and_changes_no_number(golden):
    given = golden("window_mixed")
    plain, checkpointed = given.model().train(), given.model().train()
    checkpointed.gradient_checkpointing_enable()

    calls = Counter()
    for name, module in checkpointed.named_modules():
        if name.endswith(".self_attn"):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    losses, gradients = [], []
    for model in (plain, checkpointed):
        loss = model(**given.inputs).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})

    towers = {"visual_tokenizer.vit.vision_model.encoder": 3, "llm.model": 2}
    assert calls == {
        f"{tower}.layers.{i}.self_attn": 2
        for tower, layers in towers.items()
        for i in range(layers)
    }
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    assert [n for n, g in gradients[0].items() if not torch.equal(g, gradients[1][n])] == []


@pytest.mark.parametrize(("case", "suffix"), RUNS)
def test_backbone_gives_what_the_head_reads(golden, case, suffix):
    given = golden(case, suffix)
    model = given.model()
    inputs = {key: value for key, value in given.inputs.items() if key != "labels"}
    hidden = model.base_model(**inputs).last_hidden_state
    assert hidden.shape == (*inputs["input_ids"].shape, 32)
    assert torch.equal(model.get_output_embeddings()(hidden), model(**inputs).logits)


@pytest.mark.parametrize(("case", "suffix"), RUNS)
def test_fused_head_of_trl_gives_the_reference_loss_and_gradients(golden, case, suffix):
    given = golden(case, suffix)
    model = given.model()
    add_fused_lm_head(model)
    output = model(**given.inputs, fused_lm_head=True)
    assert output.loss.item() == pytest.approx(given.meta["loss"], abs=1e-5)
    output.loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    total = torch.stack(norms).norm().item()
    assert total == pytest.approx(given.meta["total_grad_norm"], rel=1e-4)


LOG_4 = 1.3862944


@pytest.mark.parametrize(
    ("labels", "items", "expected"),
    [
        pytest.param([9, 0, 1, 2], None, LOG_4, id="mean"),
        pytest.param([9, -100, 1, -100], None, LOG_4, id="mean-over-one"),
        pytest.param([9, 0, 1, 2], 6, LOG_4 / 2, id="sum-over-given-count"),
        pytest.param([9, 0, 1, 2], torch.tensor(12), LOG_4 / 4, id="count-as-tensor"),
        pytest.param([9, -100, -100, -100], None, 0.0, id="nothing-to-learn"),
    ],
)
def test_loss_counts_each_label_at_the_position_before_it(labels, items, expected):
    logits = torch.zeros(1, 4, 4, dtype=torch.bfloat16)
    logits[0, 3] = torch.nan  # predicts nothing
    loss = causal_lm_loss(logits, torch.tensor([labels]), items)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(
            {"pixel_values": None, "grid_thws": None},
            ["hold 55 visual tokens (by row [31, 0, 24])", "the grids of 0 images 0."],
            id="no-pixels",
        ),
        pytest.param({"pixel_values": None}, ["pixel_values"], id="grids-without-pixels"),
        pytest.param({"grid_thws": None}, ["55 visual tokens", "0 images 0."], id="no-grids"),
        pytest.param(
            {"grid_thws": lambda grids: grids[:2], "pixel_values": lambda pixels: pixels[:124]},
            ["hold 55 visual tokens (by row [31, 0, 24])", "the grids of 2 images 31."],
            id="an-image-short",
        ),
        pytest.param({"pixel_values": lambda pixels: pixels[:-4]}, ["216", "220"], id="rows-short"),
        pytest.param(
            {"input_ids": lambda ids: ids.masked_fill(ids == -301, -200)},
            ["hold [-200]."],
            id="image-placeholder",
        ),
        pytest.param(
            {"input_ids": lambda ids: ids.masked_fill(ids == -301, -201)},
            ["hold [-201]."],
            id="video-placeholder",
        ),
        pytest.param(
            {"input_ids": lambda ids: ids.masked_fill(ids == -301, -305)},
            ["hold [-305]."],
            id="unknown-id",
        ),
        pytest.param({"input_ids": None}, ["neither input_ids nor inputs_embeds"], id="no-ids"),
    ],
)
def test_ids_and_pixels_that_disagree_are_refused_with_their_counts(golden, change, parts):
    given = golden("full_multi_tied")
    inputs = {
        key: change[key](value) if callable(change.get(key)) else change.get(key, value)
        for key, value in given.inputs.items()
    }
    with pytest.raises(ModelError) as error:
        given.model()(**inputs)
    assert error.value.where == "Ovis2_5.forward"
    for part in parts:
        assert part in error.value.what


def test_placeholder_left_in_text_is_refused(golden):
    with pytest.raises(ModelError, match=r"hold 0 visual tokens .* input_ids hold \[-200\]\."):
        golden().model()(input_ids=torch.tensor([[5, -200, 7]]))
