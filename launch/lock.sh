#!/usr/bin/env bash
# Makes launch/lock anew: every package of an installation, with the hashes of its files.
# Usage: bash launch/lock.sh [--check] [--dry-run]
#   --check    changes nothing; ends with 1 when a lock is not what setup.cfg and the constraints give today
#   --dry-run  prints the commands
# Versions are those of launch/constraints.txt; what only CUDA needs, which it does not name, keeps the locked version.
# The locks are for Python 3.11 on Linux with an x86-64, as in launch/Dockerfile. Needs uv and the package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

check=
dry=
for argument in "$@"; do
  case $argument in
    --help)
      help
      exit 0
      ;;
    --check) check=1 ;;
    --dry-run) dry=1 ;;
    *) fail "$argument is no option (see --help)" ;;
  esac
done
if [ -z "$dry" ] && ! command -v uv >/dev/null 2>&1; then
  fail "uv is missing: pip install uv"
fi

folder=launch/lock
if [ -n "$check" ] && [ -z "$dry" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  cp launch/lock/*.txt "$folder"
fi

# lock NAME ARGUMENT ...: makes one. No wheel of libtpu takes a glibc before 2.31.
lock() {
  local command=(uv pip compile --quiet --generate-hashes --no-annotate --no-emit-index-url
    --custom-compile-command 'bash launch/lock.sh' --constraints launch/constraints.txt
    --python-version 3.11 --python-platform x86_64-manylinux_2_31
    --output-file "$folder/requirements-$1.txt" "${@:2}")
  if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" >/dev/null
  fi
}

lock cpu setup.cfg
lock tpu --extra tpu setup.cfg
lock cuda --extra cuda setup.cfg
lock cuda12 --extra cuda12 setup.cfg
# What builds the project itself, and the packages that have no wheel.
if [ -n "$dry" ]; then
  printf 'echo setuptools | '
fi
lock build - <<<setuptools

if [ -n "$check" ] && [ -z "$dry" ] && ! diff -r launch/lock "$folder"; then
  echo "lock.sh: the locks are out of date: bash launch/lock.sh" >&2
  exit 1
fi
