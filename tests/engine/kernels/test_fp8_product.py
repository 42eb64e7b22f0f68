"""Products in FP8 as layers call them, by the reference arithmetic: what they compute, and what they leave alone."""

import pytest
import torch

from engine.batch_shape import BatchShape
from engine.gemm_peak import linear_flops_per_second
from engine.kernels.fp8_product import fp8_product, grouped_fp8_product, quantised, torch_grouped_product
from engine.kernels.row_scales import dequantise_rows, quantise_into, quantise_rows_reference
from engine.layers.linear import ColumnParallelLinear, Linear, QKVLinear, RowParallelLinear
from engine.layers.mixture_of_experts import GroupedExperts, MixtureOfExperts
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel

CONFIG = sized_config(Architecture.MIXTRAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product_of_what_was_quantised(dtype: torch.dtype, with_bias: bool) -> None:
    input_TI, weight_OI = torch.randn(7, 64).to(dtype), torch.randn(24, 64) * torch.linspace(0.01, 10, 24)[:, None]
    bias_O = torch.randn(24).to(dtype) if with_bias else None
    values_OI, scales_O = quantise_rows_reference(weight_OI)
    wide_TI, wide_OI = dequantise_rows(*quantised(input_TI)), dequantise_rows(values_OI, scales_O)
    expected_TO = wide_TI.double() @ wide_OI.T.double() + (0 if bias_O is None else bias_O.double())
    output_TO = fp8_product(input_TI, values_OI, scales_O, bias_O)
    assert output_TO.dtype is dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(output_TO.double(), expected_TO, rtol=tolerance, atol=100 * 1e-6)
    given_TO = torch.empty_like(output_TO)
    assert fp8_product(input_TI, values_OI, scales_O, bias_O, given_TO) is given_TO
    assert torch.equal(given_TO, output_TO)
    assert fp8_product(input_TI[:0], values_OI, scales_O, bias_O).shape == (0, 24)


def test_every_expert_has_its_rows_and_scales() -> None:
    sorted_SI, weight_XOI = (
        torch.randn(9, 32).bfloat16(),
        torch.randn(4, 16, 32) * torch.tensor([1, 5, 20, 100.0]).view(-1, 1, 1),
    )
    values, scales = torch.empty(4, 16, 32, dtype=torch.float8_e4m3fn), torch.empty(4, 16)
    quantise_into(values, scales, weight_XOI)
    ends = [3, 3, 8, 9]
    output_SO = grouped_fp8_product(sorted_SI, values, scales, torch.tensor(ends, dtype=torch.int32))
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        assert torch.equal(output_SO[start:end], fp8_product(sorted_SI[start:end], values[expert], scales[expert]))
    assert output_SO.isfinite().all()


def test_which_operations_take_it() -> None:
    group = TensorParallel()
    taking = (ColumnParallelLinear(8, 8, group), RowParallelLinear(8, 8, group), QKVLinear(CONFIG, group))
    experts = MixtureOfExperts(CONFIG, group, round_scores=False)
    for operation in (*taking, experts.experts, experts.router, Linear(8, 8)):
        before = sum(parameter.numel() for parameter in operation.parameters())
        operation.use_fp8()
        in_fp8 = [parameter for parameter in operation.parameters() if parameter.dtype is torch.float8_e4m3fn]
        assert bool(in_fp8) == (operation in taking or operation is experts.experts)
        assert sum(parameter.numel() for parameter in in_fp8) in (0, before)


def test_linear_in_place_and_its_work() -> None:
    linear = ColumnParallelLinear(64, 32, TensorParallel(), bias=True).to(torch.bfloat16)
    plain = linear.work(BatchShape(num_decodes=10, num_prefills=0), 2)
    weight = torch.randn(32, 64)
    linear.use_fp8()
    assert linear.weight_scale is not None and linear.bias is not None
    quantise_into(linear.weight.data, linear.weight_scale.data, weight)
    linear.bias.data.normal_()
    input_TI = torch.randn(5, 64).bfloat16()
    output_TO = torch.empty(5, 32, dtype=torch.bfloat16)
    linear.into(output_TO, input_TI)
    assert torch.equal(output_TO, linear(input_TI))
    error = output_TO.float() - (input_TI.float() @ weight.T + linear.bias.float())
    assert error.norm() < 0.06 * output_TO.float().norm()
    work = linear.work(BatchShape(num_decodes=10, num_prefills=0), 2)
    assert work.flops == plain.flops
    assert work.weight_bytes == 32 * 64 + 32 * 4 + 32 * 2  # values, scales, bias
    assert work.replicated_bytes == plain.replicated_bytes + 10 * 2 * 64  # quantised input, written and read
    linear.pack()  # which is for a CPU's own formats
    assert not linear.weight.is_mkldnn
    assert linear.kernel("bfloat16", 16) is None


def test_experts_read_half_the_weights() -> None:
    experts = GroupedExperts(CONFIG, TensorParallel(), round_scores=False)
    shape = BatchShape(num_decodes=1000, num_prefills=0)
    before = experts.work(shape, 2)
    experts.use_fp8()
    after = experts.work(shape, 2)
    assert 0.5 * before.weight_bytes < after.weight_bytes < 0.53 * before.weight_bytes
    assert (after.flops, after.replicated_bytes) == (before.flops, before.replicated_bytes)


def test_the_peak_of_products_in_fp8_can_be_measured() -> None:
    pytest.importorskip("triton")
    assert linear_flops_per_second((16, 32, 16), torch.bfloat16, torch.device("cpu"), quick=True, in_fp8=True) > 0


def test_torch_takes_the_grouped_product_in_this_layout() -> None:
    """As far as shapes, strides and dtypes go, which it checks without a GPU."""
    values_SI, weight_XOI = (
        torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta") for shape in ((64, 128), (4, 32, 128))
    )
    scales_S, scales_XO = (torch.empty(shape, device="meta") for shape in (64, (4, 32)))
    ends_X = torch.empty(4, dtype=torch.int32, device="meta")
    output_SO = torch_grouped_product(values_SI, scales_S, weight_XOI, scales_XO, ends_X)
    assert (output_SO.shape, output_SO.dtype) == ((64, 32), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_outputs", [256, 200])
def test_a_gpu_computes_the_reference(num_outputs: int) -> None:
    """Within what its tensor cores lose of a sum, and the rounding of the output."""
    input_TI, weight_OI = torch.randn(130, 512).bfloat16(), torch.randn(num_outputs, 512)
    bias_O = torch.randn(num_outputs).bfloat16()
    operands = (input_TI, *quantise_rows_reference(weight_OI), bias_O)
    expected_TO = fp8_product(*operands).float()
    found_TO = fp8_product(*(operand.cuda() for operand in operands)).cpu().float()
    assert (found_TO - expected_TO).norm() < 0.01 * expected_TO.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_outputs", [256, 200])
def test_a_gpu_computes_the_grouped_reference(num_outputs: int) -> None:
    sorted_SI, weight_XOI = torch.randn(130, 512).bfloat16(), torch.randn(4, num_outputs, 512)
    values, scales = torch.empty_like(weight_XOI, dtype=torch.float8_e4m3fn), torch.empty(4, num_outputs)
    quantise_into(values, scales, weight_XOI)
    operands = (sorted_SI, values, scales, torch.tensor([60, 60, 61, 130], dtype=torch.int32))
    expected_SO = grouped_fp8_product(*operands).float()
    found_SO = grouped_fp8_product(*(operand.cuda() for operand in operands)).cpu().float()
    assert (found_SO - expected_SO).norm() < 0.01 * expected_SO.norm()
