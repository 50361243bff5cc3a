"""A config file and command-line overrides -> one `RunConfig`; imports no host library."""

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..core.checkpoints import latest_checkpoint
from ..core.errors import ConfigError
from .adapter import AdapterConfig
from .coercion import coerce
from .host_fields import host_fields
from .legacy import CHECKPOINT, FIXED, NO_EFFECT, RENAMED, RENAMED_HOW, SWITCHES
from .schema import DataConfig, LoopConfig, ModelConfig, RunConfig, annotations_of

COMMAND_LINE = "command line"

ADAPTERS_OWN = ("apply_lora_to_vision", "init_lora_weights", "rank_pattern", "alpha_pattern")

_EXAMPLES = {
    "model_path": '"model_path": "AIDC-AI/Ovis2.5-2B"',
    "llm_name_or_path": '"llm_name_or_path": "Qwen/Qwen3-1.7B"',
    "vit_name_or_path": '"vit_name_or_path": "google/siglip2-so400m-patch16-512"',
    "data_path": '"data_path": "data/train.json"',
    "output_dir": '"output_dir": "outputs/run1"',
}


def load_config(argv: Sequence[str]) -> RunConfig:
    """Resolve what follows `vlmtune train`, for a config without stages.

    Args:
        argv: An optional config file (.json, .yaml, .yml), then `--key value`, `--key=value` or a
            bare `--flag` (true). The command line wins over the file.

    Raises:
        ConfigError: a file that cannot be read, an unknown or missing key, or a wrong value.
    """
    layers = read_layers(argv)
    notes: list[str] = []
    return combine(resolve_layers(layers, notes), notes, where=next(iter(layers)))


