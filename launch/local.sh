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
[[ "${1-}" != --dry-run ]] || { dry_run=1; shift; }
case "${1-}" in
  -h | --help) usage; exit 0 ;;
  "" | -*) usage >&2; exit 2 ;;
esac

export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}" # large arrays on huge pages: fewer page faults
trap 'kill -TERM "$!"' TERM # it may come to this shell alone, as in a container
trap : INT                  # comes to both

for stage in index train evaluate; do
  command=("${RAGJAX:-ragjax}" "$stage" "$@")
  printf '+ %s\n' "${command[*]}"
  [[ -z "$dry_run" ]] || continue
  "${command[@]}" & code=0
  wait "$!" || code=$? # which a signal interrupts
  while kill -0 "$!" 2>/dev/null; do code=0; wait "$!" || code=$?; done
  [[ $code -eq 0 ]] || exit "$code"
done
