"""The profiler measures the operations of a traced layer on this device with these libraries, as the runtime runs them.

Every node alone over a grid of tokens and contexts, then in pairs: the network beside whatever computes and, on a GPU,
compute beside memory too. Repetitions go round the grid so that a disturbance hits all points alike; a point counts
with its median. All ranks measure the same things in the same order and agree on every number, so that they end with
the same profile: the slowest rank's time, and for a collective the time of the rank that entered it last.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_cache import KVCache
from engine.operation import Resource, TokenKind
from engine.pipeline.atomic_file import read_file
from engine.pipeline.cost_model import Mode
from engine.pipeline.fingerprint import Fingerprint, differences
from engine.pipeline.graph import Node
from engine.pipeline.layer_bench import LayerBench
from engine.pipeline.layer_program import LayerProgram
from engine.pipeline.profile import Interference, NodeProfile, Profile, Sample
from engine.pipeline.rank_agreement import FirstRankError, RankAgreement
from engine.pipeline.schedule import ALL_UNITS
from engine.pipeline.synthetic_step import synthetic_cache
from engine.pipeline.timer import CudaTimer, HostTimer, Load, Timer
from engine.tensor_parallel import TensorParallel

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_MIN_ROUNDS, _MAX_ROUNDS = 3, 200
_MAX_COLLECTIVES = 8
_LONGEST_CONTEXT = 4096
# Nothing is sped up by company, and nothing stands still for it; what was measured beyond is noise.
_SLOWEST, _FASTEST = 0.05, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileGrid:
    """What is measured, and for about how long in all: making the inputs and the least repetitions come on top.

    `sizes` are fractions of the dense batch (for decodes: of the most sequences), `contexts` of the longest sequence.
    """

    name: str
    seconds: float
    sizes: tuple[float, ...]
    contexts: tuple[float, ...]


QUICK = ProfileGrid(name="quick", seconds=4.0, sizes=(1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0), contexts=(1 / 8, 1 / 2))
THOROUGH = ProfileGrid(
    name="thorough",
    seconds=60.0,
    sizes=(1 / 128, 1 / 64, 1 / 32, *(part / 16 for part in range(1, 17))),
    contexts=(1 / 16, 1 / 4, 3 / 4),
)


class Profiler:
    """Profiles one layer of this rank's model. Every rank of the group makes one and calls `profile` with the others.

    `unit_streams`: on a GPU, streams that own so many tenths of the execution units, to measure shares with.
    """

    def __init__(
        self,
        program: LayerProgram,
        config: EngineConfig,
        tensor_parallel: TensorParallel,
        device: torch.device,
        fingerprint: Fingerprint,
        grid: ProfileGrid = QUICK,
        unit_streams: Mapping[int, torch.cuda.Stream] | None = None,
    ) -> None:
        self._program, self._traced = program, program.traced
        self._config = config
        self._device = device
        self._grid = grid
        self._unit_streams = dict(sorted((unit_streams or {}).items()))
        self._ranks = RankAgreement(tensor_parallel, device)
        self._timer: Timer = CudaTimer() if device.type == "cuda" else HostTimer()
        self._benches: dict[tuple[BatchShape, str], LayerBench] = {}
        self._path: Path | None = None
        self._done = Profile(
            fingerprint=dict(fingerprint),
            source=f"measured on {fingerprint.get('device', device.type)}, {tensor_parallel.size} rank(s), {grid.name}",
            element_bytes=config.dtype.num_bytes,
            layer=program.graph.signature,
        )

    @torch.inference_mode()
    def profile(
        self, path: Path | None = None, progress: Progress | None = None, *, must_write: bool = True
    ) -> Profile:
        """Measure what the file at `path` does not hold yet; rank 0 writes it after every node and every pair.

        A file of another fingerprint, or one that cannot be read, is measured anew and replaced. Where it cannot be
        written, all ranks raise `ConfigError`, or, without `must_write`, go on without a file.
        """
        self._path = path
        stored = self._stored(path)
        if stored is not None:
            self._done = replace(self._done, nodes=stored.nodes, interference=stored.interference)
        nodes, pairs = self._traced.graph.nodes, self._pairs
        total = len(nodes) + len(pairs)
        budget = self._grid.seconds / total
        for index, node in enumerate(nodes):
            if not self._is_profiled(node):
                measured = self._node_profile(node, budget)
                self._keep(replace(self._done, nodes={**self._done.nodes, node.name: measured}), must_write)
            if progress is not None:
                progress(index + 1, total)
        for index, (node, others) in enumerate(pairs):
            missing = [other for other in others if not self._is_paired(node, other)]
            if missing:
                speeds = self._pair_speeds(node, missing[0], budget)
                found = tuple(_interference(node, other, speeds) for other in missing)
                self._keep(replace(self._done, interference=sum(found, self._done.interference)), must_write)
            if progress is not None:
                progress(len(nodes) + index + 1, total)
        self._benches.clear()
        return self._done

    def finished(self, path: Path) -> Profile | None:
        """The profile in the file, if every node and pair was measured for this fingerprint, at whatever sizes."""
        found = self._stored(path)
        if found is None:
            return None
        pairs = {(node.name, other.name) for node, others in self._pairs for other in others}
        is_finished = pairs <= {(pair.node, pair.beside) for pair in found.interference}
        return found if is_finished and {node.name for node in self._traced.graph.nodes} <= set(found.nodes) else None

    @cached_property
    def _pairs(self) -> tuple[tuple[Node, tuple[Node, ...]], ...]:
        """(node, nodes of another resource that cost alike): of those that cost alike, one is measured for all."""
        alike: dict[tuple[Resource, str], list[Node]] = {}
        for node in self._traced.graph.nodes:
            name = repr([call.signature for call in node.calls]) if node.resource is Resource.NETWORK else node.name
            alike.setdefault((node.resource, name), []).append(node)
        partners = [nodes for (resource, _), nodes in alike.items() if resource is Resource.NETWORK]
        pairs = [
            (node, tuple(nodes))
            for node in self._traced.graph.nodes
            if node.resource is not Resource.NETWORK
            for nodes in partners
        ]
        if self._device.type == "cuda":
            memory = [node for node in self._traced.graph.nodes if node.resource is Resource.MEMORY]
            computing = [node for node in self._traced.graph.nodes if node.resource is Resource.COMPUTE]
            pairs += [(node, (other,)) for node in computing for other in memory]
        return tuple(pairs)

    def _stored(self, path: Path | None) -> Profile | None:
        """What the file holds, if rank 0 finds one of this fingerprint there."""
        if path is None:
            return None
        text = self._ranks.done_by_first(lambda: self._read(path))
        return Profile.parse(text, str(path)) if text else None

    def _read(self, path: Path) -> str:
        """Nothing for a file that is missing or of no use, the latter with the reason logged."""
        try:
            text = read_file(path)
            if text is None:
                return ""
            changes = differences(Profile.parse(text, str(path)).fingerprint, self._done.fingerprint)
        except ConfigError as error:
            _log.warning("%s Its operations are measured anew.", error)
            return ""
        if changes:
            _log.info("%s is measured anew: %s.", path, "; ".join(changes))
        return "" if changes else text

    def _keep(self, profile: Profile, must_write: bool) -> None:
        self._done = profile
        if self._path is None:
            return
        try:
            self._ranks.done_by_first(partial(_written, profile, self._path))
        except FirstRankError as error:
            if must_write:
                raise ConfigError(str(error)) from error
            if self._ranks.is_first:
                _log.warning("%s What is measured now will be measured again at the next start.", error)
            self._path = None

    def _is_profiled(self, node: Node) -> bool:
        found = self._done.nodes.get(node.name)
        wanted = {_recorded(node, shape) for shape in self._shapes(node)}
        return found is not None and wanted <= {sample.shape for sample in found.samples}

    def _is_paired(self, node: Node, other: Node) -> bool:
        return (node.name, other.name) in {(pair.node, pair.beside) for pair in self._done.interference}

    def _shapes(self, node: Node) -> list[BatchShape]:
        """The points of the grid for a node: sizes, and contexts where it reads the cache."""
        config, grid = self._config, self._grid
        largest = config.max_sequences if node.tokens is TokenKind.DECODE else config.max_batch_tokens
        sizes = sorted({max(1, round(largest * part)) for part in grid.sizes})
        longest = min(config.max_model_len, _LONGEST_CONTEXT)
        contexts = sorted({max(1, round(longest * part)) for part in grid.contexts})
        return [
            _shape_of(node, size, context)
            for context in (contexts if node.cache_reads else contexts[:1])
            for size in sizes
        ]

    def _node_profile(self, node: Node, budget: float) -> NodeProfile:
        shapes = self._shapes(node)
        loads = [self._load(node, shape) for shape in shapes]
        seconds = self._medians(loads, budget, is_network=node.resource is Resource.NETWORK)
        samples = tuple(Sample(_recorded(node, shape), second) for shape, second in zip(shapes, seconds, strict=True))
        modes = tuple(self._modes(loads[-1])) if node.resource is not Resource.NETWORK else ()
        if not node.cache_reads:
            return NodeProfile(samples, modes)
        for key in [key for key in self._benches if key[1] == node.name]:
            del self._benches[key]
        return NodeProfile(samples, modes)

    def _load(self, node: Node, shape: BatchShape) -> Load:
        """The node on the tokens of `shape`: those of all kinds on a part of one large batch, attention on its own."""
        ordinary = [
            other.name for other in self._traced.graph.nodes if other.tokens is TokenKind.ALL and not other.cache_reads
        ]
        if node.name in ordinary:
            key, names = (_shape_of(node, self._config.max_batch_tokens, shape.prefill_context), ""), ordinary
        else:
            key, names = (shape, node.name), [node.name]
        if key not in self._benches:
            self._benches[key] = LayerBench(self._program, self._config, self._cache, key[0], names)
        return self._benches[key].load(node.name, int(shape.num_tokens))

    @cached_property
    def _cache(self) -> KVCache:
        shapes = [shape for node in self._traced.graph.nodes for shape in self._shapes(node)]
        num_tokens = max(
            shape.num_decodes * (shape.decode_context + self._config.block_size)
            + shape.num_prefills * (2 + shape.prefill_context / self._config.block_size)
            for shape in shapes
        )
        return synthetic_cache(self._config, math.ceil(num_tokens), self._device)

    def _medians(self, loads: Sequence[Load], budget: float, is_network: bool) -> list[float]:
        """The median seconds of each load, in `budget` seconds of repetitions that go round all of them."""
        for load in loads:
            load.run()
        estimates = self._ranks.largest([self._cost_of(load, is_network) for load in loads])
        rounds = [_num_rounds(budget / len(loads), estimate) for estimate in estimates]
        samples: list[list[float]] = [[] for _ in loads]
        for number in range(max(rounds)):
            for load, count, found in zip(loads, rounds, samples, strict=True):
                if number < count:
                    found.append(self._once(load, is_network))
        medians = [statistics.median(found) for found in samples]
        # A rank that comes early to a collective waits there for the others: the last one's time is its own.
        return self._ranks.smallest(medians) if is_network else self._ranks.largest(medians)

    def _cost_of(self, load: Load, is_network: bool) -> float:
        """What a repetition takes with everything around it."""
        started = time.perf_counter()
        self._once(load, is_network)
        return time.perf_counter() - started

    def _once(self, load: Load, is_network: bool) -> float:
        if is_network:
            self._ranks.meet()
        return self._timer.seconds(load)

    def _modes(self, load: Load) -> Iterator[Mode]:
        """The speed of the load with each share of the units, relative to all of them."""
        if not isinstance(self._timer, CudaTimer) or not self._unit_streams:
            return
        samples: dict[int, list[float]] = {share: [] for share in (*self._unit_streams, ALL_UNITS)}
        for _ in range(2 * _MIN_ROUNDS):
            for share, found in samples.items():
                found.append(self._timer.seconds(load, self._unit_streams.get(share)))
        seconds = self._ranks.largest([statistics.median(found) for found in samples.values()])
        for share, second in sorted(zip(samples, seconds, strict=True)):
            yield Mode(share, min(_FASTEST, seconds[-1] / second) if share < ALL_UNITS else 1.0)

    def _pair_speeds(self, node: Node, other: Node, budget: float) -> tuple[float, float]:
        """Speeds of both while the other runs, relative to alone, for half a batch of each."""
        first, second = (self._load(each, self._half_shape(each)) for each in (node, other))
        for load in (first, second):
            load.run()
        estimates = [self._once(first, is_network=True), self._once(second, is_network=True)]
        first_seconds, second_seconds = self._ranks.largest(estimates)
        num_second = min(_MAX_COLLECTIVES, math.ceil(2 * first_seconds / second_seconds))
        num_first = max(1, round(num_second * second_seconds / first_seconds))
        estimate = 2 * (num_first * first_seconds + num_second * second_seconds)
        speeds: tuple[list[float], list[float]] = ([], [])
        for _ in range(_num_rounds(budget, estimate)):
            alone = []
            for counts in ((num_first, 0), (0, num_second)):
                self._ranks.meet()
                alone.append(max(self._timer.together(first, counts[0], second, counts[1])))
            self._ranks.meet()
            together = self._timer.together(first, num_first, second, num_second)
            for found, speed in zip(speeds, overlapped_speeds((alone[0], alone[1]), together), strict=True):
                found.append(speed)
        first_speed, second_speed = self._ranks.smallest([statistics.median(found) for found in speeds])
        return first_speed, second_speed

    def _half_shape(self, node: Node) -> BatchShape:
        """The shape of the node's grid nearest to half a dense batch, with the shortest context."""
        half = self._config.max_batch_tokens / 2
        return min(self._shapes(node), key=lambda shape: abs(shape.num_tokens - half))


