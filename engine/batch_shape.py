"""`BatchShape`: how much work a batch, or a part of one, holds: what the cost of an operation depends on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Tokens of one step, or of a range of it; averages may be fractions.

    `decode_context` is the mean number of cached tokens that a decode token attends to, itself included;
    `prefill_context` the same for a token of a prefill chunk.
    """

    num_decodes: float
    num_prefills: float
    decode_context: float = 0.0
    prefill_context: float = 0.0

    @classmethod
    def steady(cls, num_tokens: float, num_prompt_tokens: float, num_output_tokens: float) -> "BatchShape":
        """The batch that requests of p prompt and d output tokens settle at (NanoFlow, section 3.1).

        d / (p + d) of the tokens are decodes, halfway through their answer: p + d / 2 tokens of context. A prefill
        token is counted with the whole prompt, as the paper does.
        """
        decode_share = num_output_tokens / (num_prompt_tokens + num_output_tokens)
        return cls(
            num_decodes=num_tokens * decode_share,
            num_prefills=num_tokens * (1 - decode_share),
            decode_context=num_prompt_tokens + num_output_tokens / 2,
            prefill_context=num_prompt_tokens,
        )

    @property
    def num_tokens(self) -> float:
        """Decode and prefill tokens together."""
        return self.num_decodes + self.num_prefills

    def part(self, num_decodes: float, num_prefills: float) -> "BatchShape":
        """A part of this batch with so many tokens of each kind and the same contexts."""
        return BatchShape(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            decode_context=self.decode_context,
            prefill_context=self.prefill_context,
        )
