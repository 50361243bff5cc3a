"""What is read from a checkpoint folder and what is written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmtune.core.errors import ModelError
from vlmtune.models import Ovis2_5, Ovis2_5Config

CASES = [
    "full_single_untied",
    "full_multi_tied",
    "window_mixed",
    "video_linear_norope",
    "window_video_rope",
]
# Keys of the published config.json that the golden ones lack.
SERVING_KEYS = {
    "auto_map": {
        "AutoConfig": "configuration_ovis2_5.Ovis2_5_Config",
        "AutoModelForCausalLM": "modeling_ovis2_5.Ovis2_5",
    },
    "vocab_size": 352,
    "num_attention_heads": 4,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


def load(folder: Path, **kwargs) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("transformers_version", None)
    return config


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        assert not tensors.keys() & shard.keys()
        tensors |= shard
    return tensors


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_saved_shards_hold_the_published_tensors_bit_for_bit(golden, case, tmp_path):
    given = golden(case)
    model = load(given.folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")

    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) >= 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert_same_tensors(tensors_of(tmp_path), load_file(given.folder / "model.safetensors"))

    again, inputs = load(tmp_path), given.inputs
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("case", CASES[:2])
def test_head_handed_over_as_a_tensor_of_its_own_is_written_only_where_untied(
    golden, case, tmp_path
):
    model = golden(case).model()
    head = model.get_output_embeddings().weight.detach().clone()
    state = {**model.state_dict(), "llm.lm_head.weight": head}
    model.save_pretrained(tmp_path, state_dict=state)
    assert_same_tensors(tensors_of(tmp_path), load_file(golden(case).folder / "model.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_config_comes_back_as_it_was(golden, case, tmp_path):
    folder = golden(case).folder
    load(folder).save_pretrained(tmp_path)
    assert config_of(tmp_path) == config_of(folder)


def test_keys_of_serving_engines_come_back_and_remote_code_is_not_tried(checkpoint, tmp_path):
    folder = checkpoint(**SERVING_KEYS)  # the python files of `auto_map` are not there
    model = load(folder)
    assert type(model) is Ovis2_5
    assert type(model.config) is Ovis2_5Config
    model.save_pretrained(tmp_path / "saved")

    saved = config_of(tmp_path / "saved")
    assert {key: saved[key] for key in SERVING_KEYS} == SERVING_KEYS
    assert saved == config_of(folder)
    weights = load_file(folder / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert_same_tensors(tensors_of(tmp_path / "saved"), halves)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["default", "trusted"])
def test_python_files_beside_the_weights_are_never_run(checkpoint, trust):
    folder = checkpoint(**SERVING_KEYS)
    for name in ("configuration_ovis2_5.py", "modeling_ovis2_5.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')", "utf-8")
    assert type(AutoConfig.from_pretrained(folder, **trust)) is Ovis2_5Config
    assert type(load(folder, **trust)) is Ovis2_5


def test_dtype_in_the_saved_config_is_the_one_of_the_weights(checkpoint, tmp_path):
    load(checkpoint(**SERVING_KEYS), dtype=torch.float32).save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved")["torch_dtype"] == "float32"
    assert {t.dtype for t in tensors_of(tmp_path / "saved").values()} == {torch.float32}


def test_checkpoint_of_the_training_code_is_saved_as_the_published_kind(checkpoint, tmp_path):
    folder = checkpoint(model_type="ovis", architectures=["Ovis"])
    model = load(folder)
    assert type(model) is Ovis2_5
    model.save_pretrained(tmp_path / "saved")
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "config")
    expected = config_of(folder) | {"model_type": "ovis2_5", "architectures": ["Ovis2_5"]}
    assert config_of(tmp_path / "saved") == config_of(tmp_path / "config") == expected


def test_serving_copies_follow_the_language_model(checkpoint, tmp_path):
    model = load(checkpoint("full_multi_tied", **SERVING_KEYS))
    model.resize_token_embeddings(360, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    saved = config_of(tmp_path / "saved")
    assert saved["vocab_size"] == saved["llm_config"]["vocab_size"] == 360
    again = load(tmp_path / "saved")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert again.get_input_embeddings().weight.shape == (360, 32)


def test_serving_copy_of_a_key_the_language_model_leaves_at_its_default_is_written(
    checkpoint, tmp_path
):
    folder = checkpoint(max_position_embeddings=32768)
    config = config_of(folder)
    del config["llm_config"]["max_position_embeddings"]  # Qwen3Config's default is 32768
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved")["max_position_embeddings"] == 32768


def test_generation_config_comes_back_as_it_was(checkpoint, tmp_path):
    published = {
        "bos_token_id": 320,
        "do_sample": True,
        "eos_token_id": [322, 320],
        "multimodal_max_length": 8192,
        "pad_token_id": 320,
        "repetition_penalty": 1.05,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    folder = checkpoint()
    (folder / "generation_config.json").write_text(json.dumps(published), "utf-8")
    load(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text("utf-8"))
    saved.pop("transformers_version")
    assert saved == published


@pytest.mark.parametrize("case", CASES[:2])
def test_model_built_from_a_config_alone_saves_and_reloads(golden, case, tmp_path):
    given = golden(case)
    source = config_of(given.folder)
    config = Ovis2_5Config(
        llm_config=source["llm_config"], vit_config=source["vit_config"], visual_vocab_size=64
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["llm_config"]["tie_word_embeddings"] is (case == "full_multi_tied")
    assert tensors_of(tmp_path).keys() == load_file(given.folder / "model.safetensors").keys()
    assert torch.equal(load(tmp_path)(**given.inputs).logits, model(**given.inputs).logits)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        pytest.param(
            {"vit_config": {"temporal_patch_size": 2}},
            "vit_config.temporal_patch_size",
            "is 2, but the patch embedding has no temporal axis.",
            id="temporal-patches",
        ),
        pytest.param(
            {"hidden_size": 64},
            "config.json, hidden_size",
            "is 64, but llm_config.hidden_size is 32.",
            id="widths-differ",
        ),
    ],
)
def test_config_that_cannot_work_is_refused(checkpoint, changes, where, what):
    with pytest.raises(ModelError) as error:
        AutoConfig.from_pretrained(checkpoint(**changes))
    assert (error.value.where, error.value.what) == (where, what)
