# Sourced by the scripts here: errors and help; of the launchers that submit, the options they share, dry runs, the preflight.
# shellcheck shell=bash
# shellcheck disable=SC2034 # variables that the launchers read
#
# A launcher is `X.sh [options] train CONFIG [overlay ...]`. What follows the options is passed on word by word; where a
# shell on the other side reads it again, it is written by `printf %q`, so that spaces, quotes and $ arrive untouched.

launcher=${0##*/}
on=
name=
dry_run=
checks=1
paths=1
slices=1
# What is installed where there is no environment yet.
requirement=.
# Read by the launchers: how many words the last option took.
words=0

# fail MESSAGE: one line, and the status of bad input.
fail() {
  printf '%s: error: %s\n' "$launcher" "$*" >&2
  exit 2
}

# warn MESSAGE: one line; the launcher goes on.
warn() {
  printf '%s: warning: %s\n' "$launcher" "$*" >&2
}

# help: prints the comment that the launcher begins with.
help() {
  sed -n -e '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
}

# option VARIABLE --name VALUE ... (or --name=VALUE ...): keeps the value, and in `words` how many words it took.
option() {
  # A name that no caller has: bash would set the nearer variable of the two.
  local option_variable=$1
  shift
  case $1 in
    --*=*)
      printf -v "$option_variable" '%s' "${1#*=}"
      words=1
      ;;
    *)
      if [ $# -lt 2 ]; then
        fail "$1 needs a value (see --help)"
      fi
      printf -v "$option_variable" '%s' "$2"
      words=2
      ;;
  esac
}

# shared_option "$@": takes an option that every launcher has, or fails.
shared_option() {
  words=1
  case $1 in
    --on | --on=*) option on "$@" ;;
    --name | --name=*) option name "$@" ;;
    --dry-run) dry_run=1 ;;
    --no-check) checks= ;;
    --no-paths) paths= ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
}

# whole_number --name VALUE: what an option that counts was given.
whole_number() {
  if ! [[ "$2" =~ ^[0-9]+$ ]]; then
    fail "$1 $2: a whole number expected"
  fi
}

# job_name CONFIG: a name that Kubernetes and Google Cloud take, from the config's file name.
job_name() {
  local base=${1##*/}
  base=$(printf '%s' "${base%.py}" | LC_ALL=C tr '[:upper:]' '[:lower:]' | LC_ALL=C tr -c '[:lower:][:digit:]' '-')
  base=$(printf '%s' "$base" | sed -e 's/--*/-/g' -e 's/^-//' -e 's/^[0-9]/gemma-&/' | cut -c 1-40)
  printf '%s' "${base%-}"
}

# check_words WORD ...: what is run must be a training or one cell of a sweep, its config right behind it.
check_words() {
  local word
  for word in "$@"; do
    case $word in
      --dry-run | --no-check) fail "$word stands before ${1:-train}: what follows belongs to gemma-qat" ;;
    esac
  done
  case ${1:-} in
    train | sweep) ;;
    '') fail "a command is expected after the options: train CONFIG [overlay ...] (see --help)" ;;
    -*) fail "options stand before the command: $1 (see --help)" ;;
    *) fail "train or sweep expected, not $1 (see --help)" ;;
  esac
  if [ $# -lt 2 ] || [[ "$2" == -* ]]; then
    fail "$1 needs a config right behind it, such as $1 configs/e2b_q4_0.py${2:+, not $2}"
  elif [ ! -e "$2" ] && [ -e "${OLDPWD:-}/$2" ]; then
    fail "$2: paths are taken from the project's root, $PWD: give $OLDPWD/$2"
  fi
}

# check_command WORD ...: the same, and a name for it that clouds take.
check_command() {
  check_words "$@"
  if [ -z "$name" ]; then
    name=$(job_name "$2")
  fi
  if ! [[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
    fail "--name $name: at most 40 lower-case letters, digits and hyphens expected, a letter first"
  fi
}

# quoted WORD ...: a command in one line, for a shell on the other side to read back as the same words.
quoted() {
  local word line=
  for word in "$@"; do
    # What needs no quotes is left as it is: printf of some shells also quotes commas and equals signs.
    if [[ "$word" =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]]; then
      line="$line $word"
    else
      line="$line $(printf '%q' "$word")"
    fi
  done
  printf '%s\n' "${line# }"
}

# shown WORD ...: the same for people to read and paste, with single quotes wherever they do.
shown() {
  local word line=
  for word in "$@"; do
    case $word in
      *\'* | *[[:cntrl:]]* | '') line="$line $(printf '%q' "$word")" ;;
      *[!-A-Za-z0-9_./:=,@%+]*) line="$line '$word'" ;;
      *) line="$line $word" ;;
    esac
  done
  printf '%s\n' "${line# }"
}

