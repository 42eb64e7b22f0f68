"""Weights in FP8: quantised at load rank by rank, and checkpoints that hold them already, in every form."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.kernels.row_scales import dequantise_rows, quantise_into, quantise_rows_reference
from engine.model_config import Architecture, ModelConfig
from engine.number_format import NumberFormat
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from engine.weight_layout import rank_weight_bytes, weight_layout
from engine.weights import check_checkpoint
from tests.engine.fp8_model import Quantiser, load, per_block, per_channel, per_row, per_tensor, write_fp8

FP8, BFLOAT16, FLOAT32 = NumberFormat.FP8, NumberFormat.BFLOAT16, NumberFormat.FLOAT32
SPARSE = sized_config(Architecture.QWEN3_MOE, num_layers=2, num_dense_layers=1, vocab_size=301, attention_bias=True)
FLOATS = {"num_bits": 8, "type": "float", "strategy": "channel"}
FORMS: dict[str, tuple[Quantiser, dict[str, Any], str]] = {
    "fp8, a tensor": (per_tensor, {"quant_method": "fp8", "activation_scheme": "static"}, "_scale"),
    "fp8, rows": (per_row, {"quant_method": "fp8", "activation_scheme": "dynamic"}, "_scale_inv"),
    "compressed-tensors, channels": (
        per_channel,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": FLOATS, "targets": ["Linear"]}},
            "ignore": ["lm_head"],
        },
        "_scale",
    ),
}
# 48 divides neither side of any weight.
BLOCKS = (per_block(48, 48), {"quant_method": "fp8", "weight_block_size": [48, 48], "fmt": "e4m3"}, "_scale_inv")


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A checkpoint with experts, a dense layer, biases, and a vocabulary that two does not divide."""
    write_random_checkpoint(tmp_path / "sparse", SPARSE)
    return tmp_path / "sparse"


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _meant(parameters: dict[str, Tensor], name: str) -> Tensor:
    """A parameter in float32, whatever it is held in."""
    values = parameters[name].float()
    return values * parameters[name + "_scale"][..., None] if name + "_scale" in parameters else values


@pytest.mark.parametrize("size", [1, 2])
def test_products_are_quantised_a_row_at_a_time(sparse: Path, size: int) -> None:
    for rank in range(size):
        share = TensorParallel(rank, size)
        plain = _parameters(load(sparse, FLOAT32, share=share)[0])
        quantised = _parameters(load(sparse, FP8, share=share)[0])
        products = {part.parameter for part in weight_layout(SPARSE) if part.is_product}
        assert len(products) == 8  # of two layers: QKV, O, gate and up, down
        for name, weight in plain.items():
            if name not in products:
                assert torch.equal(quantised[name], weight.bfloat16()) or "shard" in name
                assert quantised[name].dtype is torch.bfloat16
                continue
            values, scales = quantise_rows_reference(weight.flatten(0, -2))
            assert quantised[name].dtype is torch.float8_e4m3fn
            assert torch.equal(quantised[name].float().flatten(0, -2), values.float())
            assert torch.equal(quantised[name + "_scale"].flatten(), scales)


@pytest.mark.parametrize("size", [1, 2])
def test_the_predicted_size_of_a_rank_is_what_it_holds(sparse: Path, size: int) -> None:
    model, config = load(sparse, FP8, share=TensorParallel(0, size))
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert rank_weight_bytes(config.model, config.dtype, size, in_fp8=True) == held
    assert held < rank_weight_bytes(config.model, config.dtype, size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2])
def test_scales_of_rows_are_taken_as_they_are(sparse: Path, form: str, size: int) -> None:
    """Every rank holds exactly what the file means."""
    meant = write_fp8(sparse, *FORMS[form])
    check_checkpoint(load(sparse, FP8)[1])
    for rank in range(size):
        _check_is_meant(sparse, TensorParallel(rank, size), meant, tolerance=0)


@pytest.mark.parametrize("size", [1, 2])
def test_blocks_are_quantised_anew(sparse: Path, size: int) -> None:
    meant = write_fp8(sparse, *BLOCKS)
    for rank in range(size):
        _check_is_meant(sparse, TensorParallel(rank, size), meant, tolerance=2**-4)


def _check_is_meant(path: Path, share: TensorParallel, meant: dict[str, Tensor], tolerance: float) -> None:
    parameters = _parameters(load(path, FP8, share=share)[0])
    config = ModelConfig.from_checkpoint(path)
    for part in weight_layout(config, share.rank, share.size):
        found = _meant(parameters, part.parameter)[part.target]
        expected = meant[part.tensor][part.source]
        if part.is_product:
            largest = expected.abs().amax(-1, keepdim=True)
            assert ((found - expected).abs() <= tolerance * largest + 1e-9).all(), part.tensor
        else:
            assert torch.equal(found, expected.bfloat16().float())


