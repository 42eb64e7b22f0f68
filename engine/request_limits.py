"""`RequestLimits`: what a request may ask of one engine."""

from dataclasses import dataclass

from engine.errors import RequestError
from engine.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """In tokens: of the vocabulary, of one request's context, and of the whole KV cache."""

    vocab_size: int
    max_model_len: int
    cache_tokens: int

    def check(self, request: Request) -> None:
        """Raise `RequestError` for a request that can never run, naming what is wrong with it."""
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestError("The prompt is empty; give at least one token.", "prompt")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise RequestError(f"The prompt has token ids outside the vocabulary 0..{self.vocab_size - 1}.", "prompt")
        request.sampling.validate(self.vocab_size)
        length = len(prompt) + request.sampling.max_tokens
        if length > self.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{length} tokens ({len(prompt)} in the prompt, {request.sampling.max_tokens} to generate).",
                "prompt",
                "context_length_exceeded",
            )
        if length > self.cache_tokens:
            raise RequestError(
                f"The KV cache holds {self.cache_tokens} tokens; this request may need {length}.",
                "max_tokens",
                "context_length_exceeded",
            )
