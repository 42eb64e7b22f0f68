"""Scales of a KV cache in FP8: found under every name, used by who writes and reads it, refused where they differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.kv_cache import KVCache
from engine.kv_scales import KVScales
from engine.model_config import Architecture, DType, ModelConfig
from engine.number_format import NumberFormat
from engine.pipeline.synthetic_step import synthetic_step
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.weights import check_checkpoint
from engine.worker import Worker
from tests.engine.fp8_model import load, per_channel, prompt_logits, write_fp8
from tests.engine.gpu_case import DEVICE, config_of, random_model

BFLOAT16, FP8 = NumberFormat.BFLOAT16, NumberFormat.FP8
MODEL = sized_config(Architecture.LLAMA, dtype=DType.FLOAT32)
SCALES = KVScales(keys=(0.5, 8.0), values=(6.0, 0.25))
PREFIX = "model.layers.{layer}.self_attn."
FORMS = {
    "llm-compressor": ("k_scale", "v_scale"),
    "ModelOpt": ("k_proj.k_scale", "v_proj.v_scale"),
    "AutoFP8": ("kv_scale", "kv_scale"),
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path / "model", MODEL)
    return tmp_path / "model"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(load_file(path / "model.safetensors") | tensors, path / "model.safetensors")


def _scale_tensors(names: tuple[str, str] = FORMS["llm-compressor"], scales: KVScales = SCALES) -> dict[str, Tensor]:
    found = {}
    for layer in range(MODEL.num_layers):
        for name, scale in zip(names, (scales.keys[layer], scales.values[layer]), strict=True):
            found[PREFIX.format(layer=layer) + name] = torch.tensor([scale])
    return found


def _config(path: Path, cache: NumberFormat | None = FP8) -> EngineConfig:
    return load(path, BFLOAT16, cache)[1]


@pytest.mark.parametrize("form", FORMS)
def test_scales_are_found_under_every_name(path: Path, form: str) -> None:
    scales = SCALES if form != "AutoFP8" else KVScales(keys=(0.5, 8.0), values=(0.5, 8.0))
    _write(path, _scale_tensors(FORMS[form], scales))
    assert KVScales.read(_config(path)) == scales
    assert KVScales.read(_config(path, BFLOAT16)) == KVScales.none(2)


def test_without_any_they_are_one(path: Path) -> None:
    assert KVScales.read(_config(path)) == KVScales(keys=(1.0, 1.0), values=(1.0, 1.0))
    cache = KVCache.allocate(_config(path, BFLOAT16), 2, DEVICE, SCALES)
    assert cache.scales(0) == (1.0, 1.0), "a cache that is not in FP8 holds keys and values as they are"
    assert KVCache.allocate(_config(path), 2, DEVICE, SCALES).scales(1) == (8.0, 0.25)


def test_a_rank_uses_those_of_its_checkpoint(path: Path) -> None:
    write_fp8(path, per_channel, COMPRESSED | {"kv_cache_scheme": SCHEME}, "_scale")
    _write(path, _scale_tensors())
    model = ModelConfig.from_checkpoint(path)
    assert model.fp8 is not None and model.fp8.has_kv_scales
    config = replace(_config(path), model=model, num_threads=1, num_blocks=16, max_batch_tokens=16, max_sequences=2)
    worker = Worker(config, emulates_fp8=True)
    worker.start()
    assert worker._cache is not None and [worker._cache.scales(layer) for layer in range(2)] == [(0.5, 6.0), (8, 0.25)]
    worker.close()


def _logits_with(path: Path, cache: NumberFormat, monkeypatch: pytest.MonkeyPatch, scales: KVScales | None) -> Tensor:
    model, config = load(path, BFLOAT16, cache)
    allocate: Any = KVCache.allocate
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "allocate", lambda *arguments: allocate(*arguments, scales))
        return prompt_logits(model, config, torch.arange(32) * 13 % 512, 16)


def test_what_is_too_large_for_fp8_is_kept_by_its_scale(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of thousands, of which e4m3 would leave 448; keys as small as its last digits."""
    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        factor = {"v_proj": 2000.0, "o_proj": 1 / 2000, "k_proj": 1e-3, "q_proj": 1e3}
        tensors[name] = weight * next((value for part, value in factor.items() if part in name), 1.0)
    save_file(tensors, path / "model.safetensors")
    exact = _logits_with(path, BFLOAT16, monkeypatch, None)
    scales = KVScales(keys=(1e-4, 1e-4), values=(20.0, 20.0))
    errors = [
        float((_logits_with(path, FP8, monkeypatch, given) - exact).norm() / exact.norm()) for given in (None, scales)
    ]
    assert errors[1] < 0.05 < 0.2 < errors[0]


