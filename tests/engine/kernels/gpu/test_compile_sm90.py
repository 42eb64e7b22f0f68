"""The harness that compiles for sm_90 sees what it is there to see: spills, instructions, errors."""

import pytest

from engine.kernels.gpu.gemm import persistent_gemm
from tests.engine.kernels.gpu.sm90 import Sm90Compiler
from tests.engine.kernels.gpu.test_gemm_sm90 import arguments, constants

CONSTANTS = constants(128, 256, 64, parts=4)
SIGNATURE = arguments(128, 256, 64)


def test_tensor_cores_and_tma_are_found(sm90: Sm90Compiler) -> None:
    resources = sm90.compiled(persistent_gemm, SIGNATURE, CONSTANTS, 8, 3, divisible=["num_inner"])
    assert "wgmma.mma_async" in resources.ptx
    assert "cp.async.bulk.tensor" in resources.ptx
    assert resources.num_threads == 256
    assert resources.cta_registers == -(-resources.registers // 8) * 8 * 256
    assert resources.shared_bytes >= 3 * (128 + 256) * 128


def test_spilled_registers_are_counted(sm90: Sm90Compiler) -> None:
    """128 x 256 sums are 128 registers of each of 256 threads; four warps would need all 256."""
    assert sm90.compiled(persistent_gemm, SIGNATURE, CONSTANTS, 4, 3, divisible=["num_inner"]).spill_bytes > 0


def test_what_does_not_compile_or_does_not_exist_is_an_error(sm90: Sm90Compiler) -> None:
    name = "engine.kernels.gpu.gemm:persistent_gemm"
    with pytest.raises(RuntimeError, match=r"missing \['PARTS'\]"):
        sm90.compiled(name, SIGNATURE, {key: value for key, value in CONSTANTS.items() if key != "PARTS"}, 8, 3)
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        sm90.compiled("engine.kernels.gpu.gemm:no_such_kernel", {}, {}, 4, 1)
    with pytest.raises(RuntimeError, match="does not compile for sm_90"):
        sm90.compiled(name, SIGNATURE | {"b": "tensordesc<bf16[256,32]>"}, CONSTANTS, 8, 3)
    assert sm90.compiled(name, SIGNATURE, CONSTANTS, 8, 3).registers > 128  # errors do not end the process
