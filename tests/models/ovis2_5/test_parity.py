"""Every number of the golden model cases: tensors, losses, gradients, a short training run."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmtune.models.ovis2_5.vision_ovis2_5 import patch_layout, rope_angles

IMAGE_CASES = [
    "full_single_untied",
    "full_multi_tied",
    "window_mixed",
    "video_linear_norope",
    "window_video_rope",
]
RUNS = [
    *((case, "") for case in IMAGE_CASES),
    ("full_single_untied", "_text_only_train"),
    ("full_single_untied", "_text_only_eval"),
]
every_run = pytest.mark.parametrize(
    ("case", "suffix"), RUNS, ids=[case + suffix for case, suffix in RUNS]
)
every_image_case = pytest.mark.parametrize("case", IMAGE_CASES)


@dataclass
class Run:
    """Our tensors under the reference's names, and the model holding the gradients of `loss`."""

    model: Any
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def ours(golden):
    """`ours(case, suffix)`: one forward and backward pass, kept for the tests of this module."""

    @cache
    def run(case: str, suffix: str = "") -> Run:
        given = golden(case, suffix)
        model = given.model()
        model.train(given.meta["mode"] == "train")
        tensors: dict[str, Tensor] = {}

        def keep(name: str, module: torch.nn.Module):
            def hook(module, arguments, output):
                tensors[name] = output.detach()

            return module.register_forward_hook(hook)

        vision = model.visual_tokenizer.vit.vision_model
        hooks = [
            keep("vit.embeddings", vision.embeddings),
            keep("vit.hidden_states.0", vision.encoder.layers[0]),
            keep("visual_tokenizer.features", model.visual_tokenizer.vit),
            keep("visual_tokenizer.logits", model.visual_tokenizer.head),
            keep("visual_tokenizer.tokens", model.visual_tokenizer),
        ]
        output = model(**given.inputs)
        if "pixel_values" in given.inputs:
            with torch.no_grad():
                model.visual_tokenizer(given.inputs["pixel_values"], given.grids)
        for hook in hooks:
            hook.remove()
        output.loss.backward()

        with torch.no_grad():
            images = {k: v for k, v in given.inputs.items() if k in ("pixel_values", "grid_thws")}
            tensors["inputs_embeds"] = model.embed(given.inputs["input_ids"], **images)
            twice = model(**given.inputs, num_items_in_batch=2 * given.meta["num_label_tokens"])
            if images:
                tensors["visual_embeds"] = model.embed_images(images["pixel_values"], given.grids)
        tensors["logits"], tensors["loss"] = output.logits.detach(), output.loss.detach()
        tensors["loss_num_items_2x"] = twice.loss
        return Run(model, tensors)

    return run


@every_image_case
def test_checkpoint_loads_with_no_key_left_over(golden, case):
    _, report = golden(case).model(output_loading_info=True)
    assert not any(report.values()), report


@every_image_case
@pytest.mark.parametrize(
    ("name", "atol"),
    [
        ("vit.embeddings", 1e-5),
        ("visual_tokenizer.features", 1e-5),
        ("visual_tokenizer.logits", 2e-5),
        ("visual_embeds", 2e-5),
    ],
)
def test_vision_tensors_equal_the_reference(ours, golden, case, name, atol):
    expected = golden(case).outputs[name]
    torch.testing.assert_close(ours(case).tensors[name], expected, rtol=0, atol=atol)


@every_image_case
def test_visual_tokens_are_the_references_without_its_four_zero_columns(ours, golden, case):
    expected = golden(case).outputs["visual_tokenizer.tokens"]
    assert expected[:, -4:].count_nonzero() == 0
    tokens = ours(case).tensors["visual_tokenizer.tokens"]
    torch.testing.assert_close(tokens, expected[:, :-4], rtol=0, atol=1e-5)


@every_image_case
def test_rotary_angles_equal_the_reference_bit_for_bit(ours, golden, case):
    given, config = golden(case), ours(case).model.config.vit_config
    layout = patch_layout(given.grids, config)
    head_dim = config.hidden_size // config.num_attention_heads
    angles = rope_angles(layout.rows_N, layout.columns_N, head_dim)
    assert torch.equal(angles, given.outputs["vit.rotary_freqs"])


def windows_of_reference(given) -> tuple[Tensor, list[int]]:
    """The reference permutes merged cells; ours permutes their four patches each."""
    cells = given.outputs["vit.window_index"]
    order = (cells[:, None] * 4 + torch.arange(4)).flatten()
    return order, given.outputs["vit.cu_window_seqlens"].diff().tolist()


@every_image_case
def test_windows_and_frames_equal_the_reference(golden, case):
    given = golden(case)
    config = given.model().config.vit_config
    config.fullatt_block_indexes = "0"  # at least one layer windowed, also where none is
    layout = patch_layout(given.grids, config)
    order, lengths = windows_of_reference(given)
    assert layout.window_order_N is not None
    assert torch.equal(layout.window_order_N, order)
    assert layout.window_lengths == lengths
    assert layout.frame_lengths == given.outputs["vit.cu_seqlens"].diff().tolist()


