#!/usr/bin/env bash
# One run in several processes on this machine, as on several machines: index, train and evaluate.
set -euo pipefail

usage() {
  cat <<TEXT
usage: [DEVICES=1] launch/processes.sh [--dry-run] N CONFIG [key=value …]

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
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${DEVICES:-1}" JAX_NUM_PROCESSES="$count"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-$((20000 + RANDOM % 20000))}"
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

for stage in ${STAGES:-index train evaluate}; do
  printf '+ %s × %s\n' "$count" "${RAGJAX:-ragjax} $stage $* --distributed"
  [[ -z "$dry_run" ]] || continue
  pids=() code=0
  for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID="$i" ${RAGJAX:-ragjax} "$stage" "$@" --distributed &
    pids+=($!)
  done
  while [[ -n "$(jobs -pr)" ]]; do # a signal interrupts `wait`
    of_this=0
    wait -n || of_this=$?
    [[ $code -eq 0 && $of_this -ne 0 && $of_this -ne 127 ]] || continue
    code=$of_this
    [[ $code -ge 128 ]] || { sleep 5; kill -KILL "${pids[@]}" 2>/dev/null || true; } # they have had time to speak
  done
  [[ $code -eq 0 ]] || exit "$code"
done
