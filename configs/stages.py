"""A recipe: one config with "stages", each trained from the model of the stage before it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from ..core.checkpoints import ADAPTER_CONFIG, RUN_FILE, STATE_FILE, latest_checkpoint
from ..core.errors import ConfigError
from .load import COMMAND_LINE, combine, read_layers, resolve_layers
from .schema import RunConfig

ALL = "all"
_START_KEYS = ("model_path", "llm_name_or_path", "vit_name_or_path")


@dataclass(frozen=True)
class Recipe:
    """A recipe as read, and which of its stages is asked for.

    Attributes:
        path: The file, as the user wrote it.
        source: The file, as errors name it.
        common: Raw keys of every stage.
        stages: Name -> raw keys of that stage, in order.
        overrides: Raw keys of the command line, which win over both.
        requested: A stage's name, or "all".
    """

    path: str
    source: str
    common: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    overrides: dict[str, Any]
    requested: str

    @property
    def names(self) -> list[str]:
        return list(self.stages)

    def words(self, stage: str) -> list[str]:
        """What follows `vlmtune train` to train one stage with the same overrides."""
        flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in self.overrides.items()]
        return [self.path, "--stage", stage, *flags]

    def previous(self, stage: str) -> str | None:
        index = self.names.index(stage)
        return self.names[index - 1] if index else None


def read_recipe(argv: Sequence[str]) -> Recipe | None:
    """Read what follows `vlmtune train`; None when its config has no stages.

    Raises:
        ConfigError: stages that are not written as a list of named objects, or `--stage` is
            missing or names none of them.
    """
    layers = read_layers(argv)
    source, common = next(iter(layers.items()))
    if source == COMMAND_LINE or "stages" not in common:
        return None
    overrides = layers[COMMAND_LINE]
    requested = overrides.pop("stage", None)
    stages = _read_stages(common.pop("stages"), f"{source}, stages")
    choices = [*stages, ALL]
    if requested not in choices:
        named = isinstance(requested, str)
        nearest = get_close_matches(requested, choices, n=1) if named else []
        raise ConfigError(
            f"{COMMAND_LINE}, stage",
            f'the recipe has no stage "{requested}"'
            if named
            else "a recipe is trained stage by stage, and none is named",
            f'did you mean "{nearest[0]}"? It has {", ".join(choices)}'
            if nearest
            else f"add --stage {' or --stage '.join(choices)}",
        )
    return Recipe(argv[0], source, common, stages, overrides, requested)


def stage_config(recipe: Recipe, stage: str) -> RunConfig:
    """One stage as a run: common keys, then its own, then the command line.

    The common `output_dir` holds the stages' folders, each under its stage's name. The model that
    the recipe or the command line names is where the first stage starts; a later one starts from
    the model of the stage before it. A stage's own `output_dir` or model wins over both.

    Raises:
        ConfigError: a key or value of this stage, or of one before it.
    """
    own = f"{recipe.source}, stage {stage}"
    raw = {recipe.source: recipe.common, own: recipe.stages[stage], COMMAND_LINE: recipe.overrides}
    notes: list[str] = []
    layers = resolve_layers(raw, notes)
    common, of_stage, overrides = layers.values()
    root = overrides.pop("output_dir", None)
    if root or not of_stage.get("output_dir"):
        root = root or common.get("output_dir")
        of_stage["output_dir"] = root and str(Path(root) / stage)
    previous = recipe.previous(stage)
    if previous:
        _check_own_folder(recipe, stage, of_stage["output_dir"])
        for layer, key in product((common, overrides), _START_KEYS):
            layer.pop(key, None)
        if not any(of_stage.get(key) for key in _START_KEYS):
            before = stage_config(recipe, previous)
            if before.adapter.use_lora:
                raise ConfigError(
                    own,
                    f"starts from {previous}, which leaves an adapter and no model",
                    'give the stage a "model_path", and to train on its adapter an "adapter_path": '
                    f'"{before.training["output_dir"]}"',
                )
            of_stage["model_path"] = before.training["output_dir"]
            notes.append(f"{stage} starts from {of_stage['model_path']}")
    return combine(layers, notes, where=own)


def load_stage(recipe: Recipe, stage: str) -> RunConfig | None:
    """One stage as its folder stands: None when finished, else its run, which resumes where an
    earlier one was stopped. `overwrite_output_dir` trains it from its start in both cases.

    Raises:
        ConfigError: the stage before it is not finished, or was trained again later.
    """
    config = stage_config(recipe, stage)
    folder = _folder_of(config)
    start = _start_folder(recipe, stage, config)
    anew = config.loop.overwrite_output_dir
    if not anew and is_finished(folder):
        _check_newer(folder / RUN_FILE, stage, start)
        return None
    if start and not is_finished(start):
        previous = str(recipe.previous(stage))
        command = shlex.join(["vlmtune", "train", *recipe.words(previous)])
        raise ConfigError(
            f"{recipe.source}, stage {stage}",
            f"starts from {previous}, and {start.resolve()} holds no finished model",
            f"train {previous} first: {command}",
        )
    newest = latest_checkpoint(folder)
    if config.training.get("resume_from_checkpoint", True) is True:
        config.training.pop("resume_from_checkpoint", None)
        if newest and not anew:
            _check_newer(newest / STATE_FILE, stage, start)
            config.training["resume_from_checkpoint"] = True
            config.notes.append(f"{stage} resumes from {newest}")
    return config


def is_finished(folder: Path) -> bool:
    """Whether a run has saved its model there: the save moves these two files in at its end."""
    # Listed, because exists() may answer from what a node remembers of a network file system.
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return RUN_FILE in names and not names.isdisjoint(("config.json", ADAPTER_CONFIG))


def is_stale(recipe: Recipe, stage: str) -> bool:
    """Whether a stage's model or checkpoint is older than the model it starts from."""
    config = stage_config(recipe, stage)
    folder, start = _folder_of(config), _start_folder(recipe, stage, config)
    newest = latest_checkpoint(folder)
    written = folder / RUN_FILE if is_finished(folder) else newest and newest / STATE_FILE
    return written is not None and _is_older(written, start)


