"""Parts of a model by module paths, ranges and short names."""

import pytest

from vlmtune.core.errors import ConfigError
from vlmtune.models import Ovis2_5, Ovis2_5Config
from vlmtune.models.parts import LANGUAGE, VISION, is_under, modules_at, paths_under

LAST = "visual_tokenizer.vit.vision_model.encoder.layers.1"


@pytest.fixture(scope="module")
def model() -> Ovis2_5:
    """Three layers of the language model and two of the vision tower."""
    llm = {"model_type": "qwen3", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12}
    llm |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm |= {"head_dim": 4}
    vit = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    vit |= {"num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    return Ovis2_5(Ovis2_5Config(llm_config=llm, vit_config=vit, visual_vocab_size=16))


def test_the_names_of_language_and_vision_are_modules_of_ovis(model):
    assert modules_at(LANGUAGE, model, "k") == ["llm"]
    assert modules_at(VISION, model, "k") == ["visual_tokenizer.vit"]


def test_all_is_every_module_and_parameter(model):
    below = paths_under("all", model, "k")
    assert {name for name, _ in model.named_parameters()} < below
    assert {name for name, _ in model.named_modules() if name} < below


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("vte", ["vte", "vte.weight"]),
        ("vte.weight", ["vte.weight"]),
        (
            "llm.model.layers.0-1.self_attn.q_norm",
            [
                f"llm.model.layers.{i}.self_attn.q_norm{kind}"
                for i in (0, 1)
                for kind in ("", ".weight")
            ],
        ),
        (
            "visual_tokenizer.head",
            [
                "visual_tokenizer.head",
                "visual_tokenizer.head.0",
                "visual_tokenizer.head.0.weight",
                "visual_tokenizer.head.1",
                "visual_tokenizer.head.1.bias",
                "visual_tokenizer.head.1.weight",
            ],
        ),
    ],
)
def test_what_is_at_a_path_and_below(model, path, expected):
    assert sorted(paths_under(path, model, "k")) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("llm", ["llm"]),
        ("llm.model.layers", ["llm.model.layers"]),
        ("llm.model.layers.1-2", ["llm.model.layers.1", "llm.model.layers.2"]),
        (
            "llm.model.layers.1-2.mlp",
            ["llm.model.layers.1.mlp", "llm.model.layers.2.mlp"],
        ),
        ("visual_tokenizer.vit.last_block", [LAST]),
        (LAST, [LAST]),
        ("llm.lm_head", ["llm.lm_head"]),
    ],
)
def test_modules_a_path_names_are_not_those_below_it(model, path, expected):
    assert modules_at(path, model, "k") == expected


@pytest.mark.parametrize("path", ["vte.weight", "all", "visual_tokenizer.head.0.weight"])
def test_a_parameter_or_the_whole_model_is_no_module(model, path):
    with pytest.raises(ConfigError) as error:
        modules_at(path, model, "lora_parts")
    assert (error.value.where, error.value.what) == ("lora_parts", f'"{path}" is no module')
    assert error.value.fix == "name modules, such as llm or visual_tokenizer.vit"


@pytest.mark.parametrize(
    ("path", "missing", "fix"),
    [
        ("llmm", "llmm", "did you mean llm"),
        (
            "connector",
            "connector",
            "known are all, visual_tokenizer.vit.last_block, llm, visual_tokenizer, vte",
        ),
        ("llm.model.layers.1-3", "llm.model.layers.3", "did you mean llm.model.layers"),
        ("llm.model.layers.3-4.mlp", "llm.model.layers.3.mlp", "did you mean llm.model.layers"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_ones(model, path, missing, fix):
    for look in (paths_under, modules_at):
        with pytest.raises(ConfigError) as error:
            look(path, model, "lora_parts")
        assert error.value.where == "lora_parts"
        assert error.value.what == f'the model has no module "{missing}"'
        assert error.value.fix.startswith(fix)


def test_being_under_goes_by_whole_parts_of_a_path():
    assert is_under("llm.model", "llm") and is_under("llm", "llm")
    assert not is_under("llmx.model", "llm") and not is_under("llm", "llm.model")
