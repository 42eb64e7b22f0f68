"""Tests of kernels run on a GPU where there is one, else interpreted (see tests/conftest.py); without Triton, not."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests.engine.kernels.gpu.sm90 import Sm90Compiler, sm90_compiler

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in these tests: a GPU where there is one, else the CPU, interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def sm90() -> Iterator[Sm90Compiler]:
    """Compiles kernels for sm_90 without a GPU: see tests/engine/kernels/gpu/sm90.py."""
    with sm90_compiler() as compiler:
        yield compiler
