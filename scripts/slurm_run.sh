#!/usr/bin/env bash
# scripts/slurm_run.sh COMMAND [WORD ...]
# Inside a SLURM job: runs the command once on each node, as the machines of one torchrun. When it
# ends with 75, stopped by a signal in a state that can be resumed, the job is put back in the queue.
set -euo pipefail
if [[ "$*" =~ --overwrite[_-]output[_-]dir ]]; then
  echo "overwrite_output_dir would begin anew whenever the job comes back from the queue." >&2
  echo "Fix: remove the old folders instead." >&2
  exit 1
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES="$SLURM_NNODES"
export MASTER_ADDR="${hosts[0]}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over by itself
fi
code=0
# --wait: when a node has failed, the others would wait for it until ddp_timeout.
# shellcheck disable=SC2016  # expanded on each node
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=300 \
  bash -c 'export NODE_RANK="$SLURM_NODEID"; exec "$@"' node "$@" || code=$?
if ((code == 75)); then
  if ((${SLURM_RESTART_COUNT:-0} >= 100)); then
    echo "job $SLURM_JOB_ID was stopped for the 100th time and is not requeued" >&2
    exit "$code"
  fi
  echo "job $SLURM_JOB_ID was stopped and goes back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
