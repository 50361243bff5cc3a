"""What every key is: as a JSON schema for editors, as a paragraph for people. Imports no host."""

import json
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import version
from textwrap import fill
from typing import Any

from .. import __version__
from .adapter import AdapterConfig
from .coercion import kinds_of
from .host_fields import ConfigKey, host_enums, host_fields
from .legacy import FIXED, NO_EFFECT, RENAMED, RENAMED_HOW, SWITCHES
from .load import COMMAND_LINE, unknown_key
from .schema import DataConfig, LoopConfig, ModelConfig

# Key of the host -> its default here, and why.
DEFAULTS: dict[str, tuple[str, str]] = {
    "bf16": ("true on a GPU, false on a CPU", ""),
    "use_cpu": ("true where there is no GPU", ""),
    "report_to": ("`tensorboard` if installed, else nothing", "nothing asks for a login"),
    "ddp_find_unused_parameters": ("false", "every rank runs every trainable part"),
    "logging_nan_inf_filter": ("false", "a NaN is shown"),
    "train_sampling_strategy": (
        "`group_by_length`",
        "batches of samples of like length, in random order; `random` draws them from all",
    ),
    "dataloader_num_workers": ("1 to 4", "one less than the cores of each process"),
    "dataloader_persistent_workers": ("true with workers", ""),
    "gradient_checkpointing": ("false with `recompute`", "that decides instead"),
    "ddp_timeout": ("four hours", "other processes wait while the first checks the data"),
    "eval_strategy": ("`steps` when `eval_steps` and `eval_data_path` are given", ""),
}

# Key -> what the host's help does not say, or what is refused here.
REMARKS: dict[str, str] = {
    "model_path": "Required, or llm_name_or_path and vit_name_or_path.",
    "data_path": "Required.",
    "output_dir": "Required.",
    "learning_rate": "Not with base_learning_rate.",
    "auto_find_batch_size": "Refused: it would change the global batch, by which a run is resumed.",
    "hub_strategy": 'Other than "end" it is refused: the finished model alone is pushed.',
    "train_sampling_strategy": '"batch_rebalance" is refused: packing does what it is for.',
    "resume_from_checkpoint": 'true is the newest complete checkpoint in output_dir; "auto" too, '
    "and where there is none the run begins.",
    "do_eval": "With eval_data_path the finished model is evaluated unless this is false.",
    "deepspeed": "Files: configs/zero. Refused: blocks optimizer and scheduler, and a stage 3 that "
    "does not gather weights on save.",
    "data_name": "Beside datainfo and without data_path it is read as data_path.",
    "stage": "On the command line: which stage of a recipe is trained, or all.",
}

_STAGES = (
    "Makes the config a recipe: objects with a name and the keys that differ in that stage, each "
    "trained from the model of the one before."
)
_MIN_LR_RATE = ConfigKey(
    "float | None",
    None,
    "Lowest learning rate as a share of the highest, for cosine_with_min_lr and "
    "cosine_warmup_with_min_lr; read as lr_scheduler_kwargs.min_lr_rate.",
    None,
    "vlmtune",
)

# Kind of an annotation -> JSON schema's name of it, ours.
_KINDS = {
    "bool": ("boolean", "true or false"),
    "int": ("integer", "a whole number"),
    "float": ("number", "a number"),
    "str": ("string", "text"),
    "list": ("array", "a list"),
    "dict": ("object", "an object"),
    "None": ("null", "null"),
}
_REQUIRED = ("model_path", "data_path", "output_dir")
_REFUSED = ("batch_rebalance",)


