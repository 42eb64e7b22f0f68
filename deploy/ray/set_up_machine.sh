#!/usr/bin/env bash
# Readies a machine for `ray up`: the environment, and `ray` on the PATH of login shells, where `ray down`, `ray exec`
# and `ray attach` look for it. May be repeated.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
"$root/deploy/install.sh" "${1:-tracing}"
line="export PATH=\"$root/.venv/bin:\$PATH\"  # nanoserve"
grep -qxF "$line" ~/.bashrc 2>/dev/null || printf '%s\n' "$line" >>~/.bashrc
