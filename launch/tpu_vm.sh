#!/usr/bin/env bash
# launch/tpu_vm.sh NAME ZONE runs/large --data data/mine --preset trimodal_3b
# Copies what is committed here to all hosts of a TPU VM and trains there; called again, it resumes. The run's folder and
# the data must be where every host sees them, such as a mounted bucket.
set -euo pipefail
name=$1 zone=$2
shift 2
git archive --output /tmp/trimask.tar HEAD
gcloud compute tpus tpu-vm scp --worker all --zone "$zone" /tmp/trimask.tar "$name:"
gcloud compute tpus tpu-vm ssh "$name" --worker all --zone "$zone" --command \
    "mkdir -p trimask && tar -xf trimask.tar -C trimask && cd trimask && \
    make setup EXTRAS=tpu && JAX_COMPILATION_CACHE_DIR=compiled .venv/bin/trimask train $(printf '%q ' "$@")"
