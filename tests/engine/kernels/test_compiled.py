"""Kernels compiled ahead: what they compute, that they are kept, and what happens where they cannot be made or read."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from engine.kernels import packed
from engine.kernels.compiled import CompiledKernels
from engine.kernels.kernel import Argument, Kernel, KernelCall

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
SILU = Kernel.of("silu_and_mul", (Argument("bfloat16", ("T", 32)),))
NORM = Kernel.of("rms_norm", (Argument("bfloat16", ("T", 48)), Argument("bfloat16", (48,))), (("epsilon", 1e-5),))
CACHE = Argument("float32", ("N", 2, 4, 16))
DECODE = Kernel.of(
    "decode_attention",
    (Argument("float32", ("D", 4, 16)), CACHE, CACHE, Argument("int64", ("D", "B")), Argument("int64", ("D",))),
    (("scale", 0.25),),
)
# The sum of two values, and a product of its norm: both are wanted.
CHAIN = Kernel(
    (*[Argument("bfloat16", ("T", 48))] * 2, Argument("bfloat16", (48,)), Argument("bfloat16", (32, 48))),
    (
        KernelCall("add", (0, 1)),
        KernelCall("rms_norm", (4, 2), (("epsilon", 1e-5),)),
        KernelCall("linear", (5, 3)),
        KernelCall("silu_and_mul", (6,)),
    ),
    (0, 3),
)
ALL = [SILU, NORM, DECODE, CHAIN]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CompiledKernels:
    kernels = CompiledKernels(tmp_path_factory.mktemp("kernels"))
    assert kernels.missing([*ALL, SILU]) == ALL
    kernels.compile(ALL)
    assert not kernels.missing(ALL)
    return kernels


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 500])
def test_one_kernel_serves_every_batch(kernels: CompiledKernels, num_tokens: int) -> None:
    silu, norm, decode = (kernels.load(kernel) for kernel in (SILU, NORM, DECODE))
    assert silu is not None and norm is not None and decode is not None
    gate_up = torch.randn(num_tokens, 32).bfloat16()
    assert torch.equal(*silu(gate_up), *SILU(gate_up))  # rounded where the written operations round
    hidden, weight = torch.randn(num_tokens, 48).bfloat16(), torch.randn(48).bfloat16()
    torch.testing.assert_close(norm(hidden, weight), list(NORM(hidden, weight)))
    query, (keys, values) = torch.randn(num_tokens, 4, 16), torch.randn(2, 30, 2, 4, 16)
    tables, lengths = torch.randint(0, 30, (num_tokens, 3)), torch.randint(1, 13, (num_tokens,))
    inputs = (query, keys, values, tables, lengths)
    torch.testing.assert_close(decode(*inputs), list(DECODE(*inputs)))
    # Another width, and inputs that do not lie or count as those compiled for.
    inputs = (query, keys, values, tables[:, :1], lengths.clamp(max=4))
    torch.testing.assert_close(decode(*inputs), list(DECODE(*inputs)))
    narrow = (query, keys, values, tables.int(), lengths)
    torch.testing.assert_close(decode(*narrow), DECODE(*narrow))
    assert norm(hidden[:, None], weight)[0].shape == (num_tokens, 1, 48)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 500])
def test_a_chain_computes_what_its_functions_do(kernels: CompiledKernels, num_tokens: int) -> None:
    chain = kernels.load(CHAIN)
    assert chain is not None
    hidden, other, weight = (torch.randn(*shape).bfloat16() for shape in ((num_tokens, 48), (num_tokens, 48), (48,)))
    matrix = torch.randn(32, 48).bfloat16()
    weights = (weight, packed.pack(matrix) if packed.can_pack(matrix) else matrix)
    for found, expected in zip(chain.call((hidden, other), weights), CHAIN(hidden, other, *weights), strict=True):
        assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.slow
def test_what_cannot_be_compiled_or_read_is_done_without(
    kernels: CompiledKernels, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = CompiledKernels(tmp_path)
    (path := broken._path(SILU)).write_bytes(b"not a package")
    with caplog.at_level(logging.WARNING):
        assert broken.load(SILU) is None
    assert "is of no use and is removed" in caplog.text and not path.exists()
    caplog.clear()
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    broken = CompiledKernels(tmp_path)
    broken.compile([NORM])
    assert "rms_norm could not be compiled, and computes as it is written" in caplog.text
    assert broken.load(NORM) is None
    caplog.clear()
    (tmp_path / "file").write_text("")
    CompiledKernels(tmp_path / "file" / "folder").compile([NORM])
    assert "Kernels cannot be compiled into" in caplog.text


def test_a_kernel_s_file_tells_everything_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CompiledKernels(tmp_path)
    other = Kernel.of("rms_norm", NORM.arguments, (("epsilon", 1e-6),))
    fewer = Kernel(CHAIN.arguments, CHAIN.calls, (3,))
    paths = {kernels._path(kernel) for kernel in (*ALL, other, fewer)}
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len({*paths, kernels._path(SILU)}) == 7
