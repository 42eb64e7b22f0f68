"""A layer whose costs are known by every mechanism, made up: products lose in proportion to the units that they give
up, attention reads as fast with six tenths as with all. Imported by tests.
"""

from engine.batch_shape import BatchShape
from engine.model_config import Architecture
from engine.number_format import NumberFormat
from engine.operation import TokenKind
from engine.pipeline.cost_model import Mode
from engine.pipeline.overlap_profile import Interference, OverlapProfile
from engine.pipeline.placement import GPU_LANES, lane_of
from engine.pipeline.profile import MeasuredCosts, NodeProfile, Profile, Sample
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism
from tests.engine.pipeline.schedule_strategies import traced_graph

GRAPH = traced_graph(Architecture.LLAMA, 1)
LANES = {node.name: lane_of(node, GPU_LANES) for node in GRAPH.nodes}
SHAPE = BatchShape(num_decodes=512, num_prefills=512, decode_context=1000, prefill_context=500)
# Microseconds of a token: attention takes half as long as all that computes.
MICROSECONDS = {name: 2.0 for name in LANES} | {"decode_attention": 8.0, "prefill_attention": 0.5}


def linear(num_tenths: int) -> float:
    return num_tenths / ALL_UNITS


def saturating(num_tenths: int) -> float:
    """Six tenths of the units read as fast as all of them."""
    return min(1.0, num_tenths / 6)


def modes(shares: tuple[int, ...], lane: Lane) -> tuple[Mode, ...]:
    speed = saturating if lane is Lane.MEMORY else linear
    return tuple(Mode(share, 1.0 if share == ALL_UNITS else speed(share)) for share in (*shares, ALL_UNITS))


def profile_of(microseconds: dict[str, float] = MICROSECONDS) -> Profile:
    nodes, split, joint = {}, {}, {}
    for node in GRAPH.nodes:
        is_decode, lane = node.tokens is TokenKind.DECODE, LANES[node.name]
        shapes = [
            BatchShape(num_decodes=size, num_prefills=0, decode_context=1000 * node.cache_reads)
            if is_decode
            else BatchShape(num_decodes=0, num_prefills=size, prefill_context=500 * node.cache_reads)
            for size in (64, 512, 1024)
        ]
        samples = tuple(Sample(shape, 1e-6 * microseconds[node.name] * shape.num_tokens) for shape in shapes)
        nodes[node.name] = NodeProfile(samples, modes(tuple(range(1, 10)), lane))
        split[node.name] = modes((2, 3, 4, 5) if lane is Lane.MEMORY else (5, 6, 7, 8), lane)
        joint[node.name] = (Mode(ALL_UNITS, 0.95),)
    products = [name for name, lane in LANES.items() if lane is Lane.COMPUTE]
    beside = tuple(
        Interference(*pair, 0.9)
        for name in products
        for pair in ((name, "decode_attention"), ("decode_attention", name))
    )
    return Profile(
        fingerprint={},
        source="made up",
        number_format=NumberFormat.BFLOAT16,
        nodes=nodes,
        overlap={
            Mechanism.GREEN: OverlapProfile(modes=split, interference=()),
            Mechanism.CORESIDENT: OverlapProfile(modes=joint, interference=beside),
        },
    )


COSTS = MeasuredCosts(profile_of(), GRAPH)
