"""`LlamaServerBuild`: makes `llama-server`, which llama.cpp's Python package is built without, in that environment.

It is compiled from the package's own sources and linked with the libraries that the offline engine uses, so that both
compute with the same code. Takes about two minutes of one core.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Final

from peer_engines.peer_environment import PeerEnvironment

_PACKAGE: Final = "llama-cpp-python"
_TOOLS: Final = ("cmake==3.31.6", "ninja==1.13.0")
_PROJECT: Final = Path(__file__).with_name("llama_server")


class LlamaServerBuild:
    """In the folder of `environment`, which has the package of one pinned version."""

    def __init__(self, environment: PeerEnvironment) -> None:
        self._environment = environment
        (self._requirement,) = (text for text in environment.requirements if text.startswith(f"{_PACKAGE}=="))

    @property
    def path(self) -> Path:
        """The executable, whether or not it is there; another version of the package has another."""
        version = self._requirement.partition("==")[2]
        return self._environment.python.with_name(f"llama-server-{version}")

    def install(self) -> None:
        """Make what is missing. Raises `subprocess.CalledProcessError`."""
        self._environment.install()
        if self.path.exists():
            return
        tools = self.path.parent
        self._environment.run("pip", "install", "-q", *_TOOLS)
        with tempfile.TemporaryDirectory(dir=tools.parent) as name:
            folder, build = Path(name), Path(name) / "build"
            sources = ["--no-deps", "--no-binary", _PACKAGE, "-d", str(folder), self._requirement]
            self._environment.run("pip", "download", "-q", *sources)
            (archive,) = folder.glob("*.tar.gz")
            subprocess.run(["tar", "-xzf", archive, "-C", folder, "--strip-components=1"], check=True)
            configure = [
                *(str(tools / "cmake"), "-S", str(_PROJECT), "-B", str(build), "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DLLAMA_SOURCES={folder / 'vendor' / 'llama.cpp'}",
                f"-DLLAMA_LIBRARIES={self._libraries()}",
            ]
            self._environment.execute(*configure)
            self._environment.execute(str(tools / "cmake"), "--build", str(build), "--target", "llama-server")
            (build / "server" / "llama-server").rename(self.path)

    def _libraries(self) -> Path:
        """Those that are installed for programs, with the headers' part that the Python binding does not need."""
        (folder,) = self.path.parents[1].glob("lib/python*/site-packages/lib")
        return folder
