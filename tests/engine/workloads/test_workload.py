"""Workloads: lengths, arrivals, scaling, and the option set that makes them."""

from pathlib import Path

import numpy as np
import pytest

from engine import ConfigError, LengthRange, PlannedRequest, Workload, WorkloadName, WorkloadSource
from engine.workloads.named_workload import NAMED_WORKLOADS


def workload(*requests: PlannedRequest) -> Workload:
    return Workload(requests=requests, description="test")


def planned(prompt: int, output: int, arrival: float | None = None) -> PlannedRequest:
    return PlannedRequest(num_prompt_tokens=prompt, num_output_tokens=output, arrival_seconds=arrival)


@pytest.mark.parametrize(("text", "low", "high"), [("512", 512, 512), ("128:512", 128, 512), (" 3 : 4 ", 3, 4)])
def test_length_range_reads_its_two_forms(text: str, low: int, high: int) -> None:
    assert LengthRange.parse(text) == LengthRange(low=low, high=high)


@pytest.mark.parametrize("text", ["", "a", "-1", "5:", "0", "9:3", "1:2:3", "1.5"])
def test_length_range_refuses_what_is_none_and_names_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--input-len|length range"):
        LengthRange.parse(text, "--input-len")


def test_a_range_reaches_both_bounds() -> None:
    drawn = LengthRange(low=3, high=5).draw(1000, np.random.default_rng(0))
    assert set(drawn.tolist()) == {3, 4, 5}


def test_dividing_lengths_rounds_up_and_never_reaches_zero() -> None:
    scaled = workload(planned(1, 9), planned(8, 8)).with_lengths_divided(8)
    assert [(item.num_prompt_tokens, item.num_output_tokens) for item in scaled.requests] == [(1, 2), (1, 1)]
    assert scaled.block_tokens == 64


def test_stretching_multiplies_arrivals() -> None:
    stretched = workload(planned(1, 1, 0.0), planned(1, 1, 2.0)).with_time_stretched(1.5)
    assert [item.arrival_seconds for item in stretched.requests] == [0.0, 3.0]
    assert stretched.offered_rate == pytest.approx(1 / 3)


def test_time_cannot_be_stretched_without_times() -> None:
    with pytest.raises(ConfigError, match="must have times"):
        workload(planned(1, 1)).with_time_stretched(2)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    arrivals = workload(*[planned(1, 1)] * 20_000).with_poisson_arrivals(50.0, seed=3)
    times = np.array([item.arrival_seconds for item in arrivals.requests])
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.min() >= 0
    assert 1 / gaps.mean() == pytest.approx(50, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.03)  # exponential: coefficient of variation 1
    assert arrivals.offered_rate == pytest.approx(50, rel=0.03)


def test_the_same_options_give_the_same_workload_and_another_seed_another() -> None:
    options = {"prompt": LengthRange(low=1, high=500), "num_requests": 50, "request_rate": 3.0}
    first = WorkloadSource(**options, seed=1).load()  # type: ignore[arg-type]
    assert first == WorkloadSource(**options, seed=1).load()  # type: ignore[arg-type]
    assert first.requests != WorkloadSource(**options, seed=2).load().requests  # type: ignore[arg-type]


# The traces' own means, as stated in each workload's `source`.
MEANS = {
    WorkloadName.AZURE_CONVERSATION: (1243, 217),
    WorkloadName.LMSYS: (92, 207),
    WorkloadName.SHAREGPT: (278, 323),
    WorkloadName.DEEPSEEK_R1: (1085, 2994),
}


@pytest.mark.parametrize("name", list(WorkloadName))
def test_named_workloads_have_the_means_and_medians_that_they_state(name: WorkloadName) -> None:
    shape = NAMED_WORKLOADS[name]
    drawn = np.array(shape.draw(200_000, np.random.default_rng(0)))
    assert drawn.mean(axis=0) == pytest.approx(MEANS[name], rel=0.03)
    assert np.median(drawn, axis=0) == pytest.approx((shape.prompt.median, shape.output.median), rel=0.03)
    assert drawn.min() >= 1
    assert (drawn.max(axis=0) <= (shape.prompt.maximum, shape.output.maximum)).all()
    for mean in MEANS[name]:
        assert f"{mean:,}" in shape.source


def test_named_workloads_keep_their_correlation() -> None:
    shape = NAMED_WORKLOADS[WorkloadName.LMSYS]
    logs = np.log(np.array(shape.draw(200_000, np.random.default_rng(0))))
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(shape.correlation, abs=0.02)


def test_a_source_is_either_a_trace_or_a_name() -> None:
    with pytest.raises(ConfigError, match="Choose one"):
        WorkloadSource(trace=Path("trace.csv"), name=WorkloadName.LMSYS).load()
