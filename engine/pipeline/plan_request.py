"""`PlanRequest`: what to plan, for people: a model, devices that may be elsewhere, a batch, whose prices."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.number_format import NumberFormat
from engine.operation import Resource
from engine.pipeline.collective_placement import with_gather_branch
from engine.pipeline.cost_model import CostModel, Mode
from engine.pipeline.devices import CPU, DeviceSpec
from engine.pipeline.mechanism_plans import plan_by
from engine.pipeline.operation_table import OperationTable, operation_table
from engine.pipeline.overlap_costs import OverlapCosts
from engine.pipeline.placement import CPU_LANES, GPU_LANES
from engine.pipeline.plan import Plan, SearchState
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.planner import plan
from engine.pipeline.profile import MeasuredCosts, NodeProfile, Profile
from engine.pipeline.roofline import RooflineCosts
from engine.pipeline.schedule import Lane, Mechanism, Schedule
from engine.pipeline.search import Problem
from engine.pipeline.sequential import sequential_schedule
from engine.pipeline.tracer import TracedLayer
from engine.pipeline.unit_sharing import SHARINGS, SharingName

_TOKEN_MULTIPLE, _NANO_BATCH_SIZES = 128, 8


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Requests of p prompt and d output tokens settle at the batch that is planned for (`BatchShape.steady`).

    `profile` None: prices are estimated from `device`. `sharing` None: shares and speeds are those of the profile or
    else of the device. With `considers_gather` the planner may gather before attention's projection instead of reducing
    after it, which the engine does not run. `mechanism`: what lanes overlap by; any other than streams wants a profile
    that has it. Raises `ConfigError` for a profile of another layer or number format.
    """

    name: str
    model: ModelConfig
    device: DeviceSpec
    num_devices: int
    num_tokens: int
    num_prompt_tokens: int
    num_output_tokens: int
    number_format: NumberFormat
    profile: Profile | None = None
    sharing: SharingName | None = None
    considers_gather: bool = False
    mechanism: Mechanism = Mechanism.STREAMS

    @property
    def shape(self) -> BatchShape:
        """The batch, in whole tokens."""
        shape = BatchShape.steady(self.num_tokens, self.num_prompt_tokens, self.num_output_tokens)
        num_decodes = round(shape.num_decodes)
        return shape.part(num_decodes, self.num_tokens - num_decodes)

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return self.number_format.dtype.num_bytes

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """What the devices can run side by side."""
        return CPU_LANES if self.device.name == CPU else GPU_LANES

    @cached_property
    def traced(self) -> TracedLayer:
        """What is planned: the layer, and where that is wanted the other way to place attention's collective."""
        return with_gather_branch(self._layer) if self.considers_gather else self._layer

    @cached_property
    def _layer(self) -> TracedLayer:
        """Of the layers that differ, the most frequent kind."""
        kinds = [(self.model.is_sparse(layer), self.model.sliding_window(layer)) for layer in range(self.num_layers)]
        layer = kinds.index(Counter(kinds).most_common(1)[0][0])
        return trace_planned_layer(self.model, self.num_devices, layer, self.number_format)

    @property
    def num_layers(self) -> int:
        """Of the model; all are taken to be of the most frequent kind."""
        return self.model.num_layers

    @cached_property
    def costs(self) -> CostModel:
        """The prices of operations; where the mechanism is another than streams, those of the sequential schedule."""
        if self.sharing not in (None, SharingName.NONE) and self.lanes is CPU_LANES:
            raise ConfigError("The operations of a CPU do not divide its units: leave out the table of shares.")
        if self.mechanism is not Mechanism.STREAMS and (self.profile is None or self.sharing is not None):
            raise ConfigError(
                f"How fast operations are where lanes overlap by {self.mechanism} must have been measured: plan from a "
                "profile, without a table of shares."
            )
        if self.profile is None:
            device = replace(self.device, sharing=None) if self.sharing is SharingName.NONE else self.device
            table = None if self.sharing is None else SHARINGS[self.sharing]
            return RooflineCosts(self.traced, device, self.num_devices, self.element_bytes, table)
        if self.considers_gather:
            raise ConfigError(
                "A profile holds what a layer does, which is to reduce: gathering instead is planned from estimates, "
                "without a profile."
            )
        if self.profile.number_format is not self.number_format:
            raise ConfigError(
                f"The profile ({self.profile.source}) was measured in {self.profile.number_format}, but the plan is to "
                f"be in {self.number_format}: ask for dtype {self.profile.number_format}, or profile in "
                f"{self.number_format}."
            )
        if self.profile.layer not in (None, self.traced.graph.signature):
            raise ConfigError(
                f"The profile ({self.profile.source}) is of another layer than that of {self.name} on "
                f"{self.num_devices} devices: profile this model with as many ranks."
            )
        return MeasuredCosts(self._shared(self.profile), self.traced.graph)

    @cached_property
    def table(self) -> OperationTable:
        """What each operation of a step asks of the devices at their peaks; of several branches the first."""
        unused = {node.name for node in self.traced.graph.nodes if node.branch in self.traced.graph.branches[1:]}
        table = operation_table(
            self.traced,
            self.shape,
            self._known_device,
            num_devices=self.num_devices,
            num_layers=self.num_layers,
            element_bytes=self.element_bytes,
        )
        return OperationTable(tuple(row for row in table.rows if row.name not in unused))

    def price(self, node: str) -> float:
        """Seconds of a node for the whole batch in all layers of a step, alone, by the cost model."""
        return self.num_layers * self.costs.seconds(self.traced.graph.by_name[node], self.shape)

    def answer(self, seconds: float, progress: Callable[[SearchState], None] = lambda state: None) -> Plan:
        """Search for about so long. Raises `ConfigError` where OR-tools is not installed."""
        assert self.table.rows  # what the device cannot do is refused here, before the search

        def search(costs: CostModel) -> Plan:
            return plan(
                self.traced.graph,
                costs,
                self.shape,
                num_layers=self.num_layers,
                lanes=self.lanes,
                seconds=seconds,
                token_multiple=min(_TOKEN_MULTIPLE, -(-self.num_tokens // _NANO_BATCH_SIZES)),
                progress=progress,
            )

        if self._overlap_costs is None:
            return search(self.costs)
        schedule = sequential_schedule(self.traced.graph, round(self.shape.num_decodes), round(self.shape.num_prefills))
        sequential = Problem(self.traced.graph, self.costs, self.shape, self.num_layers, self.lanes).candidate(schedule)
        return plan_by(self._overlap_costs, search, sequential)

    def costs_of(self, schedule: Schedule) -> CostModel:
        """The prices that predicted a schedule of the answer."""
        overlap = self._overlap_costs
        return self.costs if overlap is None or schedule.mechanism is not self.mechanism else overlap

    @cached_property
    def _overlap_costs(self) -> OverlapCosts | None:
        if self.mechanism is Mechanism.STREAMS:
            return None
        assert isinstance(self.costs, MeasuredCosts)
        if self.lanes is CPU_LANES:
            raise ConfigError(f"Lanes of a CPU do not overlap by {self.mechanism}: name the device that was profiled.")
        return OverlapCosts.of(self.mechanism, self.costs, self.shape)

    def _shared(self, profile: Profile) -> Profile:
        """The profile with the speeds of another table, or without any loss by sharing."""
        if self.sharing is None:
            return profile
        table = SHARINGS[self.sharing]
        nodes = {
            node.name: NodeProfile(
                profile.nodes[node.name].samples,
                ()
                if table is None
                else tuple(Mode(share, speed) for share, speed in enumerate(table.speeds(node.resource), 1)),
            )
            for node in self.traced.graph.nodes
            if node.name in profile.nodes
        }
        source = f"{profile.source}; speeds of shared units: {'no loss' if table is None else table.name}"
        return replace(profile, source=source, nodes=nodes, interference=())

    @property
    def _known_device(self) -> DeviceSpec:
        """The device; where nothing is known of its network, with the rate that the profile's collectives reached."""
        network = [node for node in self.traced.graph.nodes if node.resource is Resource.NETWORK]
        if self.device.network_bandwidth is not None or self.profile is None or not network:
            return self.device
        rate = max(
            self.traced.work(node, self.shape, self.element_bytes).network_bytes / self.costs.seconds(node, self.shape)
            for node in network
        )
        return replace(self.device, network_bandwidth=rate)
