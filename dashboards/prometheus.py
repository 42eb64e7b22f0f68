"""Asks a Prometheus: instant and range queries of its HTTP API."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx


class QueryError(Exception):
    """Prometheus refused a query; the message is its own, with the query."""


@dataclass(frozen=True, slots=True)
class Series:
    """Labels, and (time in Unix seconds, value) pairs; a NaN stays one."""

    labels: Mapping[str, str]
    points: list[tuple[float, float]]


class Prometheus:
    """One server, by its URL."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def instant(self, expression: str, time: float | None = None) -> list[Series]:
        """The value of every series at `time` (now unless given). A scalar or a string is one series."""
        data = self._get("/api/v1/query", query=expression, **({} if time is None else {"time": str(time)}))
        if data["resultType"] != "vector":
            return [Series({}, [_point(data["result"])])]
        return [Series(result["metric"], [_point(result["value"])]) for result in data["result"]]

    def over(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """The values of every series from `start` to `end`, a point every `step` seconds."""
        data = self._get("/api/v1/query_range", query=expression, start=str(start), end=str(end), step=str(step))
        return [Series(result["metric"], [_point(pair) for pair in result["values"]]) for result in data["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its state and what is wrong with it, if anything."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def close(self) -> None:
        """Let go of its connections."""
        self._client.close()

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(path, params=parameters).json()
        if answer["status"] != "success":
            raise QueryError(f"{answer['error']} in: {parameters.get('query', path)}")
        return answer["data"]


def _point(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
