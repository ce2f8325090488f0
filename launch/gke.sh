#!/usr/bin/env bash
# Starts a run on a Kubernetes cluster, such as GKE, as a JobSet (launch/gke_jobset.yaml filled in).
# Usage: bash launch/gke.sh --on MACHINE --image IMAGE [option ...] train CONFIG [overlay ...]
#
#   --on MACHINE             v5e:4x8, v5p:4x4x4, h100:4x8 (nodes x GPUs)
#   --image IMAGE            container image, made by launch/Dockerfile and pushed to a registry of yours
#   --name NAME              of the JobSet (default: from the config's file name)
#   --slices N               TPU slices of one run
#   --volume gcs:BUCKET:/app/runs or pvc:CLAIM:/app/runs; may be given again
#   --env NAME=VALUE         may be given again; nothing secret
#   --secret NAME=SECRET:KEY environment variable from a Kubernetes Secret; may be given again
#   --service-account NAME   that may read and write the buckets
#   --namespace NAME, --context NAME   of kubectl (default: the current ones)
#   --queue NAME             Kueue's LocalQueue
#   --spot, --reservation NAME
#   --max-restarts N         after failures (default 3); stops that saved (status 75) are not counted
#   --grace SECONDS          from SIGTERM to the end (default 600)
#   --privileged             as root, where nodes do not give a TPU to others
#   --logs DIR               default: runs/logs/NAME
#   --no-paths               preflight without files and free space, for a laptop that does not see the cluster's
#   --no-check               leaves out the preflight
#   --dry-run                prints everything, starts nothing, needs no cluster
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

image=
namespace=
context=
value=
manifest=
given=()
while [ $# -gt 0 ]; do
  case $1 in
    --help)
      help
      exit 0
      ;;
    --image | --image=*) option image "$@" ;;
    --namespace | --namespace=*) option namespace "$@" ;;
    --context | --context=*) option context "$@" ;;
    --slices | --slices=*)
      option slices "$@"
      given+=("--slices=$slices")
      ;;
    --volume | --volume=* | --env | --env=* | --secret | --secret=* | --queue | --queue=* | \
      --reservation | --reservation=* | --max-restarts | --max-restarts=* | --grace | --grace=* | --logs | --logs=* | \
      --service-account | --service-account=*)
      option value "$@"
      given+=("${1%%=*}=$value")
      ;;
    --spot | --privileged)
      words=1
      given+=("$1")
      ;;
    -*) shared_option "$@" ;;
    *) break ;;
  esac
  shift "$words"
done
check_command "$@"
if [ -z "$on" ]; then
  fail "--on MACHINE is expected, such as v5e:4x8 or h100:4x8"
fi
if [ -z "$image" ]; then
  fail "--image is expected: build launch/Dockerfile and push it to a registry that the cluster reads"
fi

kubectl=(kubectl ${context:+--context="$context"})
need kubectl "see kubernetes.io/docs/tasks/tools"
if [ -z "$dry_run" ]; then
  if [ -z "$context" ] && ! kubectl config current-context >/dev/null 2>&1; then
    fail "kubectl has no current context: gcloud container clusters get-credentials CLUSTER --location LOCATION"
  fi
  if ! said=$("${kubectl[@]}" get customresourcedefinition jobsets.jobset.x-k8s.io --output name 2>&1); then
    case $said in
      *NotFound*) fail "the cluster has no JobSet: see jobset.sigs.k8s.io/docs/installation (0.10 or newer)" ;;
      *) fail "the cluster does not answer: $(head -n 1 <<<"$said")" ;;
    esac
  fi
fi

find_gemma_qat
ask manifest launch render --on "$on" --image "$image" --name "$name" ${namespace:+--namespace="$namespace"} \
  ${given[@]+"${given[@]}"} -- "$@"
preflight "$@"
if [[ " ${given[*]-} " != *" --volume="* ]]; then
  warn "no --volume: what the run writes goes with its pods"
fi
# Not `apply`: it would say "unchanged" of a run that has ended, and start nothing.
create=("${kubectl[@]}" create --filename -)
if [ -n "$dry_run" ]; then
  # shellcheck disable=SC2016 # the quotes are what the reader pastes
  printf "%s <<'EOF'\n%s\nEOF\n" "$(shown "${create[@]}")" "$manifest"
  exit 0
fi
printf '%s\n' "$manifest" | "${create[@]}"
where=("${kubectl[@]}" ${namespace:+--namespace="$namespace"})
echo "state:  $(shown "${where[@]}" get jobset "$name")"
echo "logs:   $(shown "${where[@]}" logs --follow --prefix --max-log-requests 256 \
  --selector "jobset.sigs.k8s.io/jobset-name=$name" --container gemma-qat)"
echo "stop:   $(shown "${where[@]}" delete jobset "$name")"
