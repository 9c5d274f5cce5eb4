#!/usr/bin/env bash
#SBATCH --job-name=molora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
# Several machines under SLURM: one torchrun on each. sbatch copies this file to where it runs it, so it does not read
# common.sh beside it.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: sbatch [--nodes N --gpus-per-node G ...] slurm.sh CONFIG.yaml [--argument value ...]

Starts one torchrun on each machine of the job: DistributedDataParallel, or DeepSpeed if the arguments say so
(`--deepspeed zero2`). Submit it from where CONFIG.yaml is, with the environment active; options of sbatch win over the
lines at the top of this file. Three minutes before its time is up the job gets a signal, saves and stops (torchrun
waits 30 seconds for that: one step and the save have to fit); with
`--resume_from_checkpoint auto` the same command, submitted again, goes on from there (and starts anew the first time).

Environment:
  NUM_GPUS         processes on each machine (default: SLURM_GPUS_ON_NODE)
  MASTER_PORT      port at which they meet (default: 20000 and the last four digits of the job's number)
  OMP_NUM_THREADS  CPU threads of each process (default 1)

Example: sbatch --nodes 4 training/launch/slurm.sh training/configs/demo_mixlora.yaml --deepspeed zero2
TEXT
}

fail() {
  printf 'slurm.sh: %s\n' "$1" >&2
  exit 2
}

case "${1-}" in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
esac
config=$1
shift
[ -f "$config" ] || fail "$config does not exist; the first argument is the YAML file (see --help)"
[ -n "${SLURM_JOB_ID-}" ] || fail "this is no SLURM job: start it with sbatch (see --help)"
processes=${NUM_GPUS:-${SLURM_GPUS_ON_NODE-}}
[ -n "$processes" ] || fail "the job has no GPUs: give sbatch --gpus-per-node, or set NUM_GPUS"

# The machine of the first task is where all meet. Jobs that share a machine get ports of their own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec srun --kill-on-bad-exit=1 \
  torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$processes" \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:$port" \
  -m molora.cli train --config "$config" "$@"
