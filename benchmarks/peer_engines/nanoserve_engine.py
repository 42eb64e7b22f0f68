"""This project's engine, as `bench offline` runs it: `LLMEngine` with its one rank in this process."""

import asyncio
from dataclasses import replace
from typing import Final

from peer_engines.peer import Peer
from peer_engines.peer_engine import MAX_BATCH_TOKENS, EngineSetup, PeerRequest
from peer_engines.worker_loop import serve

from engine.config import DeviceKind, EngineConfig
from engine.errors import EngineDeadError
from engine.event_loop import new_event_loop
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.model_config import DType, ModelConfig
from engine.request import Request, RequestId, SamplingParams, TokenOutput

PEERS: Final = (Peer(name="nanoserve", module="peer_engines.nanoserve_engine", environment=None),)


def engine_config(setup: EngineSetup) -> EngineConfig:
    """The engine's settings for this comparison; also those that the GEMM peak is measured with."""
    model = ModelConfig.from_checkpoint(setup.checkpoint)
    dtype = DType(setup.dtype)
    bytes_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.num_bytes
    config = EngineConfig(
        model=model,
        checkpoint=setup.checkpoint,
        dtype=dtype,
        device=DeviceKind(setup.options.get("device", "cpu")),
        max_model_len=setup.max_model_len,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_sequences=setup.max_sequences,
        num_threads=setup.num_threads,
    )
    return replace(config, cache_bytes=cache_tokens(setup, config.block_size) * bytes_per_token)


def cache_tokens(setup: EngineSetup, block_size: int) -> int:
    """Of `cache_tokens` in blocks of so many, with a block of each request partly filled."""
    return setup.cache_tokens + block_size * (setup.max_sequences + 1)


class NanoserveEngine:
    """Keeps one event loop between runs; it stands still while no run is on."""

    def __init__(self, setup: EngineSetup) -> None:
        config = engine_config(setup)
        self.version = "this working tree"
        self._runner = asyncio.Runner(loop_factory=new_event_loop)
        self._num_runs = 0
        self._engine = LLMEngine(config, InlineExecutor(config))
        self._runner.run(self._engine.start())

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each."""
        self._num_runs += 1
        return self._runner.run(self._run(requests))

    def close(self) -> None:
        """Stop the engine and its loop."""
        self._runner.run(self._engine.close())
        self._runner.close()

    async def _run(self, requests: list[PeerRequest]) -> list[list[int]]:
        ids = [RequestId(f"{self._num_runs}-{index}") for index in range(len(requests))]
        sink = _TokenSink(ids)
        for request_id, request in zip(ids, requests, strict=True):
            count = request.num_output_tokens
            sampling = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0)
            prompt = tuple(request.prompt)
            self._engine.submit(Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling), sink)
        await sink.all_finished
        return list(sink.tokens.values())


class _TokenSink:
    """Collects the tokens of each request and resolves `all_finished` when the last request has ended."""

    def __init__(self, ids: list[RequestId]) -> None:
        self.tokens: dict[RequestId, list[int]] = {request_id: [] for request_id in ids}
        self.all_finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_open = len(ids)

    def put(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            self.tokens[output.request_id].extend(output.token_ids)
            self._num_open -= output.finish_reason is not None
        if self._num_open == 0 and not self.all_finished.done():
            self.all_finished.set_result(None)

    def fail(self, error: EngineDeadError) -> None:
        if not self.all_finished.done():
            self.all_finished.set_exception(error)


if __name__ == "__main__":
    serve(NanoserveEngine)
