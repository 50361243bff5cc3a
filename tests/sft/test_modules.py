"""`train_modules` on a model: what is trained, how names resolve, and who gets which group."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from vlmtune.configs.schema import ModelConfig
from vlmtune.core.errors import ConfigError
from vlmtune.models import Ovis2_5, Ovis2_5Config
from vlmtune.sft.callbacks import FreshAdam, GradientReport
from vlmtune.sft.modules import (
    GradientNorms,
    TrainedModule,
    apply_train_modules,
    module_table,
    parameter_groups,
)

ENCODER = "visual_tokenizer.vit.vision_model.encoder.layers"
POST_LAYERNORM = "visual_tokenizer.vit.vision_model.post_layernorm"
HEAD = {f"visual_tokenizer.head.{name}" for name in ("0.weight", "1.weight", "1.bias")}
BLOCK = {
    *(f"{layer}.{kind}" for layer in ("layer_norm1", "layer_norm2") for kind in ("weight", "bias")),
    *(f"self_attn.{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")),
    *(f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")),
}
LAYER = {
    *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")),
    *(f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}
VIT = {
    "visual_tokenizer.vit.vision_model.embeddings.patch_embedding.weight",
    "visual_tokenizer.vit.vision_model.embeddings.patch_embedding.bias",
    "visual_tokenizer.vit.vision_model.embeddings.position_embedding.weight",
    *(f"{ENCODER}.{i}.{name}" for i in range(2) for name in BLOCK),
}
VTE = {"vte.weight"}


def layers(*indices: int) -> set[str]:
    return {f"llm.model.layers.{i}.{name}" for i in indices for name in LAYER}


LLM = {
    "llm.model.embed_tokens.weight",
    "llm.lm_head.weight",
    "llm.model.norm.weight",
    *layers(0, 1, 2),
}
ALL = LLM | VIT | HEAD | VTE


def tiny(tied: bool = False) -> Ovis2_5:
    """Three layers of the language model and two of the vision tower."""
    llm = {"model_type": "qwen3", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12}
    llm |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm |= {"head_dim": 4, "tie_word_embeddings": tied}
    vit = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    vit |= {"num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    return Ovis2_5(Ovis2_5Config(llm_config=llm, vit_config=vit, visual_vocab_size=16))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def applied(text: str, tied: bool = False, **keys) -> tuple[Ovis2_5, list[TrainedModule]]:
    model = tiny(tied)
    settings = ModelConfig(model_path="m", train_modules=text, **keys)
    return model, apply_train_modules(model, settings, 2e-5)


def test_the_tiny_model_has_exactly_these_parameters():
    names = {name for name, _ in tiny().named_parameters()}
    assert names == ALL | {f"{POST_LAYERNORM}.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all", ALL),
        ("llm", LLM),
        ("visual_tokenizer", VIT | HEAD),
        ("visual_tokenizer.head", HEAD),
        ("visual_tokenizer.vit", VIT),
        ("visual_tokenizer.vit.last_block", {f"{ENCODER}.1.{name}" for name in BLOCK}),
        ("vte", VTE),
        ("llm.model.layers.0-1", layers(0, 1)),
        ("llm.model.layers.2-2", layers(2)),
        ("llm.model.layers.1", layers(1)),
        (
            "llm.model.layers.1-2.mlp",
            {f"llm.model.layers.{i}.{n}" for i in (1, 2) for n in LAYER if n.startswith("mlp.")},
        ),
        ("visual_tokenizer.head.0-1", HEAD),
        ("visual_tokenizer.head.1.bias", {"visual_tokenizer.head.1.bias"}),
        ("llm.lm_head", {"llm.lm_head.weight"}),
    ],
)
def test_a_name_trains_its_parameters_and_freezes_the_rest(name, expected):
    model, [module] = applied(name)
    assert trained(model) == expected
    assert (module.name, module.parameters.keys()) == (name, expected)
    assert module.learning_rate == 2e-5


def test_a_tied_head_is_the_embedding_it_shares():
    model, [module] = applied("llm.lm_head", tied=True)
    assert trained(model) == {"llm.model.embed_tokens.weight"}
    assert module.size == 20 * 8


@pytest.mark.parametrize("keys", [{}, {"freeze_llm": True}])
def test_what_the_family_never_trains_stays_frozen(keys):
    model, _ = applied("all|visual_tokenizer:1e-3|visual_tokenizer.vit.vision_model", **keys)
    assert not any(p.requires_grad for p in model.get_submodule(POST_LAYERNORM).parameters())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"freeze_llm": True}, VIT | HEAD | VTE),
        ({"freeze_vision_tower": True}, LLM | HEAD | VTE),
        ({"freeze_llm": True, "freeze_vision_tower": True}, HEAD | VTE),
    ],
)
def test_shorthands_freeze_within_what_is_named(keys, expected):
    model, [module] = applied("all", **keys)
    assert trained(model) == module.parameters.keys() == expected


def test_a_shorthand_freezes_what_an_entry_has_of_it():
    model, [module] = applied("visual_tokenizer", freeze_vision_tower=True)
    assert trained(model) == module.parameters.keys() == HEAD


@pytest.mark.parametrize("turned", [False, True])
def test_the_most_specific_name_counts_however_deep_and_in_any_order(turned):
    entries = [
        "all:1e-2",
        "llm:1e-3",
        "llm.model.layers.1-2:1e-4",
        "llm.model.layers.2.mlp:1e-5",
        "llm.model.layers.2.mlp.up_proj.weight",
    ]
    names = entries[::-1] if turned else entries
    model, modules = applied("|".join(names))
    mlp = {n for n in layers(2) if ".mlp." in n}
    up = {"llm.model.layers.2.mlp.up_proj.weight"}
    expected = [
        ("all", 1e-2, ALL - LLM),
        ("llm", 1e-3, LLM - layers(1, 2)),
        ("llm.model.layers.1-2", 1e-4, layers(1, 2) - mlp),
        ("llm.model.layers.2.mlp", 1e-5, mlp - up),
        ("llm.model.layers.2.mlp.up_proj.weight", 2e-5, up),
    ]
    found = [(m.name, m.learning_rate, m.parameters.keys()) for m in modules]
    assert found == (expected[::-1] if turned else expected)
    assert trained(model) == ALL


@pytest.mark.parametrize(
    "text",
    [
        "llm.model.layers.0-1|llm.model.layers.1-2",
        "llm.model.layers.1-2|llm.model.layers.0-1.mlp",
        "vte|vte.weight",
        f"visual_tokenizer.vit.last_block|{ENCODER}.1",
    ],
)
def test_overlaps_without_a_more_specific_name_are_refused(text):
    a, b = text.split("|")
    with pytest.raises(ConfigError) as error:
        applied(text)
    assert error.value.where == "train_modules"
    assert error.value.what == f'"{a}" and "{b}" overlap, and neither is part of the other'


def test_tied_weights_cannot_belong_to_two_names():
    with pytest.raises(ConfigError, match="overlap, and neither is part of the other"):
        applied("llm.model.embed_tokens|llm.lm_head", tied=True)


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        (
            "visual_tokenizer.haed",
            'the model has no module "visual_tokenizer.haed"',
            "did you mean visual_tokenizer.head, ",
        ),
        ("vte|vtx", 'the model has no module "vtx"', "did you mean vte"),
        (
            "connector",
            'the model has no module "connector"',
            "known are all, visual_tokenizer.vit.last_block, llm, visual_tokenizer, vte",
        ),
        (
            "llm.model.layers.1-3",
            'the model has no module "llm.model.layers.3"',
            "did you mean llm.model.layers",
        ),
        ("llm.model.layers.0-1.mpl", 'the model has no module "llm.model.layers.0.mpl"', ""),
        ("ll", 'the model has no module "ll"', "did you mean llm"),
        (POST_LAYERNORM, f'"{POST_LAYERNORM}" has no parameter to train', "remove it"),
        ("llm.model.rotary_emb", '"llm.model.rotary_emb" has no parameter to train', "remove it"),
        (
            "|".join(["llm", "llm.model", "llm.lm_head"]),
            'every parameter of "llm" belongs to more specific names',
            "remove it",
        ),
    ],
)
def test_unknown_and_empty_names_are_refused_with_the_nearest_ones(text, what, fix):
    with pytest.raises(ConfigError) as error:
        applied(text)
    assert (error.value.where, error.value.what) == ("train_modules", what)
    assert error.value.fix.startswith(fix)


@pytest.mark.parametrize(
    ("text", "keys", "name"),
    [
        ("llm", {"freeze_llm": True}, "llm"),
        ("vte|llm.model.layers.0-1:1e-4", {"freeze_llm": True}, "llm.model.layers.0-1"),
        (
            "visual_tokenizer.vit.last_block|vte",
            {"freeze_vision_tower": True},
            "visual_tokenizer.vit.last_block",
        ),
    ],
)
def test_a_module_asked_for_and_frozen_is_refused(text, keys, name):
    with pytest.raises(ConfigError) as error:
        applied(text, **keys)
    assert error.value.what == f'every parameter of "{name}" is frozen'


def test_a_model_whose_parameters_are_all_frozen_is_refused():
    model = tiny()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match='"all" has no parameter to train'):
        apply_train_modules(model, ModelConfig(model_path="m"), 1e-4)


def grouped(text: str, weight_decay: float = 0.1):
    model, modules = applied(text)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(modules, decayed, weight_decay)
    return model, [
        (g["module"], g["lr"], g["weight_decay"], {names[p] for p in g["params"]}) for g in groups
    ]


def test_groups_have_the_rate_of_their_module_and_decay_only_where_it_belongs():
    _, groups = grouped("visual_tokenizer.head:1e-3|vte|llm.model.layers.1:1e-4")
    matrices = {n for n in layers(1) if "_proj." in n}
    assert groups == [
        ("visual_tokenizer.head", 1e-3, 0.1, {"visual_tokenizer.head.0.weight"}),
        ("visual_tokenizer.head", 1e-3, 0.0, HEAD - {"visual_tokenizer.head.0.weight"}),
        ("vte", 2e-5, 0.1, VTE),
        ("llm.model.layers.1", 1e-4, 0.1, matrices),
        ("llm.model.layers.1", 1e-4, 0.0, layers(1) - matrices),
    ]


@pytest.mark.parametrize(
    "text", ["all", "all|llm:1e-3|llm.model.layers.0-1|visual_tokenizer.vit.last_block:1e-6"]
)
def test_every_trainable_parameter_is_in_exactly_one_group(text):
    model, groups = grouped(text)
    names = [name for *_, own in groups for name in own]
    assert len(names) == len(set(names))
    assert set(names) == trained(model) == ALL
    undecayed = {name for _, _, decay, own in groups if decay == 0.0 for name in own}
    assert undecayed == {n for n in ALL if n.endswith(".bias") or "norm" in n or ".head.1." in n}


def test_the_table_names_module_size_rate_and_dtype():
    _, modules = applied("visual_tokenizer.head:1e-3|vte|llm:2.5e-06")
    assert module_table(modules) == (
        "  module                 parameters  learning rate    dtype\n"
        "  visual_tokenizer.head         408          0.001  float32\n"
        "  vte                           128          2e-05  float32\n"
        "  llm                         1,840        2.5e-06  float32"
    )


def test_the_table_names_both_dtypes_and_sizes_under_zero_3():
    part = nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)})
    part["a"].ds_numel = 1_000_000  # ZeRO-3 keeps the whole size here
    rows = module_table([TrainedModule("vte", 1e-4, dict(part.items()))]).splitlines()
    assert rows[1].split() == ["vte", "1,000,002", "0.0001", "bfloat16/float32"]


def optimizer_of(**gradients: list[float] | None) -> tuple[list[TrainedModule], torch.optim.AdamW]:
    """One module and group for each name, with that gradient on its only parameter."""
    modules = []
    for name, values in gradients.items():
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = None if values is None else torch.tensor(values)
        modules.append(TrainedModule(name, 1e-3, {f"{name}.weight": parameter}))
    return modules, torch.optim.AdamW(parameter_groups(modules, (), 0.0))


def test_gradient_norms_are_those_of_each_module():
    modules, optimizer = optimizer_of(vte=[3.0, 4.0], llm=[0.0, 0.5], head=None)
    extra = nn.Parameter(torch.zeros(1))
    extra.grad = torch.tensor([12.0])
    modules[0].parameters["vte.bias"] = extra
    optimizer.add_param_group({"params": [extra], "weight_decay": 0.0, "module": "vte"})
    norms = GradientNorms(modules)
    optimizer.register_step_pre_hook(norms.read)
    assert norms.take(torch.device("cpu")) is None
    optimizer.step()
    assert norms.take(torch.device("cpu")) == {"vte": 13.0, "llm": 0.5, "head": 0.0}
    assert norms.take(torch.device("cpu")) is None
    optimizer.step()
    assert norms.take(torch.device("cpu")) == {"vte": 13.0, "llm": 0.5, "head": 0.0}


class Wrapped:
    """As accelerate and DeepSpeed keep the optimizer that is stepped."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def reported(report: GradientReport, optimizer: torch.optim.Optimizer, tmp_path) -> None:
    """One optimizer step under the report's eyes."""
    args, state, control = (
        TrainingArguments(str(tmp_path), use_cpu=True),
        TrainerState(),
        TrainerControl(),
    )
    if report._hook is None:
        report.on_train_begin(args, state, control, optimizer=Wrapped(Wrapped(optimizer)))
    optimizer.step()
    report.on_optimizer_step(args, state, control)


