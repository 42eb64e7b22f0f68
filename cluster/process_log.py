"""Where a process of a cluster writes what this project logs: one file per process, in the recipe's format.

Serve keeps a file for each ingress and replica, and knows which one it is and which call it is busy with; so ours go
there, through Serve's own handlers. Ranks are plain actors, whose standard error Ray keeps in a file.
"""

import logging

from cluster.config import LogFormat, LogsConfig

OURS = ("cluster", "engine", "opentelemetry")
_SERVE = "ray.serve"  # the logger that Serve offers to deployments


def serve_logging(config: LogsConfig) -> dict[str, object]:
    """Serve's `logging_config`. Its access log would repeat our line of each exchange, with less in it."""
    return {"encoding": config.format.value.upper(), "enable_access_log": False}


def log_with_serve() -> None:
    """In an ingress or replica, whose handlers Serve has made."""
    _use(logging.getLogger(_SERVE).handlers)


def log_to_standard_error(config: LogsConfig, replica: str, rank: int) -> None:
    """In a rank, whose lines say of which replica it is."""

    def mark(record: logging.LogRecord) -> bool:
        record.replica, record.rank = replica, rank
        return True

    handler = logging.StreamHandler()
    handler.addFilter(mark)
    if config.format is LogFormat.JSON:
        from ray._common.filters import CoreContextFilter
        from ray._common.formatters import JSONFormatter

        handler.addFilter(CoreContextFilter())
        handler.setFormatter(JSONFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(replica)s rank %(rank)d -- %(message)s"))
    _use([handler])


def _use(handlers: list[logging.Handler]) -> None:
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = list(handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False