def test_kernels_use_them_as_the_reference_does() -> None:
    """Decodes and chunks over what other steps have cached, behind two layers; without a scale it is something else."""
    pytest.importorskip("triton")
    config = replace(config_of(Architecture.LLAMA), kv_cache_format=FP8)
    shape = BatchShape(num_decodes=1, num_prefills=2, decode_context=18, prefill_context=2)
    found: dict[tuple[bool, KVScales | None], tuple[Tensor, Tensor]] = {}
    scales = KVScales(keys=(0.25, 2.0), values=(4.0, 0.5))
    for kernels, given in ((False, None), (False, scales), (True, scales)):
        model = random_model(config, kernels=kernels)
        cache = KVCache.allocate(config, 16, DEVICE, given)
        generator = torch.Generator().manual_seed(3)
        for tensor in (*cache.keys, *cache.values):
            tensor.copy_(torch.empty(tensor.shape).normal_(generator=generator))
        step = synthetic_step(shape, config.max_model_len, cache, DEVICE)
        step = replace(step, tokens=torch.arange(len(step.tokens), device=DEVICE) * 7)
        with torch.inference_mode():
            found[kernels, given] = model(step), torch.stack([*cache.keys, *cache.values]).float()
    for kernel, reference, other in zip(found[True, scales], found[False, scales], found[False, None], strict=True):
        assert (kernel - reference).norm() < 0.01 * reference.norm() < 0.1 * (other - reference).norm()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "k_scale",
            torch.ones(2),
            r"self_attn.k_scale has shape \[2\]: only one scale for all heads of a layer is s",
        ),
        (
            "v_scale",
            torch.ones(1, dtype=torch.int32),
            "self_attn.v_scale is stored as I32, which is not a support",
        ),
        (
            "k_zero_point",
            torch.zeros(1),
            "self_attn.k_zero_point makes scales of the KV cache asymmetric, which",
        ),
    ],
)
def test_scales_of_other_kinds_are_refused(path: Path, name: str, tensor: Tensor, message: str) -> None:
    config = _config(path)
    _write(path, _scale_tensors() | {PREFIX.format(layer=1) + name: tensor})
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(config)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_a_number_above_zero(path: Path, scale: float) -> None:
    _write(path, _scale_tensors(scales=replace(SCALES, keys=(1.0, scale))))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_scale is .*, but a scale of a KV cache must be a"):
        KVScales.read(_config(path))


def test_scales_that_are_promised_must_be_there(path: Path) -> None:
    write_fp8(path, per_channel, COMPRESSED | {"kv_cache_scheme": SCHEME}, "_scale")
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.k_scale is missing, which kv_cache_scheme in conf"):
        _config(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"strategy": "attn_head"},
            "kv_cache_scheme: scales of a KV cache by attn_head are not supported, only one",
        ),
        ({"symmetric": False}, "asymmetric scales of a KV cache are not supported, only symmetric ones"),
        ({"dynamic": True}, "scales of a KV cache found in every step are not supported, only those of a cal"),
        ({"type": "int"}, "KV caches of type int in 8 bits are not supported, only float in 8 bits"),
    ],
)
def test_other_schemes_are_refused(path: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((path / "config.json").read_text())
    quantization = COMPRESSED | {"kv_cache_scheme": SCHEME | change}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_checkpoint(path)
