#!/usr/bin/env bash
# epplan 0.1.0: epplan launch plan.json
# Runs the plan with Open MPI 4 or 5.
set -euo pipefail
cd /shared/job
case "$(mpirun --version 2> /dev/null | head -n 1)" in
  *Open*' 4.'*) map=(--rankfile rankfile) ;;
  *Open*) map=(--map-by rankfile:file=rankfile) ;;
  *) echo "mpirun is not Open MPI's: $(command -v mpirun)" >&2; exit 2 ;;
esac
exec mpirun --hostfile hosts "${map[@]}" --bind-to none --tag-output -n 4 bash rank.sh
