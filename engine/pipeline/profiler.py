"""The profiler measures the operations of a traced layer on this device with these libraries, as the runtime runs them.

Every node alone over a grid of tokens and contexts, then in pairs: the network beside whatever computes and, on a GPU,
compute beside memory too. There nodes also run alone with a share of the execution units, and nodes and pairs do so by
every mechanism that lanes can overlap by (`granted_loads`). All ranks measure the same things in the same order and
agree on every number (`agreed_times`), so that they end with the same profile.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_cache import KVCache
from engine.operation import Resource, TokenKind
from engine.pipeline.agreed_times import AgreedTimes
from engine.pipeline.atomic_file import read_file
from engine.pipeline.cost_model import Mode
from engine.pipeline.device_lanes import DeviceLanes
from engine.pipeline.fingerprint import Fingerprint, differences
from engine.pipeline.granted_loads import PAIRED_SHARE, GrantedLoads, measured_shares, shares_of
from engine.pipeline.graph import Node
from engine.pipeline.layer_bench import LayerBench
from engine.pipeline.layer_program import LayerProgram
from engine.pipeline.pairing import Pairing, pairings
from engine.pipeline.placement import GPU_LANES, lane_of
from engine.pipeline.profile import NodeProfile, Profile, Sample
from engine.pipeline.profile_grid import QUICK, ProfileGrid
from engine.pipeline.rank_agreement import FirstRankError, RankAgreement
from engine.pipeline.schedule import ALL_UNITS, Mechanism
from engine.pipeline.synthetic_step import synthetic_cache
from engine.pipeline.timer import CudaTimer, HostTimer, Load
from engine.tensor_parallel import TensorParallel
from engine.units_at_hand import UnitsAtHand

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_LONGEST_CONTEXT = 4096
# A collective's library takes few units, and as many whatever a schedule says.
_COLLECTIVE_MODES = (Mode(1, 1.0), Mode(ALL_UNITS, 1.0))


class Profiler:
    """Profiles one layer of this rank's model. Every rank of the group makes one and calls `profile` with the others.

    `units`: what the model's kernels ask for how many they may take, where some do.
    """

    def __init__(
        self,
        program: LayerProgram,
        config: EngineConfig,
        tensor_parallel: TensorParallel,
        device: torch.device,
        fingerprint: Fingerprint,
        grid: ProfileGrid = QUICK,
        units: UnitsAtHand | None = None,
        lanes: DeviceLanes | None = None,
    ) -> None:
        self._program, self._traced = program, program.traced
        self._config = config
        self._device = device
        self._grid = grid
        self._granted = None
        if device.type == "cuda":
            self._granted = GrantedLoads(device, units, None if lanes is None else lanes.grants)
        self._ranks = RankAgreement(tensor_parallel, device)
        self._times = AgreedTimes(self._ranks, CudaTimer() if device.type == "cuda" else HostTimer())
        self._benches: dict[tuple[BatchShape, str], LayerBench] = {}
        self._path: Path | None = None
        self._done = Profile(
            fingerprint=dict(fingerprint),
            source=f"measured on {fingerprint.get('device', device.type)}, {tensor_parallel.size} rank(s), {grid.name}",
            number_format=config.number_format,
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
            self._done = replace(
                self._done, nodes=stored.nodes, interference=stored.interference, overlap=stored.overlap
            )
        nodes, pairs = self._traced.graph.nodes, self._pairs
        total = len(nodes) + len(pairs)
        budget = self._grid.seconds / total
        for index, node in enumerate(nodes):
            if not self._is_profiled(node):
                self._keep(self._with_node(node, budget), must_write)
            if progress is not None:
                progress(index + 1, total)
        for index, pairing in enumerate(pairs):
            missing = pairing.missing_in(self._done)
            if missing:
                speeds = self._pair_speeds(pairing.node, missing[0], budget, pairing.mechanism)
                self._keep(pairing.added_to(self._done, missing, speeds), must_write)
            if progress is not None:
                progress(len(nodes) + index + 1, total)
        self._benches.clear()
        return self._done

    def finished(self, path: Path) -> Profile | None:
        """The profile in the file, if every node and pair was measured for this fingerprint, at whatever sizes."""
        found = self._stored(path)
        if found is None:
            return None
        nodes = self._traced.graph.nodes
        has_nodes = all(node.name in found.nodes and self._has_modes(found, node) for node in nodes)
        return found if has_nodes and not any(pairing.missing_in(found) for pairing in self._pairs) else None

    @cached_property
    def _mechanisms(self) -> tuple[Mechanism, ...]:
        """What lanes can overlap by on every rank's device; none on a CPU, where units are not divided."""
        if self._granted is None:
            return ()
        offered = self._granted.offered()
        agreed = self._ranks.smallest([float(is_offered) for is_offered in offered.values()])
        return tuple(mechanism for mechanism, is_offered in zip(offered, agreed, strict=True) if is_offered)

    @cached_property
    def _pairs(self) -> tuple[Pairing, ...]:
        return tuple(pairings(self._traced.graph, self._mechanisms))

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
        if found is None:
            return False
        wanted = {_recorded(node, shape) for shape in self._shapes(node)}
        return self._has_modes(self._done, node) and wanted <= {sample.shape for sample in found.samples}

    def _has_modes(self, profile: Profile, node: Node) -> bool:
        """Whether its speeds were measured by every mechanism that there is here."""
        return all(
            mechanism in profile.mechanisms and profile.by(mechanism).nodes[node.name].modes
            for mechanism in self._mechanisms
        )

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

    def _with_node(self, node: Node, budget: float) -> Profile:
        """What is known, with what this node takes."""
        shapes = self._shapes(node)
        loads = [self._load(node, shape) for shape in shapes]
        seconds = self._times.medians(loads, budget, is_network=node.resource is Resource.NETWORK)
        samples = tuple(Sample(_recorded(node, shape), second) for shape, second in zip(shapes, seconds, strict=True))
        modes = self._modes(node, loads[-1]) if self._mechanisms else {}
        measured = NodeProfile(samples, modes.pop(Mechanism.STREAMS, ()))
        profile = replace(self._done, nodes={**self._done.nodes, node.name: measured})
        for mechanism, found in modes.items():
            profile = profile.with_overlap(mechanism, modes={node.name: found})
        if node.cache_reads:
            for key in [key for key in self._benches if key[1] == node.name]:
                del self._benches[key]
        return profile

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

    def _modes(self, node: Node, load: Load) -> dict[Mechanism, tuple[Mode, ...]]:
        """The speeds of the load with a share of the units by each mechanism, relative to all of them."""
        if node.resource is Resource.NETWORK or self._granted is None:
            return dict.fromkeys(self._mechanisms, _COLLECTIVE_MODES)
        lane = lane_of(node, GPU_LANES)
        points = [(mechanism, share) for mechanism in self._mechanisms for share in measured_shares(mechanism, lane)]
        loads = [self._granted.load(load, mechanism, lane, share) for mechanism, share in points]
        speeds = self._times.speeds_of([load, *loads])
        modes: dict[Mechanism, dict[int, Mode]] = {each: {ALL_UNITS: Mode(ALL_UNITS, 1.0)} for each in self._mechanisms}
        for (mechanism, share), speed in zip(points, speeds, strict=True):
            modes[mechanism][share] = Mode(share, speed)
        return {each: tuple(found[share] for share in sorted(found)) for each, found in modes.items()}

    def _pair_speeds(
        self, node: Node, other: Node, budget: float, mechanism: Mechanism = Mechanism.STREAMS
    ) -> tuple[float, float]:
        """Speeds of both while the other runs, relative to alone, for half a batch of each."""
        first, second = (self._pair_load(each, mechanism, beside) for each, beside in ((node, other), (other, node)))
        return self._times.pair_speeds(first, second, budget)

    def _pair_load(self, node: Node, mechanism: Mechanism, beside: Node) -> Load:
        """What runs the node once beside the other; on a GPU two nodes that divide its units do it by their shares."""
        load = self._load(node, self._half_shape(node))
        if self._granted is None or Resource.NETWORK in (node.resource, beside.resource):
            return load
        lane = lane_of(node, GPU_LANES)
        return self._granted.load(load, mechanism, lane, shares_of(mechanism, PAIRED_SHARE)[lane])

    def _half_shape(self, node: Node) -> BatchShape:
        """The shape of the node's grid nearest to half a dense batch, with the shortest context."""
        half = self._config.max_batch_tokens / 2
        return min(self._shapes(node), key=lambda shape: abs(shape.num_tokens - half))


def _written(profile: Profile, path: Path) -> str:
    profile.write(path)
    return str(path)


def _shape_of(node: Node, size: int, context: float) -> BatchShape:
    if node.tokens is TokenKind.DECODE:
        return BatchShape(num_decodes=size, num_prefills=0, decode_context=context)
    return BatchShape(num_decodes=0, num_prefills=size, prefill_context=context)


def _recorded(node: Node, shape: BatchShape) -> BatchShape:
    """The shape without what does not matter to the node."""
    return shape if node.cache_reads else replace(shape, decode_context=0.0, prefill_context=0.0)
