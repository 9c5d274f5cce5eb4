#!/usr/bin/env bash
# All GPUs of one machine, by DeepSpeed's own launcher.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: deepspeed.sh CONFIG.yaml [--argument value ...]

Trains on the GPUs of this machine under DeepSpeed: ZeRO-2, unless CONFIG.yaml or the arguments name something else
(`--deepspeed zero3`; zero1, zero2, zero3_offload, or the path of a JSON file). training/zero/README.md explains them.

Environment:
  NUM_GPUS     processes to start (default: one for every GPU that is seen; 2 on a CPU)
  MASTER_PORT  port at which they meet (default 29500; two runs on one machine need two)

On a machine without a GPU the same code runs over gloo: a way to try a configuration before the real one.

Example: NUM_GPUS=4 deepspeed.sh training/configs/demo_mixlora.yaml --deepspeed zero3
TEXT
}

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

case "${1-}" in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
esac
config=$1
shift
[ -f "$config" ] || fail "$config does not exist; the first argument is the YAML file (see --help)"
command -v deepspeed > /dev/null ||
  fail "deepspeed is not on PATH: pip install 'molora[train]', and activate the environment that it is in"

engine=(--deepspeed zero2)
if grep -q '^deepspeed:' "$config"; then engine=(); fi
for argument in "$@"; do
  case "$argument" in --deepspeed | --deepspeed=*) engine=() ;; esac
done
if [ -z "${NUM_GPUS-}" ]; then
  NUM_GPUS=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
exec deepspeed --num_gpus "$NUM_GPUS" --master_port "${MASTER_PORT:-29500}" --no_local_rank \
  --module molora.cli train --config "$config" ${engine[@]+"${engine[@]}"} "$@"
