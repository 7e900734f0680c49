#!/usr/bin/env bash
# One machine with GPUs on Google Cloud: create it, install this checkout on it, start a run, follow it, delete it.
set -euo pipefail
usage() {
  cat <<TEXT
usage: [NAME=… ZONE=… TYPE=… IMAGE=… BUCKET=gs://…] launch/gpu.sh [--dry-run] COMMAND

  create [--spot]            a machine of TYPE (default g2-standard-96, eight L4), on demand or pre-emptible
  install                    this checkout, as committed, and JAX for CUDA
  run CONFIG [key=value …]   index, train, evaluate; runs/ goes to BUCKET every minute and is fetched from there first
  logs | state | delete      follow the log, RUNNING or TERMINATED or …, give the machine back
TEXT
}
name="${NAME:-ragjax-gpu}" zone="--zone=${ZONE:-us-central1-a}" image="${IMAGE:-common-cu128-ubuntu-2204-nvidia-570}"
show() { printf '+'; printf ' %q' "$@"; echo; }
do=()
[[ "${1-}" != --dry-run ]] || { do=(show); shift; }
vm() { "${do[@]}" gcloud compute "$@"; }
on_it() { vm ssh "$name" "$zone" --command="$1"; }

case "${1-}" in
  -h | --help) usage ;;
  create)
    spot=()
    [[ "${2-}" != --spot ]] || spot=(--provisioning-model=SPOT --instance-termination-action=DELETE)
    vm instances create "$name" "$zone" --machine-type="${TYPE:-g2-standard-96}" --maintenance-policy=TERMINATE \
      --image-family="$image" --image-project=deeplearning-platform-release --boot-disk-size=500GB "${spot[@]}" ;;
  install)
    "${do[@]}" git archive --prefix=ragjax/ -o /tmp/ragjax.tar HEAD
    vm scp /tmp/ragjax.tar "$name:" "$zone"
    on_it "tar xf ragjax.tar && curl -LsSf https://astral.sh/uv/install.sh | sh && .local/bin/uv venv -q --seed -p 3.13 env && env/bin/pip install -q -e ./ragjax 'jax[cuda13]'" ;;
  run)
    shift; kept="BUCKET='${BUCKET-}' RAGJAX=../env/bin/ragjax launch/kept.sh ${*@Q}"
    on_it "set -o pipefail; cd ragjax; $kept 2>&1 | tee -a ~/ragjax.log" ;;
  logs) on_it "tail -n 50 -f ragjax.log" ;;
  state) vm instances describe "$name" "$zone" --format="value(status)" ;;
  delete) vm instances delete "$name" "$zone" --quiet ;;
  *) usage >&2; exit 2 ;;
esac
