"""Which layers get adapters, what is trained fully beside them, and what PEFT makes of it."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from vlmtune.configs.adapter import AdapterConfig
from vlmtune.configs.schema import ModelConfig
from vlmtune.core.errors import ConfigError, ModelError
from vlmtune.lora.settings import (
    FullPart,
    add_adapter,
    full_parts,
    load_adapter,
    saved_parts,
)
from vlmtune.lora.targets import target_modules
from vlmtune.models import Ovis2_5, Ovis2_5Config

EMBEDDINGS = "visual_tokenizer.vit.vision_model.embeddings"
ENCODER = "visual_tokenizer.vit.vision_model.encoder.layers"
POST_LAYERNORM = "visual_tokenizer.vit.vision_model.post_layernorm"
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
BLOCK = [*(f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj"))]
BLOCK += ["mlp.fc1", "mlp.fc2"]


def layers(*indices: int, of: list[str] = ATTENTION + MLP) -> list[str]:
    return [f"llm.model.layers.{i}.{name}" for i in indices for name in of]


def blocks(*indices: int, of: list[str] = BLOCK) -> list[str]:
    return [f"{ENCODER}.{i}.{name}" for i in indices for name in of]


LLM, VIT = layers(0, 1, 2), blocks(0, 1)
HEAD = ["visual_tokenizer.head.0"]


def tiny(tied: bool = False) -> Ovis2_5:
    """Three layers of the language model and two of the vision tower."""
    llm = {"model_type": "qwen3", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12}
    llm |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm |= {"head_dim": 4, "tie_word_embeddings": tied}
    vit = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    vit |= {"num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    return Ovis2_5(Ovis2_5Config(llm_config=llm, vit_config=vit, visual_vocab_size=16))


MODEL_KEYS = ("train_modules", "freeze_llm", "freeze_vision_tower")


class Decided:
    """Settings resolved on a tiny model, as a run does it."""

    def __init__(self, trainer: str = "trl", tied: bool = False, **keys):
        self.model = tiny(tied)
        settings = ModelConfig("m", **{k: keys.pop(k) for k in MODEL_KEYS if k in keys})
        self.adapter = AdapterConfig(use_lora=True, **keys)
        self.full = full_parts(self.model, settings, self.adapter)
        self.modules = [module for part in self.full for module in part.modules]
        self.targets = target_modules(self.model, settings, self.adapter, self.modules, trainer)

    def adapted(self) -> PeftModel:
        return add_adapter(self.model, self.adapter, self.targets, self.modules)


def targets(**keys) -> list[str]:
    """Resolved, and compared with where PEFT puts its layers."""
    decided = Decided(**keys)
    base = decided.adapted().get_base_model()
    sits = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    assert sits == decided.targets
    return decided.targets


def same(found: list[str], expected: list[str]) -> None:
    assert sorted(found) == sorted(expected)


# -- where adapters sit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, LLM),
        ({"lora_parts": "llm"}, LLM),
        ({"lora_parts": "llm|visual_tokenizer.vit"}, LLM + VIT),
        ({"lora_parts": "visual_tokenizer"}, VIT + HEAD),
        ({"lora_parts": "visual_tokenizer.head"}, HEAD),
        ({"lora_parts": "visual_tokenizer.vit.last_block"}, blocks(1)),
        ({"lora_parts": "llm.model.layers.1-2"}, layers(1, 2)),
        ({"lora_parts": "llm.model.layers.0-1.mlp"}, layers(0, 1, of=MLP)),
        (
            {"lora_parts": f"llm.model.layers.2.self_attn|{ENCODER}.0"},
            layers(2, of=ATTENTION) + blocks(0),
        ),
        ({"lora_parts": "llm.model.layers.1.mlp.up_proj"}, ["llm.model.layers.1.mlp.up_proj"]),
        ({"lora_target_modules": "all-linear"}, LLM + VIT + HEAD),
        ({"lora_target_modules": "all-linear", "lora_parts": "llm"}, LLM),
        ({"apply_lora_to_vision": True}, LLM + VIT),
        ({"lora_parts": "llm.model.layers.0", "apply_lora_to_vision": True}, layers(0) + VIT),
        ({"lora_parts": "llm|visual_tokenizer.vit", "apply_lora_to_vision": True}, LLM + VIT),
        ({"lora_parts": "llm|visual_tokenizer", "apply_lora_to_vision": False}, LLM + HEAD),
        ({"lora_target_modules": "all-linear", "apply_lora_to_vision": False}, LLM + HEAD),
    ],
)
def test_linear_layers_of_the_named_parts_and_of_no_other(keys, expected):
    same(targets(**keys), expected)


QV = ["self_attn.q_proj", "self_attn.v_proj"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"lora_target_modules": ["q_proj", "v_proj"]},
            layers(0, 1, 2, of=QV) + blocks(0, 1, of=QV),
        ),
        ({"lora_target_modules": "q_proj,v_proj"}, layers(0, 1, 2, of=QV) + blocks(0, 1, of=QV)),
        (
            {"lora_target_modules": "q_proj,v_proj", "apply_lora_to_vision": False},
            layers(0, 1, 2, of=QV),
        ),
        ({"lora_target_modules": "o_proj"}, layers(0, 1, 2, of=["self_attn.o_proj"])),
        ({"lora_target_modules": "layers.0.mlp.fc1"}, blocks(0, of=["mlp.fc1"])),
        ({"lora_target_modules": "1.mlp.up_proj"}, layers(1, of=["mlp.up_proj"])),
        ({"lora_target_modules": r"llm\..*\.[qv]_proj"}, layers(0, 1, 2, of=QV)),
        (
            {"lora_target_modules": r".*\.(0|2)\.mlp\.(up_proj|fc2)"},
            [*layers(0, 2, of=["mlp.up_proj"]), *blocks(0, of=["mlp.fc2"])],
        ),
        (
            {"lora_target_modules": "q_proj", "lora_parts": "llm|visual_tokenizer.vit"},
            layers(0, 1, 2, of=QV[:1]) + blocks(0, 1, of=QV[:1]),
        ),
        (
            {"lora_target_modules": "gate_proj", "lora_parts": "llm"},
            layers(0, 1, 2, of=["mlp.gate_proj"]),
        ),
        (
            {
                "lora_target_modules": "q_proj",
                "lora_parts": "llm",
                "apply_lora_to_vision": True,
            },
            layers(0, 1, 2, of=QV[:1]) + blocks(0, 1, of=QV[:1]),
        ),
        ({"lora_target_modules": "embed_tokens"}, ["llm.model.embed_tokens"]),
        ({"lora_target_modules": "lm_head", "trainer": "standard"}, ["llm.lm_head"]),
    ],
)
def test_layers_that_names_and_expressions_match(keys, expected):
    same(targets(**keys), expected)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"apply_lora_to_vision": True, "freeze_llm": True}, VIT),
        ({"lora_target_modules": "q_proj", "freeze_llm": True}, blocks(0, 1, of=QV[:1])),
        ({"train_modules": "llm.model.layers.0"}, layers(1, 2)),
        ({"modules_to_save": ["layers.0.mlp"]}, layers(0, of=ATTENTION) + layers(1, 2)),
    ],
)
def test_what_is_frozen_or_trained_fully_gets_no_adapter(keys, expected):
    same(targets(**keys), expected)


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["layers.1.mlp.up_proj"]])
def test_names_stay_in_the_saved_config_where_they_say_the_same(names):
    adapted = Decided(lora_target_modules=names).adapted()
    assert adapted.peft_config["default"].target_modules == set(names)


def test_parts_that_names_cannot_say_are_saved_as_whole_paths():
    adapted = Decided(lora_target_modules="q_proj", apply_lora_to_vision=False).adapted()
    expected = set(layers(0, 1, 2, of=QV[:1]))
    assert adapted.peft_config["default"].target_modules == expected


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_gets_none_from_all_linear(tied):
    assert "llm.lm_head" not in targets(lora_target_modules="all-linear", tied=tied)


@pytest.mark.parametrize(
    ("keys", "where", "what", "fix"),
    [
        (
            {"lora_target_modules": "q_prj"},
            "lora_target_modules",
            'no layer is "q_prj" or ends in it',
            "write q_proj",
        ),
        (
            {"lora_target_modules": "attn_proj,zzz"},
            "lora_target_modules",
            'no layer is "attn_proj" or ends in it',
            "write ",
        ),
        (
            {"lora_target_modules": r"llm\.q_proj"},
            "lora_target_modules",
            "leaves no layer for an adapter: nothing matches",
            "name layers such as q_proj,v_proj, or a part with linear layers such as llm",
        ),
        (
            {"lora_target_modules": "q_proj", "lora_parts": "llm"},
            "lora_target_modules",
            f"matches {ENCODER}.0.self_attn.q_proj and 1 more outside of lora_parts",
            r'add their part to lora_parts, write an expression such as "llm\..*q_proj", or leave '
            "lora_target_modules out: all linear layers of the parts",
        ),
        (
            {"lora_target_modules": "lm_head"},
            "lora_target_modules",
            "matches the output head llm.lm_head; TRL computes the loss from its weight, so an "
            "adapter on it would never be trained",
            'name other layers, train it fully ("train_modules": "llm.lm_head"), or use '
            '"trainer": "standard"',
        ),
        (
            {"lora_target_modules": "vte"},
            "lora_target_modules",
            "vte is a VisualEmbeddingTable, which computes in a way of its own; an adapter cannot "
            "sit on it",
            'train it fully: "train_modules": "vte"',
        ),
        (
            {"lora_target_modules": "patch_embedding"},
            "lora_target_modules",
            f"{EMBEDDINGS}.patch_embedding is a PatchConvolution, which computes in a way of its "
            "own; an adapter cannot sit on it",
            f'train it fully: "train_modules": "{EMBEDDINGS}.patch_embedding"',
        ),
        (
            {"lora_target_modules": "position_embedding"},
            "lora_target_modules",
            f"{EMBEDDINGS}.position_embedding is a PositionTable, which computes in a way of "
            "its own; an adapter cannot sit on it",
            f'train it fully: "train_modules": "{EMBEDDINGS}.position_embedding"',
        ),
        (
            {"lora_target_modules": "self_attn"},
            "lora_target_modules",
            "llm.model.layers.0.self_attn is no linear layer; an adapter cannot sit on it",
            "name linear layers",
        ),
        (
            {"lora_target_modules": r".*norm"},
            "lora_target_modules",
            "llm.model.layers.0.self_attn.q_norm is no linear layer; an adapter cannot sit on it",
            "name linear layers",
        ),
        (
            {"lora_parts": "vte"},
            "lora_parts",
            "leaves no layer for an adapter: nothing matches",
            "name layers such as q_proj,v_proj, or a part with linear layers such as llm",
        ),
        (
            {"lora_parts": "llm.lm_head"},
            "lora_parts",
            "leaves no layer for an adapter: nothing matches",
            "name layers such as q_proj,v_proj, or a part with linear layers such as llm",
        ),
        (
            {"freeze_llm": True},
            "lora_parts",
            "leaves no layer for an adapter: all matches are frozen, trained fully or kept out",
            "name layers such as q_proj,v_proj, or a part with linear layers such as llm",
        ),
        (
            {"lora_parts": "visual_tokenizer.vit", "apply_lora_to_vision": False},
            "lora_parts",
            "leaves no layer for an adapter: all matches are frozen, trained fully or kept out",
            "name layers such as q_proj,v_proj, or a part with linear layers such as llm",
        ),
        (
            {"lora_parts": "vit"},
            "lora_parts",
            'the model has no module "vit"',
            "",
        ),
        (
            {"lora_parts": "vte.weight"},
            "lora_parts",
            '"vte.weight" is no module',
            "name modules, such as llm or visual_tokenizer.vit",
        ),
        (
            {"rank_pattern": {"x_proj": 4}},
            "rank_pattern",
            '"x_proj" matches no adapted layer',
            "write the end of a path, as that of llm.model.layers.0.self_attn.q_proj",
        ),
        (
            {"alpha_pattern": {"fc1": 4}},
            "alpha_pattern",
            '"fc1" matches no adapted layer',
            "write the end of a path, as that of llm.model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_what_to_write(keys, where, what, fix):
    with pytest.raises(ConfigError) as error:
        Decided(**keys)
    assert (error.value.where, error.value.what) == (where, what)
    assert error.value.fix.startswith(fix)


# -- what PEFT makes of it -------------------------------------------------------------------------


def trained(model: nn.Module) -> set[str]:
    """Names as they are in the model below."""
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    return {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".base_layer", "")
        .replace(".default", "")
        for name in names
    }


def matrices(paths: list[str]) -> set[str]:
    return {f"{path}.lora_{side}.weight" for path in paths for side in "AB"}


def layer_of(adapted: PeftModel, path: str) -> LoraLayer:
    module = adapted.get_base_model().get_submodule(path)
    assert isinstance(module, LoraLayer)
    return module


def biases(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith(".bias")}


UNUSED = {f"{POST_LAYERNORM}.{kind}" for kind in ("weight", "bias")}


def test_adapters_are_trained_in_float32_and_nothing_else_is():
    decided = Decided(lora_parts="llm|visual_tokenizer.vit")
    decided.model.to(torch.bfloat16)
    adapted = decided.adapted()
    assert trained(adapted) == matrices(LLM + VIT)
    kinds = {(p.requires_grad, p.dtype) for p in adapted.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_unless_it_starts_at_random(dora):
    ids = torch.arange(6)[None]
    for start in (True, "gaussian", "orthogonal", False):
        torch.manual_seed(0)
        decided = Decided(init_lora_weights=start, use_dora=dora, lora_r=4)
        before = decided.model(ids).logits
        a = (layer := layer_of(decided.adapted(), LLM[0])).lora_A["default"].weight
        difference = (decided.model(ids).logits - before).abs().max().item()
        if start is False:
            assert difference > 1e-3
        else:
            assert difference <= 1e-6
            b = layer.lora_B["default"].weight
            assert (b.abs().max().item() > 0) == (start == "orthogonal")
            assert a.abs().max() > 0 and (b @ a).abs().max() <= 1e-8


def test_gaussian_starts_with_a_spread_of_one_over_the_rank():
    torch.manual_seed(0)
    adapted = Decided(init_lora_weights="gaussian", lora_r=8).adapted()
    a = torch.cat([layer_of(adapted, name).lora_A["default"].weight.flatten() for name in LLM])
    assert a.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"lora_r": 16, "lora_alpha": 32}, 2.0),
        ({"lora_r": 4, "lora_alpha": 1}, 0.25),
        ({"lora_r": 16, "lora_alpha": 32, "use_rslora": True}, 8.0),
        ({"lora_r": 4, "lora_alpha": 1, "use_rslora": True}, 0.5),
    ],
)
def test_the_scaling_is_alpha_by_r_or_by_its_root(keys, scaling):
    decided = Decided(lora_target_modules="o_proj", init_lora_weights=False, **keys)
    layer = layer_of(decided.adapted(), "llm.model.layers.0.self_attn.o_proj")
    assert layer.scaling["default"] == scaling
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape[0] == b.shape[1] == keys["lora_r"]
    x = torch.randn(2, 8)
    expected = layer.get_base_layer()(x) + scaling * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_ranks_and_alphas_that_differ_are_those_of_the_pattern():
    adapted = Decided(
        lora_parts="llm|visual_tokenizer.vit",
        lora_r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 4, r"layers\.[01]\.mlp\.up_proj": 2},
        alpha_pattern={"q_proj": 1, "layers.1.mlp.fc1": 24},
    ).adapted()
    found = {}
    for name in LLM + VIT:
        layer = layer_of(adapted, name)
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"]
        found[name] = (layer.r["default"], layer.scaling["default"])
    changed = {name: pair for name, pair in found.items() if pair != (8, 2.0)}
    assert changed == {
        **{name: (4, 0.25) for name in LLM + VIT if name.endswith("q_proj")},
        **{name: (2, 8.0) for name in layers(0, 1, of=["mlp.up_proj"])},
        f"{ENCODER}.1.mlp.fc1": (8, 3.0),
    }


def test_dora_trains_a_magnitude_of_each_row_as_well():
    adapted = Decided(lora_target_modules="up_proj", use_dora=True).adapted()
    names = layers(0, 1, 2, of=["mlp.up_proj"])
    assert trained(adapted) == matrices(names) | {
        f"{name}.lora_magnitude_vector.weight" for name in names
    }
    magnitude = layer_of(adapted, names[0]).lora_magnitude_vector["default"].weight
    rows = adapted.get_base_model().get_submodule(names[0]).get_base_layer().weight.norm(dim=1)
    torch.testing.assert_close(magnitude, rows)


@pytest.mark.parametrize("parts", ["llm|visual_tokenizer.vit", "visual_tokenizer.vit"])
def test_biases_that_lora_bias_trains(parts):
    names = VIT + (LLM if "llm" in parts else [])
    every = biases(tiny())
    expected = {
        "none": set(),
        "all": every - UNUSED,
        "lora_only": {f"{name}.bias" for name in VIT},
        True: {f"{name}.lora_B.bias" for name in VIT},
    }
    for bias, extra in expected.items():
        if bias is True and "llm" in parts:
            continue
        adapted = Decided(lora_parts=parts, lora_bias=bias).adapted()
        assert trained(adapted) == matrices(names) | extra, bias


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (
            {"lora_bias": True, "lora_parts": "llm|visual_tokenizer.vit"},
            "is true, but llm.model.layers.0.self_attn.q_proj has no bias that an adapter's could "
            "be merged into",
        ),
        ({"lora_bias": "lora_only"}, "is lora_only, but no adapted layer has a bias"),
    ],
)
def test_a_bias_that_layers_do_not_have_is_refused(keys, what):
    with pytest.raises(ConfigError) as error:
        Decided(**keys)
    assert (error.value.where, error.value.what) == ("lora_bias", what)
    assert error.value.fix.startswith("set it to none")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"init_lora_weights": "orthogonal", "lora_r": 5}, "rank to be even, got 5"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}, "even, got 3"),
        ({"lora_parts": "visual_tokenizer.vit", "lora_bias": True, "use_dora": True}, "DoRA"),
    ],
)
def test_what_peft_does_not_combine_is_an_error_in_its_words(keys, what):
    with pytest.raises(ConfigError, match=what):
        Decided(**keys).adapted()


def test_parts_without_parameters_to_train_are_refused():
    for key, name in (
        ("modules_to_save", "act_fn"),
        ("modules_to_save", "rotary_emb"),
        ("train_modules", POST_LAYERNORM),
    ):
        with pytest.raises(ConfigError) as error:
            Decided(**{key: [name] if key == "modules_to_save" else name})
        assert key in error.value.where
        assert f'"{name}"' in error.value.what


def test_vision_kept_out_needs_no_other_expression():
    keys = {"lora_parts": "llm", "lora_target_modules": "q_proj", "apply_lora_to_vision": False}
    same(targets(**keys), layers(0, 1, 2, of=QV[:1]))


def test_an_unused_norm_is_never_trained():
    for keys in (
        {"lora_bias": "all"},
        {"train_modules": "visual_tokenizer"},
        {"train_modules": "visual_tokenizer.vit"},
        {"modules_to_save": ["vision_model"]},
    ):
        adapted = Decided(**keys).adapted()
        assert trained(adapted) & UNUSED == set()
        assert len(trained(adapted)) > len(matrices(LLM)), keys


# -- parts trained fully ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, []),
        ({"train_modules": "all"}, []),
        ({"train_modules": "vte:1e-3"}, [FullPart("vte", 1e-3, ["vte"])]),
        (
            {"train_modules": "visual_tokenizer.head|visual_tokenizer.vit.last_block:2e-5"},
            [
                FullPart("visual_tokenizer.head", None, ["visual_tokenizer.head"]),
                FullPart("visual_tokenizer.vit.last_block", 2e-5, [f"{ENCODER}.1"]),
            ],
        ),
        (
            {"train_modules": "llm.model.layers.1-2.mlp"},
            [
                FullPart(
                    "llm.model.layers.1-2.mlp", None, [f"llm.model.layers.{i}.mlp" for i in (1, 2)]
                )
            ],
        ),
        (
            {"modules_to_save": ["vte", "q_norm"]},
            [
                FullPart("vte", None, ["vte"]),
                FullPart(
                    "q_norm", None, [f"llm.model.layers.{i}.self_attn.q_norm" for i in range(3)]
                ),
            ],
        ),
        (
            {"train_modules": "vte:1e-3", "modules_to_save": ["visual_tokenizer.head"]},
            [
                FullPart("vte", 1e-3, ["vte"]),
                FullPart("visual_tokenizer.head", None, ["visual_tokenizer.head"]),
            ],
        ),
        (
            {"modules_to_save": ["embed_tokens"]},
            [FullPart("embed_tokens", None, ["llm.model.embed_tokens"])],
        ),
    ],
)
def test_full_parts_with_their_rates_and_modules(keys, expected):
    decided = Decided(**keys)
    assert decided.full == expected
    adapted = decided.adapted()
    assert list(saved_parts(adapted)) == [m for m in _in_order(decided.modules)]
    full = {
        f"{module}.{name}"
        for module in decided.modules
        for name, p in tiny().get_submodule(module).named_parameters()
    }
    assert trained(adapted) == matrices(decided.targets) | full


def _in_order(modules: list[str]) -> list[str]:
    return [name for name, _ in tiny().named_modules() if name in modules]


@pytest.mark.parametrize("name", ["llm.model.embed_tokens:1e-3", "llm.lm_head:1e-3"])
def test_a_tied_embedding_and_head_are_trained_as_one_tensor_and_saved_twice(name, tmp_path):
    decided = Decided(tied=True, train_modules=name)
    [part] = decided.full
    both = ["llm.model.embed_tokens", "llm.lm_head"]
    same(part.modules, both)
    assert part.learning_rate == 1e-3
    adapted = decided.adapted()
    copies = saved_parts(adapted)
    assert copies[both[0]].weight is copies[both[1]].weight
    shared = [p for n, p in adapted.named_parameters() if "modules_to_save" in n]
    assert len(shared) == 1 and shared[0].requires_grad
    base = adapted.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight is shared[0]
    with torch.no_grad():
        shared[0] += 1
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    names = [f"base_model.model.{module}.weight" for module in both]
    assert torch.equal(saved[names[0]], saved[names[1]])
    assert torch.equal(saved[names[0]], shared[0])


@pytest.mark.parametrize("name", ["llm", "llm.model"])
def test_a_tied_head_stays_tied_under_a_trained_parent(name):
    decided = Decided(tied=True, train_modules=name, lora_parts="visual_tokenizer")
    base = decided.adapted().get_base_model()
    embedding = base.get_input_embeddings().weight
    assert embedding.requires_grad
    assert base.get_output_embeddings().weight is embedding


def test_an_untied_embedding_is_trained_without_the_head():
    decided = Decided(train_modules="llm.model.embed_tokens")
    assert decided.modules == ["llm.model.embed_tokens"]


@pytest.mark.parametrize(
    ("keys", "where", "what", "fix"),
    [
        (
            {"modules_to_save": ["vtee"]},
            "modules_to_save",
            'no module of the model is "vtee" or ends in it',
            "did you mean vte?",
        ),
        (
            {"modules_to_save": ["connector"]},
            "modules_to_save",
            'no module of the model is "connector" or ends in it',
            "write a module path",
        ),
        (
            {"train_modules": "vte.weight"},
            "train_modules",
            '"vte.weight" is no module',
            "name modules, such as llm or visual_tokenizer.vit",
        ),
        (
            {"train_modules": "vtx"},
            "train_modules",
            'the model has no module "vtx"',
            "did you mean vte",
        ),
        (
            {"train_modules": "vte", "modules_to_save": ["vte"]},
            "train_modules, modules_to_save",
            '"vte" and "vte" both train vte',
            "name each module once",
        ),
        (
            {"train_modules": "visual_tokenizer|visual_tokenizer.head:1e-3"},
            "train_modules, modules_to_save",
            '"visual_tokenizer" and "visual_tokenizer.head" both train visual_tokenizer.head',
            "name each module once",
        ),
        (
            {"train_modules": "llm.model.layers.0-1", "modules_to_save": ["layers.1.mlp"]},
            "train_modules, modules_to_save",
            '"llm.model.layers.0-1" and "layers.1.mlp" both train llm.model.layers.1.mlp',
            "name each module once",
        ),
        (
            {"train_modules": "llm.model.embed_tokens|llm.lm_head", "tied": True},
            "train_modules, modules_to_save",
            '"llm.model.embed_tokens" and "llm.lm_head" both train llm.lm_head',
            "name each module once",
        ),
        (
            {
                "train_modules": "llm.model.norm",
                "freeze_llm": True,
                "lora_parts": "visual_tokenizer",
            },
            "freeze_llm",
            "leaves llm as it is, but llm.model.norm is trained",
            "keep one of them",
        ),
        (
            {"train_modules": "visual_tokenizer", "freeze_vision_tower": True},
            "freeze_vision_tower",
            "leaves visual_tokenizer.vit as it is, but visual_tokenizer is trained",
            "keep one of them",
        ),
    ],
)
def test_a_full_part_that_cannot_be_is_refused_with_what_to_write(keys, where, what, fix):
    with pytest.raises(ConfigError) as error:
        Decided(**keys)
    assert (error.value.where, error.value.what) == (where, what)
    assert error.value.fix.startswith(fix)


# -- an adapter that is continued ------------------------------------------------------------------


def test_a_saved_adapter_is_continued_in_float32_with_its_own_places_ranks_and_parts(tmp_path):
    torch.manual_seed(0)
    first = Decided(
        lora_target_modules="q_proj",
        lora_r=4,
        lora_alpha=4,
        use_rslora=True,
        init_lora_weights=False,
        train_modules="vte|visual_tokenizer.vit",
    )
    base = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    saved = first.adapted()
    with torch.no_grad():
        saved_parts(saved)["vte"].weight += 1
    saved.save_pretrained(tmp_path)

    model = tiny()
    model.load_state_dict(base)
    model.to(torch.bfloat16)
    adapted = load_adapter(model, AdapterConfig(use_lora=True, adapter_path=str(tmp_path)))
    assert trained(adapted) == trained(saved)
    assert trained(adapted) & UNUSED == set()
    theirs = dict(saved.named_parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, theirs[name]), name
    assert layer_of(adapted, layers(0, of=QV[:1])[0]).scaling["default"] == 2.0


def test_a_tied_embedding_is_one_tensor_again_when_it_is_continued(tmp_path):
    first = Decided(tied=True, train_modules="llm.model.embed_tokens")
    first.adapted().save_pretrained(tmp_path)
    model = tiny(tied=True)
    adapted = load_adapter(model, AdapterConfig(use_lora=True, adapter_path=str(tmp_path)))
    copies = saved_parts(adapted)
    assert copies["llm.lm_head"].weight is copies["llm.model.embed_tokens"].weight


@pytest.mark.parametrize("made", ["other shapes", "no weights", "broken config"])
def test_what_peft_cannot_put_on_the_model_is_an_error_in_its_words(made, tmp_path):
    # Most of what does not fit is found before, on the files alone: tests/sft.
    Decided().adapted().save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    if made == "no weights":
        (tmp_path / "adapter_model.safetensors").unlink()
    elif made == "other shapes":
        config.write_text(config.read_text("utf-8").replace('"r": 16', '"r": 8'), "utf-8")
    else:
        config.write_text("{", "utf-8")
    with pytest.raises(ModelError) as error:
        load_adapter(tiny(), AdapterConfig(use_lora=True, adapter_path=str(tmp_path)))
    assert error.value.where == f"adapter_path {tmp_path}"
    assert error.value.what.startswith("cannot be put on the model: ")
    assert error.value.fix == "give an adapter of this model_path, complete"
