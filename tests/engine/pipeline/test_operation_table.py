"""Table 2, figure 3 and the equations of NanoFlow (arXiv 2408.12757), from the models' own shapes."""

from dataclasses import replace

import pytest

from engine.batch_shape import BatchShape
from engine.model_config import Architecture
from engine.model_shapes import model_shape
from engine.operation import Resource
from engine.pipeline.devices import data_sheet
from engine.pipeline.operation_table import OperationTable, operation_table
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.serving_estimate import ServingEstimate, dense_tokens
from engine.random_checkpoint import sized_config

A100 = data_sheet("a100-80gb")
STEADY = BatchShape.steady(2048, 512, 1024)
ALL_REDUCES = ("attention_all_reduce", "feed_forward_all_reduce")

# As printed: GFLOP, GB of memory, GB of network; milliseconds of compute, memory, network.
TABLE_2 = {
    "qkv_proj": ("27487.8", "19.5", "0", "11.01", "1.22", "0"),
    "o_proj": ("21990.2", "16.1", "0", "8.81", "1.01", "0"),
    "gate_up_proj": ("153931.6", "96.6", "0", "61.67", "6.04", "0"),
    "down_proj": ("76965.8", "49.7", "0", "30.84", "3.11", "0"),
    "decode_attention": ("3665.9", "462.2", "0", "1.47", "28.89", "0"),
    "prefill_attention": ("916.3", "2.1", "0", "0.37", "0.13", "0"),
    "net": ("18.8", "75.2", "75.2", "0.01", "4.70", "31.33"),
    "total": (None, None, None, "114.17", "45.09", "31.33"),
}
# Its 2.1 GB are no product of the shapes that fits; the time printed beside it, 0.13 ms, is.
NOT_REPRODUCED = {("prefill_attention", 1)}

WORKLOADS = ((102, 222), (1155, 211), (246, 322), (512, 512), (1024, 512), (512, 1024))
FIGURE_3 = {
    ("llama-3-8b", 1): (0.23, 0.31, 0.37, 0.61, 0.68, 1.09),
    ("mixtral-8x7b", 8): (0.12, 0.17, 0.20, 0.32, 0.36, 0.58),
    ("llama-2-70b", 8): (0.07, 0.09, 0.11, 0.18, 0.20, 0.32),
    ("llama-3-70b", 8): (0.07, 0.09, 0.11, 0.18, 0.20, 0.32),
    ("qwen2-72b", 8): (0.07, 0.09, 0.11, 0.18, 0.20, 0.32),
}


def _table(*, anchors_only: bool) -> OperationTable:
    traced = trace_planned_layer(model_shape("llama-2-70b"), 8)
    return operation_table(
        traced, STEADY, A100, num_devices=8, num_layers=80, element_bytes=2, anchors_only=anchors_only
    )


def _values(table: OperationTable) -> dict[str, tuple[float, ...]]:
    """In the units of the paper, with the two all-reduces as its one row."""
    found: dict[str, tuple[float, ...]] = {
        row.name: (
            row.flops / 1e9,
            row.memory_bytes / 1e9,
            row.network_bytes / 1e9,
            row.compute_seconds * 1e3,
            row.memory_seconds * 1e3,
            row.network_seconds * 1e3,
        )
        for row in (*table.rows, table.total)
    }
    found["net"] = tuple(sum(pair) for pair in zip(*(found.pop(name) for name in ALL_REDUCES), strict=True))
    return found


def test_the_large_operations_are_those_of_table_2() -> None:
    """Within 1 %, or half a unit of the last printed digit where that is more."""
    values = _values(_table(anchors_only=True))
    assert values.keys() == TABLE_2.keys()
    for name, printed in TABLE_2.items():
        for column, text in enumerate(printed):
            if text is None or (name, column) in NOT_REPRODUCED:
                continue
            half_unit = 0.5 * 10.0 ** -len(text.partition(".")[2])
            tolerance = max(0.01 * float(text), half_unit * (1 + 1e-9))
            assert abs(values[name][column] - float(text)) <= tolerance, (name, column)


def test_compute_bounds_the_step_and_memory_its_decode_attention() -> None:
    table = _table(anchors_only=True)
    bounds = {row.name: row.bound for row in table.rows}
    assert bounds.pop("decode_attention") is Resource.MEMORY
    assert {bounds.pop(name) for name in ALL_REDUCES} == {Resource.NETWORK}
    assert set(bounds.values()) == {Resource.COMPUTE}
    assert table.bound is Resource.COMPUTE
    assert table.total.seconds == pytest.approx(0.11417, rel=1e-3)
    assert table.sequential_seconds == pytest.approx(0.11270 + 0.02886 + 0.03132, rel=1e-3)


def test_whole_nodes_count_what_runs_with_the_large_operations() -> None:
    anchors, whole = _table(anchors_only=True), _table(anchors_only=False)
    by_name = {row.name: row for row in whole.rows}
    assert set(by_name) - {row.name for row in anchors.rows} == {"add_1"}
    for row in anchors.rows:
        assert by_name[row.name].flops >= row.flops
        assert by_name[row.name].memory_bytes >= row.memory_bytes
    hidden_bytes = 2048 * 8192 * 2 * 80
    assert by_name["add_1"].memory_bytes == 3 * hidden_bytes
    added = by_name["o_proj"].memory_bytes - {row.name: row for row in anchors.rows}["o_proj"].memory_bytes
    assert added == pytest.approx(2 * hidden_bytes)  # the join, sharded


