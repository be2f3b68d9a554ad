#!/bin/bash
# A run on several machines by OpenMPI, one process for each slot of the host file:
#
#   docs/cluster/openmpi.sh hosts.txt pretrain -p dataset rcdb -p budget paper -p run rcdb
#
# hosts.txt has a line for each machine, first the one this is started on: its name, and slots=N for N GPUs (or N processes).
# The checkout, its environment and the output folder must be at the same place on all machines.
set -euo pipefail
hosts=$1
shift

# Ranks meet on the first machine.
MASTER_ADDR=${MASTER_ADDR:-$(awk '$1 !~ /^(#|$)/ { print $1; exit }' "$hosts")}
MASTER_PORT=${MASTER_PORT:-29500}
export MASTER_ADDR MASTER_PORT

# What other machines must know is named by -x. Without --bind-to none a rank, with all its workers, would be tied to one core.
variables=()
for name in PATH MASTER_ADDR MASTER_PORT OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME FDSL_SETTINGS FDSL_DATA_ROOT FDSL_OUTPUT_ROOT WANDB_MODE; do
    if [ -n "${!name:-}" ]; then variables+=(-x "$name"); fi
done
exec mpirun --hostfile "$hosts" --bind-to none "${variables[@]}" fdsl run "$@"
