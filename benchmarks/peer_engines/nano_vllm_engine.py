"""nano-vllm, where somebody brought it and flash-attn: it needs a GPU, so it is no peer of the comparison on a CPU.

It has one model, Qwen3, and computes a Llama's weights as that: the same layers but for norms of queries and keys, of
ones, which it adds. It draws no greedy tokens, so it samples.
"""

from importlib.metadata import PackageNotFoundError, version

from peer_engines.peer_engine import MAX_BATCH_TOKENS, EngineSetup, PeerRequest
from peer_engines.worker_loop import serve


class NanoVllmEngine:
    """Its class `LLM`, token ids in and out."""

    def __init__(self, setup: EngineSetup) -> None:
        from nanovllm import LLM  # type: ignore[import-not-found]

        try:
            number = version("nano-vllm")
        except PackageNotFoundError:  # a checkout on the path
            number = "of a checkout"
        self.version = f"{number}, sampling, as Qwen3"
        self._llm = LLM(
            str(setup.checkpoint),
            enforce_eager=False,
            tensor_parallel_size=1,
            max_model_len=setup.max_model_len,
            max_num_seqs=setup.max_sequences,
            max_num_batched_tokens=max(MAX_BATCH_TOKENS, setup.max_model_len),
        )

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each."""
        from nanovllm import SamplingParams

        outputs = self._llm.generate(
            [request.prompt for request in requests],
            [
                SamplingParams(temperature=1.0, max_tokens=request.num_output_tokens, ignore_eos=True)
                for request in requests
            ],
        )
        return [list(output["token_ids"]) for output in outputs]

    def close(self) -> None:
        """It stops itself at the end of the process."""


if __name__ == "__main__":
    serve(NanoVllmEngine)
