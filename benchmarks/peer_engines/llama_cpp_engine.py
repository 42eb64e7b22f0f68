"""llama.cpp through its Python binding, built from source for this machine's processor.

Its C interface decodes batches of several sequences; the loop that admits, batches and takes the most likely token is
here, because llama.cpp has one only in its HTTP server. The KV cache is float32 or, as is its default, float16.
"""

import ctypes
import heapq
from collections import deque
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from peer_engines.gguf_file import gguf_path, write_gguf
from peer_engines.peer import Peer
from peer_engines.peer_engine import MAX_BATCH_TOKENS, EngineSetup, PeerRequest
from peer_engines.worker_loop import serve

PEERS: Final = (
    Peer(
        name="llama-cpp",
        module="peer_engines.llama_cpp_engine",
        environment="llama-cpp",
        requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        build_variables={"CMAKE_BUILD_PARALLEL_LEVEL": "1"},  # ten minutes of one core; other work goes on meanwhile
    ),
)


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A request: `pending` tokens are to be computed from `position` on, in the context's sequence `slot`."""

    pending: list[int]
    num_output_tokens: int
    slot: int = -1
    position: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.generated) == self.num_output_tokens


class LlamaCppEngine:
    """One context with as many sequences as the workload has requests."""

    def __init__(self, setup: EngineSetup) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.version = version("llama-cpp-python")
        self._library = llama_cpp
        self._num_slots = setup.max_sequences
        llama_cpp.llama_backend_init()
        file = str(_converted(setup)).encode()
        self._model = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = context_tokens(setup)
        settings.n_seq_max = setup.max_sequences
        settings.n_batch = MAX_BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = setup.num_threads
        if setup.dtype == "float32":
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, settings) if self._model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {file.decode()}.")
        self._num_logits = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each."""
        sequences = [_Sequence(pending=item.prompt, num_output_tokens=item.num_output_tokens) for item in requests]
        waiting, running = deque(sequences), list[_Sequence]()
        free = list(range(self._num_slots))
        memory = self._library.llama_get_memory(self._context)
        while waiting or running:
            while waiting and free:
                sequence = waiting.popleft()
                sequence.slot = heapq.heappop(free)
                self._library.llama_memory_seq_rm(memory, sequence.slot, -1, -1)
                running.append(sequence)
            self._step(running)
            for sequence in running:
                if sequence.is_finished:
                    heapq.heappush(free, sequence.slot)
            running = [sequence for sequence in running if not sequence.is_finished]
        return [sequence.generated for sequence in sequences]

    def close(self) -> None:
        """Free the context and the model."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _step(self, running: list[_Sequence]) -> None:
        """Compute the next tokens of all that run, as many as one batch holds: single ones first, then prompts.

        In order of the slots: llama.cpp computes only sequences with consecutive numbers together.
        """
        self._batch.n_tokens = 0
        sampled: list[tuple[_Sequence, int]] = []
        for sequence in sorted(running, key=lambda item: (len(item.pending) > 1, item.slot)):
            tokens = sequence.pending[: MAX_BATCH_TOKENS - self._batch.n_tokens]
            if not tokens:
                break
            sequence.pending = sequence.pending[len(tokens) :]
            self._add(sequence, tokens)
            if not sequence.pending:
                sampled.append((sequence, self._batch.n_tokens - 1))
        status = self._library.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode ended with status {status}.")
        for sequence, index in sampled:
            token = self._most_likely(index)
            sequence.generated.append(token)
            sequence.pending = [token]

    def _add(self, sequence: _Sequence, tokens: list[int]) -> None:
        batch: Any = self._batch
        for token in tokens:
            index = batch.n_tokens
            batch.token[index] = token
            batch.pos[index] = sequence.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence.slot
            batch.logits[index] = 0
            batch.n_tokens = index + 1
            sequence.position += 1
        batch.logits[batch.n_tokens - 1] = not sequence.pending

    def _most_likely(self, index: int) -> int:
        import numpy as np

        pointer = self._library.llama_get_logits_ith(self._context, index)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, shape=(self._num_logits,)).argmax())


def context_tokens(setup: EngineSetup) -> int:
    """Of all sequences together; llama.cpp gives each the same share, a multiple of 256."""
    return -(-setup.max_model_len // 256) * 256 * setup.max_sequences


def _converted(setup: EngineSetup) -> Path:
    """The checkpoint as a GGUF file, made once; `llama-server` reads it too."""
    file = gguf_path(setup)
    if not file.exists():
        partial = setup.converted / "partial.gguf"
        write_gguf(setup.checkpoint, partial)
        partial.rename(file)
    return file


if __name__ == "__main__":
    serve(LlamaCppEngine)
