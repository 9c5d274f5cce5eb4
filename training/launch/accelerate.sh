#!/usr/bin/env bash
# All GPUs of one machine, by accelerate.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: accelerate.sh CONFIG.yaml [--argument value ...]

Trains on the GPUs of this machine through `accelerate launch`: with DistributedDataParallel, or under DeepSpeed if the
arguments say so (`--deepspeed zero2`). DeepSpeed is named there and not in accelerate's own configuration file, so that
molora can check it; what else stands in that file (`accelerate config` writes it) holds.

Environment:
  NUM_GPUS     processes to start (default: one for every GPU that is seen; 2 on a CPU)
  MASTER_PORT  port at which they meet (default 0: a free one)

On a machine without a GPU the same code runs over gloo: a way to try a configuration before the real one.

Example: accelerate.sh training/configs/demo_mixlora.yaml --deepspeed zero2
TEXT
}

# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
config=$1
shift
need_file "$config" first "YAML file"
need_command accelerate "pip install 'molora[train]', and "

set_num_gpus
# --multi_gpu means several processes. Without it accelerate starts a single one on a machine that has no GPU.
several=()
if [ "$NUM_GPUS" -gt 1 ]; then several=(--multi_gpu); fi
exec accelerate launch ${several[@]+"${several[@]}"} --num_processes "$NUM_GPUS" --num_machines 1 \
  --main_process_port "${MASTER_PORT:-0}" --mixed_precision no --dynamo_backend no \
  -m molora.cli train --config "$config" "$@"
