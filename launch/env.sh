# Sourced by the launch scripts: makes a virtual environment once and installs the project into it.
# shellcheck shell=bash

find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3; do
    if command -v "$name" >/dev/null 2>&1 \
      && "$name" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return 0
    fi
  done
  echo "error: Python 3.11, 3.12 or 3.13 is needed and none was found on PATH" >&2
  return 2
}

# make_env DIRECTORY REQUIREMENT: installs REQUIREMENT (such as '.[test]') unless setup.cfg and the pins are unchanged.
make_env() {
  local directory=$1 requirement=$2 python stamp pins=()
  # The place is part of it: the scripts of an environment that was moved point to where it was.
  stamp="$(cat setup.cfg launch/constraints.txt | cksum) $requirement $PWD"
  if [ -f "$directory/.installed" ] && [ "$(cat "$directory/.installed")" = "$stamp" ]; then
    return 0
  fi
  python=$(find_python) || return 2
  echo "making $directory with $("$python" --version) ..."
  if [ -f "$directory/.installed" ] && [[ "$(cat "$directory/.installed")" != *" $PWD" ]]; then
    "$python" -m venv --clear "$directory"
  else
    "$python" -m venv "$directory"
  fi
  # The pins are of Python 3.11, the oldest supported; newer Pythons take the newest versions setup.cfg allows.
  if "$directory/bin/python" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))'; then
    pins=(-c launch/constraints.txt)
  fi
  # Spelt so because the bash of macOS takes an empty array for an unset one.
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check ${pins[@]+"${pins[@]}"} -e "$requirement"
  echo "$stamp" >"$directory/.installed"
}
