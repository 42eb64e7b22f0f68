"""The Gumbel noise of `engine.gumbel` inside a kernel: the same 31 hash bits, and two ways from them to the noise.

`exact_noise` rounds each of the two logarithms once, from float64. It is the same on every device and in the
interpreter. torch's float32 logarithms are not rounded correctly everywhere: of 8 million values a CPU gave 91 % alike,
and none further off than 1e-6. A draw can differ only where its two best scores are as close as that, which is once in
some ten million draws. `approximate_noise` takes a tenth of the instructions, the device's own logarithm among them
(within 2**-22; Triton's would be a polynomial), and is at most NOISE_ERROR away from it.
"""

import triton
import triton.language as tl

from engine.kernels.gpu.narrowing import INTERPRETED

# What `approximate_noise` is measured to stay ten times below; and what no noise exceeds: -log(2**-32) is 22.19.
NOISE_ERROR = 1e-4
LARGEST_NOISE = 22.2

_MINUS_LN_2 = tl.constexpr(-0.6931471805599453)
_SERIES_LIMIT = tl.constexpr(0.03125)
_BELOW_ONE = tl.constexpr(1 - 2.0**-24)


@triton.jit
def row_keys(seed: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The low and high 32 bits of SplitMix64's finaliser for a seed and a position."""
    mixed = _mix_64(seed.to(tl.int64).to(tl.uint64, bitcast=True))
    mixed = _mix_64(mixed + position.to(tl.int64).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    return mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def _mix_64(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform(low: tl.tensor, high: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """Numbers in (0, 1), float32, from the hash of a row's keys and token ids; near 0 with full relative precision."""
    bits = ids.to(tl.uint32) * 0x9E3779B9 + low
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = (bits ^ high) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    numbers = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    return tl.minimum(numbers, _BELOW_ONE)


@triton.jit
def exact_noise(numbers: tl.tensor) -> tl.tensor:
    """-log(-log(1 - number)), each logarithm rounded to float32. Numbers are multiples of 2**-32: 1 - one is exact."""
    inner = tl.log(1.0 - numbers.to(tl.float64)).to(tl.float32)
    return -tl.log(-inner.to(tl.float64)).to(tl.float32)


@triton.jit
def approximate_noise(numbers: tl.tensor) -> tl.tensor:
    """As `exact_noise`, from two fast logarithms; where 1 - number would cancel, from the first terms of its series."""
    series = numbers * (1.0 + numbers * (0.5 + numbers * (0.3333333432674408 + numbers * 0.25)))
    inner = tl.where(numbers < _SERIES_LIMIT, series, _log2(1.0 - numbers) * _MINUS_LN_2)
    return _log2(inner) * _MINUS_LN_2


@triton.jit
def _log2(values: tl.tensor) -> tl.tensor:
    """One instruction of the device; the interpreter has none."""
    if INTERPRETED:
        return tl.log2(values)
    return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [values], tl.float32, is_pure=True, pack=1)
