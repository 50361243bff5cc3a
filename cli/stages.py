"""`--stage all`: the stages of a recipe one after another, each in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType

from ..configs.schema import RunConfig
from ..configs.stages import Recipe, is_stale, load_stage, stage_config
from ..core.checkpoints import RESUMABLE
from ..core.distributed import launched_by_torchrun
from ..core.errors import ConfigError
from ..core.logging import say
from ..core.signals import handling


def open_stage(recipe: Recipe) -> RunConfig | None:
    """The stage that is asked for; when it is finished None, and one line says so."""
    config = load_stage(recipe, recipe.requested)
    if config is None:
        folder = stage_config(recipe, recipe.requested).training["output_dir"]
        say(f"{recipe.requested} is finished: {folder}. Again: --overwrite_output_dir true")
    return config


def run_stages(recipe: Recipe, command: Sequence[str], flags: Sequence[str]) -> int:
    """Run `command` with the words of each unfinished stage and `flags`, up to the first failure.

    A process of its own, because the state that DeepSpeed and torch.distributed keep does not
    survive a second run. SIGTERM and SIGUSR1 go on to the stage that runs as SIGUSR1.

    Returns:
        0, or the exit code of the stage that failed.

    Raises:
        ConfigError: under torchrun, or when a stage is configured wrongly, before any of them runs;
            later, when a stage does not fit the one it starts from.
    """
    if launched_by_torchrun():
        raise ConfigError(
            "command line, stage",
            "all stages cannot run under torchrun, which starts each stage's processes",
            f"use scripts/stage_configs.sh {recipe.path} all N",
        )
    for stage in recipe.names:
        stage_config(recipe, stage)
    runner = _Runner()
    with handling(runner.stop):
        for stage in recipe.names:
            again = []
            if is_stale(recipe, stage):
                say(f"{stage} is trained again: it is older than the model it starts from")
                again = ["--overwrite_output_dir=true"]
            elif open_stage(replace(recipe, requested=stage)) is None:
                continue
            say(f"-- {stage}")
            code = runner.run([*command, *recipe.words(stage), *again, *flags])
            if code:
                return code
    return 0


class _Runner:
    """Runs one child at a time and passes a request to stop on to it."""

    def __init__(self):
        self.child: subprocess.Popen | None = None
        self.stopped = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.child:
            self.child.send_signal(signal.SIGUSR1)

    def run(self, words: Sequence[str]) -> int:
        if self.stopped:
            return RESUMABLE
        self.child = subprocess.Popen(words)
        if self.stopped:  # meanwhile
            self.child.send_signal(signal.SIGUSR1)
        try:
            code = self.child.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the child by itself
            self.child.wait()
            return 128 + signal.SIGINT
        if self.stopped and code <= 0:
            return RESUMABLE
        if code < 0:
            print(f"killed by signal {-code}: {' '.join(words)}", file=sys.stderr)
            return 128 - code
        return code
