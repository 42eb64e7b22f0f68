"""Virtual ranks compute what a group of one does, whatever runs beside their network, which is that of a real group."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.row_scales import quantise_rows_reference
from engine.layers.linear import QKVLinear, RowParallelLinear
from engine.model_config import Architecture
from engine.models.decoder import Decoder
from engine.operation import Resource
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Lane
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.stream_lanes import StreamLanes
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from engine.virtual_ranks import VirtualAllReduce, VirtualLinear, use_virtual_ranks
from tests.engine.models.paged_run import Case, load, paged_logits, steps_of
from tests.engine.pipeline.deferred_cuda import DEVICE, deferred_cuda

MODEL = sized_config(Architecture.LLAMA, num_heads=8, num_kv_heads=4, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path: Path = tmp_path_factory.mktemp("virtual") / "model"
    write_random_checkpoint(path, MODEL)
    return Case(name="virtual", path=path)


def _cut(case: Case, num_ranks: int, *, kernels: bool = False) -> tuple[Decoder, EngineConfig]:
    model, config = load(case.path, TensorParallel(), case.dtype)
    use_virtual_ranks(model, num_ranks, num_ctas=3)
    if kernels:
        add_partials = pytest.importorskip("engine.kernels.gpu.all_reduce_add").add_partials
        for module in model.modules():
            if isinstance(module, VirtualAllReduce):
                module.add = lambda partials, output, num_ctas: add_partials(partials, output, num_ctas=num_ctas)
    return model, config


@pytest.mark.parametrize(("num_ranks", "kernels"), [(2, True), (4, False), (8, False)])
def test_logits_are_those_of_one_rank(case: Case, num_ranks: int, kernels: bool) -> None:
    """With our kernel for the sums, interpreted, and without."""
    expected = paged_logits(*load(case.path, TensorParallel()), case.tokens)
    found = paged_logits(*_cut(case, num_ranks, kernels=kernels), case.tokens)
    for rows, expected_rows in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=1e-5)
        assert torch.equal(rows.argmax(-1), expected_rows.argmax(-1))


def test_the_network_has_the_nodes_and_bytes_of_a_real_group(case: Case) -> None:
    real = Pipeline(load(case.path, TensorParallel(0, 4))[0], MODEL.hidden_size)
    virtual = Pipeline(_cut(case, 4)[0], MODEL.hidden_size)
    names = [
        [node.name for node in pipeline.graph.nodes if node.resource is Resource.NETWORK and node.branch != "gather"]
        for pipeline in (real, virtual)
    ]
    assert names[0] == names[1] == ["attention_all_reduce", "feed_forward_all_reduce"]
    shape = BatchShape(num_decodes=3, num_prefills=5, decode_context=8, prefill_context=4)
    found = [[pipeline.traced.operations[name] for name in names[0]] for pipeline in (real, virtual)]
    num_bytes = [[each.work(shape, 2).network_bytes for each in operations if each] for operations in found]
    assert num_bytes[0] == num_bytes[1] and all(num_bytes[0])


def _hidden(model: Decoder, config: EngineConfig, case: Case, lanes: Any, pipeline: Pipeline) -> list[Tensor]:
    """Behind the layers, step by step, in the order of the batch, as two nano-batches."""
    halves = (NanoBatch(num_decodes=1, num_prefills=8),) * 2
    schedule = split_schedule(pipeline.graph, Cut(nano_batches=halves))
    assert schedule.lanes.get(Lane.NETWORK)
    found = []
    with torch.inference_mode():
        for step, _ in steps_of(case.tokens, config):
            cut = schedule.cut.scaled(step.num_decodes, len(step.tokens) - step.num_decodes)
            hidden_TE = pipeline.run(step, schedule, lanes, Stopwatch())
            found.append(hidden_TE[torch.from_numpy(cut.positions_of(torch.arange(len(step.tokens)).numpy()))].clone())
    return found


def test_nano_batches_beside_the_network_compute_the_same(case: Case) -> None:
    """On a host's lanes; and on streams, where the sums that run beside others are told so and take few programs."""
    model, config = _cut(case, 2)
    with torch.inference_mode():
        expected = []
        for step, _ in steps_of(case.tokens, config):
            hidden_TE = model.embed_tokens(step)
            for layer in model.layers:
                hidden_TE = layer(hidden_TE, step)
            expected.append(hidden_TE)
    limits: set[int | None] = set()
    for module in model.modules():
        if isinstance(module, VirtualAllReduce):
            add = module.add

            def noted(partials: Any, output: Tensor, num_ctas: int | None, add: Any = add) -> None:
                limits.add(num_ctas)
                add(partials, output, num_ctas)

            module.add = noted
    pipeline = Pipeline(model, MODEL.hidden_size)
    for overlaps, limit in ((False, None), (True, 3)):
        limits.clear()
        with deferred_cuda():
            lanes = StreamLanes(DEVICE, overlaps=overlaps)
            found = _hidden(model, config, case, lanes, pipeline)
        assert limits == {limit}
        for rows, expected_rows in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=1e-5)
    found = _hidden(model, config, case, HostLanes(overlaps=True), pipeline)
    for rows, expected_rows in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=1e-5)


def test_weights_in_fp8_keep_their_scales() -> None:
    """Outputs keep theirs; inputs of every rank are quantised by themselves, as ranks do."""
    for linear in (RowParallelLinear(32, 6, TensorParallel()), QKVLinear(MODEL, TensorParallel())):
        weight_OI = torch.randn(linear.weight.shape)
        values_OI, scales_O = quantise_rows_reference(weight_OI)
        linear.use_fp8()
        assert linear.weight_scale is not None
        linear.weight.data, linear.weight_scale.data = values_OI, scales_O
        linear.bias = None
        input_TI = torch.randn(5, linear.weight.shape[1])
        virtual = VirtualLinear(linear, 2)
        found_TX = virtual(input_TI)
        if isinstance(linear, RowParallelLinear):
            assert found_TX.shape == (5, 12)
            found_TX = found_TX[:, :6] + found_TX[:, 6:]
        expected_TO = input_TI @ weight_OI.t()
        assert (found_TX - expected_TO).norm() < 0.06 * expected_TO.norm()


def test_what_cannot_be_cut_is_refused(case: Case) -> None:
    model, _ = load(case.path, TensorParallel())
    for num_ranks in (1, 9):
        with pytest.raises(ConfigError, match=rf"There can be 2\.\.8 virtual ranks, not {num_ranks}"):
            use_virtual_ranks(model, num_ranks)
    with pytest.raises(ConfigError, match="3 virtual ranks cannot share the 128 outputs of a product evenly"):
        use_virtual_ranks(model, 3)
