#!/bin/bash
# A run on the GPU nodes of a Slurm cluster, one process for each GPU:
#
#     sbatch --nodes=4 launch/slurm.sh --config=configs/ppo.py --config.mesh.fsdp=8
#
# From the repository's folder, in an environment with `pip install -e .[cuda12]`; the
# workdir is on a disk that all nodes share. Your --partition, --account and --time go
# before the file's name. A job that is stopped before its end is queued again, and goes
# on from its last checkpoint; the seconds of TERM@ have to be more than a phase takes.

#SBATCH --job-name=rlhf_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120

set -u
status=0
srun --kill-on-bad-exit=1 python -m rlhf_jax.train "$@" || status=$?
if [ "$status" -eq 143 ]; then # stopped by SIGTERM
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
