# What the launch scripts share; each of them reads this file. A script defines usage() first.
# shellcheck shell=bash

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# begin "$@": the help, or the usage where there is no argument.
begin() {
  case "${1-}" in
    -h | --help) usage; exit 0 ;;
    '') usage >&2; exit 2 ;;
  esac
}

# need_file FILE PLACE WHAT: FILE, the PLACE argument, is there.
need_file() {
  [ -f "$1" ] || fail "$1 does not exist; the $2 argument is the $3 (see --help)"
}

# need_command NAME [REMEDY]: NAME can be run.
need_command() {
  command -v "$1" > /dev/null || fail "$1 is not on PATH: ${2-}activate the environment that molora is installed in"
}

# set_num_gpus: NUM_GPUS, one for every GPU that is seen, 2 on a CPU.
set_num_gpus() {
  if [ -z "${NUM_GPUS-}" ]; then
    NUM_GPUS=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
  fi
}

# set_engine CONFIG "$@": the array engine asks for ZeRO-2, unless CONFIG or the arguments name something.
# shellcheck disable=SC2034  # the scripts read it
set_engine() {
  engine=(--deepspeed zero2)
  if grep -q '^deepspeed:' "$1"; then engine=(); fi
  shift
  for argument in "$@"; do
    case "$argument" in --deepspeed | --deepspeed=*) engine=() ;; esac
  done
}
