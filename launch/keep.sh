#!/usr/bin/env bash
# Carries a run to its end on spot machines: one that was taken away is made anew, and the run goes on.
set -euo pipefail

usage() {
  cat <<TEXT
usage: BUCKET=gs://… [NAME=… ZONE=… TYPE=… …] launch/keep.sh [--dry-run] tpu|gpu CONFIG [key=value …]

  tpu, gpu   on machines of launch/tpu.sh or launch/gpu.sh, which tell what else can be set
  BUCKET     where runs/ survives the machine. It stops where the run itself fails (exit code 2, or 1 five times)
TEXT
}

dry=()
[[ "${1-}" != --dry-run ]] || { dry=(--dry-run); shift; }
[[ "${1-}" != -h && "${1-}" != --help ]] || { usage; exit 0; }
[[ $# -ge 2 && "$1" =~ ^(tpu|gpu)$ && -n "${BUCKET-}" ]] || { usage >&2; exit 2; }
script="$(dirname "$0")/$1.sh"; shift
machine() { "$script" "${dry[@]}" "$@"; }

failures=0
while true; do
  state=NONE
  [[ -n "${dry[*]-}" ]] || state="$(machine state 2>/dev/null || echo NONE)"
  if [[ "$state" != READY && "$state" != RUNNING ]]; then
    [[ "$state" == NONE ]] || machine delete || true
    if ! { machine create --spot && machine install; }; then
      sleep "${PAUSE:-60}"
      continue
    fi
  fi
  code=0
  machine run "$@" || code=$?
  [[ -z "${dry[*]-}" ]] || exit 0
  if [[ $code -eq 1 ]]; then failures=$((failures + 1)); else failures=0; fi # a lost connection, or an error
  [[ $code -ne 0 && $code -ne 2 && $failures -lt 5 ]] || { machine delete; exit $code; }
  echo "the run ended with $code; looking at the machine again" >&2
  sleep "${PAUSE:-60}"
done
