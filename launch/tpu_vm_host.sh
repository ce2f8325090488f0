#!/usr/bin/env bash
# What launch/tpu_vm.sh has done on every worker of a TPU slice, in the copy of the project there.
# Usage: bash launch/tpu_vm_host.sh setup [gs://BUCKET[/DIRECTORY] | SERVER:/DIRECTORY]
#        bash launch/tpu_vm_host.sh run NAME train CONFIG [argument ...]
#        bash launch/tpu_vm_host.sh status NAME | tail NAME | failures NAME | stop NAME
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = "--help" ] || [ $# -lt 1 ]; then
  sed -n '2,5s/^# //p' launch/tpu_vm_host.sh
  exit 0
fi
action=$1
name=${2:-}
state=$HOME/.gemma_qat
logs=runs/logs/$name
mkdir -p "$state"

worker() { # which of the slice's workers this is, as jax finds out too (clusters/cloud_tpu_cluster.py)
  curl --silent --show-error --fail --max-time 20 --header 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
}

is_running() { # whether the run was started and has not written down how it ended
  local pid
  [ -f "$state/$name.pid" ] && [ ! -s "$state/$name.status" ] || return 1
  pid=$(cat "$state/$name.pid")
  # After a reboot the number may be another process's.
  kill -0 "$pid" 2>/dev/null && grep -q tpu_vm_host "/proc/$pid/cmdline"
}

# From docs.cloud.google.com/storage/docs/cloud-storage-fuse/install.
get_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc release
  release=$(lsb_release --codename --short)
  curl --silent --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$release main" \
    | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -q update
  sudo apt-get -q -y install gcsfuse
}

# Mounts what `setup` was told at runs, which is where runs and their logs are kept; again after a reboot.
mount_storage() {
  local storage bucket
  if [ ! -s "$state/storage" ] || mountpoint -q runs; then
    return 0
  fi
  storage=$(cat "$state/storage")
  mkdir -p runs
  case $storage in
    gs://*)
      command -v gcsfuse >/dev/null || get_gcsfuse
      bucket=${storage#gs://}
      bucket=${bucket%/}
      if [ "$bucket" = "${bucket%%/*}" ]; then
        gcsfuse --implicit-dirs "$bucket" runs
      else
        gcsfuse --implicit-dirs --only-dir "${bucket#*/}" "${bucket%%/*}" runs
      fi
      ;;
    *)
      command -v mount.nfs >/dev/null || sudo apt-get -q -y install nfs-common
      sudo mount -t nfs "$storage" runs
      ;;
  esac
}

set_up() {
  printf '%s' "$1" >"$state/storage"
  mount_storage
  # shellcheck source=launch/env.sh
  . launch/env.sh
  export PATH="$HOME/.local/bin:$PATH"
  if ! find_python >/dev/null 2>&1; then
    # TPU VMs have the Python of Ubuntu 22.04, which is 3.10.
    python3 -m pip install --quiet --user 'uv>=0.8,<1'
    uv python install --quiet 3.11
  fi
  make_env .venv '.[tpu]'
}

begin() { # starts the run detached, so that neither ssh nor a laptop has to stay
  local number
  number=$(worker)
  # gcloud tries again when a connection breaks: the second time finds it running.
  if is_running; then
    echo "[$number] runs already"
    return 0
  fi
  mount_storage
  mkdir -p "$logs"
  rm -f "$state/$name.status" "$state/$name.worker"
  setsid nohup bash launch/tpu_vm_host.sh watch "$name" "$number" "$@" </dev/null >"$state/$name.out" 2>&1 &
  echo $! >"$state/$name.pid"
  echo "[$number] started"
}

watch_over() { # watch_over NUMBER WORD ...: what runs detached
  local number=$1 child status=0
  shift
  trap ':' TERM HUP # a machine that goes down tells all processes; this one stays to write down how it ended
  .venv/bin/gemma-qat launch worker --process "$number" --logs "$logs" -- gemma-qat "$@" &
  child=$!
  echo "$child" >"$state/$name.worker"
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the process
    status=0
    wait "$child" || status=$?
  done
  echo "$status" >"$state/$name.status"
}

tell() {
  local number
  number=$(worker)
  if is_running; then
    echo "[$number] runs"
  elif [ -s "$state/$name.status" ]; then
    echo "[$number] ended with status $(cat "$state/$name.status")"
    if [ ! -s "$logs/process-$number.log" ]; then
      sed "s/^/[$number] /" "$state/$name.out" # the worker itself did not start
    fi
  elif [ -f "$state/$name.pid" ]; then
    echo "[$number] was cut off"
  else
    echo "[$number] has not started"
  fi
}

case $action in
  setup) set_up "${2:-}" ;;
  run) begin "${@:3}" ;;
  watch) watch_over "${@:3}" ;;
  status) tell ;;
  tail)
    number=$(worker)
    tail -n 40 -F "$logs/process-$number.log" 2>/dev/null | sed -u "s/^/[$number] /"
    ;;
  failures) .venv/bin/gemma-qat launch failures "$logs" ;;
  stop)
    if is_running && [ -s "$state/$name.worker" ]; then
      kill -TERM "$(cat "$state/$name.worker")"
    fi
    ;;
  *)
    echo "tpu_vm_host.sh: error: unknown action $action" >&2
    exit 2
    ;;
esac
