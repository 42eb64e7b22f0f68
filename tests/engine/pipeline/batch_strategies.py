"""Random batches: ragged decodes, chunks that begin anywhere, prefixes shared within the step. Imported by tests."""

from hypothesis import strategies as st

from tests.engine.pipeline.equal_runs import BLOCK_SIZE, MAX_LENGTH, RandomBatch


@st.composite
def batches(draw: st.DrawFn) -> RandomBatch:
    """One to some forty tokens, of one kind or both."""
    decode_lengths = draw(st.lists(st.integers(1, MAX_LENGTH), max_size=6))
    sizes = draw(st.lists(st.integers(1, 12), min_size=0 if decode_lengths else 1, max_size=3))
    chunks = tuple((draw(st.integers(0, MAX_LENGTH - size)), size) for size in sizes)
    shares_prefix = False
    if len(chunks) > 1 and draw(st.booleans()):
        # The second prompt goes on where the first one's blocks end, some of which are written in this very step.
        end = sum(chunks[0]) // BLOCK_SIZE * BLOCK_SIZE
        shares_prefix = end > 0 and end + sizes[1] <= MAX_LENGTH
        if shares_prefix:
            chunks = (chunks[0], (end, sizes[1]), *chunks[2:])
    return RandomBatch(
        decode_lengths=tuple(decode_lengths), chunks=chunks, shares_prefix=shares_prefix, seed=draw(st.integers(0, 99))
    )
