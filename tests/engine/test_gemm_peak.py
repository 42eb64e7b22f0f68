"""How products are timed on a device: back to back, with other weights each time, for as long as was asked."""

import pytest

from engine.gemm_peak import CUDA_RUN_SECONDS, MIN_REPETITIONS, cuda_samples
from tests.engine.pipeline.deferred_cuda import DeferredEvent, deferred_cuda


@pytest.mark.parametrize(("seconds", "num_runs"), [(0.2, 20), (0.001, MIN_REPETITIONS)])
def test_samples_are_runs_of_products_of_other_weights(
    monkeypatch: pytest.MonkeyPatch, seconds: float, num_runs: int
) -> None:
    """A work takes a millisecond, so ten make a run."""
    multiplied: list[int] = []
    with deferred_cuda() as cuda:
        monkeypatch.setattr(DeferredEvent, "synchronize", lambda event: cuda.main.synchronize(), raising=False)
        products = [lambda index=index: cuda.queue(lambda: multiplied.append(index)) for index in range(3)]
        assert cuda_samples(products, seconds) == [1e-3] * num_runs
    count = round(CUDA_RUN_SECONDS / 1e-3)
    assert len(multiplied) == 3 + 3 + num_runs * count
    assert multiplied == [number % 3 for number in range(len(multiplied))]
