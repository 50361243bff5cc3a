"""`vlmtune validate`: every record, image and video before a run is paid for."""

from collections.abc import Sequence
from functools import cache, partial

from ..configs.schema import RunConfig
from ..core.errors import ConfigError
from ..core.logging import quiet_hosts
from ..data.record_inspection import CheckSample
from ..data.validate import arguments, exit_code, run
from ..data.validation_run import Summary
from .planned import planned_config


def main(argv: Sequence[str]) -> int:
    """Check what the words after `validate` name, and print what was found.

    Returns:
        0 without errors, 1 with errors, 2 if it could not be checked, 130 after Ctrl-C, 143 after
        SIGTERM.

    Raises:
        SystemExit: 0 after `--help`, 2 for an unknown flag.
    """
    parser = arguments("vlmtune validate")
    parser.add_argument("--stage", metavar="NAME", help="of the recipe that --config names")
    given = parser.parse_args(argv)
    if given.stage and not given.config:
        parser.error("--stage needs --config RECIPE")

    def check() -> Summary:
        if not given.config:
            return run(given)
        config = planned_config([given.config, *(["--stage", given.stage] if given.stage else [])])
        return run(given, config.data, sample_check(config))

    return exit_code(check)


def sample_check(config: RunConfig) -> CheckSample:
    """What a run of `config` would find in a sample beyond its record and files.

    Raises:
        ConfigError: the config names no model yet.
    """
    folder = config.model.model_path
    if not folder:
        raise ConfigError(
            "model_path",
            "is not given: the model is built when the run starts, and has no tokenizer yet",
            "run vlmtune models build-ovis2_5 and name its folder, or leave --config out",
        )

    @cache
    def loaded() -> CheckSample:
        quiet_hosts()
        # Imported here, when there is a sample to look at: it takes seconds.
        from ..collators.sample_checks import check_sample
        from ..models.loading import load_processor
        from ..sft.data import sample_encoder

        return partial(check_sample, sample_encoder(config, load_processor(folder)))

    return lambda conversation, sizes: loaded()(conversation, sizes)
