import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.gpu.gemm_config import (
    CANDIDATES,
    CORESIDENT,
    choose_config,
    gemm_flops,
    predicted_seconds,
    wave_efficiency,
)
from tests.engine.kernels.gpu.sm90 import LARGEST_SHARED_BYTES

LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


@given(
    st.integers(1, 9000), st.integers(1, 200_000), st.integers(1, 30_000), st.integers(1, 132), st.sampled_from([1, 2])
)
def test_the_fastest_predicted_candidate_is_chosen(
    rows: int, columns: int, inner: int, num_sms: int, element_bytes: int
) -> None:
    chosen = choose_config(rows, columns, inner, num_sms, element_bytes)
    seconds = predicted_seconds(chosen, rows, columns, inner, num_sms, element_bytes)
    assert chosen in CANDIDATES
    assert all(
        seconds <= predicted_seconds(other, rows, columns, inner, num_sms, element_bytes) for other in CANDIDATES
    )
    assert seconds >= predicted_seconds(
        choose_config(rows, columns, inner, num_sms + 1, element_bytes),
        rows, columns, inner, num_sms + 1, element_bytes,
    )  # fmt: skip


@given(st.sampled_from(CANDIDATES), st.integers(1, 5000), st.integers(1, 50_000), st.integers(1, 132))
def test_wave_efficiency_counts_useful_products(config: object, rows: int, columns: int, num_sms: int) -> None:
    efficiency = wave_efficiency(config, rows, columns, num_sms)  # type: ignore[arg-type]
    assert 0 < efficiency <= 1


def test_large_tiles_for_large_products_and_small_ones_where_they_would_leave_sms_idle() -> None:
    large, square, *_, smallest = CANDIDATES
    assert all(choose_config(2048, columns, inner, 132) is large for columns, inner in LLAMA_8B)
    assert choose_config(1024, 4096, 4096, 132) is large  # 128 tiles: one round, 97 % full
    assert choose_config(640, 4096, 4096, 132) is not smallest
    assert choose_config(16, 4096, 4096, 132) is smallest
    # 17 row tiles of 16 column tiles are 272 large ones, a third round for 8 of them.
    assert wave_efficiency(large, 2176, 4096, 132) == pytest.approx(272 / 396)
    assert choose_config(256, 4096, 4096, 132).num_tiles(256, 4096) > large.num_tiles(256, 4096)
    assert square.num_tiles(129, 129) == 4


def test_every_candidate_fits_into_shared_memory() -> None:
    assert all(config.stage_bytes() + 1024 <= LARGEST_SHARED_BYTES for config in (*CANDIDATES, CORESIDENT))
    assert {config.inner(2) for config in CANDIDATES} == {64}
    assert {config.inner(1) for config in CANDIDATES} == {128}


def test_flops_of_a_layer_of_llama_8b() -> None:
    per_token = sum(gemm_flops(1, columns, inner) for columns, inner in LLAMA_8B)
    assert per_token == 2 * 218_103_808