# start WORD ...: runs a command, or prints it in a dry run.
start() {
  if [ -n "$dry_run" ]; then
    shown "$@"
  else
    "$@"
  fi
}

# need TOOL HOW_TO_GET_IT: fails early where it is missing; a dry run needs none.
need() {
  if [ -z "$dry_run" ] && ! command -v "$1" >/dev/null 2>&1; then
    fail "$1 is not on PATH: $2"
  fi
}

# find_gemma_qat: chooses the interpreter that has the project, and makes an environment where there is
# none; a dry run is content with any that is there.
find_gemma_qat() {
  if [ -n "${GEMMA_QAT_PYTHON:-}" ]; then
    if ! command -v "$GEMMA_QAT_PYTHON" >/dev/null 2>&1; then
      fail "GEMMA_QAT_PYTHON=$GEMMA_QAT_PYTHON: no such program"
    fi
    return 0
  fi
  if [ -z "$dry_run" ] || [ ! -x .venv/bin/python ]; then
    if [ -n "$dry_run" ]; then
      requirement=.
    fi
    # shellcheck source=launch/env.sh
    . launch/env.sh
    make_env .venv "$requirement" >&2 || fail "no environment in .venv"
  fi
  GEMMA_QAT_PYTHON=.venv/bin/python
}

# gemma_qat WORD ...: the project's command line on this machine.
gemma_qat() {
  "$GEMMA_QAT_PYTHON" -m gemma_qat "$@"
}

# ask VARIABLE WORD ...: keeps what gemma-qat prints in VARIABLE; an error of its becomes the launcher's.
ask() {
  # Names that no caller has, as above.
  local ask_variable=$1 ask_answer ask_errors ask_error ask_status=0
  shift
  ask_errors=$(mktemp)
  ask_answer=$(gemma_qat "$@" 2>"$ask_errors") || ask_status=$?
  ask_error=$(tail -n 1 "$ask_errors")
  rm -f "$ask_errors"
  if [ "$ask_status" -ne 0 ]; then
    fail "${ask_error#gemma-qat*: error: }"
  fi
  printf -v "$ask_variable" '%s' "$ask_answer"
}

# find_machine: asks what the machine named by --on is; sets CHIP, HOSTS,
# CHIPS_PER_HOST, TOPOLOGY, ACCELERATOR_TYPE.
find_machine() {
  local said line
  if [ -z "$on" ]; then
    fail "--on MACHINE is expected, such as v5p:4x4x4 or h100:4x8"
  fi
  find_gemma_qat
  ask said launch machine "$on"
  while IFS= read -r line; do
    case ${line%%=*} in
      CHIP | HOSTS | CHIPS_PER_HOST | TOPOLOGY | ACCELERATOR_TYPE) printf -v "${line%%=*}" '%s' "${line#*=}" ;;
    esac
  done <<<"$said"
}

# preflight WORD ...: finds out here whether the command would start there; bad input ends the launcher.
preflight() {
  local status=0 flags=(--check --on "$on")
  if [ "$slices" != 1 ]; then
    flags+=(--slices "$slices")
  fi
  if [ -z "$paths" ]; then
    flags+=(--no-paths)
  fi
  if [ -z "$checks" ] || [ "$1" != train ]; then
    return 0
  fi
  if [ -n "$dry_run" ]; then
    shown gemma-qat "$@" "${flags[@]}"
    return 0
  fi
  gemma_qat "$@" "${flags[@]}" || status=$?
  if [ "$status" -eq 2 ]; then
    fail "the preflight found that this cannot work (--no-paths where the files are there and not here; --no-check leaves it out)"
  elif [ "$status" -ne 0 ]; then
    printf '%s: the preflight itself ended with status %s\n' "$launcher" "$status" >&2
    exit "$status"
  fi
}
