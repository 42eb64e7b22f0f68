"""One warning for many calls that were refused, with their number."""

import logging

import pytest

from cluster.refusal_log import SECONDS_BETWEEN_LINES, RefusalLog


def test_refusals_share_a_line_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    log = RefusalLog(lambda: now[0])
    for _ in range(500):
        log.refused("No replica is ready.")
        now[0] += SECONDS_BETWEEN_LINES / 1000
    now[0] += SECONDS_BETWEEN_LINES
    for _ in range(2):
        log.refused("No replica is ready.")
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "Refused 1 call: No replica is ready."),
        (logging.WARNING, "Refused 500 calls since the last such line, 15 s ago: No replica is ready."),
    ]
