#!/usr/bin/env bash
# Runs a command as N processes on this machine that share one run over loopback; their CPUs are the devices.
# Usage: bash launch/local_multiprocess.sh [option ...] N train CONFIG [argument ...]
#   --logs DIR   where process-I.log are kept (default: runs/logs/NAME, after the config's file)
#   --dry-run    only print the command
# Ends with 0 when all did, else with the status of the first that failed, whose traceback is shown last; the others are
# given a few seconds, then killed. SIGTERM and interrupts are passed on: the run is saved, and the status is 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "local_multiprocess.sh: error: $1 (see --help)" >&2
  exit 2
}

logs=
dry_run=
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --help)
      sed -n "2,7s/^# //p" launch/local_multiprocess.sh
      exit 0
      ;;
    --logs)
      [ $# -gt 1 ] || fail "--logs: a directory expected"
      logs=$2
      shift
      ;;
    --dry-run) dry_run=1 ;;
    *) fail "unknown option $1" ;;
  esac
  shift
done
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  fail "a number of processes and a command expected"
fi
count=$1
shift
logs=${logs:-runs/logs/$(basename "${2:-local}" .py)}

if [ -z "${GEMMA_QAT_PYTHON:-}" ]; then
  if [ -z "$dry_run" ]; then
    # shellcheck source=launch/env.sh
    . launch/env.sh
    make_env .venv .
  fi
  GEMMA_QAT_PYTHON=.venv/bin/python
fi
command=("$GEMMA_QAT_PYTHON" -m gemma_qat launch local "$count" --logs "$logs" -- gemma-qat "$@")
if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}" | sed 's/ $//'
  echo
  exit 0
fi
exec "${command[@]}"
