#!/usr/bin/env bash
# One run on every host of a Cloud TPU slice.
#
#   export TPU=my-slice ZONE=us-west4-a
#   experiments/launch_files/tpu_pod.sh setup                # clone and install on all hosts
#   experiments/launch_files/tpu_pod.sh run run_dir=/mnt/shared/runs/a task=cartpole_swingup mesh.sp=-1
#   experiments/launch_files/tpu_pod.sh stop                 # all hosts save after the same step
#
# The same `run` again goes on from the last checkpoint, also on a slice of another size, and after a preemption.
# run_dir must lie on a file system that all hosts have mounted (Filestore, or a bucket by gcsfuse), and so must
# data.root unless each host has its own copy. REPOSITORY and BRANCH say what `setup` clones, ENTRY what `run` runs.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 1
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

[[ -n ${TPU:-} && -n ${ZONE:-} ]] || fail "TPU and ZONE are not set; export the slice's name and its zone"
action=${1:-}
[[ $# -eq 0 ]] || shift
entry=${ENTRY:-experiments/train_agent.py}

case $action in
  setup)
    [[ -n ${REPOSITORY:-} ]] || fail "REPOSITORY is not set; export the address to clone from"
    on_all_hosts "set -e; [ -d ring_rl ] || git clone --branch $(printf '%q' "${BRANCH:-main}") \
$(printf '%q' "$REPOSITORY") ring_rl; cd ring_rl; git pull --ff-only; [ -d .venv ] || python3 -m venv .venv; \
.venv/bin/pip install --quiet --constraint constraints.txt --editable . 'jax[tpu]'"
    ;;
  run)
    [[ " $*" == *" run_dir="* ]] || fail "no run_dir; give run_dir=<a folder that all hosts have mounted>"
    # %q: an override may hold brackets, spaces or an interpolation that is for Hydra, not for the hosts' shell.
    on_all_hosts "cd ring_rl && exec .venv/bin/python $entry distributed.mode=auto $(printf '%q ' "$@")"
    ;;
  stop)
    # The brackets keep the pattern from finding the shell that it stands in.
    on_all_hosts "pkill -TERM -f '[p]ython $entry' || true"
    ;;
  *)
    fail "unknown action '$action'; it is one of setup, run, stop"
    ;;
esac
