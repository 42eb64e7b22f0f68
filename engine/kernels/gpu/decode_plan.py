"""Who attends what in a decode step, decided on the device: equal shares of cache tiles for every program.

The contexts of D sequences are cut into tiles of L tokens; those of all sequences stand in one list, and the list is
walked once per KV head. Program c of C takes one unbroken C-th of that walk. So shares differ by one tile at most,
whatever the lengths are: many short contexts fill the device, and one long context is split over all of it. A context
is cut only where a share ends, which leaves at most two unfinished parts per program, and where it is cut follows
from lengths and C alone: results do not depend on who finishes first.

An atomic counter would balance as well but would make sums depend on the order of arrival; a search in every program
of the attention kernel would need the lengths' prefix sum in each of them, for each layer. The plan is made once for
all layers that share lengths and window: about D programs of one warp, some microseconds.
"""

# mypy: disable-error-code="misc"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError

# A window that hides nothing.
_NO_WINDOW = 2**30
# What a tile's word of bounds holds: its first visible token, the token behind its last one, and whether it is the
# first or the last tile of its sequence.
FIRST_TILE = tl.constexpr(1 << 16)
LAST_TILE = tl.constexpr(1 << 17)
# Tokens of a tile at most, so that a bound fits eight bits.
LARGEST_TILE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeScratch:
    """Device memory of decode attention: the plan, and the unfinished parts of contexts that shares cut in two.

    One is enough for all layers of a step. Attention that runs at the same time as another needs its own.
    """

    num_tiles: Tensor  # [1]: tiles in the plan
    tiles: Tensor  # [4, capacity]: row, bounds, tiles of the sequence before this one, tiles after it
    is_empty: Tensor  # [rows]: 1 for a sequence of length 0, which has no tile and wants zeros
    places: (
        Tensor  # [capacity, pages of a tile]: the block of each page; with several tiles in a block, the tile's number
    )
    partial_sums: Tensor  # [programs, 2, 2, group, d]: weighted values of an unfinished part, float32 in int16 halves
    partial_weights: Tensor  # [programs, 2, 2, group]: largest score, sum of weights relative to it

    @classmethod
    def allocate(
        cls,
        *,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        group_size: int,
        head_dim: int,
        max_ctas: int,
        tile: int,
        device: torch.device | str,
    ) -> "DecodeScratch":
        """For batches of up to `max_rows` sequences whose block tables are `max_blocks` wide.

        `tile` is that of `decode_configuration`, `group_size` the query heads of a KV head.
        """
        capacity = max_rows * num_row_tiles(max_blocks, block_size, tile)
        sums_shape = (max_ctas, 2, 2, group_size, triton.next_power_of_2(head_dim))
        return cls(
            num_tiles=torch.zeros(1, dtype=torch.int32, device=device),
            tiles=torch.zeros((4, capacity), dtype=torch.int32, device=device),
            is_empty=torch.zeros(max_rows, dtype=torch.int32, device=device),
            places=torch.zeros((capacity, max(1, tile // block_size)), dtype=torch.int32, device=device),
            partial_sums=torch.zeros(sums_shape, dtype=torch.int16, device=device),
            partial_weights=torch.zeros((max_ctas, 2, 2, group_size), dtype=torch.float32, device=device),
        )

    def check(
        self,
        *,
        rows: int,
        max_blocks: int,
        block_size: int,
        group_size: int,
        head_dim: int,
        num_ctas: int,
        tile: int,
    ) -> None:
        """Raises `ConfigError` when a launch of this size would not fit."""
        needed = rows * num_row_tiles(max_blocks, block_size, tile)
        if (
            needed > self.tiles.shape[1]
            or rows > len(self.is_empty)
            or self.places.shape[1] != max(1, tile // block_size)
        ):
            raise ConfigError(
                f"DecodeScratch has room for {self.tiles.shape[1]} tiles of {self.places.shape[1]} pages; {rows} "
                f"sequences with block tables of {max_blocks} blocks of {block_size} tokens need {needed} tiles of "
                f"{max(1, tile // block_size)}: allocate it for them, with tile={tile}."
            )
        max_ctas, _, _, own_group_size, own_head_dim = self.partial_sums.shape
        is_group_s = (group_size, triton.next_power_of_2(head_dim)) == (own_group_size, own_head_dim)
        if not 0 < num_ctas <= max_ctas or not is_group_s:
            raise ConfigError(
                f"DecodeScratch is for 1 to {max_ctas} CTAs and groups of {own_group_size} query heads of up to "
                f"{own_head_dim} elements, not for {num_ctas} CTAs and groups of {group_size} heads of {head_dim}: "
                f"allocate it for those."
            )


def num_row_tiles(max_blocks: int, block_size: int, tile: int) -> int:
    """Tiles that one sequence can have, and at least room for one."""
    return max(1, -(-max_blocks * block_size // tile))


def plan_decode(
    block_tables_DB: Tensor,
    lengths_D: Tensor,
    scratch: DecodeScratch,
    *,
    block_size: int,
    tile: int,
    window: int | None,
) -> None:
    """Write the plan of a step into `scratch`; one launch, no synchronisation. Lengths beyond a table are cut to it."""
    _plan[(len(lengths_D),)](
        lengths_D,
        block_tables_DB,
        scratch.num_tiles,
        scratch.tiles,
        scratch.is_empty,
        scratch.places,
        len(lengths_D),
        block_tables_DB.stride(0),
        scratch.tiles.shape[1],
        _NO_WINDOW if window is None else window,
        block_tables_DB.shape[1] * block_size,
        BLOCK_SIZE=block_size,
        TILE=tile,
        CHUNK=1024,
        num_warps=4,
    )


@triton.jit
def _span(
    length: tl.tensor, window: tl.tensor, longest: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Length, first visible token, first tile and number of tiles of sequences of these lengths; no token, no tile."""
    length = tl.minimum(tl.maximum(length.to(tl.int32), 0), longest)
    begin = tl.maximum(length - window, 0)
    first_tile = begin // TILE
    return length, begin, first_tile, (length + TILE - 1) // TILE - first_tile


@triton.jit(do_not_specialize=["lengths", "block_tables", "num_rows", "table_stride", "capacity", "window", "longest"])
def _plan(
    lengths: tl.tensor,
    block_tables: tl.tensor,
    num_tiles: tl.tensor,
    tiles: tl.tensor,
    is_empty: tl.tensor,
    places: tl.tensor,
    num_rows: tl.tensor,
    table_stride: tl.tensor,
    capacity: tl.tensor,
    window: tl.tensor,
    longest: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Program d sums the tiles of the sequences before d and lists those of d behind them."""
    PAGES: tl.constexpr = TILE // BLOCK_SIZE if TILE > BLOCK_SIZE else 1
    PARTS: tl.constexpr = BLOCK_SIZE // TILE if BLOCK_SIZE > TILE else 1
    row = tl.program_id(0)
    entries_E = tl.arange(0, CHUNK)
    entry = 0
    for chunk in range(0, row, CHUNK):
        is_before_E = chunk + entries_E < row
        others_E = tl.load(lengths + chunk + entries_E, mask=is_before_E, other=0)
        _, _, _, counts_E = _span(others_E, window, longest, TILE)
        entry += tl.sum(tl.where(is_before_E, counts_E, 0))
    given_length = tl.load(lengths + row)
    tl.store(is_empty + row, (given_length == 0).to(tl.int32))
    length, begin, first_tile, count = _span(given_length, window, longest, TILE)
    if row == num_rows - 1:
        tl.store(num_tiles, entry + count)
    for chunk in range(0, count, CHUNK):
        done_E = chunk + entries_E
        is_listed_E = done_E < count
        start_E = (first_tile + done_E) * TILE
        bounds_E = tl.minimum(tl.maximum(begin - start_E, 0), TILE)
        bounds_E += tl.minimum(tl.maximum(length - start_E, 0), TILE) << 8
        bounds_E += tl.where(done_E == 0, FIRST_TILE, 0) + tl.where(done_E == count - 1, LAST_TILE, 0)
        tl.store(tiles + entry + done_E, tl.full((CHUNK,), 0, tl.int32) + row, mask=is_listed_E)
        tl.store(tiles + capacity + entry + done_E, bounds_E, mask=is_listed_E)
        tl.store(tiles + 2 * capacity + entry + done_E, done_E, mask=is_listed_E)
        tl.store(tiles + 3 * capacity + entry + done_E, count - 1 - done_E, mask=is_listed_E)
    for chunk in range(0, count * PAGES, CHUNK):
        page_E = first_tile * PAGES + chunk + entries_E  # of the sequence, in units of a tile where a block has several
        is_cached_E = (page_E // PARTS) * BLOCK_SIZE < length
        is_listed_E = chunk + entries_E < count * PAGES
        block_E = tl.load(
            block_tables + row.to(tl.int64) * table_stride + page_E // PARTS, mask=is_cached_E & is_listed_E, other=0
        )
        place_E = block_E.to(tl.int32) * PARTS + page_E % PARTS
        tl.store(places + entry * PAGES + chunk + entries_E, place_E, mask=is_listed_E)


@triton.jit
def share_of(program: tl.tensor, num_programs: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The walk's first step of a program and the one behind its last."""
    size = total // num_programs
    num_larger = total % num_programs
    first = program * size + tl.minimum(program, num_larger)
    return first, first + size + (program < num_larger).to(tl.int32)


@triton.jit
def program_of(step: tl.tensor, num_programs: tl.tensor, total: tl.tensor) -> tl.tensor:
    """The program whose share holds a step of the walk."""
    size = total // num_programs
    num_larger = total % num_programs
    in_larger = num_larger * (size + 1)
    return tl.where(step < in_larger, step // (size + 1), num_larger + (step - in_larger) // tl.maximum(size, 1))
