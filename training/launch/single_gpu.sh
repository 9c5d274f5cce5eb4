#!/usr/bin/env bash
# One process: one GPU, or the CPU where there is none.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: single_gpu.sh CONFIG.yaml [--argument value ...]

Trains one mixture in one process. CONFIG.yaml holds the arguments of `molora train`; what follows it changes them.

Environment:
  CUDA_VISIBLE_DEVICES  which GPU (default 0)

A base that fits only without its optimizer's state: add `--deepspeed zero3_offload` (slow, but one GPU is enough).

Example: CUDA_VISIBLE_DEVICES=1 single_gpu.sh training/configs/demo_mixlora.yaml --max_steps 20
TEXT
}

# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
config=$1
shift
need_file "$config" first "YAML file"

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
exec python -m molora.cli train --config "$config" "$@"
