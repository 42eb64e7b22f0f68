"""The shipped shapes are those of the public checkpoints."""

import tomllib
from pathlib import Path

import pytest

import engine
from engine.errors import ConfigError
from engine.model_config import Architecture, DType
from engine.model_shapes import MODEL_SHAPES, model_shape
from engine.pipeline.devices import data_sheet
from engine.pipeline.serving_estimate import ServingEstimate

# Billions of parameters as their authors publish them, all and those that a token meets.
PARAMETERS = {
    "llama-2-70b": (68.98, 68.98),
    "llama-3-70b": (70.55, 70.55),
    "llama-3-8b": (8.03, 8.03),
    "qwen2-72b": (72.71, 72.71),
    "deepseek-67b": (67.42, 67.42),
    "mixtral-8x7b": (46.70, 12.88),
}


def test_every_shape_is_listed() -> None:
    assert set(MODEL_SHAPES) == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    estimate = ServingEstimate(config=model_shape(name), device=data_sheet("a100-80gb"))
    every, active = PARAMETERS[name]
    assert estimate.num_parameters / 1e9 == pytest.approx(every, abs=0.006)
    assert estimate.active_parameters / 1e9 == pytest.approx(active, abs=0.006)


def test_what_parameters_do_not_show() -> None:
    shapes = {name: model_shape(name) for name in MODEL_SHAPES}
    assert {name for name, shape in shapes.items() if shape.dtype is DType.FLOAT16} == {"llama-2-70b"}
    assert {shape.dtype for shape in shapes.values()} == {DType.FLOAT16, DType.BFLOAT16}
    assert all(shape.head_dim == 128 and shape.num_kv_heads == 8 for shape in shapes.values())
    assert not any(shape.sliding_windows or shape.tie_word_embeddings for shape in shapes.values())
    assert [name for name, shape in shapes.items() if shape.qkv_bias] == ["qwen2-72b"]
    assert shapes["mixtral-8x7b"].architecture == Architecture.MIXTRAL
    assert all(shapes["mixtral-8x7b"].is_sparse(layer) for layer in range(32))
    thetas = {name: shape.rope.theta for name, shape in shapes.items()}
    assert thetas == {
        "llama-2-70b": 1e4,
        "deepseek-67b": 1e4,
        "llama-3-70b": 5e5,
        "llama-3-8b": 5e5,
        "qwen2-72b": 1e6,
        "mixtral-8x7b": 1e6,
    }


def test_an_unknown_shape_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'gpt-2'; there are deepseek-67b, .*qwen2-72b"):
        model_shape("gpt-2")
    with pytest.raises(ConfigError):
        model_shape("../model_shapes/llama-2-70b")


def test_the_shapes_are_installed_with_the_package() -> None:
    root = Path(engine.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["engine"]
    installed = {path for pattern in patterns for path in root.glob(pattern)}
    assert {root / "model_shapes" / name / "config.json" for name in MODEL_SHAPES} <= installed
