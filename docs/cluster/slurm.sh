#!/bin/bash
# A run on several machines by SLURM, one task for each GPU:
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 docs/cluster/slurm.sh pretrain -p dataset rcdb -p budget paper -p run rcdb
#
# Submitted again, it continues: --requeue makes SLURM do so after a preemption. Partition, account and time belong to your cluster.
#SBATCH --job-name fdsl
#SBATCH --cpus-per-task 8
#SBATCH --output fdsl-%j.log
#SBATCH --requeue
set -euo pipefail

# Ranks meet on the first machine, at a port that other jobs on it do not use.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT

# Since SLURM 22.05 srun does not take over the CPUs that a task of the job has, unless it is told.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
export FDSL_WORKERS=${FDSL_WORKERS:-$((SRUN_CPUS_PER_TASK - 1))}

# One task failing ends the others.
exec srun --kill-on-bad-exit=1 fdsl run "$@"
