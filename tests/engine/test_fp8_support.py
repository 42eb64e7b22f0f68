"""Who may have FP8: what is decided of a configuration on each device, and what is said where a device has none."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine import ConfigError, DeviceKind, DType, EngineConfig, NumberFormat, cli
from engine.fp8_checkpoint import Fp8Checkpoint
from engine.fp8_support import check_cpu, settled
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint

MakeConfig = Callable[..., EngineConfig]
FP8, BFLOAT16 = NumberFormat.FP8, NumberFormat.BFLOAT16
A100, L4, H200, B200 = (8, 0), (8, 9), (9, 0), (10, 0)


@pytest.fixture
def on_gpu(engine_config: MakeConfig) -> MakeConfig:
    return lambda **overrides: engine_config(
        **({"device": DeviceKind.CUDA, "dtype": DType.BFLOAT16, "block_size": 16} | overrides)
    )


@pytest.mark.parametrize("capability", [L4, H200, B200])
def test_devices_that_have_it(on_gpu: MakeConfig, capability: tuple[int, int]) -> None:
    config = on_gpu(product_format=FP8)
    assert settled(config, capability, has_triton=True) == config
    assert (config.in_fp8, config.number_format, config.cache_format) == (True, FP8, FP8)
    assert config.dtype is DType.BFLOAT16


def test_devices_that_have_not(on_gpu: MakeConfig, engine_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as on_cpu:
        check_cpu(engine_config(dtype=DType.BFLOAT16, product_format=FP8))
    assert str(on_cpu.value) == (
        "device cpu has no FP8 matrix products: use dtype bfloat16, or a GPU of compute capability 8.9 or later "
        "(L4, H100, ...)."
    )
    with pytest.raises(ConfigError) as old:
        settled(on_gpu(product_format=FP8), A100, "NVIDIA A100-SXM4-80GB")
    assert str(old.value).startswith(
        "device cuda (NVIDIA A100-SXM4-80GB, compute capability 8.0) has no FP8 matrix products: use dtype bfloat16, "
    )
    with pytest.raises(ConfigError, match="device cpu has no FP8 numbers for a KV cache: use kv_cache_dtype auto, or"):
        check_cpu(engine_config(kv_cache_format=FP8))
    check_cpu(on_gpu(product_format=FP8))  # who knows what it is: its rank will
    check_cpu(engine_config())


@pytest.mark.parametrize(
    ("stored_fp8", "capability", "expected"),
    [(True, H200, FP8), (True, A100, BFLOAT16), (False, H200, BFLOAT16), (False, A100, BFLOAT16)],
)
def test_auto_takes_what_checkpoint_and_device_have(
    on_gpu: MakeConfig, stored_fp8: bool, capability: tuple[int, int], expected: NumberFormat
) -> None:
    config = on_gpu()
    if stored_fp8:
        config = replace(config, model=replace(config.model, fp8=Fp8Checkpoint()))
    found = settled(config, capability, has_triton=True)
    assert (found.product_format, found.cache_format, found.dtype) == (expected, expected, DType.BFLOAT16)
    assert settled(found, capability, has_triton=True) == found


def test_products_on_a_gpu_need_triton(on_gpu: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named where it lacks; a cache in FP8 beside other products does without, and so does what was left open."""
    with pytest.raises(ConfigError) as lacking:
        settled(on_gpu(product_format=FP8), H200, has_triton=False)
    assert str(lacking.value) == (
        "FP8 matrix products on a GPU need Triton, whose kernels quantise their inputs, and this Python has none: "
        "install triton in the version that torch names, or use dtype bfloat16."
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="need Triton"):
        settled(on_gpu(product_format=FP8), H200)
    with pytest.raises(ConfigError, match="has no FP8 matrix products"):  # what lacks first is the device
        settled(on_gpu(product_format=FP8), A100)
    assert settled(on_gpu(kv_cache_format=FP8), H200).cache_format is FP8
    config = on_gpu()
    assert settled(replace(config, model=replace(config.model, fp8=Fp8Checkpoint())), H200).number_format is BFLOAT16


def test_a_cache_of_its_own(on_gpu: MakeConfig) -> None:
    assert settled(on_gpu(product_format=FP8, kv_cache_format=BFLOAT16), H200, has_triton=True).cache_format is BFLOAT16
    assert settled(on_gpu(kv_cache_format=FP8), H200).cache_format is FP8
    with pytest.raises(ConfigError, match="kv_cache_dtype float16 does not go with activations in bfloat16: auto, fp8"):
        on_gpu(kv_cache_format=NumberFormat.FLOAT16)
    with pytest.raises(ConfigError, match="product_format float32 does not go with activations in bfloat16"):
        on_gpu(product_format=NumberFormat.FLOAT32)


SLOW = pytest.mark.slow  # their ranks are processes


@pytest.mark.parametrize(
    "command",
    ["bench offline", pytest.param("timeline", marks=SLOW), pytest.param("profile", marks=SLOW)],
)
def test_commands_refuse_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_random_checkpoint(tmp_path / "model", sized_config(Architecture.LLAMA))
    arguments = [*command.split(), str(tmp_path / "model"), "--dtype", "fp8", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["engine", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert str(exit.value.code).startswith("error: device cpu has no FP8 matrix products: use dtype bfloat16, or")
    assert "Traceback" not in capsys.readouterr().err
    offered = CliRunner().invoke(cli.app, [*command.split(), str(tmp_path / "model"), "--dtype", "int3"]).stderr
    assert "fp8" in offered and "bfloat16" in offered
