"""What adapter files say they change, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vlmtune.core.errors import ModelError
from vlmtune.lora.adapter import Adapter, Change, LowRank, check_fits, parse_adapter
from vlmtune.lora.checkpoint import Checkpoint, fingerprint

WEIGHTS = "adapter_model.safetensors"
LAYER = "llm.model.layers.0.self_attn.q_proj"


@pytest.fixture
def trained(base, adapter, tmp_path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(adapter(base("bfloat16")), tmp_path / "trained")


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**settings, **changes}), "utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out/a", ("out/a", 1.0)),
        ("out/a:0.5", ("out/a", 0.5)),
        ("out/a:-2", ("out/a", -2.0)),
        ("user/name:1e-1", ("user/name", 0.1)),
        ("folder:0.5", ("folder:0.5", 1.0)),
        ("folder:0.5:0.25", ("folder:0.5", 0.25)),
    ],
)
def test_an_adapter_may_have_a_weight(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder:0.5").mkdir()
    assert parse_adapter(text) == expected


@pytest.mark.parametrize("text", ["a:b", "a:", "a:nan", "a:inf", ":0.5"])
def test_a_weight_is_a_finite_number(text):
    with pytest.raises(ModelError, match="is no number"):
        parse_adapter(text)


def test_scaling_and_rank_follow_the_patterns_as_in_peft(base, adapter):
    opened = Adapter.open(
        str(
            adapter(
                base("bfloat16"),
                target_modules=["q_proj", "embed_tokens"],
                rank_pattern={"q_proj": 2},
                alpha_pattern={"llm.*q_proj": 3},
                use_rslora=True,
            )
        )
    )
    found = opened.changes[f"{LAYER}.weight"]
    name = f"base_model.model.{LAYER}.lora_"
    assert found == Change(
        low_rank=LowRank(f"{name}A.weight", f"{name}B.weight", 3 / math.sqrt(2), None, False, False)
    )
    tower = opened.changes[
        "visual_tokenizer.vit.vision_model.encoder.layers.1.self_attn.q_proj.weight"
    ]
    assert tower.low_rank and tower.low_rank.scaling == 8 / math.sqrt(2)
    embedding = opened.changes["llm.model.embed_tokens.weight"].low_rank
    assert embedding and embedding.scaling == 8 / math.sqrt(4)
    assert embedding.embedding and embedding.transposed


def test_an_adapter_says_what_it_was_trained_on(base, trained):
    assert Adapter.open(str(trained)).base == str(base("bfloat16"))
    assert Adapter.open(str(trained)).fingerprint is None
    how = {"bits": 4, "quant_type": "nf4", "double_quant": True, "dtype": "bfloat16"}
    run = {"base": {"fingerprint": "sha256:1"}, "quantization": {**how, "modules": [LAYER]}}
    (trained / "vlmtune_run.json").write_text(json.dumps(run), "utf-8")
    opened = Adapter.open(str(trained))
    assert opened.fingerprint == "sha256:1"
    assert opened.quantization and opened.quantization.modules == [LAYER]


def test_an_untrained_copy_of_embeddings_and_biases_is_no_change(base, adapter):
    folder = base("float32")
    opened = Adapter.open(str(adapter(folder, target_modules=["embed_tokens"])))
    name = "llm.model.embed_tokens.weight"
    assert opened.changes[name].full
    fitted = check_fits(opened, Checkpoint.open(str(folder)))
    assert fitted.keys() == {name}
    assert fitted[name].full is None and fitted[name].low_rank


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA adapter, not LoRA"),
        ({"alora_invocation_tokens": [1]}, "is an activated LoRA, which has no merged form"),
        ({"use_qalora": True}, "is a QALoRA (use_qalora)"),
        ({"velora_config": {"x": 1}}, "is a VeLoRA"),
        ({"arrow_config": {"top_k": 3}}, "is a router between adapters"),
        ({"layer_replication": [[0, 1]]}, "is an adapter on replicated layers"),
        ({"target_parameters": ["w"]}, "is an adapter on bare parameters"),
        ({"trainable_token_indices": [3]}, "is an adapter on single tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "was made with init_lora_weights pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "which also changed the weights below it"),
        ({"r": 3}, "has rank 4, but adapter_config.json says 3"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight has rank 4, but"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
    ],
)
def test_a_config_that_means_something_else_is_refused(trained, setting, told):
    edit(trained, **setting)
    with pytest.raises(ModelError) as caught:
        Adapter.open(str(trained))
    assert told in caught.value.what


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("adapter_config.json", {"lora_alpha": "x"}),
        ("adapter_config.json", {"rank_pattern": [1]}),
        ("vlmtune_run.json", []),
        ("vlmtune_run.json", {"quantization": {"x": 1}}),
        ("vlmtune_run.json", {"base": "x"}),
    ],
)
def test_json_of_another_kind_is_an_error_that_names_both_files(trained, file, text):
    if file == "adapter_config.json":
        edit(trained, **text)
    else:
        (trained / file).write_text(json.dumps(text), "utf-8")
    with pytest.raises(ModelError) as caught:
        Adapter.open(str(trained))
    assert caught.value.where == f"adapter {trained}"
    assert caught.value.what.startswith(
        "its adapter_config.json or vlmtune_run.json cannot be understood: "
    )


def test_an_adapter_of_peft_on_the_visual_embedding_is_refused(base, adapter):
    folder = adapter(base("bfloat16"), target_modules=["vte"])
    with pytest.raises(ModelError) as caught:
        check_fits(Adapter.open(str(folder)), Checkpoint.open(str(base("bfloat16"))))
    assert caught.value.what == "adapts vte as an embedding, but it is VisualEmbeddingTable"
    assert caught.value.fix.startswith("train that module fully instead (modules_to_save)")


def rewrite(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


A, B = (f"base_model.model.{LAYER}.lora_{x}.weight" for x in "AB")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {}, "holds no tensors"),
        (lambda t: {n: v for n, v in t.items() if n != B}, f"has no {LAYER}.lora_B.weight, but"),
        (lambda t: {n: v for n, v in t.items() if n != A}, f"has no {LAYER}.lora_A.weight, but"),
        (lambda t: {**t, B: t[B][:, :2].clone()}, f"{LAYER}.lora_B.weight has rank 2"),
        (lambda t: {**t, A: t[A].new_zeros(0)}, "lora_A.weight alone, of shape [0]"),
        (lambda t: {**t, A: t[A][..., None].clone()}, "with tensors of 3 dimensions"),
        (lambda t: {"llm.weight": t[A]}, "holds llm.weight, which is no tensor of a PEFT adapter"),
        (
            lambda t: {A.replace("lora_A", "lora_A.default"): t[A]},
            f"holds base_model.model.{LAYER}.lora_A.default.weight, whose meaning is not known",
        ),
    ],
)
def test_weights_that_are_no_whole_adapter_are_refused(trained, change, told):
    rewrite(trained, change)
    with pytest.raises(ModelError) as caught:
        Adapter.open(str(trained))
    assert told in caught.value.what


@pytest.mark.parametrize(
    ("remove", "add", "told"),
    [
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_config.json", "config.json", "has no adapter_config.json, it is a whole model"),
        (WEIGHTS, None, f"has no {WEIGHTS}"),
        (WEIGHTS, "adapter_model.bin", f"has no {WEIGHTS}, only adapter_model.bin"),
    ],
)
def test_missing_files_are_named(trained, remove, add, told):
    (trained / remove).unlink()
    if add:
        (trained / add).write_text("{}", "utf-8")
    with pytest.raises(ModelError) as caught:
        Adapter.open(str(trained))
    assert caught.value.what == told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: {**t, A: t[A][:, :64].clone()},
            f"{A} has shape [4, 64], but {LAYER}.weight of {{base}} has [128, 128], which needs "
            "[4, 128]",
        ),
        (
            lambda t: {n.replace(LAYER, "llm.other"): v for n, v in t.items()},
            "changes llm.other.weight, which {base} does not have",
        ),
        (
            lambda t: {n.replace(LAYER, "llm.model.norm"): v for n, v in t.items()},
            "adapts llm.model.norm as a linear layer, but it is Qwen3RMSNorm",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_names_the_first_misfit(base, trained, change, told):
    folder = base("bfloat16")
    rewrite(trained, lambda tensors: change({A: tensors[A], B: tensors[B]}))
    with pytest.raises(ModelError) as caught:
        check_fits(Adapter.open(str(trained)), Checkpoint.open(str(folder)))
    assert caught.value.what == told.format(base=folder)


def test_an_adapter_fits_the_weights_it_was_trained_on_and_no_siblings(base, trained, tmp_path):
    folder = base("bfloat16")
    checkpoint = Checkpoint.open(str(folder))
    run = {"base": {"model_path": str(folder), "fingerprint": fingerprint(checkpoint)}}
    (trained / "vlmtune_run.json").write_text(json.dumps(run), "utf-8")
    opened = Adapter.open(str(trained))
    assert len(check_fits(opened, checkpoint)) == 27
    sibling = shutil.copytree(folder, tmp_path / "sibling")
    for file in sibling.glob("*.safetensors"):
        save_file({n: t * 1.01 for n, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="was trained on other weights than those of"):
        check_fits(opened, Checkpoint.open(str(sibling)))
