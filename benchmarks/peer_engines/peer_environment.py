"""`PeerEnvironment`: the virtual environment of a peer, made on demand and kept."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peer_engines.peer import Peer

_MARKER = ".installed"


class PeerEnvironment:
    """The folder `root / peer.environment`. Peers that name the same environment share it."""

    def __init__(self, root: Path, peer: Peer) -> None:
        self._peer = peer
        self.path = None if peer.environment is None else root / peer.environment

    @property
    def python(self) -> Path:
        """The interpreter that runs the peer."""
        return Path(sys.executable) if self.path is None else self.path / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether an installation of exactly these requirements was completed."""
        return self.path is None or self._installed_text() == self._wanted_text()

    @property
    def requirements(self) -> tuple[str, ...]:
        """What is installed, with its versions."""
        return self._peer.requirements

    def variables(self, num_threads: int) -> dict[str, str]:
        """This process's environment variables with the peer's own, which set its threads where nothing else can."""
        own = {"OMP_NUM_THREADS": "{threads}", **self._peer.variables}
        return {**os.environ, **self._replaced(own, threads=str(num_threads))}

    def install(self) -> None:
        """Make the environment or bring it up to date; takes minutes. What pip says goes to standard error.

        Raises `subprocess.CalledProcessError`.
        """
        if self.path is None or self.is_installed:
            return
        subprocess.run([sys.executable, "-m", "venv", self.path], check=True)
        if self._peer.torch is not None:
            self._install_torch(f"torch=={self._peer.torch}")
        self.run("pip", "install", "-q", *self._peer.requirements, *self._torch_pin())
        if self._peer.unwanted:
            self.run("pip", "uninstall", "-q", "-y", *self._peer.unwanted)
        (self.path / _MARKER).write_text(self._wanted_text())

    def run(self, module: str, *arguments: str) -> None:
        """A module of the environment, with the build's variables; raises `subprocess.CalledProcessError`."""
        self.execute(str(self.python), "-m", module, *arguments)

    def execute(self, *command: str) -> None:
        """A program, likewise. What it says goes to standard error."""
        variables = {**os.environ, **self._replaced(self._peer.build_variables)}
        subprocess.run(command, check=True, stdout=sys.stderr, env=variables)

    def _install_torch(self, requirement: str) -> None:
        """The CPU build. Where pip is not offered it, uv knows where it is; plain pip would take the CUDA build."""
        try:
            self.run("pip", "install", "-q", f"{requirement}+cpu")
        except subprocess.CalledProcessError:
            self.run("pip", "install", "-q", "uv")
            self.run("uv", "pip", "install", "-q", "--python", str(self.python), "--torch-backend", "cpu", requirement)

    def _torch_pin(self) -> tuple[str, ...]:
        """Named again beside the requirements, so that none of them replaces the build."""
        return () if self._peer.torch is None else (f"torch=={self._peer.torch}",)

    def _replaced(self, variables: Mapping[str, str], **values: str) -> dict[str, str]:
        return {name: text.format(environment=self.path, **values) for name, text in variables.items()}

    def _wanted_text(self) -> str:
        return "\n".join((*self._torch_pin(), *self._peer.requirements, *(f"- {name}" for name in self._peer.unwanted)))

    def _installed_text(self) -> str | None:
        assert self.path is not None
        try:
            return (self.path / _MARKER).read_text()
        except FileNotFoundError:
            return None