def combine(layers: dict[str, dict[str, Any]], notes: list[str], where: str) -> RunConfig:
    """Resolved layers, the weakest first, as one run; `where` is named when a key is missing."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers.items():
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    _fold_min_lr_rate(values, sources, notes, list(layers))
    _check_required(values, where)
    _check_together(values, sources)
    _drop_parts_of_a_new_model(values, sources, notes)
    _resume_automatically(values, sources, notes)
    try:
        model = ModelConfig(**_take(values, annotations_of(ModelConfig)))
        data = DataConfig(**_take(values, annotations_of(DataConfig)))
        loop = LoopConfig(**_take(values, annotations_of(LoopConfig)))
        adapter = AdapterConfig(**_take(values, annotations_of(AdapterConfig)))
    except ConfigError as error:
        source = sources.get(error.where, "default")
        raise ConfigError(f"{source}, {error.where}", error.what, error.fix) from None
    _decide_lora(adapter, model, sources, notes)
    return RunConfig(model, data, loop, adapter, values, sources, list(dict.fromkeys(notes)))


def _check_required(values: dict[str, Any], where: str) -> None:
    parts = ["llm_name_or_path", "vit_name_or_path"]
    from_parts = not values.get("model_path") and any(values.get(key) for key in parts)
    required = [*(parts if from_parts else ["model_path"]), "data_path", "output_dir"]
    missing = [key for key in required if not values.get(key)]
    if missing:
        raise ConfigError(
            where,
            f"missing: {', '.join(missing)}",
            f"add {', '.join(_EXAMPLES[key] for key in missing)}",
        )


def _check_together(values: dict[str, Any], sources: dict[str, str]) -> None:
    if values.get("base_learning_rate") is not None and "learning_rate" in values:
        raise ConfigError(
            f"{sources['base_learning_rate']}, base_learning_rate",
            f"learning_rate is given too, in {sources['learning_rate']}",
            "keep one: base_learning_rate is scaled to the batch, learning_rate is used as it is",
        )
    order = values.get("train_sampling_strategy", "random")
    for key in ("streaming", "mix", "packing"):
        drawn = ("random", "group_by_length") if key == "mix" else ("random",)
        if values.get(key) and order not in drawn:
            raise ConfigError(
                f"{sources['train_sampling_strategy']}, train_sampling_strategy",
                f'"{order}" does not go with {key}, which has an order of its own',
                f"leave train_sampling_strategy or {key} out",
            )
    for key in ("packing_length", "packing_max_patches"):
        if values.get(key) is not None and not values.get("packing"):
            raise ConfigError(
                f"{sources[key]}, {key}",
                "is given, but nothing is packed",
                f'add "packing": true, or leave {key} out',
            )
    if values.get("packing") and values.get("base_learning_rate") is not None:
        raise ConfigError(
            f"{sources['base_learning_rate']}, base_learning_rate",
            "is scaled by the samples of a batch, and with packing a batch is counted in rows",
            "give learning_rate",
        )
    if values.get("streaming") and values.get("packing"):
        raise ConfigError(
            f"{sources['packing']}, packing",
            "rows are planned from the lengths of all samples, which a stream does not know",
            "leave streaming or packing out",
        )
    if values.get("streaming") and values.get("mix"):
        raise ConfigError(
            f"{sources['mix']}, mix",
            "a stream does not know how many records a set has",
            "leave streaming or mix out",
        )
    if values.get("streaming") and values.get("probe"):
        raise ConfigError(
            f"{sources['probe']}, probe",
            "which batch of a stream is the costliest is not known before its end",
            "leave streaming or probe out",
        )
    if values.get("streaming") and values.get("max_steps", -1) < 1:
        raise ConfigError(
            f"{sources['streaming']}, streaming",
            "a stream has no known end, and max_steps is not given",
            'add "max_steps": the number of optimizer steps',
        )


def _decide_lora(
    adapter: AdapterConfig, model: ModelConfig, sources: dict[str, str], notes: list[str]
) -> None:
    """Set `use_lora` where it is left open, and tell what has no effect with or without it."""
    default = AdapterConfig(use_lora=adapter.use_lora)
    told = [
        key
        for key in annotations_of(AdapterConfig)
        if key in sources and getattr(adapter, key) != getattr(default, key)
    ]
    if adapter.use_lora is None:
        adapter.use_lora = bool(told) or "lora_r" in sources
    if adapter.adapter_path:
        own = [key for key in told if key.startswith(("lora_", "use_")) or key in ADAPTERS_OWN]
        notes += [f"{key} has no effect: the adapter of adapter_path has its own" for key in own]
    if not adapter.use_lora:
        notes += [f"{key} has no effect: use_lora is false" for key in told]
    elif "train_modules" in sources and model.train_modules == "all":
        notes.append("train_modules all has no effect: with LoRA it names fully trained parts")


def _drop_parts_of_a_new_model(
    values: dict[str, Any], sources: dict[str, str], notes: list[str]
) -> None:
    for key in ("llm_name_or_path", "vit_name_or_path", "visual_vocab_size"):
        if values.get("model_path") and values.pop(key, None):
            del sources[key]
            notes.append(f"{key} has no effect: {CHECKPOINT}")


def _resume_automatically(
    values: dict[str, Any], sources: dict[str, str], notes: list[str]
) -> None:
    """Replace resume_from_checkpoint "auto" by true where there is something to resume from."""
    if values.get("resume_from_checkpoint") != "auto":
        return
    newest = latest_checkpoint(Path(values["output_dir"]).expanduser())
    if newest:
        values["resume_from_checkpoint"] = True
        notes.append(f"resumes from {newest}")
    else:
        del values["resume_from_checkpoint"], sources["resume_from_checkpoint"]


def read_layers(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Source -> its raw keys, the weakest source first."""
    rest = list(argv)
    layers = {}
    if rest and not rest[0].startswith("--"):
        path = Path(rest.pop(0)).expanduser().resolve()
        layers[f"file {path}"] = _read_file(path, f"file {path}")
    layers[COMMAND_LINE] = overrides = {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                COMMAND_LINE,
                f'"{word}" follows no key',
                'write the config file first, then --key value; join several paths with "|"',
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        overrides[key.replace("-", "_")] = value
    return layers


def _read_file(path: Path, where: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            where,
            f"cannot be read: {error.strerror}",
            "give the path of a .json, .yaml or .yml file, relative to the working directory",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(where, "is not UTF-8 text", "save it as UTF-8") from None
    match path.suffix.lower():
        case ".json":
            content = _parse_json(text, where)
        case ".yaml" | ".yml":
            content = _parse_yaml(text, where)
        case _:
            raise ConfigError(
                where, f'cannot tell the format of "{path.name}"', "name it .json, .yaml or .yml"
            )
    if not isinstance(content, dict):
        raise ConfigError(
            where,
            f"holds a {type(content).__name__}, not keys and values",
            'start it with "{" and write "key": value pairs',
        )
    # "$schema" is for the editor: it names what `vlmtune config --schema` wrote.
    return {str(k): v for k, v in content.items() if v is not None and k != "$schema"}


def _parse_json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _reject_duplicates((key for key, _ in pairs), where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}, line {error.lineno}, column {error.colno}",
            f"broken JSON: {error.msg}",
            "correct it there, or just before",
        ) from None


def _parse_yaml(text: str, where: str) -> Any:
    import yaml  # here only: JSON configs must not pay for it

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            _reject_duplicates((key.value for key, _ in node.value), where)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            where + place, f"broken YAML: {problem}", "correct it there, or just before"
        ) from None


