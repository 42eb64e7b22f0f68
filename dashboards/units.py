"""Numbers as Grafana's units write them: `formatted(0.0034, "s")` is "3.4 ms"."""

from collections.abc import Sequence

_SCALES: dict[str, Sequence[tuple[float, float, str]]] = {  # from which size on, divided by, followed by
    "s": (
        (86400, 86400, " d"),
        (3600, 3600, " h"),
        (120, 60, " min"),
        (1, 1, " s"),
        (1e-3, 1e-3, " ms"),
        (0, 1e-6, " µs"),
    ),
    "bytes": ((1 << 30, 1 << 30, " GiB"), (1 << 20, 1 << 20, " MiB"), (1 << 10, 1 << 10, " KiB"), (0, 1, " B")),
}
_NUMBERS = ((1e9, 1e9, " B"), (1e6, 1e6, " M"), (1e4, 1e3, " K"), (0, 1, ""))
_ENDINGS = {"short": "", "none": "", "reqps": " req/s", "ops": " ops/s", "percent": " %"}


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """The value with its unit, to about three figures unless `decimals` are given. Raises `KeyError` for no unit."""
    if unit == "percentunit":
        return formatted(100 * value, "percent", decimals)
    if unit in _SCALES:
        if value == 0:
            return "0"
        return _scaled(value, _SCALES[unit], decimals)
    ending = " " + unit.removeprefix("suffix:").strip() if unit.startswith("suffix:") else _ENDINGS[unit]
    return _scaled(value, _NUMBERS, decimals) + ending


def _scaled(value: float, scale: Sequence[tuple[float, float, str]], decimals: int | None) -> str:
    divisor, ending = next(step[1:] for step in scale if abs(value) >= step[0])
    return _figures(value / divisor, decimals) + ending


def _figures(value: float, decimals: int | None) -> str:
    if decimals is None:
        decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
        text = f"{value:.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{decimals}f}"