@pytest.mark.parametrize("architecture", Architecture)
def test_a_single_device_of_any_architecture_has_a_table(architecture: Architecture) -> None:
    traced = trace_planned_layer(sized_config(architecture), 1)
    device = replace(A100, network_bandwidth=None)
    table = operation_table(traced, STEADY, device, num_devices=1, num_layers=2, element_bytes=4)
    assert [row.name for row in table.rows] == [node.name for node in traced.graph.nodes]
    assert table.total.network_bytes == table.total.network_seconds == 0
    assert all(row.seconds > 0 for row in table.rows)
    empty = operation_table(traced, STEADY.part(0, 0), device, num_devices=1, num_layers=2, element_bytes=4)
    assert empty.total.seconds == 0


@pytest.mark.parametrize(("name", "num_devices"), FIGURE_3)
def test_memory_to_compute_is_that_of_figure_3(name: str, num_devices: int) -> None:
    """With the active parameters for the weights: of a dense model those are all; Mixtral's row needs it, see below."""
    estimate = ServingEstimate(config=model_shape(name), device=A100, num_devices=num_devices)
    capacity = estimate.kv_capacity_tokens(estimate.active_parameters)
    for (prompt, output), printed in zip(WORKLOADS, FIGURE_3[name, num_devices], strict=True):
        assert estimate.memory_to_compute(dense_tokens(capacity, prompt, output)) == pytest.approx(printed, abs=0.02)


def test_figure_3_leaves_out_the_experts_that_a_token_does_not_meet() -> None:
    """All of Mixtral's weights in memory leave less cache, smaller batches, and more than the figure shows."""
    estimate = ServingEstimate(config=model_shape("mixtral-8x7b"), device=A100, num_devices=8)
    batch = dense_tokens(estimate.kv_capacity_tokens(), 512, 1024)
    assert estimate.memory_to_compute(batch) == pytest.approx(0.634, abs=0.001)


@pytest.mark.parametrize(("name", "num_devices", "printed"), [("llama-2-70b", 8, 1480), ("llama-3-8b", 1, 480)])
def test_the_cache_is_as_large_as_the_repository_configures(name: str, num_devices: int, printed: int) -> None:
    estimate = ServingEstimate(config=model_shape(name), device=A100, num_devices=num_devices)
    assert estimate.kv_capacity_tokens() == pytest.approx(printed * 1024, rel=0.02)
    batch = dense_tokens(printed * 1024, 512, 1024)
    expected = FIGURE_3[name, num_devices][-1]
    assert estimate.memory_to_compute(batch) == pytest.approx(expected, abs=0.02)


def test_the_equations_for_llama_2_70b() -> None:
    estimate = ServingEstimate(config=model_shape("llama-2-70b"), device=A100, num_devices=8)
    assert estimate.memory_seconds == pytest.approx(0.040)  # 1: 80 GB at 2 TB/s
    assert estimate.compute_seconds(2048) == pytest.approx(0.11417, rel=0.02)  # 2, against the sum over operations
    assert estimate.network_seconds(2048) == pytest.approx(0.03133, rel=1e-3)  # 3, the row Net of table 2
    assert estimate.memory_to_compute(2048) == pytest.approx(0.040 / estimate.compute_seconds(2048))  # 4
    assert estimate.kv_bytes_per_token == 327_680
    assert replace(estimate, num_devices=16).kv_bytes_per_token == 2 * 327_680  # eight heads, each on two devices


# Tokens per second and device: the published figures rest on 260 TFLOP/s, whatever the text says of 280.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-2-70b", 1857),
        ("llama-3-70b", 1850),
        ("qwen2-72b", 1800),
        ("deepseek-67b", 1941),
        ("mixtral-8x7b", 10_290),
        ("llama-3-8b", 16_250),
    ],
)
def test_the_published_optimum_follows_from_equation_5(name: str, published: float) -> None:
    """Within 2 %: the paper rounds a model to its nominal size, the optimum here counts its parameters."""
    device = replace(A100, flops_per_second={2: 260e12})
    estimate = ServingEstimate(config=model_shape(name), device=device, num_devices=8)
    assert estimate.optimal_tokens_per_second == pytest.approx(published, rel=0.02)
    nominal = {"llama-2-70b": 70e9, "deepseek-67b": 67e9}.get(name)
    if nominal is not None:
        exact = estimate.optimal_tokens_per_second * estimate.active_parameters / nominal
        assert exact == pytest.approx(published, abs=1)


def test_tokens_of_the_batch_cancel_out_of_equation_5() -> None:
    estimate = ServingEstimate(config=model_shape("llama-2-70b"), device=A100, num_devices=8)
    assert 2048 / estimate.compute_seconds(2048) / 8 == pytest.approx(estimate.optimal_tokens_per_second)
    # the data sheet's 312 TFLOP/s with the nominal 70 B, as the reference derives
    assert estimate.optimal_tokens_per_second * estimate.active_parameters / 70e9 == pytest.approx(2229, abs=1)
