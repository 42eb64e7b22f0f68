"""`RecentLatencies`: exact percentiles of the last minute, and nothing older."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.recent_latencies import WINDOW_SECONDS, RecentLatencies, nearest_rank


def test_only_the_last_minute_counts() -> None:
    now = 0.0
    latencies = RecentLatencies(lambda: now)
    assert latencies.time_to_first_token() is None
    for second in range(1, 101):
        now = second
        latencies.first_token(second / 100)
    now = 100.0
    found = latencies.time_to_first_token()
    assert found is not None and latencies.time_per_output_token() is None
    assert (found.num_calls, found.p50, found.p99) == (61, 0.70, 1.0)
    now = 100.0 + WINDOW_SECONDS + 1
    assert latencies.time_to_first_token() is None


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1))
def test_the_nearest_rank_is_the_smallest_value_that_covers_the_share(values: list[float], share: float) -> None:
    ascending = sorted(values)
    found = nearest_rank(ascending, share)
    assert found in ascending
    assert sum(value <= found for value in ascending) >= share * len(ascending)
    assert sum(value < found for value in ascending) < share * len(ascending)
