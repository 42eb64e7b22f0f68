"""The log of a rank's process: one format for what the project logs there, and whose line it is."""

import json
import subprocess
import sys

import pytest

from cluster.config import LogFormat

_CODE = """
import logging
from cluster.config import LogFormat, LogsConfig
from cluster.process_log import log_to_standard_error
log_to_standard_error(LogsConfig(format=LogFormat({format!r})), "abc", 3)
logging.getLogger("engine.worker").warning("no plan for %d tokens", 512)
logging.getLogger("engine.worker").debug("too much")
logging.getLogger("somebody.else").info("not ours")
"""


@pytest.mark.parametrize("log_format", LogFormat)
def test_lines_of_a_rank(log_format: LogFormat) -> None:
    code = _CODE.format(format=log_format.value)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = run.stderr.splitlines()
    if log_format is LogFormat.JSON:
        facts = json.loads(line)
        assert (facts["message"], facts["levelname"]) == ("no plan for 512 tokens", "WARNING")
        assert (facts["replica"], facts["rank"]) == ("abc", 3)
    else:
        assert line.startswith("WARNING ") and line.endswith("abc rank 3 -- no plan for 512 tokens")
