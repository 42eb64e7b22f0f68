"""One line for many calls that were refused, and one for each that broke off."""

import logging

import pytest

from cluster.api_error import ApiError
from cluster.failure_log import SECONDS_BETWEEN_LINES, FailureLog
from engine import EngineDeadError


def test_refusals_share_a_line_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    log = FailureLog(lambda: now[0])
    for number in range(500):
        log.failed(f"c{number}", ApiError.unavailable("No replica of the model is ready."))
        now[0] += SECONDS_BETWEEN_LINES / 1000
    now[0] += SECONDS_BETWEEN_LINES
    for number in (500, 501):
        log.failed(f"c{number}", ApiError.unavailable("No replica of the model is ready."))
    assert [record.getMessage() for record in caplog.records] == [
        "Call c0 was refused: No replica of the model is ready.",
        "Call c500 was refused, as 499 others since the last such line: No replica of the model is ready.",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_every_call_that_broke_off_has_its_id_and_cause(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(lambda: 0.0)
    log.failed("a", ApiError.unavailable("No replica."))
    for name in "bc":
        log.failed(name, EngineDeadError(f"Replica of {name} was lost."))
    told = [record.getMessage() for record in caplog.records[1:]]
    assert [line[:13] for line in told] == ["Call b failed", "Call c failed"]
    assert "Replica of b was lost." in told[0]