@pytest.mark.parametrize("form", [*FORMS, "blocks"])
@pytest.mark.parametrize("products", [None, BFLOAT16, FLOAT32])
def test_without_fp8_the_checkpoint_is_dequantised(sparse: Path, form: str, products: NumberFormat | None) -> None:
    meant = write_fp8(sparse, *(BLOCKS if form == "blocks" else FORMS[form]))
    model, config = load(sparse, products)
    assert config.cache_format.value == config.dtype.value
    parameters = _parameters(model)
    for part in weight_layout(config.model):
        expected = meant[part.tensor][part.source].to(parameters[part.parameter].dtype)
        assert torch.equal(parameters[part.parameter][part.target], expected), part.tensor


def test_what_is_not_a_product_may_be_fp8_too(sparse: Path) -> None:
    meant = write_fp8(sparse, *FORMS["fp8, a tensor"])
    tensors = load_file(sparse / "model.safetensors")
    tensors["lm_head.weight"], tensors["lm_head.weight_scale"], head = per_tensor(meant["lm_head.weight"])
    save_file(tensors, sparse / "model.safetensors")
    found = load(sparse, FP8)[0].get_parameter("lm_head.shard.weight")
    assert torch.equal(found, head.bfloat16())


def test_scales_may_be_in_another_file(sparse: Path) -> None:
    meant = write_fp8(sparse, *FORMS["fp8, rows"])
    tensors = load_file(sparse / "model.safetensors")
    files = {name: "b.safetensors" if "scale" in name else "a.safetensors" for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, sparse / file)
    (sparse / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (sparse / "model.safetensors").unlink()
    _check_is_meant(sparse, TensorParallel(), meant, tolerance=0)


def test_a_large_weight_is_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 10, 32)
    values, scales = torch.empty(3, 10, 32, dtype=torch.float8_e4m3fn), torch.empty(3, 10)
    monkeypatch.setattr("engine.kernels.row_scales._LARGEST_PART", 4 * 32)
    quantise_into(values, scales, weight)
    expected, expected_scales = quantise_rows_reference(weight.flatten(0, 1))
    assert torch.equal(values.float().flatten(0, 1), expected.float())
    assert torch.equal(scales.flatten(), expected_scales)
    error = (dequantise_rows(expected, expected_scales) - weight.flatten(0, 1)).abs()
    assert (error <= expected_scales[:, None] * 448 * 2**-4).all()


NAME = "model.layers.0.self_attn.q_proj.weight"


def _without_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[NAME + "_scale"]


def _scales_of_nothing(tensors: dict[str, Tensor]) -> None:
    tensors[NAME + "_scale"] = torch.ones(7)


def _integer_scales(tensors: dict[str, Tensor]) -> None:
    tensors[NAME + "_scale"] = torch.ones((), dtype=torch.int32)


def _scale_of(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[NAME + "_scale"] = torch.tensor(value)

    return change


def _norm_in_fp8(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    tensors["model.norm.weight_scale"] = torch.ones(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_scale, rf"{NAME} is stored as F8_E4M3, but there is neither {NAME}_scale nor {NAME}_scale_inv"),
        (_scales_of_nothing, rf"{NAME}_scale has shape \[7\], which are the scales of no rows or blocks of {NAME}"),
        (_integer_scales, rf"{NAME}_scale is stored as I32"),
        *(
            (_scale_of(value), rf"{NAME}_scale has scales that are negative or not")
            for value in (math.nan, math.inf, -1.0)
        ),
        (_norm_in_fp8, r"model.norm.weight of shape \[64\] is stored as F8_E4M3, which only matrices can be"),
    ],
)
def test_wrong_scales_are_named(sparse: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    write_fp8(sparse, *FORMS["fp8, a tensor"])
    tensors = load_file(sparse / "model.safetensors")
    change(tensors)
    save_file(tensors, sparse / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(sparse, FP8)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq"}, r"quantised \(gptq\); only"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"quantised \(fp8 as e5m2\)"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size must be rows and columns"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "weights of type int in 4 bits are not supported",
        ),
    ],
)
def test_other_quantisations_are_refused(sparse: Path, quantization: dict[str, Any], message: str) -> None:
    config = json.loads((sparse / "config.json").read_text())
    (sparse / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_checkpoint(sparse)
