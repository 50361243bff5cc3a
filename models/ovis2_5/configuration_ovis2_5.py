"""Configuration of Ovis2.5 in the layout of the published checkpoints."""

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from ...core.errors import ModelError

# Ids that never reach the language model (AIDC-AI/Ovis 2.5.0). The four indicators stand for the
# last four rows of the visual embedding table, in this order.
VISUAL_ATOM_ID = -300
IMAGE_BEGIN_ID, IMAGE_END_ID, VIDEO_BEGIN_ID, VIDEO_END_ID = -301, -302, -303, -304
NUM_INDICATORS = 4


class Siglip2NavitConfig(PreTrainedConfig):
    """NaViT-style SigLIP2 vision encoder (`vit_config`).

    `fullatt_block_indexes` is None (every layer attends to its whole image, as published), or a
    string such as `"7|15|23"` or a list: those layers attend fully, the others within windows of
    `window_size` pixels.

    Source: config.json of AIDC-AI/Ovis2.5-9B; defaults of AIDC-AI/Ovis 2.5.0.
    """

    model_type = "siglip2_navit"
    base_config_key = "vit_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    num_patches: int = -1
    image_size: int = 512
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    hidden_stride: int = 2
    window_size: int = 112
    fullatt_block_indexes: str | list[int] | None = None
    temporal_patch_size: int = 1
    preserve_original_pe: bool = True
    use_rope: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.temporal_patch_size != 1:
            raise ModelError(
                "vit_config.temporal_patch_size",
                f"is {self.temporal_patch_size}, but the patch embedding has no temporal axis.",
                "use a checkpoint with temporal_patch_size 1; all published ones have it.",
            )

    @property
    def full_attention_layers(self) -> frozenset[int]:
        indexes = self.fullatt_block_indexes
        if indexes is None:
            return frozenset(range(self.num_hidden_layers))
        return frozenset(map(int, indexes.split("|") if isinstance(indexes, str) else indexes))

    @property
    def window_cells(self) -> int:
        """Side of a window in visual tokens (merged cells)."""
        return self.window_size // self.hidden_stride // self.patch_size


class Ovis2_5Config(PreTrainedConfig):
    """Ovis2.5: a causal language model, a NaViT encoder, and a visual vocabulary between them.

    The last four of the `visual_vocab_size` rows are indicators: image begin, image end, video
    begin, video end. Keys that only serving engines read (`vocab_size`, `auto_map`, ...) are kept
    and written back; `auto_map` is never executed.

    Raises:
        ModelError: `hidden_size` differs from the language model's.

    Source: config.json of AIDC-AI/Ovis2.5-9B.
    """

    model_type = "ovis2_5"
    sub_configs: ClassVar[dict] = {"llm_config": AutoConfig, "vit_config": Siglip2NavitConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    llm_config: Any = None
    vit_config: Any = None
    visual_vocab_size: int = 65536
    hidden_size: int | None = None
    conversation_formatter_class: str | None = "Qwen3ConversationFormatter"
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        if not isinstance(self.llm_config, PreTrainedConfig):
            llm = {"model_type": "qwen3", **(self.llm_config or {})}
            self.llm_config = AutoConfig.for_model(**llm)
        if not isinstance(self.vit_config, PreTrainedConfig):
            self.vit_config = Siglip2NavitConfig(**(self.vit_config or {}))
        self.hidden_size = self.hidden_size or self.llm_config.hidden_size
        if self.hidden_size != self.llm_config.hidden_size:
            raise ModelError(
                "config.json, hidden_size",
                f"is {self.hidden_size}, but llm_config.hidden_size is "
                f"{self.llm_config.hidden_size}.",
                "set both to the language model's width.",
            )
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        return self.llm_config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        source = copy.deepcopy(config_dict)
        config = super().from_dict(config_dict, **kwargs)
        (config[0] if isinstance(config, tuple) else config)._source = source
        return config

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("_source", None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """The dictionary written to config.json: the keys of the file it came from, with today's
        values, plus whatever differs from the defaults."""
        source = getattr(self, "_source", {})
        output = _published(self, super().to_diff_dict(), source)
        for key in ("llm_config", "vit_config"):
            sub, given = getattr(self, key), source.get(key) or {}
            output[key] = _published(sub, sub.to_diff_dict(), given)
            output[key].pop("transformers_version", None)
            # The published parts say float32 although the weights are bfloat16: left as it is.
            output[key].pop("torch_dtype", None)
            if "torch_dtype" in given:
                output[key]["torch_dtype"] = given["torch_dtype"]
        for key in ("vocab_size", "num_attention_heads", "max_position_embeddings"):
            if key in output:
                output[key] = getattr(self.llm_config, key, output[key])
        return {**output, "architectures": ["Ovis2_5"], "model_type": self.model_type}


def _published(
    config: PreTrainedConfig, diff: dict[str, Any], source: dict[str, Any]
) -> dict[str, Any]:
    """The keys of `source` with the values of `config`, then what `diff` adds to them; in the key
    names of transformers 4, which the published files and serving engines use."""
    now, defaults = config.to_dict(), type(config).default_config_fields()
    for values in (now, diff):
        _rename_rope(config, values)
        if dtype := values.pop("dtype", None):
            values["torch_dtype"] = dtype
    if set(now.get("layer_types") or ()) == {"full_attention"}:
        diff.pop("layer_types", None)
    if source:
        diff = {k: v for k, v in diff.items() if k != "torch_dtype" and v != defaults.get(k)}
    return {**diff, **{key: now.get(key, value) for key, value in source.items()}}


def _rename_rope(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Replace `rope_parameters` by `rope_theta` and `rope_scaling`, unless this kind of model
    would read them back as something else, as GPT-NeoX or one with a set per layer type."""
    scaling = dict(values.get("rope_parameters") or {})
    if "rope_theta" not in scaling:
        return
    theta = scaling.pop("rope_theta")
    old = {
        "rope_theta": theta,
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
    }
    others = {key: value for key, value in values.items() if key != "rope_parameters"}
    again = type(config)(**copy.deepcopy({**others, **old}))
    if again.to_dict()["rope_parameters"] == values["rope_parameters"]:
        del values["rope_parameters"]
        values.update(old)


class OvisConfig(Ovis2_5Config):
    """Reads `model_type: ovis`, which the reference's own training code writes; what it builds is
    an `Ovis2_5Config`, so everything is saved as `ovis2_5`."""

    model_type = "ovis"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return Ovis2_5Config.from_dict({**config_dict, "model_type": "ovis2_5"}, **kwargs)
