#!/usr/bin/env bash
# One run on this machine: index, train and evaluate; training uses all its devices. After an interruption the
# same command goes on: an index that is whole is kept, and training resumes.
set -euo pipefail

usage() {
  cat <<TEXT
usage: launch/local.sh [--dry-run] CONFIG [key=value …]

  launch/local.sh configs/factbook.yaml
  launch/local.sh --dry-run configs/factbook.yaml train.steps=10

  --dry-run   print the commands, run nothing
  RAGJAX      the command to run (default: ragjax)
TEXT
}

dry_run=
while [[ "${1-}" == -* ]]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[[ $# -ge 1 ]] || { usage >&2; exit 2; }

export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}" # large arrays on huge pages: fewer page faults

for stage in index train evaluate; do
  command=("${RAGJAX:-ragjax}" "$stage" "$@")
  printf '+ %s\n' "${command[*]}"
  [[ -n "$dry_run" ]] || "${command[@]}"
done
