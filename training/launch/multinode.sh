#!/usr/bin/env bash
# Several machines, by DeepSpeed's launcher and a hostfile.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: multinode.sh HOSTFILE CONFIG.yaml [--argument value ...]

HOSTFILE names the machines and their GPUs, one `worker-1 slots=8` a line. On every machine the environment, the base
model and the data lie under the same paths; this one reaches the others (and itself) by ssh without a password, and has
pdsh. ZeRO-2, unless CONFIG.yaml or the arguments name something else (`--deepspeed zero3`).

Environment:
  MASTER_ADDR  address at which the others reach the first machine (default: what that machine says of itself)
  MASTER_PORT  port at which they meet (default 29500)
  NO_SSH       1: start the processes of this machine only, and the same line by hand on each; needs the next two
  NODE_RANK    with NO_SSH: line of HOSTFILE that this machine is, from 0
  MASTER_ADDR  with NO_SSH: address of the first machine

Variables that all machines need (NCCL_SOCKET_IFNAME, HF_HOME, ...) go into ~/.deepspeed_env, one NAME=value a line.

Example: multinode.sh hosts.txt training/configs/demo_mixlora.yaml --deepspeed zero2 --global_batch_size 128
Example: NO_SSH=1 NODE_RANK=1 MASTER_ADDR=10.0.0.1 multinode.sh hosts.txt training/configs/demo_mixlora.yaml
TEXT
}

# shellcheck source=common.sh source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"
[ "$#" -ge 2 ] || fail "got one argument, expected HOSTFILE and CONFIG.yaml (see --help)"
hostfile=$1
config=$2
shift 2
need_file "$hostfile" first hostfile
need_file "$config" second "YAML file"
if grep -vqE '^[[:space:]]*(#.*)?$|^[^[:space:]]+[[:space:]]+slots=[0-9]+' "$hostfile" || ! grep -q slots= "$hostfile"; then
  fail "$hostfile: expected lines like 'worker-1 slots=8' and nothing else"
fi
need_command deepspeed "pip install 'molora[train]', and "

options=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --no_local_rank)
if [ -n "${MASTER_ADDR-}" ]; then options+=(--master_addr "$MASTER_ADDR"); fi
if [ -n "${NO_SSH-}" ]; then
  [ -n "${NODE_RANK-}" ] && [ -n "${MASTER_ADDR-}" ] || fail "NO_SSH needs NODE_RANK and MASTER_ADDR (see --help)"
  options+=(--no_ssh --node_rank "$NODE_RANK")
else
  command -v pdsh > /dev/null || fail "pdsh is not on PATH: install it, or start each machine by hand with NO_SSH=1"
fi
set_engine "$config" "$@"
exec python -m deepspeed.launcher.runner "${options[@]}" \
  --module molora.cli train --config "$config" ${engine[@]+"${engine[@]}"} "$@"
