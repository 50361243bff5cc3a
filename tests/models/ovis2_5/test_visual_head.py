"""The visual head in chunks of tokens against the plain formula over all of them."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmtune.models import supervised_head
from vlmtune.models.ovis2_5.modeling_ovis2_5 import Ovis2_5
from vlmtune.models.ovis2_5.visual_tokenizer_ovis2_5 import (
    BUFFERS,
    VisualEmbeddingTable,
    VisualTokenizer,
)

WORDS, WIDTH, HIDDEN, TOKENS = 90, 12, 8, 13
WEIGHTS = ("tokenizer.head.0.weight", "tokenizer.head.1.weight", "tokenizer.head.1.bias")
NAMES = {*WEIGHTS, "vte.weight", "features"}


@pytest.fixture(autouse=True)
def chunks_of_four_tokens(monkeypatch):
    monkeypatch.setattr(supervised_head, "CHUNK_BYTES", {"cpu": 4 * BUFFERS * 4 * WORDS})


class Features(nn.Module):
    """In the place of the tower: features that are already there."""

    def forward(self, features: Tensor, grids: Any) -> Tensor:
        return features


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        vision = SimpleNamespace(hidden_size=WIDTH // 4, hidden_stride=2)
        self.tokenizer = VisualTokenizer.__new__(VisualTokenizer)
        nn.Module.__init__(self.tokenizer)
        self.tokenizer.words, self.tokenizer.vit = WORDS, Features()
        width = vision.hidden_size * vision.hidden_stride**2
        self.tokenizer.head = nn.Sequential(
            nn.Linear(width, WORDS, bias=False), nn.LayerNorm(WORDS, eps=1e-5)
        )
        self.vte = VisualEmbeddingTable(WORDS + 4, HIDDEN)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        return self.tokenizer.embed(features, [], self.vte)


def plain(vision: Any, features: Tensor) -> Tensor:
    logits = vision.tokenizer.head(features)
    tokens = F.softmax(logits, dim=-1, dtype=torch.float32).to(logits.dtype)
    visual, indicators = vision.vte(tokens), vision.vte(torch.arange(WORDS, WORDS + 4))
    return torch.cat([visual.to(indicators.dtype), indicators])


def inputs(tokens: int = TOKENS) -> tuple[Vision, Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(tokens, WIDTH, requires_grad=True)
    return Vision(), features, torch.randn(tokens + 4, HIDDEN)


def passed(function, vision: Any, features: Tensor, weights: Tensor, bf16: bool = False):
    """Embeddings of a forward pass and, by name, the gradients of a backward pass."""
    vision = copy.deepcopy(vision)
    features = features.detach().requires_grad_(features.requires_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        embeddings = function(vision, features)
    (embeddings * weights).sum().backward()
    parameters = {"features": features, **dict(vision.named_parameters())}
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return embeddings.detach(), gradients


def ours(vision: nn.Module, features: Tensor) -> Tensor:
    return vision(features)


def assert_same(found, expected, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest value."""
    pairs = {"embeddings": (found[0], expected[0])}
    assert found[1].keys() == expected[1].keys()
    pairs |= {name: (found[1][name], expected[1][name]) for name in expected[1]}
    for name, (one, other) in pairs.items():
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert (one - other).abs().max() <= tolerance * other.abs().max(), name


class Largest(TorchDispatchMode):
    """The most numbers over the visual words that one result has, but not the weights, and how
    often a matrix product is made."""

    def __init__(self):
        super().__init__()
        self.rows, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func._schema.name == "aten::mm"
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == WORDS:
            self.rows = max(self.rows, len(result) if len(result) not in (WIDTH, HIDDEN) else 0)
        return result


@pytest.mark.parametrize("tokens", [1, 4, 6, TOKENS])
def test_embeddings_and_gradients_are_those_of_the_plain_formula(tokens):
    given = inputs(tokens)
    expected = passed(plain, *given)
    assert expected[1].keys() == NAMES
    assert_same(passed(ours, *given), expected)


FROZEN = [
    {"features"},
    {"vte.weight"},
    {"tokenizer.head.0.weight"},
    {"tokenizer.head.1.weight"},
    {"tokenizer.head.1.weight", "tokenizer.head.1.bias"},
    NAMES - {"features"},
    NAMES - {"vte.weight"},
    NAMES - {"tokenizer.head.0.weight"},
]


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: "+".join(sorted(names)))
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    vision, features, weights = inputs()
    for name, parameter in {"features": features, **dict(vision.named_parameters())}.items():
        parameter.requires_grad_(name not in frozen)
    found = passed(ours, vision, features, weights)
    assert found[1].keys() == NAMES - frozen
    assert_same(found, passed(plain, vision, features, weights))


def test_under_autocast_values_are_equal_and_gradients_as_near_the_exact_ones():
    vision, features, weights = inputs()
    exact = passed(plain, vision, features, weights)
    found, usual = (passed(f, vision, features, weights, bf16=True) for f in (ours, plain))
    assert torch.equal(found[0], usual[0])
    assert not torch.equal(found[0], exact[0])
    for name, gradient in exact[1].items():
        assert found[1][name].dtype == torch.float32
        error, theirs = (g[1][name] - gradient for g in (found, usual))
        assert 0 < error.norm() <= 1.1 * theirs.norm() <= 0.03 * gradient.norm(), name


