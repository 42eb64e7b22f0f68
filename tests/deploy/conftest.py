"""Machines to launch clusters on, where this one can emulate them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.emulated_host import EmulatedHost, missing
from tests.deploy.launch import PROFILE

MakeHost = Callable[[str], EmulatedHost]


@pytest.fixture(scope="module")
def make_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeHost]:
    """Started hosts; the first one's user may log in everywhere. The rest of their disks is this machine's."""
    if (reason := missing()) is not None:
        pytest.skip(f"emulating machines: {reason}")
    directory: Path = tmp_path_factory.mktemp("hosts")
    hosts: list[EmulatedHost] = []
    keys: list[str] = []

    def make(name: str) -> EmulatedHost:
        host = EmulatedHost(f"nanoserve-{os.getpid()}-{name}", directory / name, PROFILE)
        hosts.append(host)
        if not keys:
            keys.append(host.make_key())
        host.authorize(keys[0])
        host.start()
        return host

    try:
        yield make
    finally:
        for host in hosts:
            host.close()
