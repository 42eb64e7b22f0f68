"""`Peer`: one engine of the comparison, and how its environment is made.

Versions are pinned, so that a table can be made again. An engine's own file holds its peers and, behind imports that
only its environment satisfies, the worker that runs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`module` is run by the interpreter of `environment`; None stands for the interpreter that runs the comparison.

    `torch` is the version whose CPU build is installed first. `unwanted` packages come as dependencies and are removed
    again. `build_variables` are set while packages are installed, `variables` while the engine runs; in both,
    {environment} and {threads} are replaced. `options` are passed on to the worker: what differs between two peers of
    one module.
    """

    name: str
    module: str
    environment: str | None
    torch: str | None = None
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    build_variables: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