def _read_stages(value: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ConfigError(
            where, "is not a list of stages", 'write [{"name": "stage1", ...}, {"name": ...}]'
        )
    stages: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(value, 1):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ConfigError(
                where,
                f"entry {number} is not an object with a name",
                'start it as {"name": "stage1", ...}',
            )
        if name == ALL or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigError(
                where,
                f'"{name}" cannot name a stage',
                f"use letters, digits, _, - and ., beginning with a letter or digit; not {ALL}",
            )
        if name in stages:
            raise ConfigError(where, f'two stages are named "{name}"', "rename one of them")
        given = {str(key): item for key, item in entry.items() if item is not None}
        stages[name] = {key: given[key] for key in given if key != "name"}
    return stages


def _folder_of(config: RunConfig) -> Path:
    return Path(config.training["output_dir"]).expanduser()


def _start_folder(recipe: Recipe, stage: str, config: RunConfig) -> Path | None:
    """The folder of the stage before, where this one starts from it."""
    previous = recipe.previous(stage)
    folder = _folder_of(stage_config(recipe, previous)) if previous else None
    starts = [config.model.model_path, config.adapter.adapter_path]
    return folder if folder in [Path(start) for start in starts if start] else None


def _check_newer(file: Path, stage: str, start: Path | None) -> None:
    """A stage that is older than the model it should have started from is not what it seems."""
    if start and _is_older(file, start):
        raise ConfigError(
            f"stage {stage}, {file.parent.resolve()}",
            f"is older than the model it starts from, {start.resolve()}",
            "pass --overwrite_output_dir true to train it again; "
            f"if the folders were only copied: touch {file}",
        )


def _is_older(file: Path, start: Path | None) -> bool:
    source = start and start / RUN_FILE
    return bool(source and source.exists() and file.stat().st_mtime < source.stat().st_mtime)


def _check_own_folder(recipe: Recipe, stage: str, folder: str | None) -> None:
    for other in recipe.names[: recipe.names.index(stage)]:
        taken = stage_config(recipe, other).training["output_dir"]
        if folder and Path(taken) == Path(folder):
            raise ConfigError(
                f"{recipe.source}, stage {stage}, output_dir",
                f"{folder} is the folder of {other} too",
                "give each stage a folder of its own, or leave output_dir out of the stages",
            )
