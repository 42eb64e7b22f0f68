"""The planner: searches the pipeline of a layer with the shortest period, among all of a family of partitions.

Partitions (`partition`) are enumerated; for each, linear programs bound what it could give (`bounds`), and CP-SAT
orders its nano-operations and divides the execution units (`ordering`). The search goes through the partitions by
increasing bound and improves what it has in between, until nothing better is left or time is up. What it finds is
judged by the simulator, and compared with running the operations one after the other.

The paper searches in two stages, the partition first and then the shares (NanoFlow, section 4.1); choosing the
partition without regard to shares costs up to 8 %, so here it is chosen with them.
"""

from collections.abc import Callable, Collection
from math import ceil

from engine.batch_shape import BatchShape
from engine.pipeline.cost_model import CostModel
from engine.pipeline.graph import OperationGraph
from engine.pipeline.partition import partitions
from engine.pipeline.placement import GPU_LANES
from engine.pipeline.plan import Plan, SearchState
from engine.pipeline.schedule import Lane
from engine.pipeline.search import Problem, Search
from engine.pipeline.sequential import sequential_schedule

_MOST_CHUNKS = 16


def plan(
    graph: OperationGraph,
    costs: CostModel,
    shape: BatchShape,
    *,
    num_layers: int,
    lanes: Collection[Lane] = GPU_LANES,
    seconds: float = 30.0,
    workers: int = 8,
    token_multiple: int = 128,
    tolerance: float = 0.01,
    num_candidates: int = 4,
    progress: Callable[[SearchState], None] = lambda state: None,
) -> Plan:
    """Plan one layer of `num_layers` for batches of `shape`, in about `seconds` with `workers` threads of the solver.

    Nano-batches are multiples of `token_multiple` tokens, or of a multiple of it that makes no more than 16 of a batch.
    The search ends before its time when no plan can be better
    than the best one by more than `tolerance` of its period. `progress` is called after every partition solved.
    Raises `ConfigError` where OR-tools is not installed.
    """
    num_decodes = round(shape.num_decodes)
    num_prefills = round(shape.num_tokens) - num_decodes
    multiple = token_multiple * max(1, ceil((num_decodes + num_prefills) / (token_multiple * _MOST_CHUNKS)))
    problem = Problem(graph, costs, shape, num_layers, tuple(lanes))
    sequential = problem.candidate(sequential_schedule(graph, num_decodes, num_prefills))
    family = list(partitions(graph, lanes, num_decodes, num_prefills, multiple))
    search = Search(problem, family, sequential, seconds=seconds, workers=workers, tolerance=tolerance)
    reason = search.run(progress)
    candidates = search.best(num_candidates)
    return Plan(
        best=min((sequential, *candidates), key=lambda candidate: candidate.step_seconds),
        sequential=sequential,
        candidates=candidates,
        num_layers=num_layers,
        lower_bound_seconds=search.lower_bound_seconds,
        family=(
            f"at most two nano-batches in multiples of {multiple} tokens, heads of a layer whole or halved, "
            f"{_ways(len(graph.branches))} to place a collective, the same order in every layer"
        ),
        num_partitions=len(family),
        num_solved=search.num_solved,
        solve_seconds=search.elapsed_seconds,
        stop_reason=reason,
    )


def _ways(num_branches: int) -> str:
    return f"{num_branches} ways" if num_branches > 1 else "one way"
