#!/usr/bin/env bash
# Trains on a TPU slice whose machines are reached over ssh (Cloud TPU VMs).
# Usage: bash launch/tpu_vm.sh --on MACHINE --zone ZONE --project PROJECT [option ...] ACTION [train CONFIG [overlay ...]]
#
# Actions
#   up        preflight, create, wait, copy, setup and run, one after the other
#   create    asks for the slice; wait returns when it is there
#   copy      sends the project, the files that git tracks, to all workers
#   setup     makes the environment on all workers and mounts the storage
#   run       starts the command on all workers, detached
#   status    how the slice and the run are; tail follows the logs; failures shows what failed first
#   stop      saves and stops; delete gives the slice back
#
#   --on MACHINE            v5p:4x4x4, v5e:4x8, v6e:8x8
#   --zone, --project       or CLOUDSDK_COMPUTE_ZONE, CLOUDSDK_CORE_PROJECT, or what gcloud is configured with
#   --name NAME             of the slice and the run (default: from the config's file name)
#   --storage WHERE         gs://BUCKET or SERVER:/DIRECTORY (NFS), mounted at runs; has to outlive the slice
#   --spot, --reservation NAME
#   --direct                creates the slice at once instead of queueing for it
#   --runtime-version NAME  software of the machines (default: what the chip's is called)
#   --service-account EMAIL, --network NAME, --subnetwork NAME, --internal-ip
#   --keep-going            run, up: stays, and starts again what was saved and stopped (75) or preempted
#   --every SECONDS         how often wait and --keep-going look (default 60)
#   --no-paths              preflight without files and free space, for a laptop that does not see the cluster's
#   --no-check              leaves out the preflight
#   --dry-run               prints every command, starts nothing, needs no login
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

zone=${CLOUDSDK_COMPUTE_ZONE:-}
project=${CLOUDSDK_CORE_PROJECT:-}
storage=
reservation=
runtime=
account=
network=
subnetwork=
every=60
spot=
direct=
internal=
keep_going=
while [ $# -gt 0 ]; do
  words=1
  case $1 in
    --help)
      help
      exit 0
      ;;
    --zone | --zone=*) option zone "$@" ;;
    --project | --project=*) option project "$@" ;;
    --storage | --storage=*) option storage "$@" ;;
    --reservation | --reservation=*) option reservation "$@" ;;
    --runtime-version | --runtime-version=*) option runtime "$@" ;;
    --service-account | --service-account=*) option account "$@" ;;
    --network | --network=*) option network "$@" ;;
    --subnetwork | --subnetwork=*) option subnetwork "$@" ;;
    --every | --every=*) option every "$@" ;;
    --spot) spot=1 ;;
    --direct) direct=1 ;;
    --internal-ip) internal=1 ;;
    --keep-going) keep_going=1 ;;
    -*) shared_option "$@" ;;
    *) break ;;
  esac
  shift "$words"
done

action=${1:-}
case $action in
  up | create | wait | copy | setup | run | status | tail | failures | stop | delete) shift ;;
  '') fail "an action is expected after the options, such as up (see --help)" ;;
  *) fail "unknown action $action: up, create, wait, copy, setup, run, status, tail, failures, stop or delete" ;;
esac
if [ "$action" = up ] || [ "$action" = run ] || [ $# -gt 0 ]; then
  check_command "$@"
elif [ -z "$name" ]; then
  fail "--name is expected: which slice?"
fi
if [ -n "$spot" ] && [ -n "$reservation" ]; then
  fail "--spot and --reservation exclude one another"
elif [ -n "$direct" ] && [ -n "$reservation" ]; then
  fail "--reservation needs a queue: leave out --direct"
fi
whole_number --every "$every"
case $storage in
  '' | gs://?* | ?*:/*) ;;
  *) fail "--storage $storage: gs://BUCKET or SERVER:/DIRECTORY expected" ;;
esac
if [ "$keep_going" ] && [ -z "$storage" ]; then
  fail "--keep-going needs --storage: what is on the machines is lost with them"
fi

