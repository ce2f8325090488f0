#!/usr/bin/env bash
# Runs a command as N processes on this machine that share one run over loopback; their CPUs are the devices.
# Usage: bash launch/local_multiprocess.sh [option ...] N train CONFIG [argument ...]
#   --logs DIR   where process-I.log are kept (default: runs/logs/NAME, after the config's file)
#   --dry-run    only print the command
# Ends with 0 when all did, else with the status of the first that failed, whose traceback is shown last; the others are
# given a few seconds, then killed. SIGTERM and interrupts are passed on: the run is saved, and the status is 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

logs=
while [ $# -gt 0 ]; do
  words=1
  case $1 in
    --help)
      help
      exit 0
      ;;
    --logs | --logs=*) option logs "$@" ;;
    --dry-run) dry_run=1 ;;
    -*) fail "unknown option $1 (see --help)" ;;
    *) break ;;
  esac
  shift "$words"
done
count=${1:-}
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]]; then
  fail "a number of processes is expected${count:+, not $count}: 2 train CONFIG (see --help)"
fi
shift
check_words "$@"
if [ -z "$dry_run" ]; then
  find_gemma_qat
fi
logs=${logs:-runs/logs/$(basename "$2" .py)}
command=("${GEMMA_QAT_PYTHON:-.venv/bin/python}" -m gemma_qat launch local "$count" --logs "$logs" -- gemma-qat "$@")
if [ -n "$dry_run" ]; then
  shown "${command[@]}"
  exit 0
fi
exec "${command[@]}"
