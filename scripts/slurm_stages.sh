#!/usr/bin/env bash
# sbatch scripts/slurm_stages.sh RECIPE stage1|stage2|stage3|all [N] [standard|trl] [--key value ...]
# The stages of a recipe, one torchrun over all nodes of a job for each. Submit it from the
# repository root; sbatch's own flags win over the lines below. docs/slurm.md
#SBATCH --job-name=vlmtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail
exec scripts/slurm_run.sh scripts/stage_configs.sh "$@"
