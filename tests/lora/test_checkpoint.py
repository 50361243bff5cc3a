"""Weights found in files by the names they have in the model, and a base's fingerprint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from vlmtune.core.errors import ModelError
from vlmtune.lora.checkpoint import Checkpoint, fingerprint

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "llm.lm_head.weight", "llm.model.embed_tokens.weight"


def copy_as(folder: Path, target: Path, change) -> Path:
    """The model in one file, with its tensors changed."""
    target.mkdir()
    tensors = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    save_file(change(tensors), target / "model.safetensors")
    shutil.copy(folder / "config.json", target)
    return target


def fingerprint_of(folder: Path) -> str:
    return fingerprint(Checkpoint.open(str(folder)))


def test_every_parameter_is_found_and_read_from_its_file(base, load_model):
    folder = base("bfloat16")
    checkpoint = Checkpoint.open(str(folder))
    state = load_model(folder).state_dict()
    assert checkpoint.tied == {HEAD: EMBEDDING}
    assert checkpoint.places.keys() == state.keys() - {HEAD}
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.places)
    assert [shard.name for shard in checkpoint.shards] == [
        f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)
    ]


def test_reading_all_of_a_model_takes_no_anonymous_memory(tmp_path):
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    sizes = {"num_hidden_layers": 1, "vocab_size": 60000, "hidden_size": 512}
    config = Qwen3Config(**sizes, num_attention_heads=4, intermediate_size=512)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    name = "model.embed_tokens.weight"
    assert checkpoint.read(name).nbytes > 120e6
    before = anonymous()
    assert all(bool(torch.isfinite(part.sum())) for part in checkpoint.read(name).split(2000))
    assert anonymous() - before < 20_000


def test_the_fingerprint_does_not_depend_on_files_or_dtype(base, tmp_path):
    folder = base("bfloat16")
    wanted = fingerprint_of(folder)
    wide = copy_as(folder, tmp_path / "wide", lambda t: {n: v.float() for n, v in t.items()})
    assert fingerprint_of(wide) == wanted
    assert fingerprint_of(base("float32")) == wanted


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_the_fingerprint_does_not_depend_on_which_tensor_of_a_tied_pair_is_stored(
    base, tmp_path, stored
):
    def change(tensors):
        values = tensors.pop(EMBEDDING)
        names = {"embedding": [EMBEDDING], "head": [HEAD], "both": [EMBEDDING, HEAD]}[stored]
        return {**tensors, **{name: values.clone() for name in names}}

    folder = copy_as(base("bfloat16"), tmp_path / "copy", change)
    assert fingerprint_of(folder) == fingerprint_of(base("bfloat16"))
    tied = {EMBEDDING: HEAD} if stored == "head" else {HEAD: EMBEDDING}
    assert Checkpoint.open(str(folder)).tied == tied


def test_a_stored_pair_that_differs_is_not_tied(base, tmp_path):
    def change(tensors):
        return {**tensors, HEAD: tensors[EMBEDDING].flip(0)}

    folder = copy_as(base("bfloat16"), tmp_path / "copy", change)
    assert Checkpoint.open(str(folder)).tied == {}
    assert fingerprint_of(folder) != fingerprint_of(base("bfloat16"))


@pytest.mark.parametrize("case", ["another value everywhere", "another shape"])
def test_the_fingerprint_of_another_model_is_another(base, tmp_path, case):
    def change(tensors):
        name = "vte.weight"
        if case == "another shape":
            return {**tensors, name: tensors[name][:100].clone()}
        # One step of training with a rate of 1e-4, in float32.
        return {n: t.float() + 1e-4 * torch.randn_like(t).sign() for n, t in tensors.items()}

    folder = copy_as(base("bfloat16"), tmp_path / "copy", change)
    assert fingerprint_of(folder) != fingerprint_of(base("bfloat16"))


def broken(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    first = folder / "model-00001-of-00005.safetensors"
    match what:
        case "config":
            (folder / "config.json").unlink()
        case "config text":
            (folder / "config.json").write_text("{", "utf-8")
        case "kind":
            (folder / "config.json").write_text('{"model_type": "unheard_of"}', "utf-8")
        case "adapter":
            (folder / "adapter_config.json").write_text("{}", "utf-8")
        case "quantised":
            config["quantization_config"] = {"quant_method": "bitsandbytes"}
            (folder / "config.json").write_text(json.dumps(config), "utf-8")
        case "bin":
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"")
        case "index":
            (folder / INDEX).write_text("[]", "utf-8")
        case "tensor":
            index = json.loads((folder / INDEX).read_text("utf-8"))
            index["weight_map"]["llm.more.weight"] = first.name
            (folder / INDEX).write_text(json.dumps(index), "utf-8")
        case "header":
            content = first.read_bytes()
            first.write_bytes(content[:8] + b"x" * 100 + content[108:])
        case "empty":
            first.write_bytes(b"")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("config", "has no config.json"),
        ("config text", "config.json:\n  cannot be read"),
        ("kind", "without remote code"),
        ("adapter", "is an adapter, not a model"),
        ("quantised", "is quantised"),
        ("bin", "has no model.safetensors, only pytorch_model.bin"),
        ("index", "is no index of safetensors files"),
        ("tensor", "lacks the tensor llm.more.weight"),
        ("header", "is no safetensors file"),
        ("empty", "is cut short or no safetensors file: it has 0 bytes"),
    ],
)
def test_what_is_no_whole_model_is_refused(base, tmp_path, what, told):
    folder = shutil.copytree(base("bfloat16"), tmp_path / "model")
    broken(folder, what)
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(str(folder))
    assert told in str(caught.value)


def test_a_model_that_lacks_a_parameter_is_refused_where_it_must_be_whole(base, tmp_path):
    name = "llm.model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        return {n: t for n, t in tensors.items() if n != name}

    folder = copy_as(base("bfloat16"), tmp_path / "copy", change)
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(str(folder))
    assert caught.value.where == f"model {folder}"
    assert caught.value.what == f"has no values for {name} in its files"
    places = Checkpoint.open(str(folder), whole=False).places.keys()
    assert Checkpoint.open(str(base("bfloat16"))).places.keys() - places == {name}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/no/such/folder", "/no/such/folder is no folder"),
        ("./x", "is no folder"),
        ("a/b/c", "is no folder"),
        ("someone/no-such-model", "is no folder here and cannot be had from the Hub: "),
    ],
)
def test_what_is_no_folder_is_a_name_on_the_hub_or_an_error(source, told):
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(source)
    assert caught.value.where == f"model {source}"
    assert told in caught.value.what
