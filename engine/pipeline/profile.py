"""`Profile`: the measured costs of one layer on one device, as a JSON file; `MeasuredCosts`: the cost model over it.

    {"format": 2, "fingerprint": {"device": "...", ...}, "source": "...", "layer": "..." or null,
     "number_format": "bfloat16",
     "nodes": {"qkv_proj": {"samples": [{"num_decodes": 0, "num_prefills": 512, "decode_context": 0,
                                         "prefill_context": 0, "seconds": 0.0012}, ...],
                            "modes": [{"share": 4, "speed": 0.5}, {"share": 10, "speed": 1}]}, ...},
     "interference": [{"node": "o_proj", "beside": "all_reduce", "speed": 0.8}, ...],
     "overlap": {"green": {...}, ...}}

`number_format` is that of the layer's products and of what was cached, as a recipe's `dtype` names it. `seconds` are
alone on the device with all of its units. A mode's `speed` is relative to that with `share` tenths of the execution
units; an empty list means that shares mean nothing here. An interference's `speed` is that of `node` while `beside`
runs; either may be a resource (compute, memory, network), which stands for all its nodes not listed.
Modes and interference are of lanes that overlap by streams; `overlap`, which may be left out, has those of other
mechanisms (`overlap_profile`).
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.number_format import NumberFormat
from engine.operation import TokenKind
from engine.pipeline.atomic_file import replace_file
from engine.pipeline.cost_law import CostLaw, LawSample, fit_law
from engine.pipeline.cost_model import Mode
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.json_value import JsonValue, json_number
from engine.pipeline.overlap_profile import (
    Interference,
    OverlapProfile,
    interference_text,
    modes_text,
    parsed_interference,
    parsed_modes,
)
from engine.pipeline.schedule import ALL_UNITS, Mechanism

FORMAT = 2
_KEYS = ("format", "fingerprint", "source", "layer", "number_format", "nodes", "interference")
_OVERLAP_KEY = "overlap"
_SAMPLE_KEYS = ("num_decodes", "num_prefills", "decode_context", "prefill_context", "seconds")


@dataclass(frozen=True, slots=True)
class Sample:
    """The seconds that a node took for the tokens of `shape`."""

    shape: BatchShape
    seconds: float


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """What was measured of one node: at least one sample; modes by ascending share, or none."""

    samples: tuple[Sample, ...]
    modes: tuple[Mode, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One file. `Profile.parse(str(profile)) == profile`."""

    fingerprint: Mapping[str, str]
    source: str
    number_format: NumberFormat
    layer: str | None = None
    nodes: Mapping[str, NodeProfile] = field(default_factory=dict)
    interference: tuple[Interference, ...] = ()
    overlap: Mapping[Mechanism, OverlapProfile] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, where: str = "profile") -> "Profile":
        """Read the text form; raises `ConfigError` that names `where`, the path inside and what would be right."""
        return cls.of(JsonValue.parse(text, where))

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Read a file; raises `ConfigError` as `parse` does, or where the file cannot be read."""
        return cls.of(JsonValue.read(path))

    @classmethod
    def of(cls, value: JsonValue) -> "Profile":
        """Check a value of a JSON file; raises `ConfigError` that says where it is wrong."""
        _refuse_other_formats(value)
        has_overlap = isinstance(value.value, dict) and _OVERLAP_KEY in value.value
        entries = value.object((*_KEYS, _OVERLAP_KEY) if has_overlap else _KEYS)
        layer = entries["layer"]
        overlap = entries[_OVERLAP_KEY].entries() if has_overlap else {}
        for name in overlap.keys() - {*Mechanism} | overlap.keys() & {Mechanism.STREAMS}:
            entries[_OVERLAP_KEY].refuse(f"of the mechanisms {Mechanism.GREEN} and {Mechanism.CORESIDENT}, not {name}")
        return cls(
            fingerprint={key: text.text() for key, text in entries["fingerprint"].entries().items()},
            source=entries["source"].text(),
            number_format=_number_format(entries["number_format"]),
            layer=None if layer.value is None else layer.text(),
            nodes={name: _node_profile(node) for name, node in entries["nodes"].entries().items()},
            interference=parsed_interference(entries["interference"]),
            overlap={Mechanism(name): OverlapProfile.of(found) for name, found in overlap.items()},
        )

    def __str__(self) -> str:
        nodes = ",\n".join(f"  {json.dumps(name)}: {_node_text(node)}" for name, node in self.nodes.items())
        overlap = ",\n".join(f" {json.dumps(str(mechanism))}: {found}" for mechanism, found in self.overlap.items())
        return (
            f'{{\n"format": {FORMAT},\n'
            f'"fingerprint": {json.dumps(dict(self.fingerprint), indent=1)},\n'
            f'"source": {json.dumps(self.source)},\n"layer": {json.dumps(self.layer)},\n'
            f'"number_format": {json.dumps(self.number_format.value)},\n'
            f'"nodes": {{\n{nodes}\n}},\n"interference": [\n{interference_text(self.interference)}\n]'
            + (f',\n"{_OVERLAP_KEY}": {{\n{overlap}\n}}' if overlap else "")
            + "\n}\n"
        )

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What lanes can overlap by as far as was measured; on a CPU there is nothing else than streams."""
        return (Mechanism.STREAMS, *self.overlap)

    def by(self, mechanism: Mechanism) -> "Profile":
        """With the modes and the interference of lanes that overlap by this mechanism.

        Pairs that were not measured so, those with collectives, are as by streams. Raises `ConfigError` for a mechanism
        that was not measured.
        """
        if mechanism is Mechanism.STREAMS:
            return self
        if mechanism not in self.overlap:
            raise ConfigError(
                f"The profile ({self.source}) has nothing measured of lanes that overlap by {mechanism}; it has"
                f" {', '.join(self.mechanisms)}. Profile again where the device and the kernels can do it."
            )
        found = self.overlap[mechanism]
        nodes = {name: NodeProfile(node.samples, found.modes.get(name, ())) for name, node in self.nodes.items()}
        measured = {(pair.node, pair.beside) for pair in found.interference}
        others = (pair for pair in self.interference if (pair.node, pair.beside) not in measured)
        return replace(self, nodes=nodes, interference=(*found.interference, *others), overlap={})

    def with_overlap(
        self,
        mechanism: Mechanism,
        modes: Mapping[str, tuple[Mode, ...]] | None = None,
        interference: tuple[Interference, ...] = (),
    ) -> "Profile":
        """With more that was measured of a mechanism other than streams."""
        before = self.overlap.get(mechanism, OverlapProfile())
        found = OverlapProfile(
            modes={**before.modes, **(modes or {})}, interference=(*before.interference, *interference)
        )
        return replace(self, overlap={**self.overlap, mechanism: found})

    def write(self, path: Path) -> None:
        """Replace the file at once, so that a reader sees the old or the new one; makes its folder if need be."""
        replace_file(path, str(self))