def _reject_duplicates(keys: Iterable[Any], where: str) -> None:
    seen = []
    for key in keys:
        if key in seen:
            raise ConfigError(where, f'"{key}" is given twice', "keep one of them")
        seen.append(key)


@cache
def annotations() -> dict[str, str]:
    """Every key under its present name -> annotation text."""
    known = {key: field.annotation for key, field in host_fields().items()}
    for own in (ModelConfig, DataConfig, LoopConfig, AdapterConfig):
        known |= annotations_of(own)
    known["min_lr_rate"] = "float | None"
    return {key: known[key] for key in known if key not in RENAMED and key not in NO_EFFECT}


def resolve_layers(
    layers: dict[str, dict[str, Any]], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """Each source's keys under their present names, with values of the annotated types."""
    resolved: dict[str, dict[str, Any]] = {}
    with_datainfo = False
    for source, layer in layers.items():
        with_datainfo |= bool({"datainfo", "data_info_version"} & set(layer))
        resolved[source] = _resolve(layer, source, notes, with_datainfo)
    return resolved


def _resolve(
    layer: dict[str, Any], source: str, notes: list[str], with_datainfo: bool
) -> dict[str, Any]:
    layer = _with_one_warmup(layer)
    known = annotations()
    values = {key: _read(layer, key, known[key], source) for key in layer if key in known}
    written = {key: key for key in values}  # present name -> the name the user wrote
    for key in layer:
        if key in known:
            continue
        if key == "data_name" and with_datainfo and "data_path" not in layer:
            present = {"data_path": _read(layer, key, "list[str]", source)}
            note = "data_name is read as data_path: it names sets of datainfo"
        else:
            present, note = _translate(layer, key, source)
        notes.append(note)
        for name, value in present.items():
            if values.setdefault(name, value) != value:
                raise ConfigError(
                    source,
                    f'"{written[name]}" and "{key}" set the same thing but differ: '
                    f"{values[name]!r} and {value!r}",
                    "keep one of them",
                )
            written.setdefault(name, key)
    return values


def _translate(layer: dict[str, Any], key: str, source: str) -> tuple[dict[str, Any], str]:
    """A key without a present meaning of its own -> the present keys it sets, and a note."""
    if key in NO_EFFECT:
        _check_fixed(layer, key, source)
        return {}, f"{key} has no effect: {NO_EFFECT[key]}"
    if key in SWITCHES:
        name, if_true, if_false = SWITCHES[key]
        on = _read(layer, key, "bool", source)
        shuffled = "dataloader_shuffle" not in layer or _read(
            layer, "dataloader_shuffle", "bool", source
        )
        if key == "group_by_length" and not on and (name in layer or not shuffled):
            return {}, f"{key} false has no effect: another order is given"
        value = if_true if on else if_false
        if value is None:
            return {}, f"{key} {json.dumps(on)} has no effect: it is the default"
        return {name: value}, f'{key} {json.dumps(on)} is read as {name} "{value}"'
    if key not in RENAMED:
        raise unknown_key(key, source)
    targets = RENAMED[key]
    names = [name for name in targets if len(targets) == 1 or name not in layer]
    if not names:
        return {}, f"{key} has no effect: {' and '.join(targets)} are given"
    value = _read(layer, key, annotations()[names[0]], source)
    if key == "warmup_ratio" and not 0 <= value < 1:
        raise ConfigError(
            f"{source}, {key}",
            f"{value} is not a fraction of the steps",
            "give 0 or more and less than 1, or a number of steps as warmup_steps",
        )
    how = f": {RENAMED_HOW[key]}" if key in RENAMED_HOW else ""
    return dict.fromkeys(names, value), f"{key} is read as {' and '.join(names)}{how}"


def _check_fixed(layer: dict[str, Any], key: str, source: str) -> None:
    if key not in FIXED:
        return
    accepted, instead = FIXED[key]
    annotation = "bool" if isinstance(accepted, bool) else "str"
    value = _read(layer, key, annotation, source)
    if value != accepted:
        raise ConfigError(
            f"{source}, {key}", f"{key} {json.dumps(value)} is not supported", instead
        )


def _with_one_warmup(layer: dict[str, Any]) -> dict[str, Any]:
    """Where both warmup keys are given, as transformers 4.51 saved them, a zero yields."""
    if "warmup_steps" in layer and "warmup_ratio" in layer:
        for key in ("warmup_steps", "warmup_ratio"):
            if layer[key] in (0, "0", "0.0"):
                return {other: layer[other] for other in layer if other != key}
    return layer


def _fold_min_lr_rate(
    values: dict[str, Any], sources: dict[str, str], notes: list[str], order: list[str]
) -> None:
    """Move min_lr_rate into lr_scheduler_kwargs, where the schedulers look for it."""
    rate, source = values.pop("min_lr_rate", None), sources.pop("min_lr_rate", COMMAND_LINE)
    if rate is None:
        return
    notes.append("min_lr_rate is read as lr_scheduler_kwargs.min_lr_rate")
    kwargs = values.get("lr_scheduler_kwargs") or {}
    kwargs_source = sources.get("lr_scheduler_kwargs", source)
    if kwargs.get("min_lr_rate", rate) != rate:
        if kwargs_source == source:
            raise ConfigError(
                source,
                '"min_lr_rate" and "lr_scheduler_kwargs.min_lr_rate" set the same thing but '
                f"differ: {rate!r} and {kwargs['min_lr_rate']!r}",
                "keep one of them",
            )
        if order.index(kwargs_source) > order.index(source):
            return
    values["lr_scheduler_kwargs"] = {**kwargs, "min_lr_rate": rate}
    sources["lr_scheduler_kwargs"] = max(source, kwargs_source, key=order.index)


def _read(layer: dict[str, Any], key: str, annotation: str, source: str) -> Any:
    return coerce(
        layer[key],
        annotation,
        key=key,
        source=source,
        from_command_line=source == COMMAND_LINE,
    )


def unknown_key(key: str, source: str) -> ConfigError:
    """The error that names the keys most like it."""
    known = sorted({*annotations(), *RENAMED, *SWITCHES, *NO_EFFECT})
    nearest = ", ".join(f'"{name}"' for name in get_close_matches(key, known))
    return ConfigError(
        source,
        f'unknown key "{key}"',
        f"did you mean {nearest}?" if nearest else "remove it; no key has a similar name",
    )


def _take(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values.pop(key) for key in keys if key in values}
