"""Launches as a pure function of sizes: blocks, warps, programs and what is loaded ahead."""

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.gpu.row_launch import RowLaunch, check_argument, limited, stages_of


def test_rows_of_common_models() -> None:
    assert RowLaunch.of(2048, 4096, None, 2) == RowLaunch(num_programs=2048, block=4096, num_warps=8, num_stages=1)
    assert RowLaunch.of(2048, 4096, 16, 4) == RowLaunch(num_programs=16, block=4096, num_warps=8, num_stages=3)
    assert RowLaunch.of(2048, 14336, 16, 4) == RowLaunch(num_programs=16, block=16384, num_warps=16, num_stages=1)
    assert RowLaunch.of(1, 1, 16, 2) == RowLaunch(num_programs=1, block=1, num_warps=1, num_stages=1)
    assert RowLaunch.of(0, 4096, 16, 2).num_programs == 0


@pytest.mark.parametrize("item_bytes", [1, 8192, 24576, 49152, 49153, 10**6])
def test_what_is_loaded_ahead_leaves_room_for_others(item_bytes: int) -> None:
    num_ahead = stages_of(100, 10, item_bytes) - 1
    assert 0 <= num_ahead * item_bytes <= 49152
    assert stages_of(100, 100, item_bytes) == 1


def test_what_no_launch_could_be_is_refused() -> None:
    assert limited(3, 16) == 3
    with pytest.raises(ConfigError, match="num_ctas is -1"):
        limited(3, -1)
    with pytest.raises(ConfigError, match=r"A row of 65537 elements does not fit a program: 1..65536 would"):
        RowLaunch.of(1, 65537, None, 2)
    with pytest.raises(ConfigError, match=r"x has shape \(2,\), where \(3,\) is right"):
        check_argument("x", torch.zeros(2), (3,))
    with pytest.raises(ConfigError, match=r"x is torch.float32, where torch.int32 or torch.int64 is right"):
        check_argument("x", torch.zeros(2), (2,), torch.int32, torch.int64)
