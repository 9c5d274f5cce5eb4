#!/usr/bin/env bash
# All GPUs of one machine, by torchrun.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: torchrun.sh CONFIG.yaml [--argument value ...]

Trains on the GPUs of this machine: with DistributedDataParallel, or under DeepSpeed if the arguments say so
(`--deepspeed zero2`; zero1, zero3, zero3_offload, or the path of a JSON file). Needs nothing but torch.

Environment:
  NUM_GPUS         processes to start (default: one for every GPU that is seen; 2 on a CPU)
  OMP_NUM_THREADS  CPU threads of each process (default 1)

`--global_batch_size 64` gives the same batch on any number of GPUs: the accumulation steps are computed from it.
On a machine without a GPU the same code runs over gloo: a way to try a configuration before the real one.

Example: NUM_GPUS=4 torchrun.sh training/configs/demo_mixlora.yaml --global_batch_size 64
TEXT
}

# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
config=$1
shift
need_file "$config" first "YAML file"
need_command torchrun

set_num_gpus
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# --standalone finds a free port, so several runs fit on one machine.
exec torchrun --standalone --nproc_per_node "$NUM_GPUS" -m molora.cli train --config "$config" "$@"
