#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster that xpk made (github.com/AI-Hypercomputer/xpk).
# Usage: bash launch/xpk.sh --on MACHINE --cluster CLUSTER --zone ZONE --project PROJECT --image IMAGE [option ...] train CONFIG [overlay ...]
#        bash launch/xpk.sh --cluster CLUSTER --zone ZONE --project PROJECT [--name NAME] list | tail | delete
#
#   --on MACHINE         v5p:4x4x4, v5e:4x8, v6e:8x8
#   --cluster CLUSTER    that `xpk cluster create` made
#   --zone, --project    or CLOUDSDK_COMPUTE_ZONE, CLOUDSDK_CORE_PROJECT
#   --image IMAGE        container image, made by launch/Dockerfile and pushed
#   --base-image IMAGE   instead: xpk adds this directory to it and pushes the result (needs Docker here)
#   --name NAME          of the workload (default: from the config's file name)
#   --slices N           of one run
#   --storage NAME       that `xpk storage attach` made; may be given again
#   --env NAME=VALUE     may be given again; nothing secret
#   --priority P         very-low, low, medium, high or very-high
#   --max-restarts N     how often it may start again, after a stop that saved (75) too (default 100)
#   --grace SECONDS      from SIGTERM to the end (default 600)
#   --logs DIR           default: runs/logs/NAME
#   --no-paths           preflight without files and free space, for a laptop that does not see the cluster's
#   --no-check           leaves out the preflight
#   --dry-run            prints everything, starts nothing, needs no xpk
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

zone=${CLOUDSDK_COMPUTE_ZONE:-}
project=${CLOUDSDK_CORE_PROJECT:-}
cluster=
image=
base=
logs=
variable=
storage=
restarts=100
grace=600
priority=medium
extra=()
while [ $# -gt 0 ]; do
  case $1 in
    --help)
      help
      exit 0
      ;;
    --zone | --zone=*) option zone "$@" ;;
    --project | --project=*) option project "$@" ;;
    --cluster | --cluster=*) option cluster "$@" ;;
    --image | --image=*) option image "$@" ;;
    --base-image | --base-image=*) option base "$@" ;;
    --slices | --slices=*) option slices "$@" ;;
    --priority | --priority=*) option priority "$@" ;;
    --max-restarts | --max-restarts=*) option restarts "$@" ;;
    --grace | --grace=*) option grace "$@" ;;
    --logs | --logs=*) option logs "$@" ;;
    --storage | --storage=*)
      option storage "$@"
      extra+=(--storage "$storage")
      ;;
    --env | --env=*)
      option variable "$@"
      if ! [[ "$variable" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then
        fail "--env ${variable%%=*}...: NAME=VALUE expected"
      elif [[ "$variable" =~ [[:cntrl:]] ]] || [[ "$variable" == *[\"\\$]* ]]; then
        # It pastes the value between double quotes of YAML.
        fail "--env ${variable%%=*}=...: xpk takes no value with quotes, backslashes or dollar signs"
      fi
      extra+=(--env "$variable")
      ;;
    -*) shared_option "$@" ;;
    *) break ;;
  esac
  shift "$words"
done

action=create
case ${1:-} in
  list | tail | delete)
    action=$1
    if [ "$action" != list ] && [ -z "$name" ]; then
      fail "--name is expected: which workload?"
    fi
    ;;
  *) check_command "$@" ;;
esac
whole_number --slices "$slices"
whole_number --max-restarts "$restarts"
whole_number --grace "$grace"
if [ "$slices" -eq 0 ]; then
  fail "--slices 0: at least one expected"
fi
if [ -z "$cluster" ]; then
  fail "--cluster is expected: which one did xpk make?"
elif [ -z "$project" ]; then
  fail "no project: give --project, or set CLOUDSDK_CORE_PROJECT"
elif [ -z "$zone" ]; then
  fail "no zone: give --zone, or set CLOUDSDK_COMPUTE_ZONE"
fi
where=(--cluster "$cluster" --zone "$zone" --project "$project")
follow=(kubectl logs --follow --prefix --max-log-requests 256 --selector "xpk.google.com/workload=$name")

case $action in
  list)
    need xpk "pip install xpk, in an environment of its own"
    start xpk workload list "${where[@]}"
    exit 0
    ;;
  delete)
    need xpk "pip install xpk, in an environment of its own"
    start xpk workload delete "${where[@]}" --workload "$name" --force
    exit 0
    ;;
  tail)
    need kubectl "see kubernetes.io/docs/tasks/tools"
    start "${follow[@]}"
    exit 0
    ;;
