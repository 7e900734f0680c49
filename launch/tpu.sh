#!/usr/bin/env bash
# One TPU VM: create it, install this checkout on it, start a run there, follow it, delete it.
set -euo pipefail
usage() {
  cat <<TEXT
usage: [NAME=… ZONE=… TYPE=… VERSION=… BUCKET=gs://…] launch/tpu.sh [--dry-run] COMMAND

  create [--spot|--queued]   a machine of TYPE (default v5litepod-8), on demand, pre-emptible, or from the queue
  install                    this checkout, as committed, and JAX for TPU
  run CONFIG [key=value …]   index, train, evaluate, with runs/ kept in BUCKET; on more than one host add --distributed
  logs | state | delete      follow the log, PREEMPTED or READY or …, give the machine back
TEXT
}

name="${NAME:-ragjax}" zone="--zone=${ZONE:-us-west4-a}"
type="${TYPE:-v5litepod-8}" version="${VERSION:-v2-alpha-tpuv5-lite}"
show() { printf '+'; printf ' %q' "$@"; echo; }
do=()
[[ "${1-}" != --dry-run ]] || { do=(show); shift; }
vm() { "${do[@]}" gcloud compute tpus tpu-vm "$@"; }
on_it() { vm ssh "$name" "$zone" --worker=all --command="$1"; }

case "${1-}" in
  -h | --help) usage ;;
  create)
    [[ "${2-}" == --queued ]] || { vm create "$name" "$zone" --accelerator-type="$type" --version="$version" ${2:+"$2"}; exit; }
    "${do[@]}" gcloud compute tpus queued-resources create "$name" --node-id="$name" "$zone" --spot \
      --accelerator-type="$type" --runtime-version="$version" ;;
  install)
    "${do[@]}" git archive --prefix=ragjax/ -o /tmp/ragjax.tar HEAD
    vm scp /tmp/ragjax.tar "$name:" "$zone" --worker=all
    on_it "tar xf ragjax.tar && curl -LsSf https://astral.sh/uv/install.sh | sh && .local/bin/uv venv -q --seed -p 3.13 env && env/bin/pip install -q -e ./ragjax 'jax[tpu]'" ;;
  run)
    shift; kept="BUCKET='${BUCKET-}' RAGJAX=../env/bin/ragjax launch/kept.sh ${*@Q}"
    on_it "set -o pipefail; cd ragjax; $kept 2>&1 | tee -a ~/ragjax.log" ;;
  logs) on_it "tail -n 50 -f ragjax.log" ;;
  state) vm describe "$name" "$zone" --format="value(state)" ;;
  delete) vm delete "$name" "$zone" --quiet ;;
  *) usage >&2; exit 2 ;;
esac
