"""Writes the dashboards' JSON beside itself: `python -m dashboards.build`, with the development tools installed.

The JSON is what Grafana (10.1 or later) imports or provisions; a test compares it with what this writes. No panel
names a data source: the variable `datasource` does, so that a dashboard works in any Grafana that has a Prometheus.
"""

import json
from collections.abc import Callable, Mapping
from itertools import count

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from dashboards import cluster_dashboard, pipeline_dashboard, serving_dashboard
from dashboards.catalogue import series_name
from dashboards.panel import DATASOURCE
from dashboards.panel_json import NAMES, file_of
from dashboards.row import Row

TAG = "nanoserve"
_SOURCES: Mapping[str, tuple[Callable[[], list[Row]], str]] = {
    "serving": (serving_dashboard.rows, "What clients see: latencies against objectives, goodput, queues, errors."),
    "cluster": (cluster_dashboard.rows, "How load and memory are spread over replicas, and who came, left or hangs."),
    "pipeline": (pipeline_dashboard.rows, "How far from the optimum the replicas are, and what takes the rest."),
}


def text(name: str) -> str:
    """The JSON of one dashboard."""
    make_rows, description = _SOURCES[name]
    of_model = f'{series_name("engine_steps_total")}{{model=~"$model"}}'
    builder = (
        dashboard.Dashboard(f"nanoserve: {name.capitalize()}")
        .uid(f"nanoserve-{name}")
        .description(description)
        .tags([TAG])
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-15m", "now")
        .refresh("10s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_labels("model", "Model", f"label_values({series_name('replicas_ready')}, model)"))
        .with_variable(_labels("replica", "Replica", f"label_values({of_model}, replica)"))
    )
    for other in NAMES:
        if other != name:
            link = dashboard.DashboardLink(other.capitalize()).type(DashboardLinkType.LINK)
            builder.link(link.url(f"/d/nanoserve-{other}").include_vars(True).keep_time(True))
    ids = count(1)
    for row in make_rows():
        builder.with_row(dashboard.Row(row.title).id(next(ids)))
        for panel in row.panels:
            builder.with_panel(panel.id(next(ids)))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write every file."""
    for name in NAMES:
        file_of(name).write_text(text(name))


def _labels(name: str, title: str, query: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(title).query(query).datasource(DATASOURCE)
    variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    everything = VariableOption(selected=True, text="All", value="$__all")
    return variable.multi(True).include_all(True).all_value(".*").current(everything)


if __name__ == "__main__":
    main()
