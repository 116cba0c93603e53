#!/usr/bin/env bash
# launch/tpu_vm.sh NAME ZONE runs/large --data data/mine --preset trimodal_3b
# Copies this checkout to all hosts of a TPU VM and trains there; called again, it resumes. RUN and DATA must be where
# every host sees them, such as a mounted bucket.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm scp --recurse --worker all --zone "$zone" . "$name:trimask"
gcloud compute tpus tpu-vm ssh "$name" --worker all --zone "$zone" --command \
    "cd trimask && make setup && .venv/bin/pip install -q 'jax[tpu]' && .venv/bin/trimask train $(printf '%q ' "$@")"
