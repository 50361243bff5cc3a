#!/usr/bin/env bash
# scripts/run_ovis2_5_sft.sh [N] [--key value ...]
# The official Ovis2.5-9B recipe on N processes (default: all GPUs) with TRL's trainer:
# Run it from the repository root: ZeRO-1, global batch 64 on 2 processes, one epoch, learning rate 2e-5, cosine, warmup 10 %.
set -euo pipefail
root=$(dirname "$0")/..
exec "$root/scripts/train_launch.sh" "$root/configs/presets/ovis2_5_full.json" trl "$@"
