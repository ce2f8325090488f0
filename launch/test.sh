#!/usr/bin/env bash
# Lint, types and tests, in an environment of its own; any failure fails. Arguments go to pytest.
# Usage: bash launch/test.sh [pytest argument ...]    such as -m slow  or  tests/numerics
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = "--help" ]; then
  sed -n "2,3s/^# //p" launch/test.sh
  exit 0
fi
# shellcheck source=launch/env.sh
. launch/env.sh
make_env .venv-test '.[test]'
bin=.venv-test/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
# A worker that dies ends the run: started anew, it would wait for tests that nobody sends it.
"$bin/python" -m pytest -q -n "${TEST_WORKERS:-2}" --dist loadfile --max-worker-restart 0 "$@"