@every_image_case
def test_first_layer_equals_the_reference(ours, golden, case):
    given, hidden = golden(case), ours(case).tensors["vit.hidden_states.0"]
    if case.startswith("window"):
        order, _ = windows_of_reference(given)
        hidden = hidden[torch.argsort(order)]
    expected = given.outputs["vit.hidden_states.0"]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


@every_run
@pytest.mark.parametrize(
    ("name", "atol"),
    [("inputs_embeds", 2e-5), ("logits", 1e-4), ("loss", 1e-5), ("loss_num_items_2x", 1e-5)],
)
def test_embeddings_logits_and_losses_equal_the_reference(ours, golden, case, suffix, name, atol):
    expected = golden(case, suffix).outputs[name]
    torch.testing.assert_close(ours(case, suffix).tensors[name], expected, rtol=0, atol=atol)


@every_run
def test_gradient_tensors_equal_the_reference(ours, golden, case, suffix):
    model, outputs = ours(case, suffix).model, golden(case, suffix).outputs
    expected = {n.removeprefix("grad."): g for n, g in outputs.items() if n.startswith("grad.")}
    assert len(expected) >= 11 or suffix == "_text_only_eval"
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        assert found is not None, name
        error = (found - gradient).norm()
        assert error <= 1e-4 * gradient.norm(), (name, error)


@every_run
def test_gradient_norm_of_every_parameter_equals_the_reference(ours, golden, case, suffix):
    model, meta = ours(case, suffix).model, golden(case, suffix).meta
    found = {name: p.grad for name, p in model.named_parameters()}
    assert set(found) == set(meta["grad_l2_norms"])
    for name, expected in meta["grad_l2_norms"].items():
        gradient = found[name]
        if expected is None:
            assert gradient is None, name
        elif gradient is None:  # as above: the reference has exact zeros
            assert suffix == "_text_only_train" and expected == 0.0, name
        else:
            # Without RoPE a key bias has no effect; its gradient is rounding noise of 1e-8.
            assert gradient.norm().item() == pytest.approx(expected, rel=1e-4, abs=1e-7), name
    total = torch.stack([g.norm() for g in found.values() if g is not None]).norm().item()
    assert total == pytest.approx(meta["total_grad_norm"], rel=1e-4)


@pytest.mark.parametrize("case", IMAGE_CASES[:2])
def test_six_steps_of_adamw_follow_the_reference(golden, case):
    given = golden(case)
    expected = given.meta["trajectory"]
    model = given.model().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
    )
    losses, norms = [], []
    for _ in range(6):
        loss = model(**given.inputs).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss.item())
        optimizer.step()
    assert losses == pytest.approx(expected["loss"], rel=1e-4)
    assert norms == pytest.approx(expected["grad_norm_before_clip"], rel=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_language_model_and_keeps_the_loss(
    golden, implementation
):
    given = golden("full_multi_tied")
    model = given.model(attn_implementation=implementation)
    assert model.llm.config._attn_implementation == implementation
    assert model(**given.inputs).loss.item() == pytest.approx(given.meta["loss"], abs=1e-5)


VISION = ("visual_tokenizer.", "vte.")


def test_unseen_image_gives_exact_zero_gradients_and_the_same_loss(ours, golden, monkeypatch):
    given = golden("full_single_untied", "_text_only_train")
    model = given.model().train()
    monkeypatch.setattr(model, "_vision_must_run", lambda: True)
    loss = model(**given.inputs).loss
    loss.backward()
    assert torch.equal(loss, ours("full_single_untied", "_text_only_train").tensors["loss"])

    vision = {n: p.grad for n, p in model.named_parameters() if n.startswith(VISION)}
    unused = {n for n in vision if "post_layernorm" in n}
    assert len(vision) - len(unused) == sum(
        norm == 0.0 for norm in given.meta["grad_l2_norms"].values()
    )
    for name, gradient in vision.items():
        if name in unused:
            assert gradient is None
        else:
            assert gradient is not None and gradient.count_nonzero() == 0, name


def test_unseen_image_never_reads_an_overflow(golden, monkeypatch):
    given = golden("full_single_untied", "_text_only_train")
    model = given.model()
    model.vte.weight.data.fill_(torch.inf)
    monkeypatch.setattr(model, "_vision_must_run", lambda: True)
    assert model(**given.inputs).loss.item() == pytest.approx(given.meta["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("training", "zero3", "expected"),
    [
        pytest.param(True, False, True, id="training"),
        pytest.param(False, False, False, id="evaluating"),
        pytest.param(False, True, True, id="evaluating-under-zero3"),
    ],
)
def test_text_only_batch_runs_the_vision_side_in_training_and_where_other_ranks_wait(
    ours, monkeypatch, training, zero3, expected
):
    model = ours("full_single_untied", "_text_only_eval").model
    monkeypatch.setattr(
        "vlmtune.models.ovis2_5.modeling_ovis2_5.is_deepspeed_zero3_enabled", lambda: zero3
    )
    monkeypatch.setattr(model, "training", training)
    assert model._vision_must_run() is expected
