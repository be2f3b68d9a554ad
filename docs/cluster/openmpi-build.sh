#!/bin/bash
# A data set written by all cores of several machines, by OpenMPI. One process gives out the work, the others do it:
#
#   docs/cluster/openmpi-build.sh hosts.txt -p dataset visualatom -p budget paper -p layout shards -p run atoms
#
# hosts.txt has a line for each machine: its name, and slots=N for N cores.
set -euo pipefail
hosts=$1
shift
exec "$(dirname "$0")/openmpi.sh" "$hosts" build "$@" -p scheduler mpi
