"""`dot`: a product on tensor cores with float32 sums; in Triton's interpreter, 3.6 and 3.7 alike, the same numbers.

The interpreter keeps bfloat16 as the integers of its bits and multiplies those; there operands are widened first, which
changes nothing else: products of two-byte and one-byte numbers are exact in float32.
"""

# mypy: disable-error-code="misc"

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """sums + a b. float32 operands are multiplied as such ("ieee"), not rounded to TF32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
