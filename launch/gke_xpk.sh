#!/usr/bin/env bash
# Train on a GKE cluster made with XPK (pip install xpk): any TPU from v4 to TPU7x (Ironwood), or GPU machines.
#
#   PROJECT=p ZONE=us-east5-a CLUSTER=c TPU_TYPE=v5p-256 \
#     launch/gke_xpk.sh [--dry_run] NAME --config=FILE:ARM --workdir=gs://BUCKET/runs/X ...
#
# SLICES=2: two slices, `data` of the mesh over the network between them. IMAGE: an image with iha_jax and its needs in
# /app; without it XPK puts this folder into a plain Python image, and each start installs it. RESTARTS: how often GKE
# starts the job again, on exit code 75 (preempted and saved) or when a host is lost; after that, or an input that was
# refused (2), run the same command under another NAME: the workdir decides where it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -lt 2 ]]; then
  sed -n '2,/^set/{/^#/p;}' launch/gke_xpk.sh >&2
  exit 2
fi
name=$1
shift
: "${PROJECT:?the Google Cloud project}" "${ZONE:?of the cluster}" "${CLUSTER:?made with xpk cluster create}"
: "${TPU_TYPE:?such as v5litepod-16, v5p-256, v6e-256 or tpu7x-128}"

shown() { # a command as text that a shell understands
  local text
  text=$(printf '%q ' "$@")
  echo "${text% }"
}

# `exec`: XPK passes SIGTERM on to this process alone, and train.py must get it to save.
command="exec python train.py $(shown "$@")"
if [[ ${IMAGE:-} ]]; then
  image=(--docker-image="$IMAGE")
  command="cd /app && $command"
else
  image=(--base-docker-image=python:3.12 --script-dir=.)
  command="pip install -q -e '.[tpu,gcs]' && $command"
fi

# A saved checkpoint must fit into the grace period; Kubernetes' own default is 30 seconds.
submit=(xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$name"
  --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" "${image[@]}"
  --max-restarts="${RESTARTS:-50}" --restart-on-exit-codes=75 --termination-grace-period-seconds="${GRACE:-300}"
  --command="$command")

if [[ $dry_run ]]; then shown "${submit[@]}"; else "${submit[@]}"; fi
