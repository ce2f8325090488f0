#!/usr/bin/env bash
# Trains, quantizes, measures, exports and decodes a tiny Gemma 4 on this machine. Makes its own environment.
# Usage: bash launch/quickstart.sh [overlay ...]      such as cross_entropy=true  float_reference.train.steps=500
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = "--help" ]; then
  sed -n "2,3s/^# //p" launch/quickstart.sh
  exit 0
fi
# shellcheck source=launch/env.sh
. launch/env.sh
make_env .venv .
exec .venv/bin/gemma-qat quickstart "$@"
