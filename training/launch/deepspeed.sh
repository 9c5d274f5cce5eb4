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

# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
config=$1
shift
need_file "$config" first "YAML file"
need_command deepspeed "pip install 'molora[train]', and "

set_engine "$config" "$@"
set_num_gpus
exec python -m deepspeed.launcher.runner --num_gpus "$NUM_GPUS" --master_port "${MASTER_PORT:-29500}" --no_local_rank \
  --module molora.cli train --config "$config" ${engine[@]+"${engine[@]}"} "$@"
