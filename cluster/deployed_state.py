"""What was deployed last, kept in the Ray cluster itself: whether the same again would change anything.

The fingerprint covers the recipe and the project's code, not the weights: a changed checkpoint needs a new path.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ray.experimental import internal_kv

from cluster.config import ServingConfig

_NAMESPACE = "nanoserve"
_KEY = "deployed"
_PACKAGES = ("engine", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedState:
    """One deployment. `host` and `port` stay what Serve was first started with, for the life of the Ray cluster."""

    fingerprint: str
    host: str
    port: int
    is_ready: bool = False

    @classmethod
    def of(cls, config: ServingConfig, root: Path) -> "DeployedState":
        """What deploying `config` with the code at `root` would make."""
        content = hashlib.sha256(config.model_dump_json().encode())
        for package in _PACKAGES:
            for file in sorted((root / package).rglob("*")):
                path = file.relative_to(root)
                if file.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in path.parts):
                    content.update(str(path).encode())
                    content.update(file.read_bytes())
        return cls(fingerprint=content.hexdigest(), host=config.host, port=config.port)

    def write(self) -> None:
        """Keep it in the cluster this process is connected to."""
        value = json.dumps(asdict(self)).encode()
        internal_kv._internal_kv_put(_KEY, value, overwrite=True, namespace=_NAMESPACE)


def read_deployed_state() -> DeployedState | None:
    """The state in the cluster this process is connected to, if any was written."""
    value = internal_kv._internal_kv_get(_KEY, namespace=_NAMESPACE)
    return None if value is None else DeployedState(**json.loads(value))
