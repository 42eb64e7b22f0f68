"""A `Profile` for people: what each operation costs by the number of tokens, and what it loses beside others."""

from collections.abc import Mapping, Sequence

from engine.pipeline.profile import NodeProfile, Profile, Sample

_MOST_COLUMNS = 8


def profile_summary(profile: Profile) -> str:
    """Where it is from, tables of milliseconds, and speeds in pairs."""
    tables: dict[tuple[int, ...], list[str]] = {}
    for name, node in profile.nodes.items():
        for context, samples in _by_context(node).items():
            title = name if context == 0 else f"{name}, context {context:g}"
            kept = _thinned(sorted(samples, key=lambda sample: sample.shape.num_tokens))
            sizes = tuple(int(sample.shape.num_tokens) for sample in kept)
            tables.setdefault(sizes, []).append(_line(title, [f"{1e3 * sample.seconds:.4g}" for sample in kept]))
    parts = [f"{profile.source}; {profile.number_format}"]
    parts += [
        "\n".join([_line("milliseconds for tokens:", list(map(str, sizes))), *lines]) for sizes, lines in tables.items()
    ]
    for mechanism in profile.mechanisms:
        parts += _by_mechanism(profile.by(mechanism), "" if len(profile.mechanisms) == 1 else f", by {mechanism}")
    return "\n\n".join(parts)


def _by_mechanism(profile: Profile, mechanism: str) -> list[str]:
    """Speeds with a share of the units, and beside others."""
    parts = []
    shared = {name: node.modes for name, node in profile.nodes.items() if node.modes}
    if shared:
        shares = sorted({mode.share for modes in shared.values() for mode in modes})
        lines = [_line(f"speed by tenths{mechanism}:", list(map(str, shares)))]
        for name, modes in shared.items():
            speeds = {mode.share: f"{100 * mode.speed:.0f} %" for mode in modes}
            lines.append(_line(name, [speeds.get(share, "") for share in shares]))
        parts.append("\n".join(lines))
    if profile.interference:
        parts.append("\n".join([f"speed beside another, of that alone{mechanism}:", *_pairs(profile)]))
    return parts


def _by_context(node: NodeProfile) -> Mapping[float, list[Sample]]:
    found: dict[float, list[Sample]] = {}
    for sample in node.samples:
        found.setdefault(max(sample.shape.decode_context, sample.shape.prefill_context), []).append(sample)
    return found


def _thinned(samples: Sequence[Sample]) -> list[Sample]:
    """At most so many as fit a terminal, evenly, the largest among them."""
    step = -(-len(samples) // _MOST_COLUMNS)
    return list(samples[::-1][::step][::-1])


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:<36}" + "".join(f"{cell:>9}" for cell in cells)


def _pairs(profile: Profile) -> list[str]:
    """A line for each two, in the order in which they were measured."""
    speeds = {(pair.node, pair.beside): pair.speed for pair in profile.interference}
    lines: list[str] = []
    told: set[tuple[str, str]] = set()
    for (node, beside), speed in speeds.items():
        if (node, beside) not in told:
            other = speeds.get((beside, node))
            back = "" if other is None else f", {100 * other:.0f} % the other"
            lines.append(f"{node} beside {beside}: {100 * speed:.0f} %{back}")
            told.add((beside, node))
    return lines
