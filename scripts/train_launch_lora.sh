#!/usr/bin/env bash
# scripts/train_launch_lora.sh [CONFIG] [N] [standard|trl] [--key value ...]
# As train_launch.sh, with adapters on the model (docs/lora.md); rank 16 unless lora_r says otherwise.
set -euo pipefail
exec "${PYTHON:-python}" -m vlmtune.cli.launch "$@" --use_lora true
