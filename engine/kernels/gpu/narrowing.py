"""Casts of float32 values to what is stored: bfloat16, float16, float32, or e4m3 (float8_e4m3fn, up to 448, saturated).

The device rounds all of them to nearest even, two values an instruction. Triton's interpreter, 3.6 and 3.7 alike, cuts
to bfloat16 and loses carries to e4m3; there values are rounded before the cast, which is then exact, so that a kernel
gives the same bits on both.
"""

import triton
import triton.language as tl

from engine.kernels.row_scales import LARGEST_E4M3 as LARGEST_E4M3

_LARGEST = tl.constexpr(LARGEST_E4M3)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
# Adding it, 1.5 * 2**23 units of the subnormal values, pushes what is finer than a unit out of a float32.
_SUBNORMAL_UNITS = tl.constexpr(1.5 * 2.0**23 * 2.0**-9)
# The interpreter takes e4m3's NaN for a number, and this is it.
_NOT_A_NUMBER = tl.constexpr(480.0)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 values as `dtype`, to nearest even; NaN stays NaN."""
    if dtype == tl.float8e4nv:
        return _to_e4m3(values)
    if INTERPRETED and dtype == tl.bfloat16:
        values = _rounded(values, 0x10000)
    return values.to(dtype)


@triton.jit
def _to_e4m3(values: tl.tensor) -> tl.tensor:
    """The nearest of e4m3's values, none of them infinite."""
    values = tl.where(values > _LARGEST, _LARGEST, tl.where(values < -_LARGEST, -_LARGEST, values))
    if INTERPRETED:
        magnitudes = tl.abs(values)
        subnormal = (magnitudes + _SUBNORMAL_UNITS) - _SUBNORMAL_UNITS
        rounded = tl.where(magnitudes < _SMALLEST_NORMAL, subnormal, _rounded(magnitudes, 0x100000))
        sign = values.to(tl.int32, bitcast=True) & -0x80000000
        signed = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        values = tl.where(values == values, signed, _NOT_A_NUMBER)
    return values.to(tl.float8e4nv)


@triton.jit
def _rounded(values: tl.tensor, unit: tl.constexpr) -> tl.tensor:
    """To the nearest float32 whose bits are a multiple of `unit`, a power of two; of two the even one."""
    bits = values.to(tl.int32, bitcast=True)
    is_odd = ((bits & unit) != 0).to(tl.int32)
    bits = (bits + (unit // 2 - 1) + is_odd) & -unit
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