@dataclass(frozen=True)
class MeasuredCosts:
    """The `CostModel` over a profile; raises `ConfigError` when the profile lacks a node of the graph."""

    profile: Profile
    graph: OperationGraph

    def __post_init__(self) -> None:
        missing = [node.name for node in self.graph.nodes if node.name not in self.profile.nodes]
        if missing:
            raise ConfigError(
                f"The profile ({self.profile.source}) lacks {', '.join(missing)} of this layer; it has "
                f"{', '.join(self.profile.nodes) or 'no operations'}. Profile this model again."
            )
        for node in self.graph.nodes:
            if not any(_law_samples(node, self.profile.nodes[node.name])):
                raise ConfigError(
                    f"The profile ({self.profile.source}) has no sample of {node.name} with {node.tokens} tokens, "
                    "which are what it computes. Profile this model again."
                )

    @property
    def source(self) -> str:
        """Where the prices come from, for people."""
        return self.profile.source

    @property
    def shares_units(self) -> bool:
        """Whether any operation was measured at several shares."""
        return any(len(self.profile.nodes[node.name].modes) > 1 for node in self.graph.nodes)

    def seconds(self, node: Node, shape: BatchShape) -> float:
        """Time of `node` for the tokens of `shape`, alone, interpolated between samples (`cost_law`)."""
        return self._laws[node.name].seconds(*_tokens_and_context(node, shape))

    def modes(self, node: Node) -> tuple[Mode, ...]:
        """The measured shares; all units where there are none."""
        return self.profile.nodes[node.name].modes or (Mode(ALL_UNITS, 1.0),)

    def speed(self, node: Node, share: int, beside: Sequence[tuple[Node, int]]) -> float:
        """The speed at this share times what each of the others leaves of it.

        A pair without a measurement of its own takes the one of its resources, else none is lost.
        """
        speed = _speed_at(self.modes(node), share)
        for other, _ in beside:
            speed *= self._interference(node, other)
        return speed

    def _interference(self, node: Node, other: Node) -> float:
        for one in (node.name, node.resource.value):
            for another in (other.name, other.resource.value):
                if (one, another) in self._pairs:
                    return self._pairs[one, another]
        return 1.0

    @cached_property
    def _pairs(self) -> Mapping[tuple[str, str], float]:
        return {(pair.node, pair.beside): pair.speed for pair in self.profile.interference}

    @cached_property
    def _laws(self) -> Mapping[str, CostLaw]:
        return {
            node.name: fit_law(tuple(_law_samples(node, self.profile.nodes[node.name])), node.cache_reads)
            for node in self.graph.nodes
        }


