#!/bin/bash
# A data set written by all cores of several machines, by SLURM. One task gives out the work, the others do it; no GPU is used:
#
#   sbatch --nodes 4 --ntasks-per-node 64 docs/cluster/slurm-build.sh -p dataset visualatom -p budget paper -p layout shards -p run atoms
#
# The MPI that mpi4py finds must understand SLURM's PMI: `srun --mpi=list` says which there are; OpenMPI takes pmix.
#SBATCH --job-name fdsl-build
#SBATCH --cpus-per-task 1
#SBATCH --output fdsl-%j.log
#SBATCH --requeue
set -euo pipefail

# Since SLURM 22.05 srun does not take over the CPUs that a task of the job has, unless it is told.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
exec srun --mpi="${FDSL_PMI:-pmix}" --kill-on-bad-exit=1 fdsl run build "$@" -p scheduler mpi
