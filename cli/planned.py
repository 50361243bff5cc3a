"""The run that a command looks at before it is trained."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ..configs.load import COMMAND_LINE, load_config
from ..configs.schema import RunConfig
from ..configs.stages import ALL, is_finished, read_recipe, stage_config
from ..core.checkpoints import require_model
from ..core.errors import ConfigError


def planned_config(words: Sequence[str]) -> RunConfig:
    """The run that `vlmtune train` would start with these words. A stage whose model is not trained
    yet is read with the model before it, which has the same tokenizer and shapes.

    Raises:
        ConfigError: as `load_config` and `stage_config`, or no single stage is named.
    """
    recipe = read_recipe(words)
    if recipe is None:
        return load_config(words)
    if recipe.requested == ALL:
        raise ConfigError(
            f"{COMMAND_LINE}, stage",
            "is all, and each stage may have data and limits of its own",
            f"give one of {', '.join(recipe.names)}",
        )
    config = stage_config(recipe, recipe.requested)
    wanted, stage = config.model.model_path, recipe.requested
    while stage := recipe.previous(stage):
        before = stage_config(recipe, stage)
        folder = Path(before.training["output_dir"])
        if Path(config.model.model_path or "") != folder or is_finished(folder.expanduser()):
            break
        config.model.model_path = before.model.model_path
    if config.model.model_path and config.model.model_path != wanted:
        taken = config.model.model_path
        config.notes.append(f"{wanted} is not trained yet; its shapes are those of {taken}")
    return config


def title_of(words: Sequence[str]) -> str:
    """What the run of these words is called: its file, and the stage of a recipe."""
    recipe = read_recipe(words)
    if recipe:
        return f"{recipe.path}, {recipe.requested}"
    return words[0] if words and not words[0].startswith("--") else "the command line"


def check_flags(words: Sequence[str], flags: Sequence[str]) -> None:
    """Raises ConfigError for what is nearly a flag of this command: no key of a config is."""
    for word in words:
        flag = word.partition("=")[0]
        if near := get_close_matches(flag, flags, n=1, cutoff=0.8) if flag[:2] == "--" else []:
            raise ConfigError(COMMAND_LINE, f"unknown flag {flag}", f"did you mean {near[0]}?")


def check_present(config: RunConfig) -> None:
    """See that what is named is there, before torch is imported, which takes seconds.

    Raises:
        ModelError, ConfigError, DataError: as training would.
    """
    from ..data.records import open_text
    from ..data.sources import resolve_sources

    require_model(str(config.model.model_path))
    data = config.data
    for names in (data.data_path, *data.eval_sets.values()):
        for source in resolve_sources(names, data.image_folder, data.datainfo):
            if not source.is_table:
                with open_text(source.path):
                    pass
