"""How many files a process may have open: streams are sockets, and HAProxy and Ray have some for each."""

import resource
from dataclasses import dataclass

from cluster.doctor.finding import Finding, error, ok, warning

CHECK = "open files"
LEAST = 1024
AMPLE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFileLimit:
    """RLIMIT_NOFILE; a process may raise the soft limit up to the hard one."""

    soft: int
    hard: int


def read_open_file_limit() -> OpenFileLimit:
    """Of this process, which those it starts inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OpenFileLimit(soft=soft, hard=hard)


def judge_open_file_limit(limit: OpenFileLimit) -> Finding:
    """Unlimited is told as -1."""
    found, where = f"A process may open {limit.soft:,} files", "ulimit -n"
    if limit.soft < 0 or limit.soft >= AMPLE:
        return ok(CHECK, f"{found}." if limit.soft >= 0 else "A process may open any number of files.", where)
    if limit.hard < 0 or limit.hard >= AMPLE:
        remedy = f"Run `ulimit -n {65536 if limit.hard < 0 else min(limit.hard, 65536)}` in this shell before serving."
    else:
        remedy = (
            "Raise it for this user: `* - nofile 65536` in /etc/security/limits.conf, or LimitNOFILE=65536 (systemd)."
        )
    if limit.soft < LEAST:
        return error(CHECK, f"{found}: Ray and HAProxy alone need more.", where, remedy)
    return warning(CHECK, f"{found}: some thousand streams need more.", where, remedy)
