#!/usr/bin/env bash
# epplan 0.1.0: epplan launch plan.json
# Starts all hosts over ssh; the first to fail ends all.
set -euo pipefail
cd /shared/job
hold=$(mktemp -d)
mkfifo "$hold/stdin"
exec 9<> "$hold/stdin"  # open until this script ends: its hosts wait for that
connections=()
end() {
  trap - EXIT INT TERM
  kill "${connections[@]}" 2> /dev/null || true
  exec 9>&-
  rm -rf "$hold"
  wait
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
number=0
while read -r host _; do
  case $host in ''|'#'*) continue;; esac
  ${EPPLAN_SSH:-ssh} -o BatchMode=yes "$host" \
    'bash /shared/job/remote.sh'" host-$number.sh" < "$hold/stdin" 9>&- &
  connections+=($!)
  number=$((number + 1))
done < hosts
for _ in "${connections[@]}"; do
  wait -n || exit $?  # the first failure ends all
done
