"""The `vlmtune` command. Config errors and `--help` answer without importing torch."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from signal import SIGTERM, SIGUSR1

from .. import __version__
from ..configs.load import load_config
from ..configs.stages import ALL, read_recipe
from ..core.distributed import rank, watched_by_torchrun
from ..core.errors import DataError, TrainingError, VLMTuneError
from ..core.logging import quiet_hosts
from ..core.signals import STOP_SIGNALS, handling, interrupted, terminate
from .signals import leave
from .stages import open_stage, run_stages

USAGE = """\
usage: vlmtune train [CONFIG] [--key value ...] [--debug]
       vlmtune train RECIPE --stage NAME|all [--key value ...] [--debug]
       vlmtune validate DATA ... [--image_folder FOLDER] [--config CONFIG] [--fix OUT]
       vlmtune preview CONFIG [--key value ...] [--index 0,5 | --random 5 | --longest 3]
       vlmtune plan CONFIG [--key value ...] [--gpus N] [--gpu_memory 80]
       vlmtune config --schema | --explain KEY
       vlmtune env
       vlmtune infer --model MODEL [--adapter ADAPTER] --image FILE --prompt TEXT
       vlmtune infer --model MODEL --data FILE --output OUT.jsonl
       vlmtune chat --model MODEL      and in a browser: vlmtune serve-ui --model MODEL
       vlmtune evaluate --model MODEL --data FILE --metrics all
       vlmtune merge --adapter ADAPTER[:WEIGHT] --output FOLDER [--base MODEL] [--verify]
       vlmtune verify --base MODEL --adapter ADAPTER --merged FOLDER [--data FILE]
       vlmtune models build-ovis2_5 --llm MODEL --vit MODEL --output FOLDER

Fine-tune a vision-language model on LLaVA-style JSON. More on one command: --help after it.

  CONFIG           JSON or YAML file; every key of it is also a flag
  RECIPE           the same with "stages"; a finished stage is skipped, a stopped one resumed
  --key value      overrides the file; TrainingArguments and SFTConfig names work unchanged
  --debug          show the traceback of an error
  --version        print the version

A run needs at least model_path, data_path and output_dir:

  vlmtune train --model_path AIDC-AI/Ovis2.5-2B --data_path train.json \\
      --image_folder images --output_dir outputs/run1

On several GPUs: scripts/train_launch.sh CONFIG N trl, scripts/stage_configs.sh RECIPE all N
Exit code: 0; 1 after an error; 75 when a signal stopped the run and it can be resumed
Before a run: docs/check.md, after it: docs/inference.md, docs/evaluation.md,
all keys: docs/config.md, LoRA: docs/lora.md, stages: docs/stages.md, SLURM: docs/slurm.md
"""

# Command -> the module here whose main takes what follows it, and how many words it has.
COMMANDS = {
    "validate": ("validate", 1),
    "preview": ("preview", 1),
    "plan": ("plan", 1),
    "config": ("config", 1),
    "env": ("env", 1),
    "infer": ("infer", 1),
    "chat": ("chat", 1),
    "serve-ui": ("serve_ui", 1),
    "evaluate": ("evaluate", 1),
    "merge": ("merge", 1),
    "verify": ("verify", 1),
    "models build-ovis2_5": ("build", 2),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    command = COMMANDS.get(" ".join(words[:2])) or COMMANDS.get(" ".join(words[:1]))
    if not command and (not words or {"-h", "--help"} & set(words)):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"vlmtune {__version__}")
        return 0
    if not command and words[0] != "train":
        unknown = " ".join(words[:2]) if words[0] == "models" else words[0]
        print(f'vlmtune: unknown command "{unknown}"\n\n{USAGE}', file=sys.stderr)
        return 1
    try:
        if command:
            module, taken = command
            return run_command(module, words[taken:])
        return train(words[1:], debug)
    except VLMTuneError as error:
        if debug:
            raise
        # Settings and checkpoints are wrong on every rank alike; the others may be on one alone.
        if rank() == 0 or isinstance(error, DataError | TrainingError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def run_command(module: str, words: Sequence[str]) -> int:
    """Its exit code; 1 where what reads the output has left, as `head` does, 130 after Ctrl-C, 143
    after SIGTERM."""
    try:
        with handling(terminate, (SIGTERM,)):
            code = import_module(f".{module}", __package__).main(words) or 0
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        print("Stopped.", file=sys.stderr)
        return interrupted(stop)


def train(argv: Sequence[str], debug: bool = False) -> int:
    """Train one config or stage, or all stages of a recipe.

    Returns:
        0 when the model is saved or was before; for all stages, the first failure's exit code.

    Raises:
        VLMTuneError: what the user can mend.
        SystemExit: with 75, when a signal stopped the run and it can be resumed.
    """
    recipe = read_recipe(argv)
    if recipe and recipe.requested == ALL:
        flags = ["--debug"] if debug else []
        return run_stages(recipe, [sys.executable, "-m", "vlmtune.cli.main", "train"], flags)
    config = open_stage(recipe) if recipe else load_config(argv)
    if config is None:
        return 0
    quiet_hosts()
    # torchrun ends its workers with SIGTERM when one has failed; they must not outlive it.
    signals = (SIGUSR1,) if watched_by_torchrun() else STOP_SIGNALS
    with handling(leave, signals):
        # Imported here: it takes seconds, and load_config catches most mistakes before.
        from ..sft.train import run

        run(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
