"""`ServingPeer`: one OpenAI-compatible server of the comparison over HTTP, and the offline engine it is compared with.

Each serves the checkpoint as `MODEL_NAME` on 127.0.0.1, with the limits that its offline engine has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from peer_engines import llama_cpp_engine, nanoserve_engine, vllm_engine
from peer_engines.gguf_file import gguf_path
from peer_engines.llama_server_build import LlamaServerBuild
from peer_engines.peer import Peer
from peer_engines.peer_engine import MAX_BATCH_TOKENS, EngineSetup
from peer_engines.peer_environment import PeerEnvironment

from engine.model_config import DType, ModelConfig

MODEL_NAME: Final = "model"
_ROOT: Final = Path(__file__).resolve().parents[2]
_NANOSERVE_BLOCK_TOKENS: Final = 64
_VLLM_BLOCK_TOKENS: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPeer:
    """`arguments` of (setup, port) follow the program on the command line.

    The program is what `build` makes in `peer`'s environment, by default the environment's interpreter.

    GET `ready_path` is answered with status 200 when requests can be sent, and not before.

    `variables` are set beside the peer's own and win over them; None takes one away.
    """

    peer: Peer
    arguments: Callable[[EngineSetup, int], list[str]]
    ready_path: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    folder: Path | None = None
    build: Callable[[PeerEnvironment], LlamaServerBuild] | None = None

    @property
    def name(self) -> str:
        """The engine's."""
        return self.peer.name

    def program(self, environment: PeerEnvironment) -> Path:
        """What is started."""
        return environment.python if self.build is None else self.build(environment).path

    def is_installed(self, environment: PeerEnvironment) -> bool:
        """Whether it can be started."""
        return environment.is_installed and self.program(environment).exists()

    def install(self, environment: PeerEnvironment) -> None:
        """Make what is missing; raises `subprocess.CalledProcessError`."""
        if self.build is None:
            environment.install()
        else:
            self.build(environment).install()


def _nanoserve(setup: EngineSetup, port: int) -> list[str]:
    options = {
        "port": port,
        "name": MODEL_NAME,
        "device": "cpu",
        "dtype": setup.dtype,
        "threads": setup.num_threads,
        "max-model-len": setup.max_model_len,
        "max-sequences": setup.max_sequences,
        "max-batch-tokens": MAX_BATCH_TOKENS,
        "cache": nanoserve_engine.cache_tokens(setup, _NANOSERVE_BLOCK_TOKENS) * _bytes_per_token(setup),
        "plan-seconds": 0,
    }
    return ["-m", "cluster.cli", "serve", str(setup.checkpoint), *_options(options)]


def _vllm(*, is_eager: bool) -> Callable[[EngineSetup, int], list[str]]:
    def arguments(setup: EngineSetup, port: int) -> list[str]:
        cache_tokens = setup.cache_tokens + _VLLM_BLOCK_TOKENS * (setup.max_sequences + 1)  # blocks partly filled
        options = {
            "model": setup.checkpoint,
            "served-model-name": MODEL_NAME,
            "host": "127.0.0.1",
            "port": port,
            "dtype": setup.dtype,
            "max-model-len": setup.max_model_len,
            "max-num-seqs": setup.max_sequences,
            "max-num-batched-tokens": max(MAX_BATCH_TOKENS, setup.max_model_len),
            "kv-cache-memory-bytes": cache_tokens * _bytes_per_token(setup),
            "uvicorn-log-level": "warning",
        }
        flags = ["--disable-log-stats", *(["--enforce-eager"] if is_eager else [])]
        return ["-m", "vllm.entrypoints.openai.api_server", *_options(options), *flags]

    return arguments


def _vllm_peer(peer: Peer) -> ServingPeer:
    """In two processes, as vLLM serves: its server has no mode without an engine process of its own."""
    return ServingPeer(
        peer=peer,
        arguments=_vllm(is_eager=bool(peer.options["eager"])),
        ready_path="/health",
        variables={
            "VLLM_ENABLE_V1_MULTIPROCESSING": None,
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )


def _llama_cpp(setup: EngineSetup, port: int) -> list[str]:
    """The settings of the offline engine. Nothing of a prompt comes twice, so nothing is kept in host memory for it."""
    options = {
        "model": gguf_path(setup),
        "alias": MODEL_NAME,
        "host": "127.0.0.1",
        "port": port,
        "threads": setup.num_threads,
        "parallel": setup.max_sequences,
        "ctx-size": llama_cpp_engine.context_tokens(setup),
        "batch-size": MAX_BATCH_TOKENS,
        "cache-ram": 0,
        "log-verbosity": 2,  # warnings
    }
    if setup.dtype == DType.FLOAT32:
        options |= {"cache-type-k": "f32", "cache-type-v": "f32"}
    return _options(options)


def _bytes_per_token(setup: EngineSetup) -> int:
    model = ModelConfig.from_checkpoint(setup.checkpoint)
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * DType(setup.dtype).num_bytes


def _options(options: Mapping[str, object]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


SERVING_PEERS: Final = (
    *(
        ServingPeer(peer=peer, arguments=_nanoserve, ready_path="/ready", folder=_ROOT)
        for peer in nanoserve_engine.PEERS
    ),
    *map(_vllm_peer, vllm_engine.PEERS),
    *(
        ServingPeer(peer=peer, arguments=_llama_cpp, ready_path="/health", build=LlamaServerBuild)
        for peer in llama_cpp_engine.PEERS
    ),
)