def test_a_model_in_bfloat16_computes_the_same_bits():
    vision, features, _ = inputs()
    vision, features = vision.bfloat16(), features.bfloat16()
    with torch.no_grad():
        assert torch.equal(vision(features), plain(vision, features))


@pytest.mark.parametrize("adapted", [None, "tokenizer.head.0"])
def test_only_one_chunk_of_the_distribution_exists_at_a_time(adapted):
    vision, features, _ = inputs()
    if adapted:
        config = LoraConfig(target_modules=[adapted], init_lora_weights=False)
        vision = get_peft_model(vision, config).base_model.model
    with Largest() as found:
        vision(features).sum().backward()
    assert found.rows == 4
    with Largest() as usual:
        plain(vision, features).sum().backward()
    assert usual.rows == TOKENS


def test_without_gradients_nothing_is_computed_twice():
    vision, features, _ = inputs()
    with torch.no_grad(), Largest() as found:
        vision(features)
    assert found.products == 2 * 4
    assert not vision(features.detach()).detach().requires_grad


ADAPTED = {
    "lora-on-the-linear": {"target_modules": ["tokenizer.head.0"]},
    "lora-and-a-trained-table": {
        "target_modules": ["tokenizer.head.0"],
        "modules_to_save": ["vte"],
    },
    "trained-head": {"target_modules": [], "modules_to_save": ["tokenizer.head"]},
    "trained-parts": {
        "target_modules": [],
        "modules_to_save": ["tokenizer.head.0", "tokenizer.head.1", "vte"],
    },
    "trained-tokenizer": {"target_modules": [], "modules_to_save": ["tokenizer", "vte"]},
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("settings", ADAPTED.values(), ids=ADAPTED.keys())
def test_adapters_and_trained_copies(settings, bf16):
    vision, features, weights = inputs()
    config = {**settings, "target_modules": settings["target_modules"] or ["other"]}
    vision.other = nn.Linear(2, 2)
    adapted = get_peft_model(vision, LoraConfig(init_lora_weights=False, **config))
    adapted = adapted.base_model.model
    found = passed(ours, adapted, features, weights, bf16)
    expected = passed(plain, adapted, features, weights, bf16)
    assert len(expected[1]) > 1
    assert_same(found, expected, 0.02 if bf16 else 2e-6)


def test_hooks_of_all_three_modules_see_one_call():
    vision, features, _ = inputs()
    calls = []
    for name in ("tokenizer.head.0", "tokenizer.head.1", "vte"):
        module = vision.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"into {name}"))
        module.register_forward_hook(lambda *_, name=name: calls.append(f"out of {name}"))
    vision(features)
    assert calls == [
        "into vte",
        "into tokenizer.head.1",
        "into tokenizer.head.0",
        "out of tokenizer.head.0",
        "out of tokenizer.head.1",
        "out of vte",
    ]


def by_plain_formula(model: Ovis2_5, given: Any) -> Tensor:
    """The merged embeddings, position by position."""
    tokens = model.visual_tokenizer(given.inputs["pixel_values"], given.grids)
    table, last = model.vte.weight, model.config.visual_vocab_size - 4
    atoms, rows = iter(tokens @ table[:last]), []
    for token in given.inputs["input_ids"].flatten().tolist():
        if token >= 0:
            rows.append(model.get_input_embeddings().weight[token])
        else:
            rows.append(next(atoms) if token == -300 else table[last - 301 - token])
    return torch.stack(rows).view(*given.inputs["input_ids"].shape, -1)


@pytest.mark.parametrize("case", ["full_multi_tied", "window_mixed", "window_video_rope"])
def test_every_embedding_and_its_gradients_are_in_their_place(golden, case):
    given = golden(case)
    model = given.model()
    images = {key: given.inputs[key] for key in ("input_ids", "pixel_values", "grid_thws")}
    results = []
    for embeddings in (model.embed(**images), by_plain_formula(model, given)):
        model.zero_grad()
        weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
        (embeddings * weights).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((embeddings.detach(), gradients))
    assert results[1][1].keys() >= {"vte.weight", "visual_tokenizer.head.0.weight"}
    assert_same(*results, tolerance=1e-5)


def test_a_text_only_step_gives_all_of_vision_a_gradient_of_zero(golden):
    given = golden("full_single_untied", "_text_only_train")
    model = given.model().train()
    model(**given.inputs).loss.backward()
    vision = {n: p for n, p in model.named_parameters() if n.startswith(("visual_t", "vte"))}
    found = {n for n, p in vision.items() if p.grad is not None}
    assert {n for n in vision if "post_layernorm" not in n} == found
    assert all(vision[n].grad.count_nonzero() == 0 for n in found)


def test_what_a_packed_row_carries_reaches_the_language_model(golden):
    given = golden("full_single_untied", "_text_only_eval")
    model = given.model().eval()
    ids = given.inputs["input_ids"][:1]
    seen: dict[str, Any] = {}
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    bounds = torch.tensor([0, 3, ids.shape[1]], dtype=torch.int32)
    packed = {
        "position_ids": torch.cat([torch.arange(3), torch.arange(ids.shape[1] - 3)])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": ids.shape[1] - 3,
        "max_length_k": ids.shape[1] - 3,
        "use_cache": False,
    }
    hidden = model.base_model(input_ids=ids, **packed).last_hidden_state
    assert {name: seen[name] for name in packed} == packed
    alone = model.base_model(input_ids=ids[:, 3:]).last_hidden_state
    torch.testing.assert_close(hidden[:, 3:], alone, rtol=0, atol=1e-5)
