"""Routing: least predicted work, prefixes worth what they save, fair ties, and loads that always return to zero."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing_policy import Decision, LoadSnapshot, PrefixIndex, RoutingPolicy, block_hashes
from engine import Request, RequestId, SamplingParams

BLOCK = 4


def request(name: str, prompt: range | list[int], max_tokens: int = 100, salt: str = "") -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens),
        cache_salt=salt,
    )


def policy(*replicas: str, expected: int = 10, affinity: bool = True, capacity: int = 100_000) -> RoutingPolicy:
    made = RoutingPolicy(prefix_affinity=affinity, expected_output_tokens=expected)
    for replica in replicas:
        made.add_replica(replica, capacity_tokens=capacity, block_size=BLOCK)
    return made


def route(made: RoutingPolicy, sent: Request) -> Decision:
    decision = made.route(sent)
    assert decision is not None
    return decision


def test_no_replica_no_decision() -> None:
    assert policy().route(request("r", range(8))) is None


def test_equal_replicas_take_turns() -> None:
    made = policy("a", "b", "c", affinity=False)
    chosen = []
    for index in range(6):
        chosen.append(route(made, request(f"r{index}", [index])).replica_id)
        made.finish(RequestId(f"r{index}"), is_complete=False)
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_the_least_work_wins_not_the_fewest_requests() -> None:
    made = policy("a", "b", affinity=False)
    assert route(made, request("long", range(1000))).replica_id == "a"
    chosen = [route(made, request(f"r{index}", range(100))).replica_id for index in range(8)]
    assert chosen == ["b"] * 8


def test_a_prefix_is_worth_exactly_the_prefill_it_saves() -> None:
    made = policy("a", "b", expected=10)
    shared = list(range(400))
    route(made, request("first", shared))
    made.finish(RequestId("first"), is_complete=False)
    # "a" has all but the last token's block: 396 tokens. Work there just below that does not turn the request away.
    route(made, request("other", range(1000, 1000 + 380)))  # to "b", whose turn it is
    assert route(made, request("again", shared)) == Decision(replica_id="a", num_cached_tokens=396, cost=4)
    made.finish(RequestId("again"), is_complete=False)
    made.finish(RequestId("other"), is_complete=False)
    made.observe(
        "a", LoadSnapshot(num_running=0, num_waiting=40, num_free_tokens=100_000)
    )  # 400 tokens of others' work
    assert route(made, request("busy", shared)).replica_id == "b"


def test_a_hot_prefix_spreads_before_it_builds_a_hot_spot() -> None:
    made = policy("a", "b", expected=50)
    prefix = list(range(200))
    chosen = [route(made, request(f"r{index}", [*prefix, index])).replica_id for index in range(40)]
    assert 15 <= chosen.count("a") <= 25


def test_the_last_prompt_token_is_never_free() -> None:
    made = policy("a")
    route(made, request("first", range(8)))
    assert route(made, request("again", range(8))).num_cached_tokens == 4


def test_answers_become_prefixes_too() -> None:
    made = policy("a", "b")
    route(made, request("turn1", range(8)))
    made.produced(RequestId("turn1"), list(range(100, 108)))
    made.finish(RequestId("turn1"))
    follow_up = [*range(8), *range(100, 108), 7, 7]
    assert route(made, request("turn2", follow_up)).num_cached_tokens == 16


def test_tenants_do_not_share_prefixes() -> None:
    made = policy("a")
    route(made, request("one", range(40), salt="alice"))
    assert route(made, request("two", range(40), salt="bob")).num_cached_tokens == 0
    assert route(made, request("three", range(40), salt="alice")).num_cached_tokens == 36


def test_a_full_cache_counts_as_work() -> None:
    made = policy("a", "b", affinity=False, expected=10)
    made.observe("a", LoadSnapshot(num_free_tokens=0))
    assert route(made, request("r", range(100))).replica_id == "b"


def test_what_others_sent_counts() -> None:
    made = policy("a", "b", affinity=False)
    made.observe("a", LoadSnapshot(num_running=5, num_free_tokens=100_000))
    assert [route(made, request(f"r{i}", [1])).replica_id for i in range(2)] == ["b", "b"]


def test_decoding_lowers_the_predicted_work() -> None:
    made = policy("a", expected=10)
    route(made, request("r", range(20)))
    assert made.loads()["a"] == (1, 30)
    made.produced(RequestId("r"), [1])
    assert made.loads()["a"] == (1, 9)
    for _ in range(20):
        made.produced(RequestId("r"), [1])
    assert made.loads()["a"] == (1, 21)  # longer than expected: as long again
    made.finish(RequestId("r"))
    assert made.loads()["a"] == (0, 0)


def test_the_expected_length_is_learned_from_what_finished() -> None:
    made = policy("a", expected=900, affinity=False)

    def work_of_next(name: str) -> float:
        route(made, request(name, [1], max_tokens=10_000))
        work = made.loads()["a"][1]
        made.produced(RequestId(name), [1] * 18)
        made.finish(RequestId(name))
        return work

    assert work_of_next("first") == 901
    assert work_of_next("second") == pytest.approx(1 + (8 * 900 + 18) / 9, abs=1), "one answer is not all answers"
    for index in range(600):
        work_of_next(f"r{index}")
    assert work_of_next("last") == pytest.approx(19, abs=1)


@given(seed=st.integers(0, 10_000))
def test_loads_return_to_zero_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    made = policy("a", "b", expected=chance.randint(1, 50))
    open_requests: list[RequestId] = []
    for index in range(100):
        match chance.randint(0, 5):
            case 0 | 1 | 2:
                name = RequestId(f"r{index}")
                if made.route(request(name, [chance.randint(0, 3) for _ in range(chance.randint(1, 30))])):
                    open_requests.append(name)
            case 3 if open_requests:
                made.produced(chance.choice(open_requests), [1] * chance.randint(1, 20))
            case 4 if open_requests:
                name = open_requests.pop(chance.randrange(len(open_requests)))
                made.finish(name, is_complete=chance.random() < 0.5)
                made.finish(name)
            case 5 if chance.random() < 0.2:
                gone = chance.choice(["a", "b"])
                made.remove_replica(gone)
                made.add_replica(gone, capacity_tokens=1000, block_size=BLOCK)
    for name in open_requests:
        made.finish(name, is_complete=False)
    assert made.loads() == {"a": (0, 0), "b": (0, 0)}


def test_the_index_is_bounded_and_keeps_heads_longest() -> None:
    index = PrefixIndex(4)
    first = block_hashes(range(16), BLOCK, "")
    index.add(first)
    second = block_hashes(range(100, 108), BLOCK, "")
    index.add(second)
    assert index.match(second) == 2
    assert index.match(first) == 2, "the tail of the older chain goes first"


def test_hashes_cover_everything_before_them() -> None:
    one = block_hashes([1, 2, 3, 4, 5, 6, 7, 8], BLOCK, "")
    other = block_hashes([9, 2, 3, 4, 5, 6, 7, 8, 9], BLOCK, "")
    assert len(one) == len(other) == 2
    assert one[1] != other[1]
