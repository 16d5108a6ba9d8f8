#!/bin/bash
# A run on all hosts of a TPU VM, started where `gcloud` is:
#
#     launch/tpu_pod.sh my-tpu us-central2-b --config=configs/ppo.py \
#         --config.workdir=/mnt/shared/ppo
#
# From the repository's folder, which is copied and installed there. The workdir is on a
# disk that all hosts share (Filestore). The same command goes on where a run stopped.

set -eu
name=$1 zone=$2
shift 2
on_all=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all)
"${on_all[@]}" --command="mkdir -p rlhf"
gcloud compute tpus tpu-vm scp --recurse --worker=all "--zone=$zone" \
    setup.py pyproject.toml README.md rlhf_jax configs "$name:rlhf/"
"${on_all[@]}" --command="cd rlhf && pip install --quiet -e '.[tpu]'"
"${on_all[@]}" --command="cd rlhf && python3 -m rlhf_jax.train $(printf '%q ' "$@")"
