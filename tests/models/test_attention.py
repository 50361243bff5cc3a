"""Attention "packed": samples of one row as if alone, no mask of the whole row, sdpa otherwise."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from vlmtune.core.errors import ModelError
from vlmtune.models import Ovis2_5, Ovis2_5Config, attention
from vlmtune.models.attention import Segments, attend_within, packing_attention
from vlmtune.models.ovis2_5.configuration_ovis2_5 import (
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    VISUAL_ATOM_ID,
)
from vlmtune.sft.isolation import packed_row

LANGUAGE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
LANGUAGES = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **LANGUAGE},
    "qwen2": {"model_type": "qwen2", **LANGUAGE},
    "llama": {"model_type": "llama", **LANGUAGE},
    "qwen2 with windows": {"model_type": "qwen2", **LANGUAGE, **WINDOW},
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 32,
}
WINDOWED = {"window_size": 16, "fullatt_block_indexes": "1"}
GRIDS = ([(1, 4, 6), (1, 8, 8)], [(1, 6, 10)], [(1, 8, 8)])


def ovis(language: str, implementation: str = "packed", vision: dict | None = None) -> Any:
    torch.manual_seed(0)
    config = Ovis2_5Config(
        llm_config=LANGUAGES[language], vit_config=VISION | (vision or {}), visual_vocab_size=64
    )
    model = Ovis2_5._from_config(config, attn_implementation=implementation)
    torch.nn.init.normal_(model.vte.weight, std=1.0)
    return model


def text_model(language: str, implementation: str, **keys) -> Any:
    torch.manual_seed(0)
    settings = {**LANGUAGES[language], **keys}
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def samples() -> list[dict[str, Tensor]]:
    """Text around one or two images each, of different lengths."""
    torch.manual_seed(1)
    made = []
    for grids in GRIDS:
        ids = torch.randint(0, 96, (5 + len(made),)).tolist()
        for t, h, w in grids:
            atoms = [VISUAL_ATOM_ID] * (t * h * w // 4)
            ids += [IMAGE_BEGIN_ID, *atoms, IMAGE_END_ID, *torch.randint(0, 96, (4,)).tolist()]
        patches = sum(t * h * w for t, h, w in grids)
        made.append(
            {
                "input_ids": torch.tensor([ids]),
                "pixel_values": torch.randn(patches, 48),
                "grid_thws": torch.tensor(grids),
            }
        )
    return made


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_samples_in_one_row_have_the_logits_they_have_alone(language, implementation):
    model = ovis(language, implementation, WINDOWED).eval()
    with torch.no_grad():
        alone = [model(**sample, use_cache=False).logits[0] for sample in samples()]
        row = model(**packed_row(samples()), use_cache=False).logits[0]
    assert torch.cat(alone).std() > 0.1
    torch.testing.assert_close(row, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["packed", "sdpa"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_gradients_of_a_row_are_the_sum_of_the_samples(language, implementation):
    def labels(sample: dict[str, Tensor]) -> Tensor:
        ids = sample["input_ids"].clone().clamp(min=-100)
        ids[ids < 0] = -100
        ids[:, 0] = -100
        return ids

    def gradients(model, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        model.zero_grad()
        for row in rows:
            model(**row, use_cache=False, num_items_in_batch=60).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = ovis(language, implementation, WINDOWED).train()
    given = [{**sample, "labels": labels(sample)} for sample in samples()]
    expected = gradients(model, given)
    found = gradients(model, [packed_row(given)])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0 or name == "vte.weight", name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=max(2e-6 * scale, 1e-7))


@pytest.mark.parametrize("blocks", [None, "1"], ids=["full", "windowed"])
def test_the_second_sample_does_not_see_the_image_of_the_first(blocks):
    model = ovis("qwen3", vision={**WINDOWED, "fullatt_block_indexes": blocks}).eval()
    first, *others = samples()
    changed = {**first, "pixel_values": first["pixel_values"] + 1.0}
    with torch.no_grad():
        before = model(**packed_row([first, *others])).logits[0]
        after = model(**packed_row([changed, *others])).logits[0]
    end = first["input_ids"].shape[1]
    assert (before[:end] != after[:end]).any()
    assert torch.equal(before[end:], after[end:])


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("left", [True, False])
def test_padded_batches_and_generation_are_those_of_sdpa_bit_for_bit(language, left):
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 5) if left else slice(7, 12)] = 0
    made = []
    for implementation in ("packed", "sdpa"):
        model = text_model(language, implementation).eval()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        # Without an end token, so that every step is run.
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        new = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **settings)
        alone = model.generate(input_ids=ids[:1], pad_token_id=0, **settings)
        made.append((logits, new, alone))
    for ours, expected in zip(*made, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_restarting_positions_without_segments_get_the_block_mask_of_sdpa(language):
    row = packed_row([{"input_ids": sample["input_ids"].clamp(min=0)} for sample in samples()])
    row = {key: row[key] for key in ("input_ids", "position_ids")}
    logits = [text_model(language, i)(**row, use_cache=False).logits for i in ("packed", "sdpa")]
    assert torch.equal(*logits)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple) else (made,):
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("segments", [1, 64])
def test_nothing_as_large_as_a_mask_of_the_row_is_made(segments):
    length = 4096
    model = text_model("qwen3", "packed", max_position_embeddings=length)
    one = {"input_ids": torch.zeros(1, length // segments, dtype=torch.int64)}
    row = packed_row([one] * segments)
    with Largest() as largest:
        hidden = model.model(**row, use_cache=False).last_hidden_state
        hidden.square().mean().backward()
    # The widest activation is the MLP's: 64 float32 per token.
    assert largest.size == length * 64 * 4


def test_a_saved_model_does_not_ask_for_packed_attention(tmp_path):
    model = ovis("qwen3")
    assert model.config._attn_implementation == "packed"
    assert model.llm.config._attn_implementation == "packed"
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text("utf-8")
    assert "_attn_implementation" not in json.dumps(model.config.to_dict())
    assert Ovis2_5.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [("gemma2", {"head_dim": 16}, "softcap"), ("llama4_text", {"head_dim": 16}, "a local mask")],
)
def test_attention_that_is_more_than_causal_is_refused(family, keys, named):
    settings = {**LANGUAGE, **keys, "pad_token_id": 0}
    if family == "llama4_text":
        settings |= {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    row = packed_row([{"input_ids": torch.arange(12)[None]}] * 2)
    with pytest.raises(ModelError, match=f"{named}, which packed attention does not apply"):
        model(**row, use_cache=False)


def test_packing_asks_for_packed_attention_unless_told_otherwise(capsys):
    assert packing_attention(None) == "packed"
    assert packing_attention("sdpa") == "sdpa"
    assert packing_attention("eager") == "eager"
    assert capsys.readouterr().err == ""
    assert packing_attention("flash_attention_2") == "packed"  # no flash-attn here
    assert "attn_implementation is packed: flash-attn 2 is not" in capsys.readouterr().err


def projections(lengths: list[int], **options) -> list[Tensor]:
    torch.manual_seed(3)
    heads = (4, 2, 2)
    return [torch.randn(sum(lengths), h, 16, **options).requires_grad_() for h in heads]


def reference(query, key, value, bounds: Tensor, causal: bool, window: int | None) -> Tensor:
    """By definition: scores of each segment, masked, in float64."""
    outputs = []
    for start, stop in pairwise(bounds.tolist()):
        q, k, v = (x[start:stop].double().transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))
        scores = q @ k.mT * 0.3
        behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        hidden = (behind < 0) & causal
        if window:
            hidden |= behind >= window
        scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


MODES = [(True, None), (False, None), (True, 5)]


@pytest.mark.parametrize(("causal", "window"), MODES)
def test_segments_get_the_attention_of_the_definition(causal, window):
    lengths = [7, 7, 1, 12, 3]
    given = projections(lengths)
    segments = Segments.of(lengths, torch.device("cpu"))
    assert segments.bounds.tolist() == [0, 7, 14, 15, 27, 30]
    assert (segments.longest, Segments(segments.bounds, 12).lengths) == (12, lengths)
    output = attend_within(*given, segments, causal=causal, window=window, scale=0.3)
    expected = reference(*given, segments.bounds, causal, window)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, given, upstream)
    exact = torch.autograd.grad(expected, given, upstream.double())
    for ours, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("causal", "window"), MODES)
def test_the_kernel_is_told_the_same(causal, window, monkeypatch):
    """With exact attention in the kernel's place, of its signature: CPUs do not have it."""

    def kernel(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
        assert bounds is bounds_k and bounds.dtype == torch.int32
        assert longest == longest_k == 12
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
        assert (scale, enable_gqa) == (0.3, True)
        left, right = window_size
        assert right == (0 if causal else -1)
        return reference(q, k, v, bounds, right == 0, left + 1 if left >= 0 else None)

    lengths = [7, 12, 3]
    given = projections(lengths)
    segments = Segments.of(lengths, torch.device("cpu"))
    settings: dict[str, Any] = {"causal": causal, "window": window, "scale": 0.3}
    exact = attend_within(*given, segments, **settings)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend_within(*given, segments, **settings)
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with the kernel")
@pytest.mark.parametrize(("causal", "window"), MODES)
@pytest.mark.parametrize("size", [64, 72, 128])
def test_the_kernel_gives_the_attention_of_the_definition(causal, window, size):
    lengths, heads = [7, 300, 1, 12, 64], (4, 2, 2)
    torch.manual_seed(3)
    given = [
        torch.randn(sum(lengths), h, size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for h in heads
    ]
    segments = Segments.of(lengths, torch.device("cuda"))
    assert attention._has_kernel(given[0], given[2], torch.bfloat16)
    output = attend_within(*given, segments, causal=causal, window=window, scale=0.3)
    expected = reference(*given, segments.bounds, causal, window)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.03)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, given, upstream)
    exact = torch.autograd.grad(expected, given, upstream.double())
    for ours, theirs in zip(gradients, exact, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 0.02
