"""Every recipe of a large model: what it asks for fits its GPU, and a plan for it is predicted to be worth while."""

from pathlib import Path

import pytest

from cluster.config import ServingConfig
from engine import ConfigError, DeviceKind, EngineConfig
from engine.memory_budget import num_affordable_blocks
from engine.model_shapes import MODEL_SHAPES, model_shape
from engine.pipeline.devices import DATA_SHEETS, DeviceSpec
from engine.pipeline.plan_report import PlanReport
from engine.pipeline.plan_request import PlanRequest
from engine.weight_layout import rank_weight_bytes

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "engine" / "model_shapes"
RECIPES = sorted(path for path in (ROOT / "deploy" / "models").glob("*.yaml") if path.stem != "demo")
# Of a GPU's memory: for the driver, the graphs, and what operations keep for a step.
KEPT_SHARE, KEPT_BYTES = 0.04, 3 * 2**30
PROMPT, OUTPUT = 512, 512


def _parts(recipe: Path) -> tuple[str, DeviceSpec]:
    """The model and the device that the file is named after."""
    (device,) = (device for device in DATA_SHEETS if recipe.stem.endswith(f"-{device}"))
    return recipe.stem.removesuffix(f"-{device}"), DATA_SHEETS[device]


def _engine_config(recipe: Path) -> EngineConfig:
    """What a replica runs, with the shape of the model for the checkpoint that only users have."""
    model, _ = _parts(recipe)
    return ServingConfig.load(recipe, {"model": SHAPES / model}).engine_config(DeviceKind.CUDA)


def _cache_tokens(recipe: Path) -> int:
    _, device = _parts(recipe)
    config = _engine_config(recipe)
    weights = rank_weight_bytes(config.model, config.dtype, config.tensor_parallel)
    free = int((1 - KEPT_SHARE) * device.memory_bytes - KEPT_BYTES - weights)
    return num_affordable_blocks(config, free) * config.block_size


def test_every_model_of_the_paper_has_a_recipe_for_each_device() -> None:
    named = {recipe.stem for recipe in RECIPES}
    assert named == {f"{model}-{device}" for model in MODEL_SHAPES for device in ("a100-80gb", "h100", "h200")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_says_what_it_serves_and_where(recipe: Path) -> None:
    config = ServingConfig.load(recipe)
    model, _ = _parts(recipe)
    assert config.names == (model,)
    assert config.model.name == model and config.model.is_absolute()
    with pytest.raises(ConfigError, match="is not a directory with a checkpoint"):
        config.engine_config(DeviceKind.CUDA)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_fits_its_device(recipe: Path) -> None:
    model, _ = _parts(recipe)
    config = _engine_config(recipe)
    model_shape(model).check_tensor_parallel(config.tensor_parallel)
    decodes = config.max_batch_tokens * OUTPUT // (PROMPT + OUTPUT)
    assert config.max_sequences >= decodes, "as many as the dense batch has decodes"
    # At half their answers they hold this much; an A100 or H100 with one 8B model is the tightest.
    assert _cache_tokens(recipe) >= 0.45 * decodes * (PROMPT + OUTPUT / 2)
    assert _cache_tokens(recipe) >= 4 * config.max_model_len


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_can_be_planned(recipe: Path) -> None:
    model, device = _parts(recipe)
    config = _engine_config(recipe)
    request = PlanRequest(
        name=model,
        model=config.model,
        device=device,
        num_devices=config.tensor_parallel,
        num_tokens=config.max_batch_tokens,
        num_prompt_tokens=PROMPT,
        num_output_tokens=OUTPUT,
        number_format=config.number_format,
    )
    report = PlanReport(request, request.answer(1.0))
    assert report.plan.best.step_seconds <= report.plan.sequential.step_seconds
    assert 40 < report.percent_of_optimal < 100
    assert f"| {recipe.stem} | {config.tensor_parallel} |" in (ROOT / "docs" / "recipes.md").read_text()
