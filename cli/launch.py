"""`train_launch.sh [CONFIG] [N] [standard|trl] [--key value ...]`: training on N processes.

N left out or 0 means all GPUs of this machine, one process without any. Without a mode the config's
`trainer` counts, or else the standard one. `NNODES`, `NODE_RANK`, `MASTER_ADDR` and `MASTER_PORT`
are respected for several machines; each stage of a recipe (`--stage NAME`, `--stage all`) takes the
port after that of the stage before. SIGTERM and SIGUSR1 stop a run at its next step with a
checkpoint; the exit code is then 75.
"""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from ..configs.load import load_config
from ..configs.stages import ALL, read_recipe
from ..core.checkpoints import RESUMABLE
from ..core.errors import ConfigError, VLMTuneError
from ..core.signals import STOP_SIGNALS, handling
from .main import main as vlmtune
from .signals import leave, stop_workers
from .stages import open_stage, run_stages


@dataclass(frozen=True)
class Launch:
    """How many processes (0: all GPUs) run `vlmtune train` with which words after it."""

    processes: int
    train_words: list[str]


def parse_launch(argv: Sequence[str]) -> Launch:
    """Positional words in any order before the first flag."""
    flags = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    processes, mode, words = 0, None, []
    for word in argv[:flags]:
        if word.isdigit():
            processes = int(word)
        elif word in ("standard", "trl"):
            mode = word
        else:
            words.append(word)
    trainer = ["--trainer", mode] if mode else []
    return Launch(processes, [*words, *trainer, *argv[flags:]])


def main(argv: Sequence[str] | None = None) -> int:
    launch = parse_launch(sys.argv[1:] if argv is None else argv)
    words = launch.train_words
    if "--help" in words:
        print(__doc__)
        return 0
    debug = "--debug" in words
    given = [word for word in words if word != "--debug"]
    try:
        nodes, port = _number("NNODES", 1), _number("MASTER_PORT", 29500)
        recipe = read_recipe(given)
        if recipe and recipe.requested == ALL:
            command = [sys.executable, "-m", "vlmtune.cli.launch", str(launch.processes)]
            return run_stages(recipe, command, ["--debug"] if debug else [])
        config = open_stage(recipe) if recipe else load_config(given)
    except VLMTuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if config is None:
        return 0
    if "trainer" not in config.sources:
        words = [*words, "--trainer", "standard"]
    processes = launch.processes or _gpus() or 1
    if processes * nodes == 1:
        return vlmtune(["train", *words])
    if recipe:
        # So that a stage cannot meet what is left of the one before.
        port += recipe.names.index(recipe.requested)
    worker = ["-m", "vlmtune.cli.main", "train", *words]
    code = torchrun(processes, nodes, port, worker, debug)
    if code == RESUMABLE:
        again = ["scripts/train_launch.sh", str(processes), *words, "--resume_from_checkpoint"]
        print(f"Stopped by a signal. Go on with: {shlex.join([*again, 'auto'])}", file=sys.stderr)
    return code


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdigit() or int(value) == 0:
        raise ConfigError(f"environment variable {variable}", f'is "{value}"', "set 1 or more")
    return int(value)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def torchrun(processes: int, nodes: int, port: int, worker: Sequence[str], debug: bool) -> int:
    """Run `worker`, words after `python`, under torchrun.

    Of SIGTERM and SIGUSR1, workers get SIGUSR1, and as long as their saving takes: torchrun itself
    would kill them 30 s after a SIGTERM.

    Args:
        processes: On each of `nodes` machines.
        port: Of MASTER_ADDR, where several machines meet.
        debug: Show torchrun's own log lines.

    Returns:
        0, 1 after an error, or 75 when a signal stopped the workers and they can be resumed.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    if not debug:
        # A failed rank has printed what happened; torchrun's summary would bury it.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    rendezvous = ["--standalone"]
    if nodes > 1 or "MASTER_PORT" in os.environ:
        rendezvous = [
            f"--nnodes={nodes}",
            f"--node_rank={os.environ.get('NODE_RANK', '0')}",
            f"--master_addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master_port={port}",
        ]
    options = [f"--nproc_per_node={processes}", "--signals_to_handle=SIGINT,SIGHUP,SIGQUIT"]
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if not stop_workers():
            leave(number, frame)

    try:
        with handling(stop):
            run(parse_args([*rendezvous, *options, *worker]))
    except (DistError, RendezvousError) as error:
        print(
            f"The processes cannot meet: {' '.join(str(error).split())}\n"
            "  Fix: see that MASTER_ADDR can be reached, that NNODES launchers run, and that "
            f"MASTER_PORT {port} is free",
            file=sys.stderr,
        )
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if RESUMABLE in codes or (stopped and codes <= {-number for number in STOP_SIGNALS}):
            return RESUMABLE
        failed, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {failed} was killed by signal {-failure.exitcode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
