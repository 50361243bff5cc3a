"""`train_launch.sh [CONFIG] [N] [standard|trl] [--key value ...]`: training on N processes.

N left out or 0 means all GPUs of this machine, one process without any. `NNODES`, `NODE_RANK`,
`MASTER_ADDR` and `MASTER_PORT` are respected for several machines.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..configs.load import load_config
from ..core.errors import VLMTuneError
from .main import main as vlmtune


@dataclass(frozen=True)
class Launch:
    """How many processes run `vlmtune train` with which words after it."""

    processes: int
    train_words: list[str]


def parse_launch(argv: Sequence[str]) -> Launch:
    """Positional words in any order before the first flag; without a mode, the standard trainer."""
    flags = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    processes, mode, words = 0, "standard", []
    for word in argv[:flags]:
        if word.isdigit():
            processes = int(word)
        elif word in ("standard", "trl"):
            mode = word
        else:
            words.append(word)
    given = any(word.split("=")[0] == "--trainer" for word in argv[flags:])
    trainer = [] if given else ["--trainer", mode]
    return Launch(processes, [*words, *trainer, *argv[flags:]])


def main(argv: Sequence[str] | None = None) -> int:
    launch = parse_launch(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in launch.train_words
    try:
        load_config([word for word in launch.train_words if word != "--debug"])
    except VLMTuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    processes, nodes = launch.processes or _gpus() or 1, int(os.environ.get("NNODES", "1"))
    if processes * nodes == 1:
        return vlmtune(["train", *launch.train_words])
    return _torchrun(processes, nodes, launch.train_words, debug)


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
