"""`ModelConfig`: the shape of a model, read from a Hugging Face config.json and checked before anything starts.

Torch-free, so that placement and planning can reason about a model on a machine that could never load it.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from engine.config_json import ConfigJson
from engine.errors import CheckpointError, ConfigError
from engine.fp8_checkpoint import Fp8Checkpoint
from engine.rope_config import RopeConfig


class DType(StrEnum):
    """Number formats of weights and activations."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of one element."""
        return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[self.value]


class Architecture(StrEnum):
    """The supported architectures, by the name that config.json gives them."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    MIXTRAL = "MixtralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    QWEN3_MOE = "Qwen3MoeForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer; the names follow config.json where it has one.

    `sliding_windows` and `sparse_layers` hold one entry per layer, or none at all when every entry would be None or
    False: the attention window in tokens (None: all of them) and whether the feed-forward is a mixture of experts.
    `qk_norm` normalises queries and keys per head (Qwen3). `fp8` is None unless the weights are stored in FP8; `dtype`
    is then what everything else is stored in.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    dtype: DType
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    sparse_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    fp8: Fp8Checkpoint | None = None

    @classmethod
    def from_checkpoint(cls, path: Path) -> "ModelConfig":
        """Read config.json (of any transformers version) and generation_config.json, which may be absent.

        Raises `CheckpointError` for a missing or malformed file, an architecture that is not supported, a
        checkpoint that is quantised otherwise than to FP8, or a shape that cannot be.
        """
        config = ConfigJson.read(path / "config.json")
        architecture = _architecture(config)
        _refuse_variants(config)
        num_layers = config.integer("num_hidden_layers")
        num_heads = config.integer("num_attention_heads")
        hidden_size = config.integer("hidden_size")
        head_dim = 128 if architecture is Architecture.QWEN3 else hidden_size // num_heads
        max_positions = config.integer("max_position_embeddings")
        is_mixtral = architecture is Architecture.MIXTRAL
        has_attention_bias = architecture in (Architecture.LLAMA, Architecture.QWEN3, Architecture.QWEN3_MOE)
        attention_bias = has_attention_bias and config.boolean("attention_bias", False)
        sparse_layers = _sparse_layers(config, architecture, num_layers)
        is_sparse = any(sparse_layers)
        moe_size_key = "intermediate_size" if is_mixtral else "moe_intermediate_size"
        model = cls(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=config.integer("num_key_value_heads", default=num_heads),
            head_dim=config.integer("head_dim", default=head_dim),
            max_position_embeddings=max_positions,
            rms_norm_eps=config.number("rms_norm_eps", default=1e-5 if is_mixtral else 1e-6),
            dtype=_dtype(config),
            rope=RopeConfig.from_json(config, max_positions, 1e6 if is_mixtral else 1e4),
            tie_word_embeddings=config.boolean("tie_word_embeddings", False),
            qkv_bias=attention_bias or architecture is Architecture.QWEN2,
            output_bias=attention_bias,
            mlp_bias=architecture is Architecture.LLAMA and config.boolean("mlp_bias", False),
            qk_norm=architecture in (Architecture.QWEN3, Architecture.QWEN3_MOE),
            sliding_windows=_sliding_windows(config, architecture, num_layers),
            sparse_layers=sparse_layers,
            num_experts=config.integer("num_experts", "num_local_experts") if is_sparse else 0,
            num_experts_per_token=config.integer("num_experts_per_tok") if is_sparse else 0,
            moe_intermediate_size=config.integer(moe_size_key) if is_sparse else 0,
            norm_topk_prob=is_mixtral or config.boolean("norm_topk_prob", False),
            eos_token_ids=_eos_token_ids(config, path),
            fp8=Fp8Checkpoint.from_json(config),
        )
        model._check(config.where)
        return model

    def sliding_window(self, layer: int) -> int | None:
        """The attention window of one layer in tokens; None where it attends to everything before."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward of one layer is a mixture of experts."""
        return bool(self.sparse_layers) and self.sparse_layers[layer]

    def kv_heads_per_rank(self, size: int) -> int:
        """Key/value heads that each of `size` ranks holds; ranks beyond the number of heads hold copies."""
        return max(1, self.num_kv_heads // size)

    def check_tensor_parallel(self, size: int) -> None:
        """Raise `ConfigError` unless `size` ranks can share the heads and the feed-forward; a vocabulary is padded."""
        if self.num_heads % size:
            raise ConfigError(f"tensor_parallel {size} does not divide the model's {self.num_heads} attention heads.")
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel {size} neither divides nor is a multiple of the model's {self.num_kv_heads} "
                "key/value heads."
            )
        for name in ("intermediate_size", "moe_intermediate_size"):
            if getattr(self, name) % size:
                raise ConfigError(f"tensor_parallel {size} does not divide {name} {getattr(self, name)}.")

    def _check(self, where: str) -> None:
        """Raise `CheckpointError` for numbers that are each possible but not together."""
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim must be even for rotary embedding, but is {self.head_dim}.")
        if self.num_experts_per_token > self.num_experts:
            raise CheckpointError(
                f"{where}: num_experts_per_tok {self.num_experts_per_token} exceeds the {self.num_experts} experts."
            )


