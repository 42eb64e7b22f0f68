"""`EmulatedHost`: a machine with an sshd of its own, made of namespaces (network, process ids, mounts, host name).

`ray up` and `ray down` run `ray stop` on their hosts, which ends every Ray process it can see, and the local provider
knows ssh's port 22 only. In namespaces of their own neither touches the machine the tests run on. Whatever goes wrong,
ending the host's first process ends all others with it.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter", "curl")
SHARED_MEMORY = "512m"
_SSHD_SECONDS = 60.0
_STATE = Path(f"/tmp/nanoserve-{os.getuid()}")

_SSHD = """\
Port 22
HostKey {directory}/host_key
PidFile none
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
AuthorizedKeysFile {directory}/authorized_keys
"""

# The home directory is the host's own, and so is what Ray and we keep at fixed places; the rest of the disk is shared.
_BOOT = """\
set -e
hostname {name}
mount --bind {directory}/passwd /etc/passwd
mount --bind {directory}/home {home}
mount --bind {directory}/ray /tmp/ray
mount --bind {directory}/state {state}
mount -t tmpfs -o size={shared_memory} tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec {sshd} -D -e -f {directory}/sshd_config
"""


def missing() -> str | None:
    """What this machine lacks for emulating others; None if nothing."""
    if os.geteuid() != 0:
        return "needs root (to make namespaces)"
    absent = [program for program in PROGRAMS if _which(program) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: apt-get install openssh-server rsync iproute2 util-linux curl)"
    trial = f"nanoserve-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if made.returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    try:
        entered = subprocess.run(
            ["ip", "netns", "exec", trial, "unshare", "-mpfu", "--mount-proc", "true"], capture_output=True, text=True
        )
        return f"this machine makes no process namespaces: {entered.stderr.strip()}" if entered.returncode else None
    finally:
        subprocess.run(["ip", "netns", "del", trial], check=False)


class EmulatedHost:
    """A machine that may be reached by ssh as root, from itself and from where `connect` links it to."""

    def __init__(self, name: str, directory: Path, profile: str = "") -> None:
        """`profile` are lines of shell that its login shells read."""
        self.name = name
        self._directory = directory
        self.files = directory / "home"  # what is in the home directory, seen from this machine
        self.home = directory.parent / "home"  # and on the host: the same place on all, as Ray expects
        self.scratch = directory / "tmp"
        for part in (self.files / ".ssh", self.scratch, directory / "ray"):
            part.mkdir(parents=True)
        self.state = directory / "state"  # cluster/state_directory.py
        self.state.mkdir(mode=0o700)
        self.home.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # to be covered by the host's own
        _STATE.mkdir(mode=0o700, exist_ok=True)
        (self.files / ".bashrc").write_text(profile)
        self._write_passwd()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / "host_key"))
        (directory / "authorized_keys").touch()
        (directory / "sshd_config").write_text(_SSHD.format(directory=directory))
        self._process: subprocess.Popen[bytes] | None = None

    def make_key(self) -> str:
        """A key pair at ~/.ssh/id_ed25519; the public half, for `authorize`."""
        key = self.files / ".ssh" / "id_ed25519"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        return key.with_suffix(".pub").read_text()

    def authorize(self, public_key: str) -> None:
        """Let the key's owner in."""
        with (self._directory / "authorized_keys").open("a") as keys:
            keys.write(public_key)

    def start(self) -> None:
        """Return when its sshd answers."""
        _run("ip", "netns", "add", self.name)
        _run("ip", "-n", self.name, "link", "set", "lo", "up")
        boot = _BOOT.format(
            name=self.name,
            directory=self._directory,
            home=self.home,
            state=_STATE,
            shared_memory=SHARED_MEMORY,
            sshd=_which("sshd"),
        )
        command = ["ip", "netns", "exec", self.name, "unshare", "-mpfu", "--kill-child", "--mount-proc"]
        with (self._directory / "sshd.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "bash", "-c", boot], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _SSHD_SECONDS
        while b"Server listening" not in (self._directory / "sshd.log").read_bytes():
            assert self._process.poll() is None, (self._directory / "sshd.log").read_text()
            assert time.monotonic() < deadline, "sshd did not start"
            time.sleep(0.05)

    def connect(self, address: str, other: "EmulatedHost", other_address: str) -> None:
        """A cable between two started hosts; addresses are like 10.77.0.1/24."""
        _run("ip", "link", "add", "eth0", "netns", self.name, "type", "veth", "peer", "eth0", "netns", other.name)
        for host, own in ((self, address), (other, other_address)):
            _run("ip", "-n", host.name, "address", "add", own, "dev", "eth0")
            _run("ip", "-n", host.name, "link", "set", "eth0", "up")

    def command(self, *command: str, directory: Path, variables: Mapping[str, str] | None = None) -> list[str]:
        """What to execute here so that `command` runs there, as somebody at its keyboard would."""
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "TERM": "dumb", "LANG": "C.UTF-8"}
        settings = [f"{key}={value}" for key, value in (environment | dict(variables or {})).items()]
        enter = ["nsenter", "--target", str(self._first_process()), "--mount", "--uts", "--net", "--pid"]
        return [*enter, f"--wd={directory}", "env", "-i", *settings, *command]

    def run(
        self, *command: str, directory: Path = Path("/"), variables: Mapping[str, str] | None = None, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; standard output and error arrive together."""
        return subprocess.run(
            self.command(*command, directory=directory, variables=variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )

    def processes(self) -> dict[int, str]:
        """Command lines of all that runs on the host beside its sshd, by this machine's ids."""
        first = self._first_process()
        namespace = os.readlink(f"/proc/{first}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace and int(entry.name) != first:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if line:
                        found[int(entry.name)] = line
        return found

    def wait_until_idle(self, seconds: float) -> None:
        """Return when nothing runs there any more. ssh keeps a connection for ten seconds."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == {}, f"still running on {self.name}"

    def listening(self) -> list[str]:
        """Addresses that accept connections, as `ss` writes them."""
        shown = self.run("ss", "-Hltn", seconds=60).stdout
        return sorted(line.split()[3] for line in shown.splitlines())

    def close(self) -> None:
        """End everything that runs there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)

    def _first_process(self) -> int:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0])

    def _write_passwd(self) -> None:
        lines = Path("/etc/passwd").read_text().splitlines()
        moved = [f"root:x:0:0:root:{self.home}:/bin/bash" if line.startswith("root:") else line for line in lines]
        (self._directory / "passwd").write_text("\n".join(moved) + "\n")


@contextlib.contextmanager
def held_port(host: EmulatedHost, port: int) -> Iterator[None]:
    """Meanwhile somebody else's process listens on a port of the host's loopback."""
    program = (
        f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(1, flush=True); time.sleep(999)"
    )
    command = host.command("python3", "-c", program, directory=Path("/"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "the port is taken by another"
        try:
            yield
        finally:
            for pid in [pid for pid, line in host.processes().items() if "time.sleep(999)" in line]:
                os.kill(pid, signal.SIGKILL)


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
