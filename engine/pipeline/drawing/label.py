"""Labels of the boxes of a drawing: the name of an operation as long as there is room for it, its tokens, its share."""

from engine.pipeline.schedule import ALL_UNITS
from engine.pipeline.timeline import TimelineEvent

# Words that say little, or that everybody knows by their short form; all others stay as the model names them.
_SHORT = {
    "proj": "",
    "attention": "attn",
    "prefill": "pf",
    "decode": "dec",
    "all_reduce": "AR",
    "all_gather": "AG",
    "feed_forward": "ffn",
    "experts": "exp",
}


def names(operation: str) -> tuple[str, ...]:
    """Ways to write an operation's name, the longest first."""
    short = operation
    for word, replacement in _SHORT.items():
        short = f"_{short}_".replace(f"_{word}_", f"_{replacement}_").strip("_")
    short = " ".join(part for part in short.split("_") if part) or operation
    plain = operation.removesuffix("_proj").replace("_", " ")
    return tuple(dict.fromkeys((operation, plain, short)))


def tokens(event: TimelineEvent) -> str:
    """The range of positions, as a schedule writes it; nothing outside the layers."""
    return f"{event.start_token}:{event.stop_token}" if event.stop_token > event.start_token else ""


def share(event: TimelineEvent) -> str:
    """The share of the execution units; nothing where it has all."""
    return f"{100 * event.share // ALL_UNITS}%" if event.share < ALL_UNITS else ""
