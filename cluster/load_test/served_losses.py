"""The loss waterfall of the servers during a load test, from the counters of their replicas before and after it.

Any OpenAI-compatible endpoint can be load-tested; one that lists no replicas with such counters simply has none.
"""

import asyncio
import json
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import LOSS_SECONDS, PREFIX
from engine import EngineStats, Loss, LossWaterfall

_TIMEOUT = aiohttp.ClientTimeout(total=5)
_FIELDS = {
    "accounted_seconds_total": "accounted_seconds",
    "ideal_seconds_total": "ideal_seconds",
    "skipped_head_seconds_total": "skipped_head_seconds",
    "optimal_tokens_per_second": "optimal_tokens_per_second",
}

ReplicaStats = dict[str, EngineStats]


async def read_replicas(url: str) -> ReplicaStats:
    """The loss counters of every replica behind `url`, which ends in /v1, by replica; empty where there are none."""
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        try:
            listed = json.loads(await _get(session, f"{url.removesuffix('/v1')}/metrics/targets"))
            addresses = [address for item in listed if _is_replica(item) for address in item["targets"]]
            texts = await asyncio.gather(*(_get(session, f"http://{address}/metrics") for address in addresses))
            pages = [parse_replicas(text) for text in texts]
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError, AttributeError):
            return {}
    return {replica: stats for page in pages for replica, stats in page.items()}


def parse_replicas(text: str) -> ReplicaStats:
    """The counters in one /metrics page, by replica; those without a known optimum are left out."""
    values: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[Loss, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, replica = sample.name.removeprefix(PREFIX), sample.labels.get("replica", "")
            if name in _FIELDS:
                values.setdefault(replica, {})[_FIELDS[name]] = sample.value
            elif name == LOSS_SECONDS:
                losses.setdefault(replica, {})[Loss(sample.labels["loss"])] = sample.value
    return {
        replica: EngineStats(**known, loss_seconds=losses.get(replica, {}))  # type: ignore[arg-type]
        for replica, known in values.items()
    }


def losses_between(earlier: ReplicaStats, later: ReplicaStats) -> LossWaterfall | None:
    """Of all replicas that were there both times, together; None where there was none."""
    found = [LossWaterfall.between(earlier[replica], later[replica]) for replica in earlier.keys() & later.keys()]
    known = [waterfall for waterfall in found if waterfall is not None]
    return LossWaterfall.combined(known) if known else None


def _is_replica(item: Any) -> bool:
    return bool(item["labels"].get("nanoserve_process") == "replica")


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        response.raise_for_status()
        return await response.text()
