"""`SlowLink`: two network namespaces joined by a link of a set rate, for benchmarks of communication on one machine.

A pair of virtual interfaces with a token-bucket filter on each end: real TCP over a real bottleneck. Needs root and
the `ip` and `tc` commands; the machine's own interfaces are not touched.
"""

import ctypes
import os
import shutil
import subprocess
import sys

_CLONE_NEWNET = 0x40000000
_BURST, _QUEUE = "256kb", "50ms"


class SlowLink:
    """A context; inside it `enter(rank)` moves the calling process to its end of the link."""

    def __init__(self) -> None:
        self._names = [f"nanoserve-{os.getpid()}-{rank}" for rank in range(2)]
        self._interfaces = [f"ns{os.getpid() % 10**7}v{rank}" for rank in range(2)]

    def __enter__(self) -> "SlowLink":
        if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
            sys.exit("This benchmark makes network namespaces: run it as root, with iproute2's ip and tc installed.")
        try:
            for name in self._names:
                _run("ip", "netns", "add", name)
            ends = zip(self._interfaces, self._names, strict=True)
            (first, first_name), (second, second_name) = ends
            _run("ip", "link", "add", first, "netns", first_name, "type", "veth", "peer", second, "netns", second_name)
            for rank, interface in enumerate(self._interfaces):
                self._inside(rank, "ip", "addr", "add", f"10.77.0.{rank + 1}/24", "dev", interface)
                self._inside(rank, "ip", "link", "set", interface, "up")
                self._inside(rank, "ip", "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            sys.exit(f"Network namespaces cannot be made here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(("ip", "netns", "del", name), capture_output=True, check=False)

    def limit(self, megabits: float) -> None:
        """Let at most so many megabits per second through, in either direction."""
        for rank, interface in enumerate(self._interfaces):
            shape = ("root", "tbf", "rate", f"{megabits}mbit", "burst", _BURST, "latency", _QUEUE)
            self._inside(rank, "tc", "qdisc", "replace", "dev", interface, *shape)

    def enter(self, rank: int) -> None:
        """Move this process to end `rank`; to be called before it makes threads or sockets."""
        descriptor = os.open(f"/var/run/netns/{self._names[rank]}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {self._names[rank]}")
        os.close(descriptor)
        os.environ["GLOO_SOCKET_IFNAME"] = self._interfaces[rank]

    def _inside(self, rank: int, *command: str) -> None:
        _run("ip", "netns", "exec", self._names[rank], *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
