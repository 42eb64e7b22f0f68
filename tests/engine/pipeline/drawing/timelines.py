"""Timelines for the tests of the drawings."""

from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import Timeline, TimelineEvent

MILLISECOND = 1e-3


def event(
    operation: str,
    lane: Lane,
    start: float,
    end: float,
    layer: int = 0,
    tokens: tuple[int, int] = (0, 256),
    nano_batch: int = 0,
    rank: int = 0,
    share: int = 10,
) -> TimelineEvent:
    """An event with times in milliseconds."""
    return TimelineEvent(
        operation=operation,
        lane=lane,
        start=start * MILLISECOND,
        end=end * MILLISECOND,
        layer=layer,
        start_token=tokens[0],
        stop_token=tokens[1],
        nano_batch=nano_batch,
        rank=rank,
        share=share,
    )


def layered(num_layers: int, num_ranks: int = 1, share: int = 9) -> Timeline:
    """Layers of ten milliseconds: two products on the compute lane and a collective beside the second one."""
    events = [
        found
        for rank in range(num_ranks)
        for layer in range(num_layers)
        for begin in [10 * layer]
        for found in (
            event("qkv_proj", Lane.COMPUTE, begin, begin + 4, layer, (0, 256), 0, rank, share),
            event("gate_up_proj", Lane.COMPUTE, begin + 5, begin + 10, layer, (256, 512), 1, rank),
            event(
                "attention_all_reduce", Lane.NETWORK, begin + 4, begin + 9, layer, (0, 256), 0, rank, 10 - share or 10
            ),
        )
    ]
    return Timeline("a model", tuple(events), is_predicted=True)
