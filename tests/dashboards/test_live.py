"""A real Prometheus follows a live cluster under load, also while a replica dies; every expression has an answer."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.metrics import PREFIX
from dashboards.catalogue import catalogue, metric_of
from dashboards.panel_json import NAMES, Target, filled_in, load, panels
from dashboards.prometheus import Prometheus
from dashboards.render import ALL, render
from tests.cluster.serve_command import ROOT, Command, until
from tests.dashboards.live_cluster import RAY_FILE, Load, PrometheusServer, RayHead, ray_targets

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus (Debian: apt install prometheus)"),
]
WITHOUT_DATA = {
    "ray_node_gpus_utilization": "this machine has no GPU that Ray shows",
}
RECIPE = ROOT / "deploy/models/demo.yaml"
_OPTIONS = "--replicas 2 --tensor-parallel 2 --threads 1 --cache 8MiB --device cpu --plan-seconds 0 --compile never"
# Answers so long that on a quick machine too some request is usually under way, and so few that a slow one keeps up.
_LOAD = "--request-rate 3 --input-len 8:64 --output-len 64:96 --num-requests 100000 --tokenizer deploy/demo_model/model"
_SCRAPE_SECONDS = 5.0  # deploy/prometheus.yml
_DATA_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Live:
    head: RayHead
    server: Command
    prometheus: PrometheusServer

    @property
    def client(self) -> Prometheus:
        return self.prometheus.client

    def value(self, expression: str) -> float | None:
        """Of an expression with one series."""
        found = self.client.instant(expression)
        return found[0].points[0][1] if found else None

    def routed(self) -> set[str]:
        """The replicas that ingresses say they have sent requests to."""
        return {one.labels["replica"] for one in self.client.instant("nanoserve_routing_decisions_total")}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    short = Path(f"/tmp/nanoserve-live-{os.getpid()}")  # sockets lie deep below it, and their paths are limited
    short.mkdir()
    head = RayHead(short)
    try:
        head.wait_ready()
        server = Command(directory, RECIPE, "--address", head.address, *_OPTIONS.split(), variables=head.variables)
        prometheus = PrometheusServer(directory, server.port, short)
        try:
            server.wait_ready()
            traffic = Load(directory, server, *_LOAD.split())
            try:
                yield Live(head, server, prometheus)
            finally:
                traffic.close()
        finally:
            prometheus.close()
            server.close()
    finally:
        head.close()
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def loaded(live: Live) -> Live:
    """Under load for so long that every rate has its window."""
    until(lambda: (live.value("sum(nanoserve_request_success_total)") or 0) > 20, 120, "requests to be answered")
    until(lambda: (live.value("sum(rate(nanoserve_rank_steps_total[20s]))") or 0) > 0, 60, "rates of ranks")
    until(lambda: (live.value("count(nanoserve_percent_of_optimal > 0)") or 0) == 2, 60, "both replicas to be used")
    return live


def test_everything_that_lists_itself_is_scraped(loaded: Live) -> None:
    kinds = {target["labels"]["nanoserve_process"] for target in loaded.server.client.get("/metrics/targets").json()}
    assert kinds == {"ingress", "replica", "haproxy"}
    listed = set(loaded.server.targets())
    assert len(listed) == 4
    until(lambda: loaded.prometheus.targets("nanoserve") == dict.fromkeys(listed, "up"), 90, "all to be scraped")
    deadline = time.monotonic() + _DATA_SECONDS
    while True:  # Ray writes its list anew as parts of it come up
        listed = ray_targets(loaded.head.directory)
        scraped = loaded.prometheus.targets("ray")
        if listed and scraped == dict.fromkeys(listed, "up"):
            return
        assert time.monotonic() < deadline, f"{RAY_FILE} has {listed}, and Prometheus {scraped}"
        time.sleep(1)


@pytest.mark.parametrize("name", NAMES)
def test_every_expression_of_every_panel_has_data(loaded: Live, name: str) -> None:
    """At some moment of a while, as on a graph: gauges are 0 between two requests, and their ratios then nothing."""
    wanted = [(panel.title, target) for panel in panels(load(name)) for target in panel.targets]
    wanted = [(title, target) for title, target in wanted if target.expression not in WITHOUT_DATA]
    began, deadline = time.time() - 30, time.monotonic() + _DATA_SECONDS

    def has_data(target: Target) -> bool:
        expression = filled_in(target.expression, ALL)
        if target.is_instant:
            return bool(loaded.client.instant(expression))
        return bool(loaded.client.over(expression, began, time.time(), _SCRAPE_SECONDS))

    while wanted := [(title, target) for title, target in wanted if not has_data(target)]:
        assert time.monotonic() < deadline, [f"{title}: {target.expression}" for title, target in wanted]
        time.sleep(_SCRAPE_SECONDS)


def test_every_alert_is_evaluated_and_asks_for_what_exists(loaded: Live) -> None:
    rules = loaded.client.rules()
    assert len(rules) > 8
    until(lambda: all(rule["health"] == "ok" for rule in loaded.client.rules()), 90, "every rule to be evaluated")
    for rule in rules:
        for selector in re.findall(r"(?:nanoserve|ray)_\w+(?:{[^}]*})?", rule["query"]):
            if selector.startswith("nanoserve_process"):
                continue
            # A rule is silent because nothing is wrong, not because its metrics have other names: of labels that only
            # trouble has (a status of 5xx), the others must be there.
            healthy = re.sub(r',? ?status=~"5\.\."', "", selector)
            assert loaded.client.instant(f"count({healthy})"), f"{rule['name']}: {selector}"
    firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
    # These are true of some machines: full ones, and those too slow for the objective under this load.
    assert firing <= {"NodeMemoryHigh", "TTFTBudgetBurn", "TTFTBudgetBurnSlow"}, firing


def test_what_is_exported_is_what_the_catalogue_says(loaded: Live) -> None:
    """All of it once every process has been scraped and has done what it counts."""
    deadline = time.monotonic() + _DATA_SECONDS
    while True:
        series = {one.labels["__name__"] for one in loaded.client.instant(f'{{__name__=~"{PREFIX}.+"}}')}
        exported = {metric_of(name) for name in series}
        assert exported <= catalogue().keys()
        if exported == catalogue().keys():
            return
        assert time.monotonic() < deadline, catalogue().keys() - exported
        time.sleep(_SCRAPE_SECONDS)


def test_promtool_finds_nothing_wrong_with_the_metrics(loaded: Live) -> None:
    for address in loaded.server.targets("ingress") + loaded.server.targets("replica"):
        text = httpx.get(f"http://{address}/metrics").text
        outcome = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_dashboard_is_drawn_without_an_empty_panel(loaded: Live, name: str) -> None:
    began, deadline = time.time() - 40, time.monotonic() + _DATA_SECONDS
    while empty := render(load(name), loaded.client, (began, time.time()))[1]:
        assert time.monotonic() < deadline, empty
        time.sleep(_SCRAPE_SECONDS)


def test_a_replica_that_dies_is_replaced_on_the_lists_too(loaded: Live) -> None:
    """After the others, which want the replicas as they were."""
    before, routed_before = set(loaded.server.targets("replica")), loaded.routed()
    lost = 'sum(nanoserve_replica_events_total{event="lost"})'
    assert loaded.value(lost) == 0
    os.kill(loaded.head.processes("ray::ServeReplica:nanoserve:Replica")[0], signal.SIGKILL)
    until(lambda: len(before & set(loaded.prometheus.targets("nanoserve"))) == 1, 90, "the dead one to be forgotten")
    until(lambda: loaded.value(lost) == 1, 90, "the loss to be counted")

    def replaced() -> bool:
        targets = loaded.prometheus.targets("nanoserve")
        return len(targets) == 4 and len(before & targets.keys()) == 1 and set(targets.values()) == {"up"}

    until(replaced, 120, "its successor to be scraped")
    until(lambda: loaded.value("max(nanoserve_replicas_ready)") == 2, 90, "two replicas to be ready")
    until(
        lambda: loaded.value('count(up{job="nanoserve"} == 0)') is None, 60, "the dead one to be no target that is down"
    )
    until(lambda: len(loaded.routed()) == len(routed_before & loaded.routed()) + 1 == 2, 90, "its series to end")
    assert loaded.server.client.get("/cluster").json()["num_restarts"] == 1


def test_an_application_that_is_deployed_anew_and_smaller_is_followed(loaded: Live) -> None:
    before = loaded.server.targets("ingress") + loaded.server.targets("replica")
    changes = {"replicas": 1, "device": "cpu", "threads": 1, "cache": "8MiB", "plan_seconds": 0, "compile": "never"}
    loaded.head.redeploy(RECIPE, changes | {"port": loaded.server.port})

    def followed() -> bool:
        targets = loaded.prometheus.targets("nanoserve")
        return len(targets) == 3 and not targets.keys() & set(before) and set(targets.values()) == {"up"}

    until(followed, 150, "one ingress, one replica and HAProxy to be scraped, and nothing else")
    until(lambda: loaded.value("max(nanoserve_replicas_ready)") == 1, 90, "one replica to be ready")