def _law_samples(node: Node, measured: NodeProfile) -> Iterator[LawSample]:
    """The samples in which the node had something to do."""
    for sample in measured.samples:
        tokens, context = _tokens_and_context(node, sample.shape)
        if tokens > 0:
            yield LawSample(tokens, context, sample.seconds)


def _tokens_and_context(node: Node, shape: BatchShape) -> tuple[float, float]:
    """The tokens of `shape` that the node computes, and their mean context."""
    decodes = 0.0 if node.tokens is TokenKind.PREFILL else shape.num_decodes
    prefills = 0.0 if node.tokens is TokenKind.DECODE else shape.num_prefills
    tokens = decodes + prefills
    total_context = decodes * shape.decode_context + prefills * shape.prefill_context
    if decodes == 0 or prefills == 0:  # exactly, not through a division that rounds
        return tokens, shape.decode_context if prefills == 0 else shape.prefill_context
    return tokens, total_context / tokens


def _speed_at(modes: Sequence[Mode], share: int) -> float:
    """Linear between measured shares and from nothing at no share; beyond the largest nothing is gained."""
    shares, speeds = (0, *(mode.share for mode in modes)), (0.0, *(mode.speed for mode in modes))
    index = bisect_right(shares, share) - 1
    if index == len(shares) - 1:
        return speeds[-1]
    part = (share - shares[index]) / (shares[index + 1] - shares[index])
    return speeds[index] + part * (speeds[index + 1] - speeds[index])


def _refuse_other_formats(value: JsonValue) -> None:
    """Before the keys, which are others in other formats."""
    found = value.entries().get("format")
    if found is not None and found.value == 1:
        found.refuse(f"{FORMAT}: files of format 1 do not say which number format was measured, so profile again")
    if found is not None:
        found.integer(FORMAT, FORMAT)


def _number_format(value: JsonValue) -> NumberFormat:
    text = value.text()
    if text not in {*NumberFormat}:
        value.refuse(f"one of {', '.join(NumberFormat)}")
    return NumberFormat(text)


def _node_profile(value: JsonValue) -> NodeProfile:
    entries = value.object(("samples", "modes"))
    samples = tuple(_sample(item) for item in entries["samples"].items())
    if not samples:
        entries["samples"].refuse("a list of at least one sample")
    return NodeProfile(samples, parsed_modes(entries["modes"]))


def _sample(value: JsonValue) -> Sample:
    fields = value.object(_SAMPLE_KEYS)
    numbers = {key: fields[key].number() for key in _SAMPLE_KEYS}
    seconds = numbers.pop("seconds")
    sample = Sample(BatchShape(**numbers), seconds)
    if sample.shape.num_tokens == 0:
        value.refuse("a sample of at least some tokens (num_decodes + num_prefills above zero)")
    return sample


def _node_text(node: NodeProfile) -> str:
    samples = ",\n".join(
        "    {" + ", ".join(f'"{key}": {json_number(float(number))}' for key, number in _numbers(sample)) + "}"
        for sample in node.samples
    )
    return f'{{"samples": [\n{samples}],\n   "modes": {modes_text(node.modes)}}}'


def _numbers(sample: Sample) -> Iterator[tuple[str, float]]:
    return zip(_SAMPLE_KEYS, (*astuple(sample.shape), sample.seconds), strict=True)
