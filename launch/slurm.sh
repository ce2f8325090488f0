#!/usr/bin/env bash
# Submits a run to Slurm: one task a node, saved and requeued before its time is over and when it is preempted.
# Usage: bash launch/slurm.sh --on NODESxGPUS [option ...] train CONFIG [overlay ...]
#        bash launch/slurm.sh --on NODESxGPUS [option ...] --jobs FILE
#   --on MACHINE         such as h100:4x8, four nodes of eight GPUs
#   --name NAME          of the job (default: after the config's file)
#   --time TIME          of one job, such as 24:00:00; the run goes on in the next (default: the partition's)
#   --partition NAME, --account NAME, --qos NAME
#   --cpus-per-task N    share nodes and take N CPUs on each (default: whole nodes, --exclusive --mem=0)
#   --signal-before S    seconds before the end of its time at which a job saves (default: 180)
#   --retry-limit N      how often a job is requeued at most (default: 50)
#   --sbatch ARGUMENT    one more argument for sbatch, may come several times: --sbatch --constraint=a
#   --srun ARGUMENT      the same for srun: --srun --container-image=IMAGE
#   --logs DIR           where logs are kept, on a file system that all nodes share (default: runs/logs/NAME)
#   --jobs FILE          a job for every line of `gemma-qat sweep CONFIG --emit FILE`, each after those it needs, and one
#                        that makes the table
#   --no-paths           ask without looking at files and free space, where this machine does not see the nodes'
#   --no-check           submit without asking first whether the run would start (gemma-qat train ... --check)
#   --dry-run            only print what would be run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

time='' partition='' account='' qos='' cpus='' logs='' jobs='' argument=''
before=180 limit=50
sbatch_arguments=() srun_arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --help)
      help
      exit 0
      ;;
    --time | --time=*) option time "$@" ;;
    --partition | --partition=*) option partition "$@" ;;
    --account | --account=*) option account "$@" ;;
    --qos | --qos=*) option qos "$@" ;;
    --cpus-per-task | --cpus-per-task=*) option cpus "$@" ;;
    --signal-before | --signal-before=*) option before "$@" ;;
    --retry-limit | --retry-limit=*) option limit "$@" ;;
    --logs | --logs=*) option logs "$@" ;;
    --jobs | --jobs=*) option jobs "$@" ;;
    --sbatch | --sbatch=*)
      option argument "$@"
      sbatch_arguments+=("$argument")
      ;;
    --srun | --srun=*)
      option argument "$@"
      srun_arguments+=("$argument")
      ;;
    -*) shared_option "$@" ;;
    *) break ;;
  esac
  shift "$words"
done
whole_number --signal-before "$before"
whole_number --retry-limit "$limit"
whole_number --cpus-per-task "${cpus:-1}"
if [ -z "$jobs" ]; then
  check_words "$@"
elif [ $# -gt 0 ]; then
  fail "--jobs FILE has the commands: none expected after it"
elif [ ! -r "$jobs" ]; then
  fail "$jobs: cannot be read; gemma-qat sweep CONFIG --emit $jobs writes it"
fi
need sbatch "run this on a login node of the cluster (some need: module load slurm)"
HOSTS='' CHIPS_PER_HOST='' TOPOLOGY=''
requirement='.[cuda]'
find_machine
if [ -n "$TOPOLOGY" ]; then
  fail "$on is a slice of TPUs, which Slurm does not give: launch/tpu_vm.sh, launch/gke.sh"
fi

batch_script() { # batch_script NAME LOGS COMMAND ...: prints it
  local name=$1 logs=$2 quoted_logs srun worker
  shift 2
  quoted_logs=$(quoted "$logs")
  if [ "$HOSTS" -gt 1 ]; then
    set -- "$@" --coordinator auto
  fi
  # A task that failed ends the others through jax within half a minute, one that saved must not: Slurm only helps later.
  srun=(srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none ${cpus:+"--cpus-per-task=$cpus"} ${srun_arguments[@]+"${srun_arguments[@]}"})
  worker=("$GEMMA_QAT_PYTHON" -m gemma_qat launch worker --logs "$logs" -- gemma-qat "$@")
  echo '#!/usr/bin/env bash'
  echo "#SBATCH --job-name=$name"
  echo "#SBATCH --nodes=$HOSTS"
  echo '#SBATCH --ntasks-per-node=1'
  echo "#SBATCH --gpus-per-node=$CHIPS_PER_HOST"
  if [ -n "$cpus" ]; then
    echo "#SBATCH --cpus-per-task=$cpus"
  else
    echo '#SBATCH --exclusive'
    echo '#SBATCH --mem=0'
  fi
  [ -z "$time" ] || echo "#SBATCH --time=$time"
  [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
  [ -z "$account" ] || echo "#SBATCH --account=$account"
  [ -z "$qos" ] || echo "#SBATCH --qos=$qos"
  echo '#SBATCH --requeue'
  echo '#SBATCH --open-mode=append'
  echo "#SBATCH --signal=USR1@$before"
  echo "#SBATCH --output=$logs/slurm-%j.log"
  cat <<SCRIPT
set -uo pipefail
rm -f $quoted_logs/process-*.failed
status=0
$(quoted "${srun[@]}") \\
  $(quoted "${worker[@]}") || status=\$?
# srun gives the highest status of all tasks: 75, saved and stopped, hides a 1 or 2 beside it.
for failed in $quoted_logs/process-*.failed; do
  if [ "\$status" -eq 75 ] && [ -e "\$failed" ]; then
    status=1
  fi
done
if [ "\$status" -eq 75 ]; then
  if [ "\${SLURM_RESTART_COUNT:-0}" -ge $limit ]; then
    echo "saved and stopped; requeued $limit times already: submit it again to go on" >&2
  else
    echo "saved and stopped; requeueing"
    scontrol requeue "\$SLURM_JOB_ID" || echo "cannot be requeued: submit it again to go on" >&2
  fi
elif [ "\$status" -ne 0 ]; then
  $(quoted "$GEMMA_QAT_PYTHON" -m gemma_qat launch failures "$logs")
fi
exit "\$status"
SCRIPT
}

check_directives() { # sbatch reads its lines word by word
  local word
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_.,:/@%+=-]*$ ]] || fail "'$word': in what sbatch reads letters, digits and _.,:/@%+=- expected"
  done
}

