"""Settings of LoRA and QLoRA training; names are PEFT's and bitsandbytes' where they have one."""

from __future__ import annotations  # keeps annotations as text, the form the host's fields have

import re
from dataclasses import dataclass, field
from os.path import expanduser
from typing import Any

from ..core.errors import ConfigError
from .coercion import check_choices
from .train_modules import parse_train_modules

ALL_LINEAR = "all-linear"


@dataclass
class AdapterConfig:
    """Which adapters are trained, where they sit, and what the frozen weights below are kept in."""

    use_lora: bool | None = field(
        default=None,
        metadata={
            "help": "Train adapters and leave the model's own weights as they are; null does so "
            "when lora_r is given or another key of this table differs from its default."
        },
    )
    adapter_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of an adapter to train on; where its layers sit, its ranks "
            "and its fully trained parts are its own."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of an adapter."})
    lora_alpha: int = field(
        default=32,
        metadata={"help": "Adapters are scaled by alpha / r, with use_rslora by alpha / sqrt(r)."},
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of an adapter, while training."}
    )
    lora_parts: str | None = field(
        default=None,
        metadata={
            "help": "Parts whose linear layers get adapters, and no other part, written as "
            'train_modules is: "llm|visual_tokenizer.vit"; null is llm, where '
            "lora_target_modules is null too."
        },
    )
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers that get adapters, as in PEFT: names (a list, or joined by commas), a "
            'regular expression for whole paths, or "all-linear"; beside lora_parts it must stay '
            "inside them."
        },
    )
    apply_lora_to_vision: bool | None = field(
        default=None,
        metadata={
            "help": "true adds the vision encoder to lora_parts, false keeps adapters out of it "
            "whatever lora_target_modules matches."
        },
    )
    modules_to_save: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Modules trained fully beside the adapters and saved with them, by path or by "
            "the end of a path; train_modules names parts with rates of their own."
        },
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "Train direction and magnitude apart (DoRA, arXiv:2402.09353)."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."}
    )
    lora_bias: str | bool = field(
        default="none",
        metadata={
            "help": "Biases trained too: none, all of the model's, or lora_only, those of adapted "
            "layers; true adds a bias to the adapters themselves."
        },
    )
    init_lora_weights: bool | str = field(
        default=True,
        metadata={
            "help": "true starts without effect on the model (Kaiming A, zero B), gaussian too, "
            "orthogonal with an A and B whose product is zero; false starts at random."
        },
    )
    rank_pattern: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Ranks that differ: layer name or regular expression to rank."},
    )
    alpha_pattern: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The same for alphas."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep frozen linear layers in 4 bits while training (QLoRA)."},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Keep them in 8 bits (LLM.int8, arXiv:2208.07339)."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Levels of 4 bits.", "choices": ("nf4", "fp4")}
    )
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantise the scales of 4-bit blocks as well."}
    )
    bnb_4bit_compute_dtype: str | None = field(
        default=None,
        metadata={
            "help": "What 4-bit layers multiply in; null is what the run computes in.",
            "choices": (None, "float32", "bfloat16", "float16"),
        },
    )
    unquantized_parts: str = field(
        default="visual_tokenizer",
        metadata={
            "help": "Parts that are not quantised, written as train_modules is; the output head "
            'and fully trained parts never are. "" quantises everything else.'
        },
    )

    def __post_init__(self) -> None:
        self.adapter_path = expanduser(self.adapter_path) if self.adapter_path else None
        self.lora_parts = self.lora_parts or None
        if self.bnb_4bit_compute_dtype:
            self.bnb_4bit_compute_dtype = self.bnb_4bit_compute_dtype.removeprefix("torch.")
        self.lora_target_modules = _names(self.lora_target_modules)
        self.modules_to_save = [
            name.strip()
            for text in self.modules_to_save
            for name in text.split(",")
            if name.strip()
        ]
        if isinstance(self.init_lora_weights, str):
            spelled = {"true": True, "false": False}
            self.init_lora_weights = spelled.get(
                self.init_lora_weights.lower(), self.init_lora_weights
            )
        if isinstance(self.lora_bias, str) and self.lora_bias.lower() in ("true", "false"):
            self.lora_bias = self.lora_bias.lower() == "true"
        if self.lora_bias is False:
            self.lora_bias = "none"
        check_choices(self)
        self._check_numbers()
        self._check_words()

    def _check_numbers(self) -> None:
        for key in ("lora_r", "lora_alpha"):
            if getattr(self, key) < 1:
                raise ConfigError(key, f"{getattr(self, key)} is below 1", "give 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                "lora_dropout", f"{self.lora_dropout} is no probability", "give 0 or more, below 1"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            for name, number in getattr(self, key).items():
                if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                    raise ConfigError(
                        key, f'{number!r} of "{name}" is no whole number above 0', "give 1 or more"
                    )
                _check_regex(name, key)

    def _check_words(self) -> None:
        if self.lora_bias not in (True, "none", "all", "lora_only"):
            raise ConfigError(
                "lora_bias",
                f'"{self.lora_bias}" is not a choice of lora_bias',
                "give none, all, lora_only or true",
            )
        start = self.init_lora_weights
        if not isinstance(start, bool) and start not in ("gaussian", "orthogonal"):
            raise ConfigError(
                "init_lora_weights",
                f'"{start}" is not supported: what starts from the model\'s own weights (pissa, '
                "olora, loftq, corda, eva, ...) changes them, and the saved adapter would not fit "
                "the published ones",
                "give true, false, gaussian or orthogonal",
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_8bit", "load_in_4bit is given too", "keep one of them")
        if self.lora_bias != "none" and (self.load_in_4bit or self.load_in_8bit):
            raise ConfigError(
                "lora_bias",
                f"{self.lora_bias}: bitsandbytes rounds the biases of quantised layers",
                "set it to none, or leave load_in_4bit and load_in_8bit out",
            )
        if self.use_dora and self.load_in_8bit:
            raise ConfigError(
                "use_dora", "cannot read weights of 8 bits again (PEFT 0.21)", "use load_in_4bit"
            )
        for key in ("lora_parts", "unquantized_parts"):
            for entry in parse_train_modules(getattr(self, key), key) if getattr(self, key) else []:
                if entry.learning_rate:
                    raise ConfigError(
                        key,
                        f"gives {entry.name} a learning rate",
                        "write names alone; adapters learn at learning_rate",
                    )
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules != ALL_LINEAR:
            _check_regex(self.lora_target_modules, "lora_target_modules")


def _names(value: list[str] | str | None) -> list[str] | str | None:
    """Names joined by commas as a list; "all-linear" and regular expressions as they are."""
    if value in ([ALL_LINEAR], ["all"], "all"):
        return ALL_LINEAR
    if isinstance(value, str) and not re.fullmatch(r"[\w.]+( *, *[\w.]+)*,?", value.strip()):
        return value or None
    listed = [value] if isinstance(value, str) else value or []
    names = [name.strip() for text in listed for name in str(text).split(",")]
    return [name for name in names if name] or None


def _check_regex(pattern: str, key: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            key,
            f'"{pattern}" is neither names nor a regular expression: {error}',
            "write names joined by commas, or an expression that matches whole paths",
        ) from None
