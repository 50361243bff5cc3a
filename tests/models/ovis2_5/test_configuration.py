"""Any kind of language model keeps its settings through config.json."""

import json

import pytest
from transformers import AutoConfig, PreTrainedConfig

from vlmtune.models import Ovis2_5Config

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = [
    pytest.param("qwen3", {"rope_theta": 1000000}, id="qwen3"),
    pytest.param("llama", {"rope_parameters": LLAMA3}, id="llama3"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param("gpt2", {"n_embd": 64, "n_head": 4, "n_positions": 128}, id="gpt2"),
    pytest.param("mistral", {"sliding_window": 32}, id="mistral"),
    pytest.param("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}, id="gpt_neox"),
    pytest.param("phi", {"partial_rotary_factor": 0.25}, id="phi"),
    pytest.param("gemma3_text", {"sliding_window": 64}, id="gemma3_text"),
    pytest.param("opt", {"word_embed_proj_dim": 768}, id="opt"),
]


def comparable(config: PreTrainedConfig) -> dict:
    ours = ("transformers_version", "_name_or_path", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in ours}


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_language_model_of_any_kind_keeps_its_settings(tmp_path, kind, changes):
    given = AutoConfig.for_model(kind, **changes)
    Ovis2_5Config(llm_config=given, visual_vocab_size=68).save_pretrained(tmp_path / "one")
    once = AutoConfig.from_pretrained(tmp_path / "one")
    assert type(once) is Ovis2_5Config
    assert type(once.llm_config) is type(given)
    assert comparable(once.llm_config) == comparable(given)
    assert once.hidden_size == given.hidden_size

    once.save_pretrained(tmp_path / "two")
    first, second = (tmp_path / name / "config.json" for name in ("one", "two"))
    assert first.read_text("utf-8") == second.read_text("utf-8")


@pytest.mark.parametrize(
    ("kind", "changes", "theta", "scaling"),
    [
        ("llama", {"rope_theta": 7.0}, 7.0, None),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            500000.0,
            {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        ),
    ],
)
def test_rope_is_written_by_the_names_serving_engines_know(tmp_path, kind, changes, theta, scaling):
    llm = AutoConfig.for_model(kind, **changes)
    Ovis2_5Config(llm_config=llm).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))["llm_config"]
    assert (saved["rope_theta"], saved["rope_scaling"]) == (theta, scaling)
    assert "rope_parameters" not in saved