submit() { # submit NAME DEPENDENCY COMMAND ...: sets `id` to the job's
  local name=$1 dependency=$2 logs=${logs:-runs/logs/$1} file command
  shift 2
  check_directives "$name" "$logs" "$time" "$partition" "$account" "$qos"
  file=$logs/slurm.sh
  command=(sbatch --parsable ${dependency:+"--dependency=$dependency" --kill-on-invalid-dep=yes}
    ${sbatch_arguments[@]+"${sbatch_arguments[@]}"} "$file")
  if [ -n "$dry_run" ]; then
    shown mkdir -p "$logs"
    echo "cat >$(quoted "$file") <<'BATCH'"
    batch_script "$name" "$logs" "$@"
    echo BATCH
    shown "${command[@]}"
    id="ID_OF_$name"
  else
    mkdir -p "$logs" || fail "$logs: logs cannot be kept there"
    batch_script "$name" "$logs" "$@" >"$file"
    id=$("${command[@]}") || fail "sbatch refused the job; what it was given: $file"
    id=${id%%;*}
    echo "job $id ($name): $logs/slurm-$id.log"
  fi
}

if [ -z "$jobs" ]; then
  if [ "$1" != train ] && [ "$HOSTS" -gt 1 ]; then
    fail "$on: gemma-qat $1 runs on one node, such as ${on%%:*}:$CHIPS_PER_HOST"
  fi
  name=${name:-$(basename "$2" .py)}
  check_directives "$name" "${logs:-runs/logs/$name}" "$time" "$partition" "$account" "$qos"
  preflight "$@"
  submit "$name" '' "$@"
  exit 0
fi

[ "$HOSTS" -eq 1 ] || fail "$on: the jobs of a sweep run on one node each, such as ${on%%:*}:$CHIPS_PER_HOST"
# For every job its name, the numbers of the jobs it needs, how many words its command has, and the words, each ended by
# NUL; last the job that puts the table together, whatever became of the others.
read_jobs=$(
  cat <<'PYTHON'
import json, sys
jobs = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8") if line.strip()]
numbers = {job["name"]: str(n) for n, job in enumerate(jobs)}
def emit(name, kind, needs, words):
    if words[0] != "gemma-qat":
        sys.exit(f"{name}: a command of gemma-qat expected")
    out = [name, kind, " ".join(needs), str(len(words) - 1), *words[1:]]
    sys.stdout.write("".join(f"{word}\0" for word in out))
for job in jobs:
    emit(job["name"], "afterok", [numbers[name] for name in job["needs"]], job["command"])
words = jobs[-1]["command"]
cut = words.index("--cell")
emit("collect", "afterany", numbers.values(), [*words[:cut], "--collect", *words[cut + 2:]])
PYTHON
)
list=$(mktemp)
trap 'rm -f "$list"' EXIT
"$GEMMA_QAT_PYTHON" -c "$read_jobs" "$jobs" >"$list" 2>/dev/null || fail "$jobs: no lines of gemma-qat sweep CONFIG --emit"
prefix=${name:-$(basename "$jobs" | sed 's/\.[^.]*$//')}
base_logs=${logs:-runs/logs/$prefix}
ids=()
while IFS= read -r -d '' job && IFS= read -r -d '' kind && IFS= read -r -d '' needs && IFS= read -r -d '' count; do
  words=()
  for ((i = 0; i < count; i++)); do
    IFS= read -r -d '' word
    words+=("$word")
  done
  dependency=''
  for number in $needs; do
    dependency=${dependency:-$kind}:${ids[number]}
  done
  logs=$base_logs/$job
  submit "$prefix-$job" "$dependency" "${words[@]}"
  ids+=("$id")
done <"$list"
