"""`train_launch.sh [CONFIG] [N] [standard|trl] [--key value ...]`: training on N processes.

N left out or 0 means all GPUs of this machine, one process without any. Without a mode the config's
`trainer` counts, or else the standard one. `NNODES`, `NODE_RANK`, `MASTER_ADDR` and `MASTER_PORT`
are respected for several machines.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..configs.load import load_config
from ..core.errors import ConfigError, VLMTuneError
from .main import main as vlmtune


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
    try:
        config = load_config([word for word in words if word != "--debug"])
        nodes = _nodes()
    except VLMTuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if "trainer" not in config.sources:
        words = [*words, "--trainer", "standard"]
    processes = launch.processes or _gpus() or 1
    if processes * nodes == 1:
        return vlmtune(["train", *words])
    return _torchrun(processes, nodes, words, debug)


def _nodes() -> int:
    value = os.environ.get("NNODES", "1")
    if not value.isdigit() or value == "0":
        raise ConfigError("environment variable NNODES", f'is "{value}"', "set 1 or more")
    return int(value)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _torchrun(processes: int, nodes: int, words: Sequence[str], debug: bool) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
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
            f"--master_port={os.environ.get('MASTER_PORT', '29500')}",
        ]
    worker = ["-m", "vlmtune.cli.main", "train", *words]
    try:
        run(parse_args([*rendezvous, f"--nproc_per_node={processes}", *worker]))
    except ChildFailedError as error:
        failed, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {failed} was killed by signal {-failure.exitcode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
