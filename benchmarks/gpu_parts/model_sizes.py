"""`ModelSizes`: the sizes of a layer that kernels are measured at; Llama-3-8B's, or small ones for tests."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """One layer, and the batches it meets."""

    hidden: int = 4096
    intermediate: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128_256
    block_size: int = 64

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inner size of the four products."""
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return {
            "QKV": (heads, self.hidden),
            "O": (self.hidden, self.num_heads * self.head_dim),
            "UG": (2 * self.intermediate, self.hidden),
            "D": (self.hidden, self.intermediate),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSizes:
    """The experts of a layer."""

    name: str
    num_experts: int
    num_choices: int
    hidden: int
    intermediate: int


LLAMA_8B = ModelSizes()
MIXTRAL = ExpertSizes(name="Mixtral-8x7B", num_experts=8, num_choices=2, hidden=4096, intermediate=14336)
QWEN3_30B = ExpertSizes(name="Qwen3-30B-A3B", num_experts=128, num_choices=8, hidden=2048, intermediate=768)
