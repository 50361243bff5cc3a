#!/usr/bin/env bash
# sbatch scripts/slurm_train.sh CONFIG [N] [standard|trl] [--key value ...]
# One torchrun over all nodes of a job, N processes on each (left out or 0: all its GPUs). Submit it
# from the repository root; sbatch's own flags win over the lines below. docs/slurm.md
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
if ((${SLURM_RESTART_COUNT:-0} > 0)); then
  set -- "$@" --resume_from_checkpoint auto
fi
exec scripts/slurm_run.sh scripts/train_launch.sh "$@"
