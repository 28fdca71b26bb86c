#!/usr/bin/env bash
# epplan 0.1.0: epplan launch plan.json
# Runs the plan with MPICH or Intel MPI.
set -euo pipefail
cd /shared/job
export I_MPI_PIN=0 I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=off
exec mpiexec.hydra -machinefile hosts -n 4 -l bash rank.sh