def overlapped_speeds(alone: tuple[float, float], together: tuple[float, float]) -> tuple[float, float]:
    """Speeds of two bodies of work while both run, from their seconds alone and when begun together.

    The one that ends later runs alone for the rest: what it did in that time does not count.
    """
    both = min(together)
    speeds = [(own - (ended - both)) / both for own, ended in zip(alone, together, strict=True)]
    first, second = (min(_FASTEST, max(_SLOWEST, speed)) for speed in speeds)
    return first, second


def _written(profile: Profile, path: Path) -> str:
    profile.write(path)
    return str(path)


def _interference(node: Node, other: Node, speeds: tuple[float, float]) -> tuple[Interference, Interference]:
    return Interference(node.name, other.name, speeds[0]), Interference(other.name, node.name, speeds[1])


def _num_rounds(budget: float, seconds: float) -> int:
    return max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(budget / max(seconds, 1e-9))))


def _shape_of(node: Node, size: int, context: float) -> BatchShape:
    if node.tokens is TokenKind.DECODE:
        return BatchShape(num_decodes=size, num_prefills=0, decode_context=context)
    return BatchShape(num_decodes=0, num_prefills=size, prefill_context=context)


def _recorded(node: Node, shape: BatchShape) -> BatchShape:
    """The shape without what does not matter to the node."""
    return shape if node.cache_reads else replace(shape, decode_context=0.0, prefill_context=0.0)
