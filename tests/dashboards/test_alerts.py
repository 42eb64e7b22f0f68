"""Prometheus's own tool accepts the configuration and the rules, and the rules fire when they should and only then."""

import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
TESTS = ("alerts_test.yml", "alerts_budget_test.yml")
pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: apt install prometheus)"
)


def promtool(*arguments: str, cwd: Path = DEPLOY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_configuration_is_valid() -> None:
    outcome = promtool("check", "config", "prometheus.yml")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "1 rule files found" in outcome.stdout


def test_rules_are_valid_and_fire_when_they_should() -> None:
    for arguments in (("check", "rules", "alerts.yml"), ("test", "rules", *TESTS)):
        outcome = promtool(*arguments)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    tests = "".join((DEPLOY / test).read_text() for test in TESTS)
    for line in (DEPLOY / "alerts.yml").read_text().splitlines():
        if "- alert:" in line:
            assert f'alertname="{line.split()[-1]}"' in tests, f"{line.split()[-1]} has no test"


def test_a_rule_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    rules = (DEPLOY / "alerts.yml").read_text()
    broken = rules.replace("nanoserve_engine_seconds_since_step > 30", "nanoserve_engine_seconds_since_step > 300")
    assert broken != rules
    (tmp_path / "alerts.yml").write_text(broken)
    shutil.copy(DEPLOY / "alerts_test.yml", tmp_path)
    assert promtool("test", "rules", "alerts_test.yml", cwd=tmp_path).returncode != 0
