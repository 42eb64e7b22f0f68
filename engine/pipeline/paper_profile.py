"""The operation times that NanoFlow measured, as a `Profile`: Llama-2-70B on eight A100-80GB, dense batch 2048.

Table 2 of the paper (arXiv 2408.12757) gives each operation's time at that batch, not at parts of it, so a time per
nano-operation of a + b * tokens is derived: a, what each costs however small it is, comes from the durations in the
repository's published solution (two or more sizes of an operation on a straight line; a guess for the down projection
and prefill attention), b makes the whole batch take what the table says. What the file holds is hence no measurement
of this project, and its fixed parts are estimates.

`python -m engine.pipeline.paper_profile` prints deploy/profiles/a100-80gb/llama-2-70b-paper.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.batch_shape import BatchShape
from engine.model_shapes import model_shape
from engine.number_format import NumberFormat
from engine.operation import Resource, TokenKind
from engine.pipeline.cost_model import Mode
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.profile import NodeProfile, Profile, Sample
from engine.pipeline.unit_sharing import PAPER_SHARING

PAPER_BATCH = BatchShape.steady(2048, 512, 1024)
NUM_LAYERS = 80
NUM_DEVICES = 8
_SMALLEST_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperOperation:
    """`milliseconds` for all layers of a step, of which `fixed_microseconds` in each layer do not depend on tokens."""

    milliseconds: float
    fixed_microseconds: float
    resource: Resource
    tokens: TokenKind = TokenKind.ALL


# The row Net holds two all-reduces a layer. An all-reduce's fixed part is the solution's 43.3 us, scaled as its whole
# time is from the solution to the table. The table has no closing addition: there it is part of a matrix product.
PAPER_OPERATIONS: Mapping[str, PaperOperation] = {
    "qkv_proj": PaperOperation(milliseconds=16.08, fixed_microseconds=42.9, resource=Resource.COMPUTE),
    "decode_attention": PaperOperation(
        milliseconds=35.60, fixed_microseconds=36.0, resource=Resource.MEMORY, tokens=TokenKind.DECODE
    ),
    "prefill_attention": PaperOperation(
        milliseconds=4.56, fixed_microseconds=20.0, resource=Resource.COMPUTE, tokens=TokenKind.PREFILL
    ),
    "o_proj": PaperOperation(milliseconds=16.01, fixed_microseconds=19.7, resource=Resource.COMPUTE),
    "attention_all_reduce": PaperOperation(milliseconds=47.92 / 2, fixed_microseconds=33.7, resource=Resource.NETWORK),
    "gate_up_proj": PaperOperation(milliseconds=69.92, fixed_microseconds=37.0, resource=Resource.COMPUTE),
    "down_proj": PaperOperation(milliseconds=34.96, fixed_microseconds=5.0, resource=Resource.COMPUTE),
    "feed_forward_all_reduce": PaperOperation(
        milliseconds=47.92 / 2, fixed_microseconds=33.7, resource=Resource.NETWORK
    ),
    "add_1": PaperOperation(milliseconds=0.0, fixed_microseconds=0.0, resource=Resource.MEMORY),
}


def paper_profile() -> Profile:
    """Two samples of each operation, the whole batch and a small one, which fix the straight line through them."""
    return Profile(
        fingerprint={"device": "8 x a100-80gb", "model": "llama-2-70b", "dense batch": "2048", "dtype": "float16"},
        source="NanoFlow's measurements (arXiv 2408.12757, table 2; fixed parts from its repository's solution)",
        number_format=NumberFormat.FLOAT16,
        layer=trace_planned_layer(model_shape("llama-2-70b"), NUM_DEVICES).graph.signature,
        nodes={
            name: NodeProfile(
                samples=(_sample(operation, small=True), _sample(operation, small=False)),
                modes=tuple(
                    Mode(share, speed) for share, speed in enumerate(PAPER_SHARING.speeds(operation.resource), 1)
                ),
            )
            for name, operation in PAPER_OPERATIONS.items()
        },
    )


def _sample(operation: PaperOperation, *, small: bool) -> Sample:
    decodes = 0.0 if operation.tokens is TokenKind.PREFILL else PAPER_BATCH.num_decodes
    prefills = 0.0 if operation.tokens is TokenKind.DECODE else PAPER_BATCH.num_prefills
    share = _SMALLEST_TOKENS / (decodes + prefills) if small else 1.0
    whole = operation.milliseconds * 1e-3 / NUM_LAYERS
    fixed = operation.fixed_microseconds * 1e-6
    seconds = fixed + (whole - fixed) * share
    return Sample(PAPER_BATCH.part(decodes * share, prefills * share), round(seconds, 10))


if __name__ == "__main__":
    print(paper_profile(), end="")
