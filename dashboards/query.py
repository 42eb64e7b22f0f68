"""PromQL in pieces: selectors with the dashboards' variables, rates, quantiles; names are those of the catalogue.

`ENGINE` metrics have a model and a replica, `INGRESS` metrics only a model. Times are Grafana's own: `$__rate_interval`
spans at least four scrapes.
"""

from dashboards.catalogue import series_name

_MODEL = 'model=~"$model"'
_REPLICA = 'replica=~"$replica"'
CALLS = 'route=~"/v1/(chat/)?completions"'
WINDOW = "$__rate_interval"


def ingress(name: str, *matchers: str) -> str:
    """Series of a metric that ingresses export."""
    return f"{series_name(name)}{{{','.join((_MODEL, *matchers))}}}"


def engine(name: str, *matchers: str) -> str:
    """Series of a metric that tells replicas apart."""
    return f"{series_name(name)}{{{','.join((_MODEL, _REPLICA, *matchers))}}}"


def rate(series: str) -> str:
    """How fast counters grow, per second."""
    return f"rate({series}[{WINDOW}])"


def engine_rate(name: str, *matchers: str, by: str = "") -> str:
    """The rate of an engine's counter, over all replicas or `by` labels."""
    return total(rate(engine(name, *matchers)), by)


def ingress_rate(name: str, *matchers: str, by: str = "") -> str:
    """The rate of an ingress's counter, over all ingresses."""
    return total(rate(ingress(name, *matchers)), by)


def total(expression: str, by: str = "") -> str:
    """The sum, over everything or `by` labels."""
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def or_zero(expression: str) -> str:
    """For what has no series before it first happens, such as an error."""
    return f"({expression}) or vector(0)"


def quantile(share: float, histogram: str) -> str:
    """Of an ingress's histogram."""
    return f"histogram_quantile({share}, {ingress_rate(histogram + '_bucket', by='le')})"


def share(part: str, whole: str) -> str:
    """`part / whole`; nothing where the whole is 0, because 0 / 0 is no share."""
    return f"{part} / ({whole} > 0)"
