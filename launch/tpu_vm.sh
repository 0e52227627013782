#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU slice (v4, v5e, v5p, v6e) over ssh. The slice exists already: docs/launching.md.
#
#   launch/tpu_vm.sh [--dry_run] install NAME ZONE
#   launch/tpu_vm.sh [--dry_run] start   NAME ZONE --config=FILE:ARM --workdir=gs://BUCKET/runs/X ...
#   launch/tpu_vm.sh [--dry_run] watch|status|stop NAME ZONE
#
# `install` copies the last commit and installs it; `start` runs train.py detached on every host, so that a lost
# connection ends nothing; `stop` has it save and leave. After a preemption: the same two commands on the new slice.
# MULTISLICE=1: NAME is a queued resource of several slices, and everything happens on all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -lt 3 ]]; then
  sed -n '2,/^set/{/^#/p;}' launch/tpu_vm.sh >&2
  exit 2
fi
action=$1 name=$2 zone=$3
shift 3

kind=(tpu-vm) hosts=(--worker=all)
if [[ ${MULTISLICE:-} == 1 ]]; then
  kind=(queued-resources) hosts=(--node=all --worker=all)
fi

shown() { # a command as text that a shell understands
  local text
  text=$(printf '%q ' "$@")
  echo "${text% }"
}
run() {
  if [[ $dry_run ]]; then shown "$@"; else "$@"; fi
}
on_hosts() { # a shell command on every host
  run gcloud compute tpus "${kind[@]}" ssh "$name" --zone="$zone" "${hosts[@]}" --command="$1"
}

case $action in
  install)
    bundle=${TMPDIR:-/tmp}/iha_jax.bundle # with its history: provenance.json names the revision
    run git bundle create -q "$bundle" HEAD
    run gcloud compute tpus "${kind[@]}" scp "$bundle" "$name:" --zone="$zone" "${hosts[@]}"
    # uv brings a Python of its own: the one of a TPU VM's image may be too old.
    on_hosts "git init -q iha_jax && cd iha_jax && git fetch -q ../iha_jax.bundle HEAD && git checkout -qf FETCH_HEAD && \
python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python=3.12 .venv && \
python3 -m uv pip install -q --python=.venv -e '.[tpu,gcs]'"
    ;;
  start)
    # The exit code stays in a file: 0 done, 75 preempted and saved, 2 refused input, anything else a failure.
    inner="rm -f exit_code; .venv/bin/python train.py $(shown "$@") & echo \$! >pid; wait \$!; echo \$? >exit_code"
    on_hosts "cd iha_jax && { nohup setsid bash -c $(shown "$inner") >>run.log 2>&1 </dev/null & }"
    ;;
  watch) # the first host's log; every number is in WORKDIR/metrics.jsonl too
    hosts=(--worker=0)
    on_hosts "tail -n 50 -F iha_jax/run.log"
    ;;
  status) on_hosts "hostname; cat iha_jax/exit_code 2>/dev/null || echo running; tail -n 1 iha_jax/run.log" ;;
  stop) on_hosts "kill -TERM \$(cat iha_jax/pid)" ;;
  *)
    echo "tpu_vm.sh: unknown action $action; expected install, start, watch, status or stop" >&2
    exit 2
    ;;
esac
