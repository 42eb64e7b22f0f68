"""The plan of a decode step against one made in Python, and shares that cover it."""

# mypy: disable-error-code="misc, untyped-decorator"

import random

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.decode_plan import DecodeScratch, plan_decode, program_of, share_of


@triton.jit
def list_shares(first: tl.tensor, last: tl.tensor, owner: tl.tensor, total: tl.tensor) -> None:
    program = tl.program_id(0)
    begin, end = share_of(program, tl.num_programs(0), total)
    tl.store(first + program, begin)
    tl.store(last + program, end)
    for step in range(begin, end):
        tl.store(owner + step, program_of(step, tl.num_programs(0), total))


def planned(
    lengths: list[int], tables: Tensor, block_size: int, tile: int, window: int | None, device: torch.device
) -> DecodeScratch:
    scratch = DecodeScratch.allocate(
        max_rows=len(lengths),
        max_blocks=tables.shape[1],
        block_size=block_size,
        group_size=1,
        head_dim=64,
        max_ctas=1,
        tile=tile,
        device=device,
    )
    lengths_D = torch.tensor(lengths, device=device)
    plan_decode(tables.to(device), lengths_D, scratch, block_size=block_size, tile=tile, window=window)
    return scratch


def check(
    lengths: list[int], tables: Tensor, block_size: int, tile: int, window: int | None, scratch: DecodeScratch
) -> None:
    pages, parts = max(1, tile // block_size), max(1, block_size // tile)
    rows, bounds, done, left = scratch.tiles.tolist()
    places = scratch.places.tolist()
    entry = 0
    for row, length in enumerate(lengths):
        assert scratch.is_empty[row].item() == (length == 0)
        if length < 0:
            continue
        length = min(max(length, 0), tables.shape[1] * block_size)
        begin = 0 if window is None else max(0, length - window)
        first = begin // tile
        count = -(-length // tile) - first if length else 0
        for number in range(count):
            start = (first + number) * tile
            assert (rows[entry], done[entry], left[entry]) == (row, number, count - 1 - number)
            assert bounds[entry] & 0xFF == min(max(begin - start, 0), tile)
            assert (bounds[entry] >> 8) & 0xFF == min(max(length - start, 0), tile)
            assert bounds[entry] >> 16 == (number == 0) + 2 * (number == count - 1)
            for page in range(pages):
                position = start + page * block_size
                block = int(tables[row, position // block_size]) if position < length else 0
                wanted = block * parts + (position % block_size) // tile if position < length else None
                assert wanted is None or places[entry][page] == wanted
            entry += 1
    assert scratch.num_tiles.item() == entry


@pytest.mark.parametrize("window", [None, 1, 70, 10_000])
@pytest.mark.parametrize(("block_size", "tile"), [(16, 64), (64, 64), (128, 64), (32, 16), (16, 128)])
def test_every_tile_is_listed(block_size: int, tile: int, window: int | None, device: torch.device) -> None:
    """Empty rows, block borders, rows to be left alone, and a length beyond its table, which no caller should give."""
    width = 256 // block_size
    lengths = [0, 1, 64, 65, 200, 256, 16, 400, -3]
    tables = torch.randperm(len(lengths) * width).view(len(lengths), width)
    check(lengths, tables, block_size, tile, window, planned(lengths, tables, block_size, tile, window, device))


@pytest.mark.slow
def test_more_rows_and_tiles_than_are_looked_at_at_once(device: torch.device) -> None:
    lengths = [random.randrange(40) for _ in range(1100)]
    tables = torch.randint(1000, (1100, 3))
    check(lengths, tables, 16, 16, None, planned(lengths, tables, 16, 16, None, device))
    lengths = [5, 17_000, 3]
    tables = torch.randint(5000, (3, 1100))
    check(lengths, tables, 16, 16, None, planned(lengths, tables, 16, 16, None, device))


@pytest.mark.parametrize(("num_programs", "total"), [(1, 7), (7, 7), (9, 4), (5, 23), (4, 24)])
def test_shares_cover_all_and_differ_by_one(num_programs: int, total: int, device: torch.device) -> None:
    first, last = (torch.zeros(num_programs, dtype=torch.int32, device=device) for _ in range(2))
    owner = torch.full((total,), -1, dtype=torch.int32, device=device)
    list_shares[(num_programs,)](first, last, owner, total)
    assert first.tolist() == [0, *last.tolist()[:-1]]
    assert last[-1].item() == total
    sizes = (last - first).tolist()
    assert max(sizes) - min(sizes) <= 1
    assert owner.tolist() == [program for program in range(num_programs) for _ in range(sizes[program])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 80}, "groups of 2 query heads of up to 64 elements, not for 3 CTAs and groups of 2 heads of 80"),
        ({"head_dim": 32}, "groups of 2 query heads of up to 64 elements, not for 3 CTAs and groups of 2 heads of 32"),
        ({"group_size": 4}, "not for 3 CTAs and groups of 4 heads of 48: allocate it for those"),
        ({"num_ctas": 4}, "is for 1 to 3 CTAs"),
        ({"rows": 9}, "has room for 8 tiles of 4 pages; 9 sequences"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    scratch = DecodeScratch.allocate(
        max_rows=8, max_blocks=4, block_size=16, group_size=2, head_dim=64, max_ctas=3, tile=64, device="cpu"
    )
    launch = dict(rows=8, max_blocks=4, block_size=16, group_size=2, head_dim=48, num_ctas=3, tile=64)
    scratch.check(**launch)
    with pytest.raises(ConfigError, match=message):
        scratch.check(**(launch | change))
