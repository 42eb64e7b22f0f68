"""`OverlapProfile`: what operations lose to sharing a device by one mechanism: speeds by share, and beside each other.

    {"modes": {"qkv_proj": [{"share": 7, "speed": 0.75}, {"share": 10, "speed": 1}], ...},
     "interference": [{"node": "o_proj", "beside": "decode_attention", "speed": 0.8}, ...]}

A mode's `speed` is relative to the node alone on the whole device as it is without overlap; that of a pair is relative
to the node alone with the share that it has in the pair.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import ConfigError
from engine.pipeline.cost_model import Mode
from engine.pipeline.json_value import JsonValue, json_number
from engine.pipeline.schedule import ALL_UNITS


@dataclass(frozen=True, slots=True)
class Interference:
    """`node` runs at `speed` times its speed alone while `beside` runs; both are names of nodes or of resources."""

    node: str
    beside: str
    speed: float


@dataclass(frozen=True, kw_only=True)
class OverlapProfile:
    """By one mechanism; nodes that were not measured have no modes."""

    modes: Mapping[str, tuple[Mode, ...]] = field(default_factory=dict)
    interference: tuple[Interference, ...] = ()

    @classmethod
    def of(cls, value: JsonValue) -> "OverlapProfile":
        """Check a value of a JSON file; raises `ConfigError` that says where it is wrong."""
        entries = value.object(("modes", "interference"))
        return cls(
            modes={name: parsed_modes(modes) for name, modes in entries["modes"].entries().items()},
            interference=parsed_interference(entries["interference"]),
        )

    def __str__(self) -> str:
        modes = ",\n".join(f"   {json.dumps(name)}: {modes_text(modes)}" for name, modes in self.modes.items())
        pairs = interference_text(self.interference)
        return f'{{"modes": {{\n{modes}\n  }},\n  "interference": [\n{pairs}\n  ]}}'


def parsed_modes(value: JsonValue) -> tuple[Mode, ...]:
    """Modes by ascending share; the last one has all units."""
    modes: list[Mode] = []
    for item in value.items():
        fields = item.object(("share", "speed"))
        modes.append(Mode(fields["share"].integer(1, ALL_UNITS), fields["speed"].number(is_positive=True)))
        if len(modes) > 1 and modes[-1].share <= modes[-2].share:
            fields["share"].refuse(f"above the share before it, {modes[-2].share}")
    if modes and modes[-1].share != ALL_UNITS:
        value.refuse(f"a list that ends with the share of all units, {ALL_UNITS}")
    return tuple(modes)


def parsed_interference(value: JsonValue) -> tuple[Interference, ...]:
    """Each pair once."""
    found: dict[tuple[str, str], Interference] = {}
    for index, item in enumerate(value.items()):
        fields = item.object(("node", "beside", "speed"))
        pair = fields["node"].text(), fields["beside"].text()
        if pair in found:
            raise ConfigError(f"{value.where}[{index}] repeats {pair[0]} beside {pair[1]}.")
        found[pair] = Interference(*pair, fields["speed"].number(is_positive=True))
    return tuple(found.values())


def modes_text(modes: Sequence[Mode]) -> str:
    """As JSON, on one line."""
    return "[" + ", ".join(f'{{"share": {mode.share}, "speed": {json_number(mode.speed)}}}' for mode in modes) + "]"


def interference_text(pairs: Sequence[Interference]) -> str:
    """As JSON, a line for each."""
    return ",\n".join(
        f'  {{"node": {json.dumps(pair.node)}, "beside": {json.dumps(pair.beside)}, '
        f'"speed": {json_number(pair.speed)}}}'
        for pair in pairs
    )
