"""No process outlives us: not a grandchild that was orphaned, nor one that ignores SIGTERM."""

import os
import subprocess
import sys
from pathlib import Path

from cluster.process_tree import descendants

PROGRAM = """
import os, subprocess, sys, time
from cluster.process_tree import ProcessTree, descendants
tree = ProcessTree()
# A shell that leaves a child behind, in a session of its own, which ignores SIGTERM.
subprocess.run(["setsid", "sh", "-c", "trap '' TERM; sleep 60 & exec true"], check=True)
stubborn = "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", stubborn])
time.sleep(0.5)
found = descendants(os.getpid())
assert len(found) == 2, found
print(*found)
assert tree.end(patience=0.3) == 2
assert not descendants(os.getpid())
"""


def is_alive(pid: str) -> bool:
    """Whether it runs; a zombie that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_descendant_ends() -> None:
    root = Path(__file__).parents[2]
    outcome = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    for pid in outcome.stdout.split():
        assert not is_alive(pid)


def test_descendants_are_found_and_others_are_not() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert child.pid in descendants(os.getpid())
            assert os.getpid() not in descendants(child.pid)
        finally:
            child.kill()