need gcloud "see cloud.google.com/sdk/docs/install"
if [ -z "$dry_run" ]; then
  if [ -z "$(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null)" ]; then
    fail "gcloud has no login: gcloud auth login"
  fi
  project=${project:-$(gcloud config get-value core/project 2>/dev/null || true)}
  zone=${zone:-$(gcloud config get-value compute/zone 2>/dev/null || true)}
fi
if [ -z "$project" ]; then
  fail "no project: give --project, or set CLOUDSDK_CORE_PROJECT"
elif [ -z "$zone" ]; then
  fail "no zone: give --zone, or set CLOUDSDK_COMPUTE_ZONE"
fi
case $action in
  up | create | run)
    CHIP='' HOSTS='' ACCELERATOR_TYPE=''
    find_machine
    if [ -z "$ACCELERATOR_TYPE" ]; then
      fail "$on has no TPUs: launch/gke.sh and launch/slurm.sh take GPUs"
    elif [ "${1:-}" = sweep ] && [ "$HOSTS" -gt 1 ]; then
      fail "sweep runs on one host, $on has $HOSTS: give a train"
    fi
    ;;
esac

where=(--zone="$zone" --project="$project")
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
archive=runs/launch/$name.tar.gz

create() {
  local options=(--accelerator-type="$ACCELERATOR_TYPE") asked=("${queue[@]}")
  if [ -z "$runtime" ]; then
    case $CHIP in # docs.cloud.google.com/tpu/docs/runtimes
      v5p) runtime=v2-alpha-tpuv5 ;;
      v5e) runtime=v2-alpha-tpuv5-lite ;;
      v6e) runtime=v2-alpha-tpuv6e ;;
      *) fail "no runtime version is known for $CHIP: give --runtime-version" ;;
    esac
  fi
  if [ -n "$spot" ]; then options+=(--spot); fi
  if [ -n "$account" ]; then options+=(--service-account="$account"); fi
  if [ -n "$network" ]; then options+=(--network="$network"); fi
  if [ -n "$subnetwork" ]; then options+=(--subnetwork="$subnetwork"); fi
  if [ -n "$internal" ]; then options+=(--internal-ips); fi
  if [ -n "$direct" ]; then
    start "${vm[@]}" create "$name" "${where[@]}" "${options[@]}" --version="$runtime"
    return
  fi
  if [ -n "$reservation" ]; then
    # By name only alpha has it: docs.cloud.google.com/tpu/docs/consume-reservation.
    asked=(gcloud alpha compute tpus queued-resources)
    options+=(--reservation="$reservation")
  fi
  start "${asked[@]}" create "$name" "${where[@]}" --node-id="$name" "${options[@]}" --runtime-version="$runtime"
}

slice_state() { # ACTIVE or READY when it is there; empty when it is gone
  if [ -n "$direct" ]; then
    "${vm[@]}" describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null || true
  else
    "${queue[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
  fi
}

wait_for_slice() {
  local now before=
  if [ -n "$dry_run" ]; then
    if [ -n "$direct" ]; then
      shown "${vm[@]}" describe "$name" "${where[@]}" '--format=value(state)'
    else
      shown "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
    fi
    return
  fi
  while true; do
    now=$(slice_state)
    if [ "$now" != "$before" ]; then
      echo "$name: ${now:-not there}"
      before=$now
    fi
    case $now in
      ACTIVE | READY) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | PREEMPTED | '')
        printf '%s: %s will not come: %s\n' "$launcher" "$name" "$(shown "${queue[@]}" describe "$name" "${where[@]}")" >&2
        return 1
        ;;
    esac
    sleep "$every"
  done
}

on_workers() { # on_workers WORKERS WORD ...: a command on them, read by a shell there
  local workers=$1
  shift
  start "${vm[@]}" ssh "$name" "${where[@]}" ${internal:+--internal-ip} --quiet --worker="$workers" \
    --command="$(quoted "$@")"
}

on_host() { # on_host WORKERS WORD ...: launch/tpu_vm_host.sh there
  local workers=$1
  shift
  on_workers "$workers" bash gemma_qat/launch/tpu_vm_host.sh "$@"
}

