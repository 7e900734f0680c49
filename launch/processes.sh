#!/usr/bin/env bash
# One experiment in several processes on this machine, as on several machines: index, train and evaluate.
set -euo pipefail

usage() {
  cat <<TEXT
usage: [DEVICES=1] launch/processes.sh [--dry-run] N CONFIG [key=value …]

  launch/processes.sh 2 configs/tiny.yaml

  N processes on the CPU, each with DEVICES devices of its own. If one ends with an error the others are stopped; then,
  or after an interruption, the same command goes on.
  RAGJAX   the command to run (default: ragjax)      STAGES   default: index train evaluate
TEXT
}

dry_run=
[[ "${1-}" != --dry-run ]] || { dry_run=1; shift; }
[[ "${1-}" != -h && "${1-}" != --help ]] || { usage; exit 0; }
[[ $# -ge 2 && "$1" =~ ^[1-9][0-9]*$ ]] || { usage >&2; exit 2; }
count="$1"; shift
port="${PORT:-$((20000 + RANDOM % 20000))}"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${DEVICES:-1}"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count"
trap 'kill -TERM $(jobs -p) 2>/dev/null || true' TERM INT

for stage in ${STAGES:-index train evaluate}; do
  printf '+ %s × %s\n' "$count" "${RAGJAX:-ragjax} $stage $* --distributed"
  [[ -z "$dry_run" ]] || continue
  for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID="$i" ${RAGJAX:-ragjax} "$stage" "$@" --distributed &
  done
  code=0
  for ((i = 0; i < count; i++)); do
    wait -n || { of_this=$?; [[ $code -ne 0 ]] || code=$of_this; }
  done
  [[ $code -eq 0 ]] || exit "$code"
done
