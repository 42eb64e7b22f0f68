"""`Row`: a titled group of panels."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """Panels (builders of grafana-foundation-sdk) that flow from left to right under a title."""

    title: str
    panels: list[Any]
