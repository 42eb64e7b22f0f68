"""Where every weight of a model comes from: which slice of which checkpoint tensor becomes which part of a parameter.

Torch-free and pure, so that one table serves checking a checkpoint, sizing a rank, loading, and writing a random
checkpoint. It follows the tensor names of Hugging Face checkpoints on one side and the modules of `engine.layers` on
the other: queries, keys and values are fused, and so are gate and up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from engine.model_config import Architecture, DType, ModelConfig

SCALE_BYTES = 4  # of one output channel of a weight in FP8


class ExpertNames(StrEnum):
    """How a checkpoint names its experts' weights."""

    MIXTRAL = "block_sparse_moe.experts.N.w1, w2, w3"
    QWEN = "mlp.experts.N.gate_proj, up_proj, down_proj"
    FUSED = "mlp.experts.gate_up_proj, down_proj with all experts in one tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSlice:
    """`tensor`[`source`] of the checkpoint, whose whole shape is `shape`, becomes `parameter`[`target`] of a rank.

    `is_product`: the weight of one of the layers' matrix products, which can be in FP8; a slice has whole rows of the
    parameter then.
    """

    tensor: str
    shape: tuple[int, ...]
    source: tuple[slice, ...]
    parameter: str
    target: tuple[slice | int, ...]
    is_product: bool = False

    @property
    def num_elements(self) -> int:
        """Elements that this rank reads."""
        count = 1
        for cut, size in zip(self.source, self.shape, strict=True):
            count *= len(range(size)[cut])
        return count

    @property
    def num_rows(self) -> int:
        """Rows of the parameter that it fills: each has a scale in FP8."""
        return self.num_elements // len(range(self.shape[-1])[self.source[-1]])


