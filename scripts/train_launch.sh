#!/usr/bin/env bash
# scripts/train_launch.sh [CONFIG] [N] [standard|trl] [--key value ...]
# Trains on N processes; N left out or 0: all GPUs of this machine, else one process.
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each.
set -euo pipefail
exec "${PYTHON:-python}" -m vlmtune.cli.launch "$@"
