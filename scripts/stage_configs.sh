#!/usr/bin/env bash
# scripts/stage_configs.sh RECIPE stage1|stage2|stage3|all [N] [standard|trl] [--key value ...]
# Trains one stage of a recipe, or all, on N processes; N left out or 0: all GPUs of this machine.
# A finished stage is skipped, a stopped one resumed. LLM_MODEL and VIT_MODEL, when set, are what
# stage 1 builds a new Ovis2.5 of. Several machines: as for train_launch.sh.
set -euo pipefail
if (($# < 2)); then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 1
fi
recipe=$1 stage=$2
shift 2
start=()
if [[ -n "${LLM_MODEL:-}${VIT_MODEL:-}" ]]; then
  # An empty model_path stands against one in the recipe.
  start=(--model_path= ${LLM_MODEL:+"--llm_name_or_path=$LLM_MODEL"}
    ${VIT_MODEL:+"--vit_name_or_path=$VIT_MODEL"})
fi
words=()
while (($# > 0)) && [[ "$1" != --* ]]; do
  words+=("$1")
  shift
done
exec "${PYTHON:-python}" -m vlmtune.cli.launch "$recipe" ${words[@]+"${words[@]}"} \
  --stage "$stage" ${start[@]+"${start[@]}"} "$@"
