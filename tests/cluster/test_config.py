"""Recipes: what is read, what wins, and that every mistake is named with its file and key."""

from pathlib import Path

import pytest

from cluster.config import ServingConfig, parse_bytes, ray_address
from engine import ConfigError, DeviceKind, DType
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(path, sized_config(Architecture.LLAMA))
    return path


def recipe(directory: Path, text: str) -> Path:
    file = directory / "recipe.yaml"
    file.write_text(text)
    return file


def test_a_directory_is_a_recipe_by_itself(checkpoint: Path) -> None:
    config = ServingConfig.load(checkpoint)
    assert config.model == checkpoint
    assert config.names == ("tiny",)
    assert (config.host, config.port) == ("127.0.0.1", 8000)


def test_model_paths_start_at_the_recipe_and_flags_win(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "here").symlink_to(checkpoint)
    file = recipe(tmp_path, "model: here\nname: demo\naliases: [gpt-4o]\nreplicas: 3\ncache: 1.5GiB\n")
    config = ServingConfig.load(file, {"replicas": 2, "port": None})
    assert config.model == checkpoint.resolve()
    assert config.names == ("demo", "gpt-4o")
    assert (config.replicas, config.port, config.cache) == (2, 8000, 3 << 29)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: x\ntensor_paralell: 2\n",
            "recipe.yaml: unknown key 'tensor_paralell'; did you mean 'tensor_parallel'?",
        ),
        ("model: x\nrouting: {affinity: 1}\n", "unknown key 'routing.affinity'"),
        (
            "model: x\nobjectives: {time_to_first_tokens: 1}\n",
            "unknown key 'objectives.time_to_first_tokens'; did you mean 'time_to_first_token'?",
        ),
        ("model: x\nobjectives: {time_per_output_token: 0}\n", "objectives.time_per_output_token: input should be gr"),
        ("model: x\nlogs: {format: xml}\n", "logs.format: input should be 'text' or 'json', but it is 'xml'."),
        ("model: x\nlogs: yes\n", "logs: input should be a valid dictionary"),
        (
            "model: x\ntracing: {endpoint: 'localhost:4318'}\n",
            "tracing.endpoint: it must be the URL of a collector, for example http://127.0.0.1:4318, but it is 'l",
        ),
        ("model: x\ntracing: {endpoint: 'http://a:43180000'}\n", "tracing.endpoint: port out of range 0-65535"),
        ("model: x\ntracing: {endpoint: 'http://a:otlp'}\n", "tracing.endpoint: port could not be cast"),
        ("model: x\ntracing: {endpoint: 'http://a b'}\n", "tracing.endpoint: it must be the URL of a collector"),
        ("model: x\ntracing: {sample_ratio: 2}\n", "tracing.sample_ratio: input should be less than or equal to 1"),
        ("model: x\ntracing: {url: 1}\n", "unknown key 'tracing.url'; known keys are endpoint, sample_ratio."),
        ("replicas: 2\n", "recipe.yaml: the key 'model' is missing."),
        ("model: x\nreplicas: 0\n", "replicas: input should be greater than or equal to 1, but it is 0."),
        ("model: x\ncache: 2 gigs\n", "cache: '2 gigs' is not a size; write a number of bytes or for example 2GiB"),
        ("model: x\nport: 99999\n", "port: input should be less than or equal to 65535, but it is 99999."),
        (
            "model: x\ndtype: int3\n",
            "recipe.yaml: dtype: input should be 'float64', 'float32', 'float16', 'bfloat16', 'fp8' or 'auto', but it "
            "is 'int3'.",
        ),
        ("model: x\nkv_cache_dtype: [fp8]\n", "recipe.yaml: kv_cache_dtype: input should be 'float64', "),
        ("model: x\naliases: [a, 3]\n", "recipe.yaml: aliases.1: input should be a valid string, but it is 3."),
        ("- model: x\n", "must be a mapping"),
        ("model: [\n", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ServingConfig.load(recipe(tmp_path, text))
    assert expected in str(raised.value)


def test_options_go_into_sections_and_leave_the_rest(tmp_path: Path, checkpoint: Path) -> None:
    file = recipe(tmp_path, f"model: {checkpoint}\nlogs: {{prompts: true}}\ntracing: {{sample_ratio: 0.5}}\n")
    config = ServingConfig.load(file, {"logs.format": "json", "tracing.endpoint": "http://127.0.0.1:4318"})
    assert (config.logs.format, config.logs.prompts) == ("json", True)
    assert (config.tracing.endpoint, config.tracing.sample_ratio) == ("http://127.0.0.1:4318/v1/traces", 0.5)
    whole = ServingConfig.load(checkpoint, {"tracing.endpoint": "https://traces.example/otlp/v1/traces"})
    assert whole.tracing.endpoint == "https://traces.example/otlp/v1/traces"
    assert ServingConfig.load(checkpoint).tracing.endpoint is None
    with pytest.raises(ConfigError, match="logs: input should be"):
        ServingConfig.load(recipe(tmp_path, f"model: {checkpoint}\nlogs: json\n"), {"logs.format": "text"})


def test_a_missing_recipe_and_a_missing_model_differ(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        ServingConfig.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="neither a model directory nor a recipe"):
        ServingConfig.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="is not a directory with a checkpoint"):
        ServingConfig.parse({"model": tmp_path / "none"}, "here").engine_config(DeviceKind.CPU)


def test_the_engine_gets_what_the_recipe_and_the_checkpoint_say(checkpoint: Path) -> None:
    engine = ServingConfig.load(checkpoint, {"tensor_parallel": 2}).engine_config(DeviceKind.CPU, num_threads=3)
    assert (engine.max_model_len, engine.dtype, engine.num_threads) == (2048, DType.FLOAT32, 3)
    assert engine.cache_bytes is None
    chosen = ServingConfig.load(checkpoint, {"dtype": "bfloat16", "max_model_len": 64, "threads": 1})
    engine = chosen.engine_config(DeviceKind.CUDA, num_threads=3)
    assert (engine.max_model_len, engine.dtype, engine.num_threads) == (64, DType.BFLOAT16, 1)
    assert (engine.cache_bytes, engine.cache_fraction) == (None, 0.9)
    assert ServingConfig.load(checkpoint, {"cache_fraction": 0.7}).engine_config(DeviceKind.CUDA).cache_fraction == 0.7
    with pytest.raises(ConfigError, match="cache_fraction: input should be less than or equal to 1"):
        ServingConfig.load(checkpoint, {"cache_fraction": 90})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("17", 17), ("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), (12, 12), ("0.5GB", 500_000_000)],
)
def test_sizes(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_device_auto_follows_the_cluster(checkpoint: Path) -> None:
    auto = ServingConfig.load(checkpoint)
    assert auto.resolve_device(0) is DeviceKind.CPU
    assert auto.resolve_device(4) is DeviceKind.CUDA
    assert ServingConfig.load(checkpoint, {"device": "cpu"}).resolve_device(4) is DeviceKind.CPU


def test_the_flag_wins_over_the_environment() -> None:
    environment = {"RAY_ADDRESS": "there:6379"}
    assert ray_address("here:6379", environment) == "here:6379"
    assert ray_address(None, environment) == "there:6379"
    assert ray_address("local", environment) is None
    assert ray_address(None, {}) is None
