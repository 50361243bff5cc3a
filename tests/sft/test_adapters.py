"""A plan of adapters on a model: what it trains in which optimizer group, and how it is told."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError
from vlmtune.lora.checkpoint import Checkpoint
from vlmtune.lora.settings import FullPart
from vlmtune.models import Ovis2_5, Ovis2_5Config
from vlmtune.sft.adapters import adapter_table, apply_adapters, plan_adapters
from vlmtune.sft.modules import module_table, parameter_groups
from vlmtune.sft.plan import _size as parameter_size

PREFIX = "base_model.model."
WIDE = 128  # whole blocks, which layers need to be quantised


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(tied, width)` is the folder of a model with three layers of the language model and two
    of the vision tower."""
    folders = {}

    def folder(tied: bool, width: int) -> Path:
        if (tied, width) not in folders:
            llm = {"model_type": "qwen3", "vocab_size": 20, "num_hidden_layers": 3}
            llm |= {"hidden_size": width, "intermediate_size": width * 3 // 2}
            llm |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2}
            llm |= {"tie_word_embeddings": tied}
            vit = {"hidden_size": width, "intermediate_size": width * 3 // 2}
            vit |= {"num_hidden_layers": 2, "num_attention_heads": 2}
            vit |= {"patch_size": 4, "image_size": 16}
            config = Ovis2_5Config(llm_config=llm, vit_config=vit, visual_vocab_size=16)
            folders[tied, width] = tmp_path_factory.mktemp("base")
            Ovis2_5(config).save_pretrained(folders[tied, width])
        return folders[tied, width]

    return folder


@pytest.fixture
def applied(saved):
    """`applied(key=value)` is the plan, the wrapped model and what it trains."""

    def apply(dtype: str = "float32", tied: bool = False, width: int = 8, **keys):
        folder = saved(tied, width)
        given = {"model_path": folder, "data_path": "d", "output_dir": "o", "use_lora": "true"}
        words = [w for k, v in (given | keys).items() for w in (f"--{k}", str(v))]
        config = load_config(words)
        plan = plan_adapters(Checkpoint.open(str(folder)), config, dtype)
        quantized = {}
        if plan.quantization:
            settings = plan.quantization.host_config(
                Ovis2_5(Ovis2_5Config.from_pretrained(folder)), dtype
            )
            quantized = {"quantization_config": settings, "device_map": {"": "cpu"}}
        model = Ovis2_5.from_pretrained(folder, dtype=dtype, **quantized)
        adapted, modules = apply_adapters(model, config, plan, 1e-4)
        return plan, adapted, modules

    return apply


def groups_of(adapted: nn.Module, modules) -> list[tuple[str, float, float, int]]:
    decayed = set(Trainer.get_decay_parameter_names(None, adapted))
    return [
        (g["module"], g["lr"], g["weight_decay"], len(g["params"]))
        for g in parameter_groups(modules, decayed, 0.1)
    ]


def test_a_plan_names_layers_parts_and_what_is_quantised(applied):
    plan, _, _ = applied(
        width=WIDE,
        lora_target_modules=r"llm\.model\.layers\.0\.mlp\..*_proj",
        train_modules="vte:1e-3",
        load_in_4bit="true",
        modules_to_save="llm.model.layers.1.mlp",
    )
    mlp = [f"llm.model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert plan.targets == mlp
    assert plan.full == [
        FullPart("vte", 1e-3, ["vte"]),
        FullPart("llm.model.layers.1.mlp", None, ["llm.model.layers.1.mlp"]),
    ]
    assert plan.full_modules == ["vte", "llm.model.layers.1.mlp"]
    assert plan.quantization
    assert len(plan.quantization.modules) == 21 - 3
    assert not any(name.startswith("llm.model.layers.1.mlp") for name in plan.quantization.modules)


def test_adapters_and_full_parts_are_groups_with_rates_of_their_own(applied):
    _, adapted, modules = applied(
        lora_parts="llm|visual_tokenizer.vit",
        train_modules="vte:1e-3|visual_tokenizer.head",
        modules_to_save="q_norm",
    )
    assert groups_of(adapted, modules) == [
        ("lora llm", 1e-4, 0.1, 42),
        ("q_norm", 1e-4, 0.0, 3),
        ("lora visual_tokenizer.vit", 1e-4, 0.1, 24),
        ("visual_tokenizer.head", 1e-4, 0.1, 1),
        ("visual_tokenizer.head", 1e-4, 0.0, 2),
        ("vte", 1e-3, 0.1, 1),
    ]
    names = {p: n for n, p in adapted.named_parameters()}
    by_group = {m.name: {names[p] for p in m.parameters.values()} for m in modules}
    assert by_group["vte"] == {f"{PREFIX}vte.modules_to_save.default.weight"}
    assert all(".lora_" in n and n.startswith(f"{PREFIX}llm.") for n in by_group["lora llm"])
    every = [p for m in modules for p in m.parameters.values()]
    assert len(every) == len(set(every))
    assert set(every) == {p for p in adapted.parameters() if p.requires_grad}


def test_a_tied_embedding_is_one_parameter_of_one_group(applied):
    _, _, modules = applied(tied=True, train_modules="llm.model.embed_tokens:1e-3")
    [part] = [m for m in modules if m.name == "llm.model.embed_tokens"]
    assert (part.learning_rate, part.size, len(part.parameters)) == (1e-3, 20 * 8, 1)


def test_adapters_in_other_parts_are_named_by_them(applied):
    _, _, modules = applied(lora_parts="visual_tokenizer|llm.model.layers.0", lora_r=2)
    assert [(m.name, m.size) for m in modules] == [
        ("lora llm", 232),
        ("lora visual_tokenizer.vit", 416),
        ("lora visual_tokenizer", 88),
    ]


def test_the_tables_say_where_every_adapter_sits_and_what_is_trained(applied):
    _, adapted, modules = applied(
        lora_parts="llm.model.layers.0-1.mlp|llm.model.layers.2.self_attn|visual_tokenizer.vit",
        lora_r=4,
        lora_alpha=6,
        rank_pattern='{"1.mlp.up_proj": 2}',
        alpha_pattern='{"fc2": 12}',
        train_modules="vte:1e-3",
    )
    assert module_table(modules) == (
        "  module                     parameters  learning rate    dtype\n"
        "  lora llm                          664         0.0001  float32\n"
        "  lora visual_tokenizer.vit         832         0.0001  float32\n"
        "  vte                               128          0.001  float32"
    )
    vision = "visual_tokenizer.vit.vision_model.encoder.layers.0-1"
    head, *rows = adapter_table(adapted).splitlines()
    assert head.startswith("  adapters on   ")
    assert head.split()[2:] == ["layers", "kind", "size", "rank", "alpha", "parameters"]
    assert [" ".join(row.split()) for row in rows] == [
        "llm.model.layers.0-1.mlp.gate_proj 2 Linear 8 -> 12 4 6 160",
        "llm.model.layers.0.mlp.up_proj 1 Linear 8 -> 12 4 6 80",
        "llm.model.layers.0-1.mlp.down_proj 2 Linear 12 -> 8 4 6 160",
        "llm.model.layers.1.mlp.up_proj 1 Linear 8 -> 12 2 6 40",
        "llm.model.layers.2.self_attn.q_proj 1 Linear 8 -> 8 4 6 64",
        "llm.model.layers.2.self_attn.k_proj 1 Linear 8 -> 4 4 6 48",
        "llm.model.layers.2.self_attn.v_proj 1 Linear 8 -> 4 4 6 48",
        "llm.model.layers.2.self_attn.o_proj 1 Linear 8 -> 8 4 6 64",
        *(
            f"{vision}.self_attn.{name}_proj 2 Linear 8 -> 8 4 6 128"
            for name in ("q", "k", "v", "out")
        ),
        f"{vision}.mlp.fc1 2 Linear 8 -> 12 4 6 160",
        f"{vision}.mlp.fc2 2 Linear 12 -> 8 4 12 160",
    ]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_the_table_tells_quantised_layers_and_embeddings_apart(applied):
    _, adapted, _ = applied(
        width=WIDE,
        lora_target_modules=r"llm\.model\.(embed_tokens|layers\.[02]\.mlp\.up_proj)",
        unquantized_parts="visual_tokenizer|llm.model.layers.2",
        load_in_4bit="true",
    )
    assert [" ".join(row.split()) for row in adapter_table(adapted).splitlines()] == [
        "adapters on layers kind size rank alpha parameters",
        "llm.model.embed_tokens 1 Embedding 20 -> 128 16 32 2,368",
        "llm.model.layers.0.mlp.up_proj 1 Linear4bit 128 -> 192 16 32 5,120",
        "llm.model.layers.2.mlp.up_proj 1 Linear 128 -> 192 16 32 5,120",
    ]


def test_layers_apart_are_written_as_ranges(applied):
    _, adapted, _ = applied(lora_target_modules=r"llm\.model\.layers\.[02]\.mlp\.up_proj", lora_r=1)
    assert adapter_table(adapted).splitlines()[1] == (
        "  llm.model.layers.0,2.mlp.up_proj       2  Linear  8 -> 12     1     32          40"
    )


def test_sizes_of_quantised_weights_are_those_of_the_model(applied):
    plain = sum(p.numel() for p in applied(width=WIDE)[1].parameters())
    packed = list(applied(width=WIDE, load_in_4bit="true")[1].parameters())
    assert sum(map(parameter_size, packed)) == plain > sum(p.numel() for p in packed)


def refusal(applied, **keys) -> tuple[str, str]:
    with pytest.raises(ConfigError) as error:
        applied(**keys)
    return error.value.where, error.value.what


@pytest.mark.parametrize(
    ("keys", "where", "what"),
    [
        (
            {"lora_bias": "all", "freeze_vision_tower": "true"},
            "freeze_vision_tower",
            "leaves a part as it is, but lora_bias all trains the biases of all parts",
        ),
        (
            {"lora_parts": "llm|vte"},
            "lora_parts",
            '"vte" gets no adapter: it has no linear layer, or is frozen, trained fully or kept '
            "out",
        ),
        (
            {"lora_parts": "llm|visual_tokenizer.vit", "freeze_vision_tower": "true"},
            "lora_parts",
            '"visual_tokenizer.vit" gets no adapter: it has no linear layer, or is frozen, trained '
            "fully or kept out",
        ),
    ],
)
def test_what_a_key_would_undo_is_refused(applied, keys, where, what):
    assert refusal(applied, **keys) == (where, what)


def test_a_frozen_part_and_an_adapter_that_changes_it_are_refused(applied, tmp_path):
    applied()[1].save_pretrained(tmp_path)
    assert refusal(applied, adapter_path=tmp_path, freeze_llm="true") == (
        "freeze_llm",
        "leaves llm as it is, but the adapter of adapter_path changes it",
    )
    applied(adapter_path=tmp_path, freeze_vision_tower="true")  # has no layer there


def test_an_adapter_on_the_embedding_is_saved_without_the_embedding(applied, tmp_path):
    applied(lora_target_modules="embed_tokens", lora_r=2)[1].save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    embedding = f"{PREFIX}llm.model.embed_tokens.lora_embedding_"
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
        f"{embedding}A": [2, 20],
        f"{embedding}B": [8, 2],
    }


def test_a_continued_adapter_names_the_model_of_its_last_run(applied, saved, tmp_path):
    applied()[1].save_pretrained(tmp_path / "first")
    file = tmp_path / "first/adapter_config.json"
    said = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**said, "base_model_name_or_path": "/elsewhere"}), "utf-8")
    applied(adapter_path=tmp_path / "first")[1].save_pretrained(tmp_path / "second")
    said = json.loads((tmp_path / "second/adapter_config.json").read_text("utf-8"))
    assert said["base_model_name_or_path"] == str(saved(False, 8))
