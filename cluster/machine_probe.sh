# What `nanoserve ray check` asks of a machine, sent over ssh: prints lines of key=value and changes nothing.
# Arguments: the paths that must exist there.
found=
for python in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
  if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found="$python"
    break
  fi
done
[ -n "${NANOSERVE_VENV:-}" ] && [ -x "$NANOSERVE_VENV/bin/python" ] && found="$NANOSERVE_VENV/bin/python"
echo "probe python=$found"
echo "probe environment=${NANOSERVE_VENV:-}"
command -v rsync >/dev/null && echo "probe rsync=yes"
echo "probe cores=$(nproc)"
echo "probe gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')"
echo "probe free_kilobytes=$(df -Pk "$HOME" | awk 'NR == 2 {print $4}')"
for table in /proc/net/tcp /proc/net/tcp6; do
  awk '$4 == "0A" {split($2, part, ":"); print "probe listening=" part[2]}' "$table" 2>/dev/null
done
for file in /proc/[0-9]*/environ; do
  if [ "$file" != "/proc/$$/environ" ] && grep -qsz '^NANOSERVE_NODE=' "$file"; then
    echo "probe node=yes"
    break
  fi
done
for path in "$@"; do
  [ -e "${path/#\~/$HOME}" ] || echo "probe absent=$path"
done
