"""`RoutingPolicy`: which replica a request should go to, by predicted work in tokens. Pure: no Ray, clock or chance.

The cost of a replica is the work it has to finish before and while it serves the request: the uncached part of this
prompt, the prefill and expected decode of what this ingress sent there and has not seen finish, an estimate for what
others sent (from the load that replicas attach to every step), and the tokens that must first be freed where the KV
cache would overflow. A cached prefix is worth exactly the prefill it saves, so affinity can never build a hot spot.
Loads are kept per request and given back whole when it ends, however it ends.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine import Request, RequestId

_PRIOR_REQUESTS = 8  # finished requests that the recipe's expected length counts as
_LENGTH_MEMORY = 64  # finished requests after which the expected length has mostly forgotten older ones


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """What a replica says about itself, on every step message; counts requests of every ingress."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a request goes, how much of its prompt should be cached there, and the predicted work before its end."""

    replica_id: str
    num_cached_tokens: int
    cost: float


class PrefixIndex:
    """The block hashes of prompts and answers that a replica has seen lately; forgets the least recently used."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max(1, max_blocks)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, hashes: Sequence[int]) -> int:
        """How many leading blocks are known."""
        for index, block in enumerate(hashes):
            if block not in self._blocks:
                return index
        return len(hashes)

    def add(self, hashes: Sequence[int]) -> None:
        """Remember a chain. Its head is the most recently used, as a chain without it is worth nothing."""
        for block in reversed(hashes):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)


def block_hashes(tokens: Sequence[int], block_size: int, salt: str) -> list[int]:
    """A hash per full block, each including everything before it (and the tenant's salt)."""
    chain = hash(salt)
    hashes = []
    for end in range(block_size, len(tokens) + 1, block_size):
        chain = hash((chain, tuple(tokens[end - block_size : end])))
        hashes.append(chain)
    return hashes


@dataclass(slots=True)
class _OpenRequest:
    request: Request
    work: int  # tokens this request is predicted to need still, as counted in its replica's work
    token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Replica:
    capacity_tokens: int
    block_size: int
    prefixes: PrefixIndex
    snapshot: LoadSnapshot
    open: dict[RequestId, _OpenRequest] = field(default_factory=dict)
    work: int = 0  # the sum over `open`
    last_chosen: int = 0


class RoutingPolicy:
    """The state of one ingress's routing: its replicas, and the requests it has open on each."""

    def __init__(self, *, prefix_affinity: bool = True, expected_output_tokens: int = 128) -> None:
        self._prefix_affinity = prefix_affinity
        self._expected_output = float(expected_output_tokens)
        self._num_finished = 0
        self._num_decisions = 0
        self._replicas: dict[str, _Replica] = {}
        self._replica_of: dict[RequestId, str] = {}

    @property
    def replica_ids(self) -> list[str]:
        """Replicas that requests may go to."""
        return list(self._replicas)

    def add_replica(self, replica_id: str, *, capacity_tokens: int, block_size: int) -> None:
        """A replica is ready; its cache holds `capacity_tokens` in blocks of `block_size`."""
        self._replicas[replica_id] = _Replica(
            capacity_tokens,
            block_size,
            PrefixIndex(capacity_tokens // block_size),
            LoadSnapshot(num_free_tokens=capacity_tokens),
        )

    def remove_replica(self, replica_id: str) -> None:
        """A replica is gone or draining; whatever was open there is forgotten."""
        replica = self._replicas.pop(replica_id, None)
        for request_id in replica.open if replica is not None else ():
            del self._replica_of[request_id]

    def observe(self, replica_id: str, snapshot: LoadSnapshot) -> None:
        """A replica told its load."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.snapshot = snapshot

    def route(self, request: Request) -> Decision | None:
        """Choose a replica and count the request there; None when there is no replica to choose."""
        hashes: dict[int, list[int]] = {}
        best: tuple[float, int, Decision] | None = None
        for replica_id, replica in self._replicas.items():
            if replica.block_size not in hashes:
                hashes[replica.block_size] = self._hash(request, (), replica.block_size)
            cached = self._cached_tokens(replica, request, hashes[replica.block_size])
            cost = self._cost(replica, request, cached)
            # Equal costs go to the replica that waited longest for a request.
            rank = (cost, replica.last_chosen, Decision(replica_id=replica_id, num_cached_tokens=cached, cost=cost))
            if best is None or rank[:2] < best[:2]:
                best = rank
        if best is None:
            return None
        decision = best[2]
        replica = self._replicas[decision.replica_id]
        self._num_decisions += 1
        replica.last_chosen = self._num_decisions
        prefill = len(request.prompt_token_ids) - decision.num_cached_tokens
        work = prefill + self._expected_remaining(request, 0)
        replica.open[request.request_id] = _OpenRequest(request, work)
        replica.work += work
        self._replica_of[request.request_id] = decision.replica_id
        replica.prefixes.add(hashes[replica.block_size])
        return decision

    def produced(self, request_id: RequestId, token_ids: Sequence[int]) -> None:
        """Tokens of an open request arrived, so its prefill is over too."""
        replica = self._replicas.get(self._replica_of.get(request_id, ""))
        if replica is not None:
            open_request = replica.open[request_id]
            open_request.token_ids.extend(token_ids)
            work = self._expected_remaining(open_request.request, len(open_request.token_ids))
            replica.work += work - open_request.work
            open_request.work = work

    def finish(self, request_id: RequestId, *, is_complete: bool = True) -> None:
        """A request ended; `is_complete` unless it failed or was aborted. Idempotent."""
        replica = self._replicas.get(self._replica_of.pop(request_id, ""))
        if replica is None:
            return
        ended = replica.open.pop(request_id)
        replica.work -= ended.work
        replica.prefixes.add(self._hash(ended.request, ended.token_ids, replica.block_size))
        if is_complete:
            self._num_finished += 1
            weight = 1 / min(_PRIOR_REQUESTS + self._num_finished, _LENGTH_MEMORY)
            self._expected_output += weight * (len(ended.token_ids) - self._expected_output)

    def loads(self) -> dict[str, tuple[int, float]]:
        """Per replica: requests this ingress has open there, and all the work predicted there, in tokens."""
        return {
            replica_id: (len(replica.open), replica.work + self._foreign_work(replica))
            for replica_id, replica in self._replicas.items()
        }

    def _hash(self, request: Request, generated: Sequence[int], block_size: int) -> list[int]:
        if not self._prefix_affinity:
            return []
        return block_hashes((*request.prompt_token_ids, *generated), block_size, request.cache_salt)

    def _cached_tokens(self, replica: _Replica, request: Request, hashes: Sequence[int]) -> int:
        # The last prompt token is computed always: its logits draw the first token.
        reusable = (len(request.prompt_token_ids) - 1) // replica.block_size
        return replica.prefixes.match(hashes[:reusable]) * replica.block_size

    def _cost(self, replica: _Replica, request: Request, cached: int) -> float:
        prefill = len(request.prompt_token_ids) - cached
        to_come = prefill + self._expected_remaining(request, 0) + replica.work
        overflow = max(0, to_come - replica.snapshot.num_free_tokens)
        return prefill + replica.work + self._foreign_work(replica) + overflow

    def _foreign_work(self, replica: _Replica) -> float:
        """Requests the replica has beyond ours, each half done if running."""
        snapshot = replica.snapshot
        foreign = max(0, snapshot.num_running + snapshot.num_waiting - len(replica.open))
        waiting = min(foreign, snapshot.num_waiting)
        return self._expected_output * (waiting + (foreign - waiting) / 2)

    def _expected_remaining(self, request: Request, num_generated: int) -> int:
        """Tokens still to come; a request that outlived the expectation is taken to go on as long again."""
        expected = self._expected_output if num_generated < self._expected_output else 2.0 * num_generated
        return max(1, int(min(expected, request.sampling.max_tokens)) - num_generated)
