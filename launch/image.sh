#!/usr/bin/env bash
# Builds the container image for an accelerator (tpu, cuda, cuda12 or cpu), and pushes it when asked.
# Usage: bash launch/image.sh ACCELERATOR [--tag IMAGE] [--push] [--dry-run]
#   --tag      the image's name; gemma-qat:ACCELERATOR unless given. To be pushed it begins with a registry's address
#   --push     pushes it, to where `docker login` has been
#   --dry-run  prints the commands
# GEMMA_QAT_DOCKER names another program that takes docker's arguments, such as podman.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

accelerator=
tag=
push=
dry=
while [ $# -gt 0 ]; do
  case $1 in
    --help)
      help
      exit 0
      ;;
    --tag)
      [ $# -gt 1 ] || fail "--tag: the image's name expected"
      tag=$2
      shift
      ;;
    --push) push=1 ;;
    --dry-run) dry=1 ;;
    -*) fail "$1 is no option (see --help)" ;;
    *)
      [ -z "$accelerator" ] || fail "one accelerator expected, and $accelerator and $1 were given"
      accelerator=$1
      ;;
  esac
  shift
done
case $accelerator in
  tpu | cuda | cuda12 | cpu) ;;
  *) fail "tpu, cuda, cuda12 or cpu expected${accelerator:+, not $accelerator}" ;;
esac
tag=${tag:-gemma-qat:$accelerator}
if [ -n "$push" ] && [[ "$tag" != */* ]]; then
  fail "--push: $tag names no registry; give --tag ADDRESS/PROJECT/gemma-qat:$accelerator"
fi

docker=${GEMMA_QAT_DOCKER:-docker}
run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
if [ -z "$dry" ]; then
  command -v "$docker" >/dev/null 2>&1 || fail "$docker is missing: install Docker Engine, or name podman in GEMMA_QAT_DOCKER"
  "$docker" info >/dev/null 2>&1 || fail "$docker has no daemon that answers: start it, or join the group that may use it"
fi

# The locks are of Linux on x86-64, whatever machine builds.
run "$docker" build --platform linux/amd64 --build-arg "ACCELERATOR=$accelerator" \
  --tag "$tag" --file launch/Dockerfile .
if [ -n "$push" ]; then
  run "$docker" push "$tag"
fi
