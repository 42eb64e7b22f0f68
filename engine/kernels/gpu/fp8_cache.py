"""Keys and values of an fp8 cache on their way to a product with wider queries.

They become float16, not bfloat16, whatever the queries are: e4m3 to float16 is one instruction for two numbers, while
to bfloat16 a second conversion follows at a quarter of the rate, which alone would take as long as reading the cache.
Both hold e4m3 exactly. Queries lose nothing that matters: float16 has more digits, and is cut at 65,504.
"""

# mypy: disable-error-code="misc"

import triton
import triton.language as tl

_LARGEST_FLOAT16 = tl.constexpr(65504.0)


@triton.jit
def widened(key: tl.tensor, value: tl.tensor, query: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Keys, values and queries in one dtype to multiply in: as they are unless keys and values are narrower."""
    if key.dtype != query.dtype:
        if query.dtype == tl.float32:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        else:
            key = key.to(tl.float16)
            value = value.to(tl.float16)
            query = query.to(tl.float32)
            query = tl.minimum(tl.maximum(query, -_LARGEST_FLOAT16), _LARGEST_FLOAT16).to(tl.float16)
    return key, value, query