@cache
def config_keys() -> dict[str, ConfigKey]:
    """Every key under its present name, ours first."""
    ours = {
        field.name: ConfigKey(
            str(field.type),
            field.default_factory() if field.default_factory is not MISSING else field.default,
            field.metadata["help"],
            field.metadata.get("choices"),
            "vlmtune",
        )
        for config in (ModelConfig, DataConfig, LoopConfig, AdapterConfig)
        for field in fields(config)
    }
    host = {
        name: key
        for name, key in host_fields().items()
        if name not in ours and name not in RENAMED and name not in NO_EFFECT
    }
    return ours | {"min_lr_rate": _MIN_LR_RATE} | host


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file, with or without stages.

    Nothing is required, since the command line can give any key, and null stands for "not given".
    """
    described = {name: _schema_of(name, key) for name, key in config_keys().items()}
    described |= {name: _schema_of_legacy(name) for name in (*RENAMED, *SWITCHES, *NO_EFFECT)}
    properties = {name: {"$ref": f"#/$defs/{name}"} for name in described}
    stage = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]*$"},
            **properties,
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    stages = {"type": "array", "items": stage, "minItems": 1, "description": _STAGES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vlmtune config",
        "$comment": ", ".join(map(_versioned, ("vlmtune", "trl", "transformers"))),
        "type": "object",
        "properties": {"$schema": {"type": "string"}, "stages": stages, **properties},
        "additionalProperties": False,
        "$defs": described,
    }


def explain(name: str) -> str:
    """One key, an old name with what it became, in lines for a person.

    Raises:
        ConfigError: there is no such key; it names those most like it.
    """
    if name == "stages":
        return _filled(f"{name}: {_STAGES}")
    if name in NO_EFFECT:
        return _filled(f"{name}: {_legacy_help(name)}")
    if name in RENAMED:
        targets = RENAMED[name]
    elif name in SWITCHES:
        targets = SWITCHES[name][:1]
    elif name in config_keys():
        return _paragraph(name, config_keys()[name])
    else:
        raise unknown_key(name, COMMAND_LINE)
    explained = [_paragraph(target, config_keys()[target]) for target in targets]
    return "\n\n".join([_filled(f"{name}: {_legacy_help(name)}"), *explained])


def _schema_of(name: str, key: ConfigKey) -> dict[str, Any]:
    text = " ".join([key.help, *_here(name), REMARKS.get(name, "")])
    found: dict[str, Any] = {"description": text.strip()}
    kinds = _kinds(name, key)
    if choices := _choices(key):
        # YAML 1.1 reads a bare no as false
        also = [False] if "no" in choices else []
        found["enum"] = [*choices, *also, *([] if None in choices else [None])]
    else:
        kinds |= {"None"} | ({"str"} if kinds >= {"list"} else set())
        found["type"] = [word for kind, (word, _) in _KINDS.items() if kind in kinds]
        if kinds & {"list"}:
            found["items"] = {"type": "string"}
    if name not in DEFAULTS and name not in _REQUIRED:
        found["default"] = key.default
    return found


def _schema_of_legacy(name: str) -> dict[str, Any]:
    found = {"description": _legacy_help(name), "deprecated": True}
    if name in FIXED:
        return found | {"enum": [FIXED[name][0], None]}
    if name in RENAMED:
        target = config_keys()[RENAMED[name][0]]
        own = _schema_of(RENAMED[name][0], target)
        return found | {word: own[word] for word in ("type", "enum", "items") if word in own}
    return found | ({"type": ["boolean", "null"]} if name in SWITCHES else {})


def _legacy_help(name: str) -> str:
    if name in RENAMED:
        how = f"; {RENAMED_HOW[name]}" if name in RENAMED_HOW else ""
        return f"Read as {' and '.join(RENAMED[name])}{how}."
    if name in SWITCHES:
        key, *values = SWITCHES[name]
        meant = zip(("true", "false"), values, strict=True)
        said = [f'{switch} is "{value}"' for switch, value in meant if value]
        return f"Read as {key}: {'; '.join(said)}."
    text = f"No effect: {NO_EFFECT[name]}."
    if name in FIXED:
        accepted, instead = FIXED[name]
        text += f" Another value than {json.dumps(accepted)} is refused: {instead}."
    return " ".join([text, *([REMARKS[name]] if name in REMARKS else [])])


def _paragraph(name: str, key: ConfigKey) -> str:
    rows = {"value": _value_words(name, key)}
    if name in DEFAULTS:
        default, why = DEFAULTS[name]
        rows["default"] = f"{default}{f': {why}' if why else ''}".replace("`", "")
        rows["host's default"] = _shown(key.default)
    elif name not in _REQUIRED:
        rows["default"] = _shown(key.default)
    rows["declared by"] = _versioned(key.owner)
    rows["other names"] = ", ".join(
        [
            *(old for old in RENAMED if name in RENAMED[old]),
            *(old for old in SWITCHES if name == SWITCHES[old][0]),
        ]
    )
    texts = [text for text in (key.help, REMARKS.get(name)) if text]
    return "\n".join(
        [name]
        + [_filled(text, "  ") for text in texts]
        + [_filled(text, f"  {label:16}", " " * 18) for label, text in rows.items() if text]
    )


def _value_words(name: str, key: ConfigKey) -> str:
    if choices := _choices(key):
        return ", ".join("null" if choice is None else choice for choice in choices)
    kinds = _kinds(name, key)
    words = [word for kind, (_, word) in _KINDS.items() if kind in kinds]
    if "list" in kinds and "str" not in kinds:
        words.append('text joined by "|"')
    return " or ".join(words)


def _choices(key: ConfigKey) -> list[Any]:
    """Its values without those that are refused here; empty for a key without a list of them."""
    enums = [host_enums()[kind] for kind in kinds_of(key.annotation) if kind in host_enums()]
    return [value for value in key.choices or (enums or [()])[0] if value not in _REFUSED]


def _kinds(name: str, key: ConfigKey) -> set[str]:
    kinds = kinds_of(key.annotation) & set(_KINDS)
    return kinds - {"str"} if name.endswith("_kwargs") else kinds


def _here(name: str) -> list[str]:
    if name not in DEFAULTS:
        return []
    default, why = DEFAULTS[name]
    return [f"Default here: {default}{f', {why}' if why else ''}.".replace("`", "")]


def _versioned(package: str) -> str:
    return f"{package} {__version__ if package == 'vlmtune' else version(package)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _filled(text: str, first: str = "", rest: str = "  ") -> str:
    return fill(text, 92, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
