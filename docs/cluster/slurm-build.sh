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
exec srun --mpi="${FDSL_PMI:-pmix}" --kill-on-bad-exit=1 fdsl run build "$@" -p scheduler mpi
