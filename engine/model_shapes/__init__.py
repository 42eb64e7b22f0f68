"""The shapes of public models, without weights, for planning on a machine that could never hold them.

Each folder holds the config.json of the model's base checkpoint on Hugging Face, as far as it bears on the shape. Among
them are the models of NanoFlow's evaluation. Torch-free.
"""

from pathlib import Path

from engine.errors import ConfigError
from engine.model_config import ModelConfig

_FOLDER = Path(__file__).parent

MODEL_SHAPES = tuple(sorted(path.parent.name for path in _FOLDER.glob("*/config.json")))


def model_shape(name: str) -> ModelConfig:
    """The configuration of a model in `MODEL_SHAPES`; raises `ConfigError` that lists them for any other name."""
    if name not in MODEL_SHAPES:
        raise ConfigError(f"No model shape is called {name!r}; there are {', '.join(MODEL_SHAPES)}.")
    return ModelConfig.from_checkpoint(_FOLDER / name)
