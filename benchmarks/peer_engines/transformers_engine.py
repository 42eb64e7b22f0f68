"""Hugging Face transformers: `generate` of one padded batch, and its continuous batching, both with SDPA attention."""

import inspect
from importlib.metadata import version
from typing import Any, Final

from peer_engines.peer import Peer
from peer_engines.peer_engine import MAX_BATCH_TOKENS, EngineSetup, PeerEngine, PeerRequest
from peer_engines.worker_loop import serve

_BLOCK_SIZE: Final = 32
_NO_TOKEN: Final = -1  # as the end of sequence: none is


def _peer(name: str, is_continuous: bool) -> Peer:
    return Peer(
        name=name,
        module="peer_engines.transformers_engine",
        environment="transformers",
        torch="2.13.0",
        requirements=("transformers==5.23.0", "accelerate==1.15.0"),
        variables={"HF_HUB_OFFLINE": "1"},
        options={"continuous": is_continuous},
    )


PEERS: Final = (_peer("transformers-continuous", True), _peer("transformers-static", False))


class StaticEngine:
    """One batch of all requests, padded on the left, that goes on until the longest output has its length."""

    def __init__(self, setup: EngineSetup) -> None:
        self.version = version("transformers")
        self._model = _model(setup)

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each, cut to the number wanted."""
        import torch

        width = max(len(request.prompt) for request in requests)
        missing = [width - len(request.prompt) for request in requests]
        prompts = torch.tensor([[0] * pad + item.prompt for pad, item in zip(missing, requests, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in missing])
        most = max(request.num_output_tokens for request in requests)
        with torch.inference_mode():
            outputs = self._model.generate(prompts, attention_mask=mask, max_new_tokens=most)
        generated = outputs[:, width:].tolist()
        return [tokens[: item.num_output_tokens] for tokens, item in zip(generated, requests, strict=True)]

    def close(self) -> None:
        """Nothing to stop."""


class ContinuousEngine:
    """The manager of its continuous batching, whose thread lives as long as the engine."""

    def __init__(self, setup: EngineSetup) -> None:
        from transformers.generation import ContinuousBatchingConfig  # type: ignore[attr-defined]

        self.version = version("transformers")
        names = inspect.signature(ContinuousBatchingConfig).parameters
        page = "page_size" if "page_size" in names else "block_size"  # as older releases call it
        settings: dict[str, Any] = {
            page: _BLOCK_SIZE,
            "num_blocks": -(-setup.cache_tokens // _BLOCK_SIZE) + setup.max_sequences,
            "max_batch_tokens": MAX_BATCH_TOKENS,
            "max_requests_per_batch": setup.max_sequences,
        }
        config = ContinuousBatchingConfig(**settings)
        self._manager = _model(setup).init_continuous_batching(continuous_batching_config=config)
        self._manager.start()

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each."""
        ids = [
            self._manager.add_request(item.prompt, max_new_tokens=item.num_output_tokens, eos_token_id=_NO_TOKEN)
            for item in requests
        ]
        tokens: dict[str, list[int]] = {}
        while len(tokens) < len(ids):
            output = self._manager.get_result(timeout=1)
            if output is None and not self._manager.is_running():
                raise RuntimeError("The thread of continuous batching has ended.")
            if output is not None and output.is_finished():
                if output.error is not None:
                    raise RuntimeError(output.error)
                tokens[output.request_id] = output.generated_tokens
        return [tokens[request_id] for request_id in ids]

    def close(self) -> None:
        """Stop the thread."""
        self._manager.stop(block=True, timeout=10)


def _model(setup: EngineSetup) -> Any:
    """The model on the wanted number of threads, generating greedily and never ending by itself."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(setup.num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        setup.checkpoint, dtype=getattr(torch, setup.dtype), attn_implementation="sdpa"
    )
    model.to(setup.options.get("device", "cpu")).eval()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generation_config = GenerationConfig.from_dict(greedy)
    return model


def _load(setup: EngineSetup) -> PeerEngine:
    return ContinuousEngine(setup) if setup.options["continuous"] else StaticEngine(setup)


if __name__ == "__main__":
    serve(_load)
