#!/usr/bin/env bash
# epplan 0.1.0: epplan launch plan.json
# Becomes one rank; the scheduler says which.
set -euo pipefail
rank=${PMI_RANK:?this script is started by the scheduler}
# of a torchrun around the scheduler, whose store these ranks are not to use
unset ${!TORCHELASTIC_@}
# a rank's lines appear when it writes them, not when it ends
[[ -v PYTHONUNBUFFERED ]] || export PYTHONUNBUFFERED=1
# the plan counts GPUs by PCI bus, CUDA by speed unless told
export CUDA_DEVICE_ORDER=PCI_BUS_ID
# without it NCCL does not say why it failed
[[ -v NCCL_DEBUG ]] || export NCCL_DEBUG=WARN
if (( rank < 3 )); then  # host node10
  first=0 count=3 group=0
  # local rank i takes the i-th GPU of this list, by UUID, as planned
  export CUDA_VISIBLE_DEVICES=GPU-00000000-aaaa-bbbb-cccc-000000000000,GPU-00000001-aaaa-bbbb-cccc-000000000000,GPU-00000002-aaaa-bbbb-cccc-000000000000
elif (( rank < 4 )); then  # host node2
  first=3 count=1 group=1
  # local rank i takes the i-th GPU of this list, by UUID, as planned
  export CUDA_VISIBLE_DEVICES=GPU-00000003-aaaa-bbbb-cccc-000000000000
else
  echo "rank $rank: the plan has 4 ranks" >&2
  exit 2
fi
export RANK="$rank" LOCAL_RANK="$(( rank - first ))" LOCAL_WORLD_SIZE="$count"
export WORLD_SIZE=4 GROUP_WORLD_SIZE=2 GROUP_RANK="$group"
export MASTER_ADDR=node10 MASTER_PORT=29500
exec /opt/venv/bin/python -m epplan.runtime.worker \
  --steps=3 \
  --result=/shared/job/result.json /shared/job/plan.json
