#!/usr/bin/env bash
# Runs a command as N processes on this machine that share one run over loopback; their CPUs are the devices.
# Usage: bash launch/local_multiprocess.sh N train CONFIG [argument ...]
# Ends with 0 when all did, else with the status of the first that failed; the others are given a few seconds, then killed.
# SIGTERM and interrupts are passed on: the run is saved, and the status is 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = "--help" ]; then
  sed -n "2,5s/^# //p" launch/local_multiprocess.sh
  exit 0
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "local_multiprocess.sh: a number of processes and a command expected (see --help)" >&2
  exit 2
fi
count=$1
shift
if [ -z "${GEMMA_QAT_PYTHON:-}" ]; then
  # shellcheck source=launch/env.sh
  . launch/env.sh
  make_env .venv .
  GEMMA_QAT_PYTHON=.venv/bin/python
fi
export JAX_PLATFORMS=cpu
port=$("$GEMMA_QAT_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

grace=10
pids=()
status=0

end() { # end SIGNAL: sends it to those that still run
  local pid
  for pid in "${pids[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}
trap 'end TERM' TERM INT HUP
trap 'end KILL' EXIT

for ((i = 0; i < count; i++)); do
  # In the background an interrupt is ignored from the start; the one the terminal sends to all comes as the TERM above.
  "$GEMMA_QAT_PYTHON" -m gemma_qat "$@" \
    --coordinator "127.0.0.1:$port" --num-processes "$count" --process-id "$i" &
  pids+=($!)
done

# Not `wait -n`: the bash of macOS has none.
left=$count
deadline=0
running=("${pids[@]}")
while [ "$left" -gt 0 ]; do
  sleep 0.2 || true
  for ((i = 0; i < count; i++)); do
    pid=${running[i]}
    if [ -z "$pid" ] || kill -0 "$pid" 2>/dev/null; then
      continue
    fi
    code=0
    wait "$pid" || code=$?
    running[i]=
    left=$((left - 1))
    if [ "$code" -ne 0 ]; then
      echo "local_multiprocess.sh: process $i ended with status $code" >&2
      if [ "$status" -eq 0 ] || [ "$status" -eq 75 ]; then
        status=$code
      fi
      if [ "$deadline" -eq 0 ]; then
        deadline=$((SECONDS + grace))
      fi
    fi
  done
  if [ "$deadline" -ne 0 ] && [ "$left" -gt 0 ] && [ "$SECONDS" -ge "$deadline" ]; then
    echo "local_multiprocess.sh: ending the $left that are left" >&2
    end KILL
  fi
done
exit "$status"
