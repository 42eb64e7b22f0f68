"""`Pipeline`: runs the layers of a model by a schedule, on the lanes of the device.

The model stays as it is: its layers are traced once, and a step walks the schedule instead of `forward`. A schedule
that was planned for one batch is scaled to the batch at hand; what order its steps are issued in is worked out
once per schedule. Layers whose graph the schedule was not made for run one operation after the other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from engine.kernels.compiled import CompiledKernels
from engine.kernels.kernel import Kernel
from engine.layers.attention import PagedAttention
from engine.layers.embedding import VocabParallelEmbedding
from engine.models.decoder import Decoder
from engine.pipeline.arena import Arena, RowShapes
from engine.pipeline.buffers import plan_buffers
from engine.pipeline.dispatch import Dispatch, dispatch_order, nano_batches_as_begun
from engine.pipeline.flight import Flight
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.lanes import Lanes
from engine.pipeline.layer_program import LayerProgram, shared_places
from engine.pipeline.nano_batch import Cut
from engine.pipeline.plain_run import compute, run_layers
from engine.pipeline.product_share import ProductShare
from engine.pipeline.schedule import Schedule
from engine.pipeline.sequential import sequential_schedule
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.step_parts import Parts, StepParts
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.pipeline.tracer import TracedLayer, trace_layer
from engine.pipeline.values import Values
from engine.pipeline.verify import verify
from engine.step_inputs import StepInputs
from engine.units_at_hand import UnitsAtHand


@dataclass(frozen=True)
class _Run:
    """Consecutive layers with the same graph."""

    traced: TracedLayer
    programs: tuple[LayerProgram, ...]


class Pipeline:
    """The layers of one rank's model. `graph` is that of the most layers: the one to plan for."""

    def __init__(self, model: Decoder, hidden_size: int) -> None:
        traced = [trace_layer(layer, hidden_size) for layer in model.layers]
        self._embedding = model.embed_tokens
        self._model = model
        self._runs = [
            _Run(group[0], tuple(map(LayerProgram.of, group)))
            for group in (list(layers) for _, layers in groupby(traced, key=lambda layer: layer.graph.signature))
        ]
        signatures = [layer.graph.signature for layer in traced]
        self.traced = max(traced, key=lambda layer: signatures.count(layer.graph.signature))
        self._orders: dict[tuple[Schedule, str, int], Sequence[Dispatch]] = {}
        self._leads: dict[Schedule, Sequence[int]] = {}
        self._arena = Arena()
        self._rows: dict[str, RowShapes] = {}
        self._sequential = {run.traced.graph.signature: sequential_schedule(run.traced.graph) for run in self._runs}

    @property
    def graph(self) -> OperationGraph:
        """What schedules are made for."""
        return self.traced.graph

    @property
    def units(self) -> UnitsAtHand | None:
        """What the model's kernels ask for how many they may take, where some do."""
        return self._model.units

    @property
    def program(self) -> LayerProgram:
        """The first of the layers that schedules are made for."""
        return next(program for program in self.programs if program.graph.signature == self.graph.signature)

    @property
    def programs(self) -> list[LayerProgram]:
        """All layers in order."""
        return [program for run in self._runs for program in run.programs]

    def kernels(self, dtype: str, block_size: int) -> list[Kernel]:
        """What can be compiled for these layers, on a CPU; see `engine.pipeline.chain`."""
        return [kernel for program in self.programs for kernel in program.kernels(dtype, block_size)]

    def use(self, kernels: CompiledKernels, dtype: str, block_size: int) -> None:
        """Compute with those kernels that there are, from the next step on."""
        known: dict[Kernel, ProductShare | None] = {}
        self._runs = [
            replace(run, programs=tuple(each.compiled(kernels, dtype, block_size, known) for each in run.programs))
            for run in self._runs
        ]

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """What makes the first layer's input."""
        return self._embedding

    @property
    def reads_lengths_on_device(self) -> bool:
        """Whether all that reads the cache is computed by kernels that find lengths and starts there."""
        calls = (call for program in self.programs for bound in program.nodes.values() for call in bound.calls)
        readers = [call.operation for call in calls if isinstance(call.operation, PagedAttention)]
        return all(reader.is_computed_elsewhere for reader in readers)

    @property
    def sequential(self) -> Schedule:
        """One nano-batch, one operation after the other; fits every batch."""
        return self._sequential[self.graph.signature]

    def run(
        self,
        step: StepInputs,
        schedule: Schedule,
        lanes: Lanes,
        stopwatch: Stopwatch,
        wanted_K: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, E] after the last layer, in the order of `schedule.cut`, scaled to the batch.

        They may be only those of the rows `wanted_K`, [K, E], where those are less than half of them: to compute no
        more behind the last attention saves more than another shape of its products costs.

        The schedule must have passed `verify` and fit the batch. The hidden states lie where the next run
        writes.
        """
        if lanes.runs_plainly and schedule == self.sequential:
            is_worth = wanted_K is not None and 2 * len(wanted_K) < len(step.tokens)
            return self._run_plainly(step, lanes, stopwatch, wanted_K if is_worth else None)
        cut = schedule.cut.scaled(step.num_decodes, len(step.tokens) - step.num_decodes)
        return self._run_cut(StepParts(step, cut), cut, schedule, self._sequential, lanes, stopwatch)

    def run_padded(self, parts: Parts, schedule: Schedule, lanes: Lanes) -> Tensor:
        """Hidden states [T, E] after the last layer, of the rows that `schedule` cuts, as they are told apart in
        `parts` (see `PaddedSchedule`).

        The schedule must have passed `check`. The hidden states lie where the next run writes, and keep that memory
        should a later run need more.
        """
        graphs = (run.traced.graph for run in self._runs)
        others = {graph.signature: split_schedule(graph, schedule.cut) for graph in graphs}
        return self._run_cut(parts, schedule.cut, schedule, others, lanes, Stopwatch())

    def _run_cut(
        self,
        parts: Parts,
        cut: Cut,
        schedule: Schedule,
        others: Mapping[str, Schedule],
        lanes: Lanes,
        stopwatch: Stopwatch,
    ) -> Tensor:
        """Run a schedule that `cut` is a scaled copy of; layers that it was not made for by `others`."""
        hidden_TE, arriving = self._embed(parts.whole, self._pieces(schedule, cut), lanes, stopwatch)
        if not self._rows and arriving is not None:
            arriving.land(stopwatch)
            arriving = None
        self._learn(parts.whole, hidden_TE)
        for run in self._runs:
            if run is not self._runs[0]:
                hidden_TE, arriving = hidden_TE.clone(), None  # it lies where these layers may write
            plan = schedule if self._is_planned(run) else others[run.traced.graph.signature]
            ranges = _ranges(plan, cut)
            values = self._values(run, plan, parts, hidden_TE, arriving)
            order = self._order_of(run, plan)
            lanes.run(order, ranges, run.programs, values, stopwatch, plan.mechanism, self.units)
            hidden_TE = values.of_layer(run.traced.graph.output, len(run.programs) - 1)
        return hidden_TE

    def check(self, schedule: Schedule) -> None:
        """Raise `ScheduleError` unless this model can be run by the schedule, and its values have places to lie in.

        Whether they have depends on no width, and those are not known before the first step: here every value is one
        byte wide.
        """
        verify(schedule, self.graph)
        for run in self._runs:
            graph = run.traced.graph
            if graph.signature == self.graph.signature:
                in_place, joined = shared_places(run.traced)
                widths = dict.fromkeys(graph.producers, 1)
                num_layers = len(run.programs)
                plan_buffers(schedule, graph, widths, 1, num_layers=num_layers, in_place=in_place, joined=joined)

    def reserve(self, schedules: Iterable[Schedule], num_tokens: int) -> None:
        """Take the memory that steps of so many tokens need by these schedules, before others count what is free.

        A step must have run before: the shapes of the values are learned from it.
        """
        device = self._embedding.shard.weight.device
        for schedule in schedules:
            for run in self._runs:
                if self._is_planned(run):
                    rows = self._rows[self.graph.signature]
                    self._arena.reserve(schedule, run.traced, len(run.programs), rows, num_tokens, device)

    @property
    def arena_bytes(self) -> int:
        """Memory held for the values between operations."""
        return self._arena.num_bytes

    def _run_plainly(
        self, step: StepInputs, lanes: Lanes, stopwatch: Stopwatch, wanted_K: Tensor | None = None
    ) -> Tensor:
        """The whole batch through one operation after the other."""
        hidden_TE, arriving = self._embed(step, [(0, len(step.tokens))], lanes, stopwatch)
        if arriving is not None:
            arriving.land(stopwatch)
        self._learn(step, hidden_TE)
        for run in self._runs:
            is_last = run is self._runs[-1]
            hidden_TE = run_layers(run.programs, hidden_TE, step, stopwatch, wanted_K if is_last else None)
        return hidden_TE

    def _embed(
        self, step: StepInputs, pieces: Sequence[tuple[int, int]], lanes: Lanes, stopwatch: Stopwatch
    ) -> tuple[Tensor, Flight | None]:
        """What the first layer reads [T, E], and what of it may still be on its way from other ranks."""
        started = stopwatch.now()
        hidden_TE: Tensor = self._embedding.shard(step)
        stopwatch.spent(Cost.OTHER, started)
        return hidden_TE, lanes.begin(self._embedding.all_reduce, hidden_TE, pieces, stopwatch)

    def _learn(self, step: StepInputs, hidden_TE: Tensor) -> None:
        """The shapes of all values, once, from computing a layer of every kind plainly; collectives keep theirs."""
        for run in self._runs:
            graph = run.traced.graph
            if graph.signature not in self._rows:
                values = {LAYER_INPUT: hidden_TE}
                for bound in run.programs[0].nodes.values():
                    compute(bound, values, step, Stopwatch())
                self._rows[graph.signature] = RowShapes.of({value: values[value] for value in graph.producers})

    def _order_of(self, run: _Run, schedule: Schedule) -> Sequence[Dispatch]:
        key = (schedule, run.traced.graph.signature, len(run.programs))
        if key not in self._orders:
            self._orders[key] = dispatch_order(schedule, run.traced.graph, len(run.programs))
        return self._orders[key]

    def _pieces(self, schedule: Schedule, cut: Cut) -> list[tuple[int, int]]:
        """The tokens of the nano-batches of `cut`, a scaled copy of the schedule's, in the order they are begun."""
        if schedule not in self._leads:
            first = self._runs[0]
            plan = schedule if self._is_planned(first) else self._sequential[first.traced.graph.signature]
            self._leads[schedule] = nano_batches_as_begun(self._order_of(first, plan), schedule.cut)
        tokens = ((cut.borders[index], cut.borders[index + 1]) for index in self._leads[schedule])
        return [(start, stop) for start, stop in tokens if start < stop]

    def _is_planned(self, run: _Run) -> bool:
        """Whether schedules are made for these layers."""
        return run.traced.graph.signature == self.graph.signature

    def _values(self, run: _Run, schedule: Schedule, parts: Parts, initial: Tensor, arriving: Flight | None) -> Values:
        """The places of a run's values."""
        graph = run.traced.graph
        rows = self._rows[graph.signature]
        places = self._arena.places(schedule, run.traced, len(run.programs), rows, len(initial), initial.device)
        return Values(places, graph, parts, initial, arriving)


def _ranges(schedule: Schedule, cut: Cut) -> list[tuple[int, int]]:
    """Where the steps' planned ranges lie in the cut of the batch at hand; empty ones have nothing to do."""
    planned = schedule.cut
    return [(planned.position_in(cut, step.start), planned.position_in(cut, step.stop)) for _, step in schedule.steps]
