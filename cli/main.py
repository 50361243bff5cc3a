"""The `vlmtune` command. Config errors and `--help` answer without importing torch."""

import sys
from collections.abc import Sequence

from .. import __version__
from ..configs.load import load_config
from ..core.distributed import rank
from ..core.errors import DataError, VLMTuneError
from ..core.logging import quiet_hosts

USAGE = """\
usage: vlmtune train [CONFIG] [--key value ...] [--debug]

Fine-tune a vision-language model on LLaVA-style JSON.

  CONFIG           JSON or YAML file; every key of it is also a flag
  --key value      overrides the file; TrainingArguments and SFTConfig names work unchanged
  --debug          show the traceback of an error
  --version        print the version

A run needs at least model_path, data_path and output_dir:

  vlmtune train --model_path AIDC-AI/Ovis2.5-2B --data_path train.json \\
      --image_folder images --output_dir outputs/run1

On several GPUs: scripts/train_launch.sh CONFIG N trl
All keys: docs/config.md
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"vlmtune {__version__}")
        return 0
    try:
        if words[0] != "train":
            print(f'vlmtune: unknown command "{words[0]}"\n\n{USAGE}', file=sys.stderr)
            return 1
        train(words[1:])
    except VLMTuneError as error:
        if debug:
            raise
        # Settings and checkpoints are wrong on every rank alike; data may be on one alone.
        if rank() == 0 or isinstance(error, DataError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def train(argv: Sequence[str]) -> None:
    config = load_config(argv)
    quiet_hosts()
    # Imported here: it takes seconds, and load_config catches most mistakes before.
    from ..sft.train import run

    run(config)


if __name__ == "__main__":
    sys.exit(main())
