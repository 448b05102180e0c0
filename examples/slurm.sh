#!/usr/bin/env bash
# A training run on several machines of a Slurm cluster; from the repository, with options of train_ds.py:
#
#   sbatch examples/slurm.sh --model-size 7B --dataset all --output-dir /shared/outputs
#
# srun starts one rank a GPU. Each reads from Slurm which it is, the first machine's name and a port of its own job
# (MASTER_ADDR and MASTER_PORT, if set, come first). Run ./launch.sh once before, to make the environment.
#SBATCH --job-name=pragnosia
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Five minutes before the end the ranks are told to write a checkpoint; resume it with --resume.
#SBATCH --signal=TERM@300
set -euo pipefail

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ./launch.sh train "$@"
