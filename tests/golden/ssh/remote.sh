#!/usr/bin/env bash
# epplan 0.1.0: epplan launch plan.json
# Runs a host's script until it ends or the connection does.
set -euo pipefail
cd /shared/job
bash "$1" < /dev/null &
ranks=$!
trap 'kill "$ranks" 2> /dev/null || true' TERM INT HUP
( cat > /dev/null; kill "$ranks" 2> /dev/null ) <&0 &
watch=$!
code=0
wait "$ranks" || code=$?
kill "$watch" 2> /dev/null || true
exit "$code"