pack() {
  if [ -n "$dry_run" ]; then
    printf 'git ls-files -z | tar --null -czf %s -T -\n' "$(shown "$archive")"
    return
  fi
  if ! git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    fail "copy sends the files that git tracks, and this is no checkout"
  fi
  mkdir -p runs/launch
  # macOS would add a file of attributes for each.
  git ls-files -z | COPYFILE_DISABLE=1 tar --null -czf "$archive" -T -
}

send() {
  start "${vm[@]}" scp "$archive" "$name:gemma_qat.tar.gz" "${where[@]}" ${internal:+--internal-ip} --quiet --worker=all \
    && on_workers all mkdir -p gemma_qat \
    && on_workers all tar -xzf gemma_qat.tar.gz -C gemma_qat
}

set_up() {
  on_host all setup ${storage:+"$storage"}
}

run() {
  local joined=()
  if [ "$HOSTS" -gt 1 ]; then
    joined=(--coordinator auto)
  fi
  on_host all run "$name" "$@" ${joined[@]+"${joined[@]}"}
}

give_back() {
  if [ -n "$direct" ]; then
    start "${vm[@]}" delete "$name" "${where[@]}" --quiet
  else
    start "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
  fi
}

failures() {
  if [ -n "$storage" ]; then
    on_host 0 failures "$name"
  else
    on_host all failures "$name"
  fi
}

again() { # a slice that was taken away, and all that was on it
  echo "$name was preempted: asking for it again"
  give_back || true
  create && wait_for_slice && send && set_up
}

stay() { # stay WORD ...: returns with the run's status, having started it again as often as that helps
  local said status
  while true; do
    sleep "$every"
    if ! said=$(on_host all status "$name" 2>&1); then
      case $(slice_state) in
        ACTIVE | READY) # a connection that broke, or a machine that starts again
          echo "the workers of $name do not answer"
          continue
          ;;
      esac
      again # the next look finds nothing started there
    elif grep -q '^\[[0-9]*\] runs' <<<"$said"; then
      continue
    elif status=$(sed -n 's/^\[[0-9]*\] ended with status //p' <<<"$said" | grep -v -x -e 0 -e 75 | head -n 1) && [ "$status" ]; then
      echo "$launcher: the run failed with status $status" >&2
      failures >&2 || true
      exit "$status"
    elif grep -q -e 'status 75$' -e 'was cut off$' -e 'has not started$' <<<"$said"; then
      echo "$name does not run: going on"
      run "$@" || true # taken away meanwhile: the next look finds that
    else
      echo "$name is done"
      return
    fi
  done
}

case $action in
  create) create ;;
  wait) wait_for_slice ;;
  copy)
    pack
    send
    ;;
  setup) set_up ;;
  run | up)
    if [ -z "$dry_run" ] && [ -e "$2" ] && ! git ls-files --error-unmatch -- "$2" >/dev/null 2>&1; then
      fail "$2 is not on the workers, as only what git tracks is copied: git add it"
    fi
    preflight "$@"
    if [ -z "$storage" ] && [ "$action" = up ]; then
      warn "no --storage: what the run writes goes with the slice, and several hosts do not see one another's"
    fi
    if [ "$keep_going" ] || [ "$action" = up ]; then
      pack
    fi
    if [ "$action" = up ]; then
      create
      wait_for_slice
      send
      set_up
    fi
    run "$@"
    if [ -n "$dry_run" ]; then
      exit 0
    elif [ -n "$keep_going" ]; then
      stay "$@"
    else
      echo "it goes on without this machine; to follow, stop or end it:"
      for next in tail stop delete; do
        shown bash launch/tpu_vm.sh "${where[@]}" --name "$name" ${direct:+--direct} ${internal:+--internal-ip} "$next"
      done
    fi
    ;;
  status)
    if [ -z "$dry_run" ]; then
      echo "$name: $(slice_state)"
    fi
    on_host all status "$name"
    ;;
  tail) on_host all tail "$name" ;;
  failures) failures ;;
  stop) on_host all stop "$name" ;;
  delete) give_back ;;
esac