def _architecture(config: ConfigJson) -> Architecture:
    names = config.texts("architectures")
    supported = ", ".join(Architecture)
    if not names:
        raise CheckpointError(f"{config.where}: architectures is missing; supported are {supported}.")
    if names[0] not in list(Architecture):
        raise CheckpointError(f"{config.where}: architecture {names[0]!r} is not supported; supported are {supported}.")
    return Architecture(names[0])


def _refuse_variants(config: ConfigJson) -> None:
    """Raise `CheckpointError` for what would load and then compute something else."""
    activation = config.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{config.where}: hidden_act {activation!r} is not supported; silu is.")


def _dtype(config: ConfigJson) -> DType:
    name = config.text("dtype", "torch_dtype", default="float32").removeprefix("torch.")
    if name not in list(DType):
        raise CheckpointError(f"{config.where}: dtype {name!r} is not supported; supported are {', '.join(DType)}.")
    return DType(name)


def _sliding_windows(config: ConfigJson, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    """One window per layer, by the rules of each architecture's configuration class in transformers."""
    if architecture is Architecture.LLAMA:
        return ()
    if architecture is Architecture.MISTRAL:
        # A null window means none; only where the key itself is absent does transformers' default of 4096 apply.
        has_window = config.has("sliding_window") or not config.mentions("sliding_window")
    elif architecture is Architecture.MIXTRAL:
        has_window = config.has("sliding_window")
    else:
        has_window = config.boolean("use_sliding_window", False)
        has_window = has_window and (config.has("sliding_window") or not config.mentions("sliding_window"))
    if not has_window:
        return ()
    window = config.integer("sliding_window", default=4096)
    if architecture not in (Architecture.QWEN2, Architecture.QWEN3):
        return (window,) * num_layers
    first = config.integer("max_window_layers", default=28, minimum=0)
    kinds = config.texts("layer_types") or tuple(
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    )
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"{config.where}: layer_types must name sliding_attention or full_attention for each of the {num_layers} "
            "layers."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _sparse_layers(config: ConfigJson, architecture: Architecture, num_layers: int) -> tuple[bool, ...]:
    if architecture is Architecture.MIXTRAL:
        return (True,) * num_layers
    if architecture is not Architecture.QWEN3_MOE:
        return ()
    step = config.integer("decoder_sparse_step", default=1)
    dense = set(config.integers("mlp_only_layers"))
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _eos_token_ids(config: ConfigJson, path: Path) -> frozenset[int]:
    generation = path / "generation_config.json"
    extra = ConfigJson.read(generation).integers("eos_token_id") if generation.exists() else ()
    return frozenset((*config.integers("eos_token_id"), *extra))