def weight_layout(
    config: ModelConfig, rank: int = 0, size: int = 1, expert_names: ExpertNames | None = None
) -> Iterator[WeightSlice]:
    """Every slice that `rank` of `size` ranks reads. `expert_names` is None for the architecture's own names."""
    layout = _Layout(config, rank, size, expert_names or own_expert_names(config))
    yield from layout.vocabulary("model.embed_tokens.weight", "embed_tokens.shard.weight")
    for layer in range(config.num_layers):
        yield from layout.attention(layer)
        yield from layout.sparse_feed_forward(layer) if config.is_sparse(layer) else layout.feed_forward(layer)
    yield layout.whole("model.norm.weight", "norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield from layout.vocabulary("lm_head.weight", "lm_head.shard.weight")


def own_expert_names(config: ModelConfig) -> ExpertNames:
    """The names in which an architecture's checkpoints are published, and which transformers writes."""
    return ExpertNames.MIXTRAL if config.architecture == Architecture.MIXTRAL else ExpertNames.QWEN


def rank_weight_bytes(config: ModelConfig, dtype: DType, size: int = 1, *, in_fp8: bool = False) -> int:
    """Bytes of weights on the fullest of `size` ranks: rank 0, which has every bias and no padding."""
    return sum(
        part.num_elements + SCALE_BYTES * part.num_rows
        if in_fp8 and part.is_product
        else part.num_elements * dtype.num_bytes
        for part in weight_layout(config, 0, size)
    )


class _Layout:
    """The slices of one rank; each method yields those of one part of the model."""

    def __init__(self, config: ModelConfig, rank: int, size: int, expert_names: ExpertNames) -> None:
        self.config = config
        self.rank = rank
        self.size = size
        self.expert_names = expert_names

    def whole(self, tensor: str, parameter: str, shape: tuple[int, ...]) -> WeightSlice:
        """Every rank holds all of it."""
        everything = tuple(slice(0, extent) for extent in shape)
        return WeightSlice(tensor=tensor, shape=shape, source=everything, parameter=parameter, target=everything)

    def vocabulary(self, tensor: str, parameter: str) -> Iterator[WeightSlice]:
        """A share of the rows; the last ranks may hold fewer, or none."""
        vocab_size, hidden = self.config.vocab_size, self.config.hidden_size
        num_rows = -(-vocab_size // self.size)
        first = min(self.rank * num_rows, vocab_size)
        last = min(first + num_rows, vocab_size)
        yield WeightSlice(
            tensor=tensor,
            shape=(vocab_size, hidden),
            source=(slice(first, last), slice(0, hidden)),
            parameter=parameter,
            target=(slice(0, last - first), slice(0, hidden)),
        )

    def attention(self, layer: int) -> Iterator[WeightSlice]:
        config, old, new = self.config, f"model.layers.{layer}.", f"layers.{layer}."
        hidden, head_dim = config.hidden_size, config.head_dim
        yield self.whole(old + "input_layernorm.weight", new + "input_norm.weight", (hidden,))
        num_heads, num_kv_heads = config.num_heads // self.size, config.kv_heads_per_rank(self.size)
        first_kv_head = self.rank * config.num_kv_heads // self.size
        row = 0
        for name, first, count, total in (
            ("q", self.rank * num_heads, num_heads, config.num_heads),
            ("k", first_kv_head, num_kv_heads, config.num_kv_heads),
            ("v", first_kv_head, num_kv_heads, config.num_kv_heads),
        ):
            source = slice(first * head_dim, (first + count) * head_dim)
            target = slice(row, row + count * head_dim)
            row = target.stop
            yield from self._rows(
                f"{old}self_attn.{name}_proj",
                f"{new}attention.qkv_proj",
                (total * head_dim, hidden),
                source,
                target,
                config.qkv_bias,
            )
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                parameter = f"{new}attention.rotary_and_kv_write.{name}.weight"
                yield self.whole(f"{old}self_attn.{name}.weight", parameter, (head_dim,))
        shape = (hidden, config.num_heads * head_dim)
        yield from self._columns(old + "self_attn.o_proj", new + "attention.o_proj", shape, config.output_bias)
        yield self.whole(old + "post_attention_layernorm.weight", new + "feed_forward_norm.weight", (hidden,))

    def feed_forward(self, layer: int) -> Iterator[WeightSlice]:
        config, old, new = self.config, f"model.layers.{layer}.mlp.", f"layers.{layer}.feed_forward."
        width = config.intermediate_size // self.size
        source = slice(self.rank * width, (self.rank + 1) * width)
        shape = (config.intermediate_size, config.hidden_size)
        for name, row in (("gate_proj", 0), ("up_proj", width)):
            target = slice(row, row + width)
            yield from self._rows(old + name, new + "gate_up_proj", shape, source, target, config.mlp_bias)
        yield from self._columns(old + "down_proj", new + "down_proj", shape[::-1], config.mlp_bias)

    def sparse_feed_forward(self, layer: int) -> Iterator[WeightSlice]:
        config = self.config
        block = "block_sparse_moe" if self.expert_names is ExpertNames.MIXTRAL else "mlp"
        old, new = f"model.layers.{layer}.{block}.", f"layers.{layer}.feed_forward."
        yield self.whole(old + "gate.weight", new + "router.weight", (config.num_experts, config.hidden_size))
        if self.expert_names is ExpertNames.FUSED:
            yield from self._fused_experts(old + "experts.", new + "experts.")
            return
        is_mixtral = self.expert_names is ExpertNames.MIXTRAL
        gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        hidden, total = config.hidden_size, config.moe_intermediate_size
        width = total // self.size
        share, every = slice(self.rank * width, (self.rank + 1) * width), slice(0, hidden)
        for expert in range(config.num_experts):
            for name, row in ((gate, 0), (up, width)):
                yield WeightSlice(
                    tensor=f"{old}experts.{expert}.{name}.weight",
                    shape=(total, hidden),
                    source=(share, every),
                    parameter=new + "experts.gate_up_proj",
                    target=(expert, slice(row, row + width), every),
                    is_product=True,
                )
            yield WeightSlice(
                tensor=f"{old}experts.{expert}.{down}.weight",
                shape=(hidden, total),
                source=(every, share),
                parameter=new + "experts.down_proj",
                target=(expert, every, slice(0, width)),
                is_product=True,
            )

    def _fused_experts(self, old: str, new: str) -> Iterator[WeightSlice]:
        hidden, total = self.config.hidden_size, self.config.moe_intermediate_size
        width = total // self.size
        experts, every = slice(0, self.config.num_experts), slice(0, hidden)
        for part in range(2):
            first = part * total + self.rank * width
            yield WeightSlice(
                tensor=old + "gate_up_proj",
                shape=(experts.stop, 2 * total, hidden),
                source=(experts, slice(first, first + width), every),
                parameter=new + "gate_up_proj",
                target=(experts, slice(part * width, (part + 1) * width), every),
                is_product=True,
            )
        yield WeightSlice(
            tensor=old + "down_proj",
            shape=(experts.stop, hidden, total),
            source=(experts, every, slice(self.rank * width, (self.rank + 1) * width)),
            parameter=new + "down_proj",
            target=(experts, every, slice(0, width)),
            is_product=True,
        )

    def _rows(
        self, tensor: str, parameter: str, shape: tuple[int, int], source: slice, target: slice, bias: bool
    ) -> Iterator[WeightSlice]:
        """Some rows of a column-parallel weight and of its bias."""
        every = slice(0, shape[1])
        yield WeightSlice(
            tensor=tensor + ".weight",
            shape=shape,
            source=(source, every),
            parameter=parameter + ".weight",
            target=(target, every),
            is_product=True,
        )
        if bias:
            yield WeightSlice(
                tensor=tensor + ".bias",
                shape=shape[:1],
                source=(source,),
                parameter=parameter + ".bias",
                target=(target,),
            )

    def _columns(self, tensor: str, parameter: str, shape: tuple[int, int], bias: bool) -> Iterator[WeightSlice]:
        """This rank's columns of a row-parallel weight; the bias is rank 0's."""
        every, width = slice(0, shape[0]), shape[1] // self.size
        yield WeightSlice(
            tensor=tensor + ".weight",
            shape=shape,
            source=(every, slice(self.rank * width, (self.rank + 1) * width)),
            parameter=parameter + ".weight",
            target=(every, slice(0, width)),
            is_product=True,
        )
        if bias and self.rank == 0:
            yield self.whole(tensor + ".bias", parameter + ".bias", shape[:1])
