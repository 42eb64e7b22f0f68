"""The profile's file form is exact and strict; measured costs follow the laws that the samples came from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.number_format import NumberFormat
from engine.operation import Resource, TokenKind
from engine.pipeline.cost_law import LawSample, fit_law
from engine.pipeline.cost_model import CostModel, Mode
from engine.pipeline.graph import LAYER_INPUT, Call, Node, OperationGraph
from engine.pipeline.overlap_profile import Interference, OverlapProfile
from engine.pipeline.profile import MeasuredCosts, NodeProfile, Profile, Sample
from engine.pipeline.schedule import Mechanism

_SIZES = st.floats(0, 1e6) | st.integers(0, 10**6).map(float)
_SPEEDS = st.floats(1e-6, 2)
_SAMPLES = st.builds(
    Sample,
    st.builds(
        BatchShape,
        num_decodes=_SIZES,
        num_prefills=st.floats(1e-3, 1e5),
        decode_context=_SIZES,
        prefill_context=_SIZES,
    ),
    st.floats(0, 1e3),
)
_MODES = st.dictionaries(st.integers(1, 10), _SPEEDS).map(
    lambda speeds: tuple(Mode(share, speeds[share]) for share in sorted(speeds)) if 10 in speeds else ()
)
_PROFILES = st.builds(
    Profile,
    fingerprint=st.dictionaries(st.text(), st.text(), max_size=3),
    source=st.text(),
    number_format=st.sampled_from(NumberFormat),
    layer=st.none() | st.text(),
    nodes=st.dictionaries(
        st.text(), st.builds(NodeProfile, st.lists(_SAMPLES, min_size=1, max_size=3).map(tuple), _MODES), max_size=3
    ),
    interference=st.dictionaries(st.tuples(st.text(), st.text()), _SPEEDS, max_size=3).map(
        lambda speeds: tuple(Interference(*pair, speed) for pair, speed in speeds.items())
    ),
    overlap=st.dictionaries(
        st.sampled_from([Mechanism.GREEN, Mechanism.CORESIDENT]),
        st.builds(OverlapProfile, modes=st.dictionaries(st.text(), _MODES, max_size=2)),
    ),
)


def _node(name: str, resource: Resource, tokens: TokenKind = TokenKind.ALL, cache_reads: bool = False) -> Node:
    call = Call(name=name, inputs=(LAYER_INPUT,), signature="")
    return Node(
        name=name,
        calls=(call,),
        inputs=(LAYER_INPUT,),
        outputs=(name,),
        resource=resource,
        tokens=tokens,
        cache_reads=cache_reads,
    )


PROJECTION = _node("projection", Resource.COMPUTE)
DECODE = _node("decode_attention", Resource.MEMORY, TokenKind.DECODE, cache_reads=True)
PREFILL = _node("prefill_attention", Resource.COMPUTE, TokenKind.PREFILL, cache_reads=True)
REDUCE = _node("all_reduce", Resource.NETWORK)
GRAPH = OperationGraph((PROJECTION, DECODE, PREFILL, REDUCE), "all_reduce")


def _sample(seconds: float, *, decodes: float = 0, prefills: float = 0, context: float = 0) -> Sample:
    shape = BatchShape(
        num_decodes=decodes,
        num_prefills=prefills,
        decode_context=context if decodes else 0,
        prefill_context=context if prefills else 0,
    )
    return Sample(shape, seconds)


def _profile(**changes: Any) -> Profile:
    nodes = {
        "projection": NodeProfile(
            tuple(_sample(1e-4 + 2e-6 * tokens, prefills=tokens) for tokens in (64, 256, 512, 2048)),
            (Mode(4, 0.5), Mode(8, 0.9), Mode(10, 1.0)),
        ),
        "decode_attention": NodeProfile(
            tuple(
                _sample(2e-5 + 1e-6 * count + 3e-9 * count * context, decodes=count, context=context)
                for count in (4, 64, 256)
                for context in (128, 1024)
            )
        ),
        "prefill_attention": NodeProfile((_sample(3e-3, prefills=1024, context=512),)),
        "all_reduce": NodeProfile(tuple(_sample(5e-5 + 1e-6 * n, prefills=n) for n in (128, 1024))),
    }
    settings: dict[str, Any] = dict(
        fingerprint={"device": "a test"},
        source="a test",
        number_format=NumberFormat.BFLOAT16,
        nodes=nodes,
        interference=(
            Interference("projection", "all_reduce", 0.8),
            Interference("projection", "memory", 0.7),
            Interference("compute", "memory", 0.6),
            Interference("network", "compute", 0.9),
        ),
    )
    return Profile(**(settings | changes))


@given(_PROFILES)
def test_the_text_form_is_exact(profile: Profile) -> None:
    assert Profile.parse(str(profile)) == profile
    assert str(Profile.parse(str(profile))) == str(profile)


def test_a_file_round_trips_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "profile.json"
    _profile().write(path)
    _profile(source="another").write(path)
    assert Profile.read(path) == _profile(source="another")
    assert list(path.parent.iterdir()) == [path]


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(profile: Any) -> None:
        for key in path[:-1]:
            profile = profile[key]
        profile[path[-1]] = value

    return change


def _delete(*path: str | int) -> Callable[[Any], None]:
    def change(profile: Any) -> None:
        for key in path[:-1]:
            profile = profile[key]
        del profile[path[-1]]

    return change


_FIRST_SAMPLE = ("nodes", "projection", "samples", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", value=3), r"format must be a whole number from 2 to 2, but is 3"),
        (_set("format", value=1), r"format must be 2: files of format 1 do not say which number format .*, but is 1"),
        (_set("extra", value=1), r"unknown key 'extra'"),
        (_delete("source"), r"lacks the key 'source'"),
        (_set("fingerprint", "device", value=3), r"fingerprint\.device must be a string, but is 3"),
        (_set("number_format", value="int8"), r"number_format must be one of float64, .*, fp8, but is \"int8\""),
        (_set("number_format", value=[]), r"number_format must be a string"),
        (_set("layer", value=[]), r"layer must be a string"),
        (_set("nodes", value=[]), r"nodes must be an object"),
        (_set("nodes", "projection", "samples", value=[]), r"nodes\.projection\.samples must be a list of at least"),
        (_set(*_FIRST_SAMPLE, "seconds", value=-1), r"samples\[0\]\.seconds must be a number of at least zero"),
        (_set(*_FIRST_SAMPLE, "seconds", value=math.nan), r"NaN"),
        (_set(*_FIRST_SAMPLE, "seconds", value=math.inf), r"Infinity"),
        (_set(*_FIRST_SAMPLE, "seconds", value=10**400), r"seconds must be a number"),
        (_set(*_FIRST_SAMPLE, "seconds", value="1"), r'seconds must be a number of at least zero, but is "1"'),
        (_set(*_FIRST_SAMPLE, "tokens", value=1), r"samples\[0\] has an unknown key 'tokens'"),
        (_set(*_FIRST_SAMPLE, "num_prefills", value=0), r"samples\[0\] must be a sample of at least some tokens"),
        (_set("nodes", "projection", "modes", 1, "share", value=4), r"modes\[1\]\.share must be above .* 4"),
        (_set("nodes", "projection", "modes", 2, "share", value=9), "modes must be a list that ends with .* 10"),
        (_set("nodes", "projection", "modes", 2, "share", value=11), r"share must be a whole number from 1 to 10"),
        (_set("nodes", "projection", "modes", 0, "speed", value=0), r"speed must be a number above zero"),
        (_set("interference", 0, "speed", value=0), r"interference\[0\]\.speed must be a number above zero"),
        (_set("interference", 1, "beside", value="all_reduce"), r"interference\[1\] repeats projection beside all_red"),
    ],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    values = json.loads(str(_profile()))
    change(values)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as caught:
        Profile.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1, "format": 1}', b"[" * 100_000, b"1" * 10_000]
)
def test_what_is_no_profile_at_all_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"profile\.json"):
        Profile.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Profile.read(tmp_path / "missing.json")


def test_costs_are_interpolated_and_prolonged() -> None:
    costs: CostModel = MeasuredCosts(_profile(), GRAPH)
    for tokens in (1, 64, 100, 511, 2048, 5000):
        for decodes in (0, tokens // 2, tokens):
            shape = BatchShape(num_decodes=decodes, num_prefills=tokens - decodes, decode_context=99)
            assert costs.seconds(PROJECTION, shape) == pytest.approx(1e-4 + 2e-6 * tokens)
    for count, context in ((1, 1), (4, 128), (30, 700), (256, 1024), (400, 3000)):
        shape = BatchShape(num_decodes=count, num_prefills=77, decode_context=context, prefill_context=5)
        assert costs.seconds(DECODE, shape) == pytest.approx(2e-5 + 1e-6 * count + 3e-9 * count * context)
    for count, context in ((512, 512), (1024, 256), (2048, 1024)):  # one sample: in proportion to tokens * context
        shape = BatchShape(num_decodes=9, num_prefills=count, decode_context=9, prefill_context=context)
        assert costs.seconds(PREFILL, shape) == pytest.approx(3e-3 * count * context / (1024 * 512))


def test_no_tokens_cost_nothing_and_noise_never_makes_costs_negative() -> None:
    none = BatchShape(num_decodes=0, num_prefills=0)
    costs = MeasuredCosts(_profile(), GRAPH)
    assert all(costs.seconds(node, none) == 0 for node in GRAPH.nodes)
    only_prefills = BatchShape(num_decodes=0, num_prefills=64, prefill_context=64)
    assert costs.seconds(DECODE, only_prefills) == 0
    steep = fit_law([LawSample(100, 0, 1e-3), LawSample(110, 0, 9e-3)], depends_on_context=False)
    assert steep.seconds(1, 0) == 0
    falling = fit_law([LawSample(100, 0, 2e-3), LawSample(200, 0, 1e-3)], depends_on_context=False)
    assert falling.seconds(100, 0) == falling.seconds(150, 0) == falling.seconds(10_000, 0) == pytest.approx(1.5e-3)


@given(
    fixed=st.floats(0, 1e-3),
    per_token=st.floats(0, 1e-4),
    per_context_token=st.floats(1e-10, 1e-7),
    points=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 4000)), min_size=6, max_size=12, unique=True).filter(
        lambda points: len({context for _, context in points}) > 3
    ),
)
def test_scattered_samples_of_a_linear_law_are_fitted(
    fixed: float, per_token: float, per_context_token: float, points: list[tuple[int, int]]
) -> None:
    def law(tokens: int, context: int) -> float:
        return fixed + per_token * tokens + per_context_token * tokens * context

    found = fit_law([LawSample(*point, law(*point)) for point in points], depends_on_context=True)
    for point in points:
        assert found.seconds(*point) == pytest.approx(law(*point), rel=1e-4, abs=1e-9)


def test_the_error_on_a_curved_law_is_small_on_the_grid_that_is_measured() -> None:
    """Tiles of 128 tokens make a stair; the quick grid must follow within the height of a stair."""

    def law(tokens: float) -> float:
        return 2e-5 + 1e-6 * 128 * math.ceil(tokens / 128)

    grid = [64, 256, 512, 1024, 2048]
    found = fit_law([LawSample(size, 0, law(size)) for size in grid], depends_on_context=False)
    for tokens in range(64, 2049, 16):
        assert abs(found.seconds(tokens, 0) - law(tokens)) <= 1.3e-4


def test_speeds_come_from_shares_and_pairs() -> None:
    costs = MeasuredCosts(_profile(), GRAPH)
    assert costs.shares_units
    assert costs.modes(PROJECTION) == (Mode(4, 0.5), Mode(8, 0.9), Mode(10, 1.0))
    assert costs.modes(REDUCE) == (Mode(10, 1.0),)
    assert costs.speed(PROJECTION, 6, ()) == pytest.approx(0.7)
    assert costs.speed(PROJECTION, 2, ()) == pytest.approx(0.25)
    assert costs.speed(PROJECTION, 10, [(REDUCE, 10)]) == pytest.approx(0.8)
    assert costs.speed(PROJECTION, 8, [(REDUCE, 1), (DECODE, 2)]) == pytest.approx(0.9 * 0.8 * 0.7)
    assert costs.speed(PREFILL, 10, [(DECODE, 10)]) == pytest.approx(0.6)
    assert costs.speed(REDUCE, 10, [(PREFILL, 10)]) == pytest.approx(0.9)
    assert costs.speed(REDUCE, 10, [(DECODE, 10)]) == 1.0


def test_without_modes_shares_mean_nothing() -> None:
    nodes = {name: NodeProfile(node.samples) for name, node in _profile().nodes.items()}
    assert not MeasuredCosts(_profile(nodes=nodes), GRAPH).shares_units


def test_a_profile_of_another_layer_is_refused() -> None:
    nodes = dict(_profile().nodes)
    del nodes["prefill_attention"]
    with pytest.raises(ConfigError, match="lacks prefill_attention"):
        MeasuredCosts(_profile(nodes=nodes), GRAPH)
    nodes["prefill_attention"] = NodeProfile((_sample(1e-3, decodes=4, context=4),))
    with pytest.raises(ConfigError, match="no sample of prefill_attention with prefill tokens"):
        MeasuredCosts(_profile(nodes=nodes), GRAPH)
