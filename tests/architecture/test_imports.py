"""The layers of the project hold: import-linter's contracts, and what really gets loaded at run time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CONTROL_PLANE = (
    "batch",
    "block_manager",
    "config",
    "errors",
    "executor",
    "llm_engine",
    "model_config",
    "request",
    "scheduler",
    "sequence",
    "simulated_executor",
    "stats",
    "workloads.workload_source",
)
HEAVY = ("torch", "ray", "transformers", "fastapi", "starlette", "pydantic", "triton", "aiohttp", "httpx")


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return set(outcome.stdout.split())


def test_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    outcome = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_probe_sees_what_is_loaded() -> None:
    """The twin of the tests below: the probe does report a heavy package when one is imported."""
    assert "starlette" in loaded_by("import starlette.requests")


def test_the_port_of_the_engine_is_light() -> None:
    assert loaded_by("import engine").isdisjoint(HEAVY)


@pytest.mark.parametrize("module", CONTROL_PLANE)
def test_control_plane_loads_no_torch(module: str) -> None:
    assert loaded_by(f"import engine.{module}").isdisjoint(HEAVY)


def test_the_command_line_of_the_engine_starts_light() -> None:
    """`--help` must not wait for torch."""
    assert loaded_by("import engine.cli").isdisjoint(HEAVY)
