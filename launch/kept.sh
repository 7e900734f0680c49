#!/usr/bin/env bash
# launch/local.sh on a machine that may vanish: runs/ is fetched from BUCKET first and copied there every minute.
# With --distributed the hosts need one folder: runs/ is the bucket itself.
set -euo pipefail

usage() {
  echo "usage: BUCKET=gs://NAME/FOLDER launch/kept.sh [--dry-run] CONFIG [key=value …]   (without BUCKET: local.sh alone)"
}

[[ $# -ge 1 ]] || { usage >&2; exit 2; }
[[ "$1" != -h && "$1" != --help ]] || { usage; exit 0; }
show() { printf '+'; printf ' %q' "$@"; echo; }
do=()
[[ "$1" != --dry-run ]] || do=(show)
# a checkpoint that is still being written has a temporary name, and stays here
copy() { "${do[@]}" gcloud storage rsync --recursive --exclude='.*orbax-checkpoint-tmp.*' "$1" "$2"; }
here="$(dirname "$0")" bucket="${BUCKET-}"; bucket="${bucket#gs://}"

if [[ -n "$bucket" ]]; then
  "${do[@]}" mkdir -p runs
  if [[ " $* " == *" --distributed "* ]]; then
    mountpoint -q runs || "${do[@]}" gcsfuse --implicit-dirs --only-dir "${bucket#*/}" "${bucket%%/*}" runs
  else
    copy "$BUCKET" runs
    if [[ "$1" != --dry-run ]]; then
      while sleep 60; do copy runs "$BUCKET" || true; done &
      trap 'kill %1; copy runs "$BUCKET"' EXIT
    fi
  fi
fi
"$here/local.sh" "$@"
