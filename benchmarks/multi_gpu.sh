#!/usr/bin/env bash
# All GPUs of this host through the real NCCL path, by the commands a user would give: topology,
# equality with the dense model, overlap, tensor parallelism, predictions, skew, moving experts, a
# killed rank.
#
#     benchmarks/multi_gpu.sh [OUTPUT_DIR] [PART ...]
#
# PARTs: topology check overlap predict skew faults; by default all, for which two H200 took 431 s.
# Every command's JSON is kept in OUTPUT_DIR (default build/multi-gpu); at the end
# benchmarks/multi_gpu.py prints what follows from them, a JSON line each. PYTHON names another
# python3. Nothing is installed; nothing of the machine is changed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# NVLink multicast stays as it is found; where nothing says so, off.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
python="${PYTHON:-python3}"
out="${1:-build/multi-gpu}"
shift || true
parts=("${@:-topology check overlap predict skew faults}")
mkdir -p "$out"
gpus=$(nvidia-smi --list-gpus | wc -l)
began=$SECONDS

has() { [[ " ${parts[*]} " == *" $1 "* ]]; }
epplan() { "$python" -m epplan "$@"; }

# keep NAME COMMAND...: stdout into NAME.json, the rest into NAME.log; a failure is said and counted.
failures=0
keep() {
  local name=$1 status=0 start=$SECONDS
  shift
  "$@" > "$out/$name.json" 2> "$out/$name.log" || status=$?
  echo "$name: exit $status, $((SECONDS - start)) s" >&2
  if ((status != 0 && status != 6)); then  # 6: findings, an answer
    failures=$((failures + 1))
    tail -5 "$out/$name.log" >&2
  fi
}

# solve NAME OPTION...: a plan of all GPUs of the discovered host.
solve() {
  local name=$1
  shift
  epplan solve --topology "$out/host.json" --ep "$gpus" -o "$out/$name.json" "$@" \
    > "$out/$name.txt" 2> "$out/$name.log" || { cat "$out/$name.log" >&2; exit 1; }
}

# plan_for NAME OPTION...: a plan for the traffic that its own seeded routers really make.
plan_for() {
  local name=$1
  shift
  solve "$name" "$@" --load uniform --tokens 16384
  keep "counts-$name" epplan launch "$out/$name.json" --sequences 4 --sequence-length 4096 --steps 1 \
    --no-verify --counts "$out/$name.npz" --json
  solve "$name" "$@" --load "$out/$name.npz"
}

# The reference model with one expert a GPU, and one whose rows travel for longer: top-8, narrow.
epplan topo discover -o "$out/host.json" 2> "$out/discover.log" || { cat "$out/discover.log" >&2; exit 1; }
prefill=(--phase prefill --sequences 4 --sequence-length 4096 --steps 8)
decode=(--phase decode --sequences 64 --context 128 --steps 20)
plan_for reference --model reference --experts "$gpus" --experts-per-gpu 1
plan_for narrow --model qwen3-235b-a22b --layers 4 --experts $((16 * gpus)) --experts-per-gpu 16

if has topology; then
  nvidia-smi topo -m > "$out/smi-topo.txt"
  keep nvml "$python" -m tests.nvml_replies
  keep topology epplan topo show "$out/host.json" --json
  keep findings epplan topo check "$out/host.json" --json
  keep links epplan topo measure "$out/reference.json" -o "$out/measured.yaml" --json
fi

if has check; then
  for dispatcher in alltoall padded; do
    keep "equal-$dispatcher" epplan launch "$out/narrow.json" --dispatcher $dispatcher \
      --sequence-length 256 --micro-batches 2 --steps 2 --json
  done
  keep equal-reference epplan launch "$out/reference.json" --sequence-length 1024 --steps 2 --json
fi

if has overlap; then
  for model in reference narrow; do
    plan="$out/$model.json"
    keep "$model-prefill" epplan bench "$plan" "${prefill[@]}" --json
    keep "$model-prefill-serial" epplan bench "$plan" "${prefill[@]}" --no-overlap --json
    keep "$model-prefill-alone" epplan bench "$plan" "${prefill[@]}" --one-rank 0 --json
    keep "$model-prefill-tp" epplan bench "$plan" "${prefill[@]}" --baseline "tp${gpus}pp1" --json
    keep "$model-decode" epplan bench "$plan" "${decode[@]}" --json
    keep "$model-decode-tp" epplan bench "$plan" "${decode[@]}" --baseline "tp${gpus}pp1" --json
  done
  keep traced epplan launch "$out/narrow.json" --sequences 4 --sequence-length 4096 --steps 2 \
    --no-verify --trace "$out/trace.json" --json
fi

if has predict; then
  keep device epplan bench --calibrate "$out/device.yaml"
  [[ -e $out/measured.yaml ]] || epplan topo measure "$out/reference.json" -o "$out/measured.yaml" >&2
  for model in reference narrow; do
    plan="$out/$model.json"
    common=(--phase prefill --batch $((4 * gpus)) --context 4096 --no-overlap --micro-batches 1)
    keep "$model-predicted" epplan simulate "$plan" "${common[@]}" --json
    keep "$model-calibrated" epplan simulate "$plan" "${common[@]}" --json \
      --topology "$out/measured.yaml" --device-profile "$out/device.yaml"
    common=(--phase decode --batch $((64 * gpus)) --context 128 --no-overlap --micro-batches 1)
    keep "$model-decode-predicted" epplan simulate "$plan" "${common[@]}" --json
    keep "$model-decode-calibrated" epplan simulate "$plan" "${common[@]}" --json \
      --topology "$out/measured.yaml" --device-profile "$out/device.yaml"
  done
fi

skewed=(--model reference --layers 2 --experts $((4 * gpus)) --experts-per-gpu 5)
run=(--router-skew 1.0 --sequences 4 --sequence-length 2048 --json)
if has skew || has faults; then
  # Even traffic gives experts in id order; its run counts what the skewed routers really send.
  solve contiguous "${skewed[@]}" --load uniform --tokens 8192
fi
if has skew; then
  keep run-contiguous epplan launch "$out/contiguous.json" "${run[@]}" --steps 10 --no-verify \
    --counts "$out/counts.npz"
  solve planned "${skewed[@]}" --load "$out/counts.npz"
  solve replicas "${skewed[@]}" --load "$out/counts.npz" --replicas "$gpus"
  for plan in planned replicas; do
    keep "run-$plan" epplan launch "$out/$plan.json" "${run[@]}" --steps 10
  done
  rm -f "$out/moving-windows.jsonl"  # metrics are appended
  keep moving epplan launch "$out/contiguous.json" "${run[@]}" --steps 200 --window 10 \
    --rebalance-drift 0.05 --metrics "$out/moving-windows.jsonl"
fi

if has faults; then
  # The last rank is killed once steps are done; all start again after the last finished one.
  progress="$out/progress.json"
  rm -f "$progress"
  keep killed epplan launch "$out/contiguous.json" "${run[@]}" --steps 200 --max-restarts 1 \
    --progress "$progress" --timeout 60 --no-verify &
  launched=$!
  while kill -0 $launched 2> /dev/null && ! grep -qs '"done": [1-9]' "$progress"; do sleep 0.2; done
  victim=$(grep -las '[e]pplan.launcher.forkserver' /proc/[0-9]*/cmdline | cut -d/ -f3 | sort -n | tail -1)
  kill -KILL "$victim" && echo "killed process $victim, the last rank" >&2
  wait $launched
fi

"$python" benchmarks/multi_gpu.py "$out"
echo "all in $((SECONDS - began)) s, $failures failures" >&2
exit $((failures > 0))
