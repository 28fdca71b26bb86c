#!/usr/bin/env bash
# epplan 0.1.0: epplan launch plan.json
# Starts ranks 0 to 2 on host node10.
set -euo pipefail
# a rank's lines appear when it writes them, not when it ends
[[ -v PYTHONUNBUFFERED ]] || export PYTHONUNBUFFERED=1
# the plan counts GPUs by PCI bus, CUDA by speed unless told
export CUDA_DEVICE_ORDER=PCI_BUS_ID
# without it NCCL does not say why it failed
[[ -v NCCL_DEBUG ]] || export NCCL_DEBUG=WARN
# local rank i takes the i-th GPU of this list, by UUID, as planned
export CUDA_VISIBLE_DEVICES=GPU-00000000-aaaa-bbbb-cccc-000000000000,GPU-00000001-aaaa-bbbb-cccc-000000000000,GPU-00000002-aaaa-bbbb-cccc-000000000000
# the ranks of a host share its CPUs; torchrun would give each a single thread
threads=$(( $(nproc) / 3 ))
[[ -v OMP_NUM_THREADS ]] || export OMP_NUM_THREADS=$(( threads > 1 ? threads : 1 ))
exec /opt/venv/bin/python -m torch.distributed.run \
  --rdzv-backend=static \
  --nnodes=2 \
  --node-rank=0 \
  --nproc-per-node=3 \
  --master-addr=node10 \
  --master-port=29500 \
  -m epplan.runtime.worker \
  --steps=3 \
  --result=/shared/job/result.json /shared/job/plan.json
