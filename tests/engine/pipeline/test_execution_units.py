from types import SimpleNamespace

import pytest
import torch

from engine.pipeline.execution_units import ExecutionUnits
from engine.units_at_hand import UnitGrant, UnitsAtHand


def _units(monkeypatch: pytest.MonkeyPatch, total: int) -> ExecutionUnits:
    properties = SimpleNamespace(multi_processor_count=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return ExecutionUnits(torch.device("cuda"))


def test_shares_of_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    units = _units(monkeypatch, 132)
    assert [units.granted(tenths) for tenths in range(1, 11)] == [16, 24, 40, 56, 64, 76, 92, 108, 116, 132]


@pytest.mark.parametrize("total", [108, 114, 132, 148, 160])
def test_two_shares_never_take_more_than_all_and_leave_little(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    units = _units(monkeypatch, total)
    for tenths in range(1, 10):
        both = units.granted(tenths) + units.granted(10 - tenths)
        assert total - 2 * 8 < both <= total
        assert abs(units.granted(tenths) - tenths * total / 10) < 8
    assert all(units.granted(tenths) % 8 == 0 for tenths in range(1, 6))


def test_a_small_device_still_grants_something(monkeypatch: pytest.MonkeyPatch) -> None:
    units = _units(monkeypatch, 12)
    assert [units.granted(tenths) for tenths in (1, 5, 9, 10)] == [8, 8, 8, 12]


def test_a_grant_holds_inside_and_not_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    units, at_hand = _units(monkeypatch, 132), UnitsAtHand(132)
    whole = at_hand.grant
    with units.launching(units.share(7), at_hand):
        assert torch._C._get_sm_carveout_experimental() == 40
        assert at_hand.grant == UnitGrant(num_units=92, is_apart=False)
    assert torch._C._get_sm_carveout_experimental() is None and at_hand.grant == whole
    with units.launching(units.share(10), at_hand):
        assert torch._C._get_sm_carveout_experimental() is None and at_hand.grant == whole
    with pytest.raises(KeyError), units.launching(units.share(3), at_hand):
        raise KeyError
    assert torch._C._get_sm_carveout_experimental() is None and at_hand.grant == whole


def test_kernels_are_limited_only_where_nothing_else_keeps_them_apart() -> None:
    assert UnitGrant(num_units=92).most_programs is None
    assert UnitGrant(num_units=92, is_apart=False).most_programs == 92
    assert UnitGrant(num_units=132, is_apart=False, has_guest=True).most_programs is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_matrix_product_is_right_with_any_share() -> None:
    device = torch.device("cuda")
    units = ExecutionUnits(device)
    left, right = (torch.randn(512, 512, device=device, dtype=torch.bfloat16) for _ in range(2))
    expected = left.float() @ right.float()
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        for tenths in range(1, 11):
            with units.launching(units.share(tenths)):
                product = left @ right
            assert ((product.float() - expected).norm() / expected.norm()).item() < 1e-2
    finally:
        torch.backends.cuda.preferred_blas_library(before)
