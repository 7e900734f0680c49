#!/usr/bin/env bash
# Runs an experiment on a TPU VM to its end: a machine that was taken away is made anew, and the run goes on.
set -euo pipefail

usage() {
  cat <<TEXT
usage: BUCKET=gs://… [NAME=… ZONE=… TYPE=… VERSION=…] launch/tpu_keep.sh [--dry-run] CONFIG [key=value …]

  BUCKET is where runs/ survives the machine. It stops at once where the experiment itself fails (exit code 2).
TEXT
}

dry=()
[[ "${1-}" != --dry-run ]] || { dry=(--dry-run); shift; }
[[ "${1-}" != -h && "${1-}" != --help ]] || { usage; exit 0; }
[[ $# -ge 1 && -n "${BUCKET-}" ]] || { usage >&2; exit 2; }
tpu() { "$(dirname "$0")/tpu.sh" "${dry[@]}" "$@"; }

while true; do
  state=NONE
  [[ -n "${dry[*]-}" ]] || state="$(tpu state 2>/dev/null || echo NONE)"
  if [[ "$state" != READY ]]; then
    [[ "$state" == NONE ]] || tpu delete || true
    if ! { tpu create --spot && tpu install; }; then
      sleep "${PAUSE:-60}"
      continue
    fi
  fi
  code=0
  tpu run "$@" || code=$?
  [[ -z "${dry[*]-}" ]] || exit 0
  [[ $code -ne 0 && $code -ne 2 ]] || { tpu delete; exit $code; }
  echo "the run ended with $code; looking at the machine again" >&2
  sleep "${PAUSE:-60}"
done
