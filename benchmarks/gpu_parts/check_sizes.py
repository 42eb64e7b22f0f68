"""`CheckSizes`: the shapes at which kernels are checked: ragged, at the borders of blocks and tiles, empty.

`TINY` is for the interpreter, on a CPU; it has the same kinds of shapes with as little in them as shows the kind.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSizes:
    """`rows` are numbers of tokens; `products` (tokens, outputs, inner); `experts` (tokens, experts, choices)."""

    num_ctas: tuple[int, ...]
    num_sms: tuple[int, ...]
    decode_lengths: tuple[int, ...]
    prefill_lengths: tuple[int, ...]
    prefill_sizes: tuple[int, ...]
    group_sizes: tuple[int, ...]
    head_dims: tuple[int, ...]
    block_sizes: tuple[int, ...]
    window: int
    ragged_product: tuple[int, int, int]
    products: tuple[tuple[int, int, int], ...]
    rows: tuple[int, ...]
    hidden: int
    intermediate: int
    experts: tuple[tuple[int, int, int], ...]
    vocabulary: int
    num_drawn: int
    has_all_candidates: bool = True


FULL = CheckSizes(
    num_ctas=(40, 132, 264),
    num_sms=(132, 92),
    decode_lengths=(1, 63, 64, 65, 127, 128, 129, 0, 500, 1300, 0, 7, 4097, 1024, 1023),
    prefill_lengths=(40, 1300, 0, 64, 129, 7, 65, 1024, 2049),
    prefill_sizes=(40, 170, 0, 64, 1, 0, 33, 1024, 512),
    group_sizes=(1, 4, 8),
    head_dims=(64, 128),
    block_sizes=(16, 64),
    window=100,
    ragged_product=(333, 1000, 4096),
    products=(
        (1, 6144, 4096),
        (17, 4096, 14336),
        (128, 28672, 4096),
        (640, 4096, 4096),
        (1024, 6144, 4096),
        (2048, 28672, 4096),
        (2032, 4096, 14336),
    ),
    rows=(1, 77, 2048),
    hidden=4096,
    intermediate=14336,
    experts=((1, 8, 2), (300, 8, 2), (2048, 8, 2), (515, 128, 8)),
    vocabulary=128_256,
    num_drawn=256,
)
TINY = CheckSizes(
    num_ctas=(3,),
    num_sms=(5,),
    decode_lengths=(1, 16, 17, 0, 40),
    prefill_lengths=(20, 40, 0, 17),
    prefill_sizes=(20, 3, 0, 1),
    group_sizes=(4,),
    head_dims=(64,),
    block_sizes=(16,),
    window=9,
    ragged_product=(5, 40, 128),
    products=((3, 64, 128),),
    rows=(3,),
    hidden=64,
    intermediate=48,
    experts=((5, 8, 2),),
    vocabulary=500,
    num_drawn=4,
    has_all_candidates=False,
)