@pytest.mark.parametrize("gradient", [[0.0, 0.0], None])
@pytest.mark.parametrize(
    ("has_images", "causes"),
    [
        (
            True,
            "remove it, or see whether its output reaches the loss and whether fp16 underflows",
        ),
        (False, "remove it, or train on data with images: this data has none"),
    ],
)
def test_a_module_without_gradient_stops_the_run(gradient, has_images, causes, tmp_path):
    modules, optimizer = optimizer_of(vte=gradient, llm=[3.0, 4.0], head=gradient)
    report = GradientReport(modules, has_images)
    report.saw_image = True
    with pytest.raises(ConfigError) as error:
        reported(report, optimizer, tmp_path)
    assert error.value.where == "train_modules, vte, head"
    assert error.value.what == "the gradient is exactly zero after step 1"
    assert error.value.fix == causes


def test_the_report_waits_for_an_image_and_speaks_once(tmp_path, capsys):
    modules, optimizer = optimizer_of(vte=[0.0, 0.0], llm=[3.0, 4.0])
    report = GradientReport(modules, has_images=True)
    reported(report, optimizer, tmp_path)
    assert capsys.readouterr().err == ""
    modules[0].parameters["vte.weight"].grad = torch.tensor([0.0, 2.0])
    report.saw_image = True
    reported(report, optimizer, tmp_path)
    assert capsys.readouterr().err == (
        "\nGradients of step 1, averaged and clipped:\n"
        "  module       norm\n"
        "  vte     2.000e+00\n"
        "  llm     5.000e+00\n"
    )
    assert report._hook is None


def test_the_report_gives_up_when_no_image_comes(tmp_path, capsys):
    modules, optimizer = optimizer_of(vte=[0.0, 0.0], llm=[3.0, 4.0])
    report = GradientReport(modules, has_images=True)
    for _ in range(report.PATIENCE):
        assert capsys.readouterr().err == ""
        reported(report, optimizer, tmp_path)
    told = "\nNo image in 100 steps: gradients by module were not looked at.\n"
    assert capsys.readouterr().err == told
    assert report._hook is None


def test_adam_counts_from_zero_in_a_new_run_and_goes_on_in_a_resumed_one(tmp_path):
    _, optimizer = optimizer_of(vte=[0.0, 0.0])
    optimizer.step()
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    for step, count in ((7, 1), (0, 0)):
        state = TrainerState(global_step=step)
        FreshAdam().on_train_begin(args, state, control, optimizer=Wrapped(optimizer))
        assert [float(values["step"]) for values in optimizer.state.values()] == [count]