esac

if [ -n "$image" ] && [ -n "$base" ]; then
  fail "--image and --base-image exclude one another"
elif [ -z "$image$base" ]; then
  fail "--image is expected: build launch/Dockerfile and push it to a registry that the cluster reads"
fi
need xpk "pip install xpk, in an environment of its own"
need gcloud "see cloud.google.com/sdk/docs/install"
need kubectl "see kubernetes.io/docs/tasks/tools"
if [ -z "$dry_run" ] && [ -z "$(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null)" ]; then
  fail "gcloud has no login: gcloud auth login"
fi
CHIP='' HOSTS='' TOPOLOGY='' ACCELERATOR_TYPE=''
find_machine
if [ -z "$ACCELERATOR_TYPE" ]; then
  # xpk puts the command of a GPU workload between double quotes of YAML, where quotes and backslashes break it
  # (src/xpk/core/docker_resources.py, COMMAND).
  fail "$on has no TPUs: launch/gke.sh takes GPUs"
fi
if [ "$CHIP:$TOPOLOGY" = v5e:2x4 ] || [ "$CHIP:$TOPOLOGY" = v6e:2x4 ]; then
  HOSTS=2 # xpk makes these slices of machines of four chips (src/xpk/core/system_characteristics.py)
fi
if [ "$1" = sweep ] && [ $((HOSTS * slices)) -gt 1 ]; then
  fail "sweep runs on one host: give a train"
fi

# xpk runs the command by `bash -c` in the container: printf %q for that shell, and $$ for Kubernetes, which makes $ of
# it before. `exec` because SIGTERM goes to the shell that xpk starts in the background: it has to be the worker itself.
logs=${logs:-runs/logs/$name}
joined=()
if [ $((HOSTS * slices)) -gt 1 ]; then
  joined=(--coordinator auto)
fi
line=$(quoted gemma-qat "$@" ${joined[@]+"${joined[@]}"})
folder=$(quoted "$logs")
two='$$' # a variable because shells differ in how they read backslashes there
line=${line//\$/$two}
folder=${folder//\$/$two}
if [ "$slices" -gt 1 ]; then
  # GKE numbers the hosts anew in every slice.
  # shellcheck disable=SC2016 # the shell in the container reads the variable
  folder="$folder"'/slice-"$MEGASCALE_SLICE_ID"'
fi
line="exec gemma-qat launch worker --logs $folder -- $line"

preflight "$@"
if [[ " ${extra[*]-} " != *" --storage "* ]]; then
  warn "no --storage: what the run writes goes with its pods"
fi
create=(xpk workload create "${where[@]}" --workload "$name" --tpu-type "${ACCELERATOR_TYPE%-*}-$TOPOLOGY" --num-slices "$slices"
  --priority "$priority" --max-restarts "$restarts" --restart-on-exit-codes 75
  --termination-grace-period-seconds "$grace" ${extra[@]+"${extra[@]}"})
if [ -n "$image" ]; then
  create+=(--docker-image "$image")
else
  create+=(--base-docker-image "$base" --script-dir "$PWD")
fi
start "${create[@]}" --command "$line"
if [ -z "$dry_run" ]; then
  echo "logs:   $(shown "${follow[@]}")"
  echo "stop:   $(shown xpk workload delete "${where[@]}" --workload "$name" --force)"
fi
