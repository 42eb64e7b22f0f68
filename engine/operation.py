"""What a layer tells the pipeline about itself: which resource it strains, which tokens it needs, how much work it is.

Models are made of Operations and plain arithmetic; the tracer of the nano-batch pipeline treats an Operation as a
leaf. Nothing here knows about streams, nano-batches or ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import Tensor, nn

from engine.batch_shape import BatchShape
from engine.kernels.compiled import CompiledKernel
from engine.kernels.kernel import Kernel
from engine.step_inputs import StepInputs


class Resource(StrEnum):
    """The part of the device that bounds an operation (NanoFlow, section 3.1)."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class TokenKind(StrEnum):
    """The tokens of a range that an operation computes."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"


class CacheUse(StrEnum):
    """Whether an operation touches the KV cache: attention of a later range may read what an earlier one writes."""

    NONE = "none"
    WRITE = "write"
    READ = "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one rank does for an operation. Bytes and floating-point operations, a multiplication and an addition each.

    `fp8_flops` of the `flops` are products of numbers in FP8. `weight_bytes` are read once, however many tokens there
    are. `sharded_bytes` of activations and cache differ from rank to rank; `replicated_bytes` are the same tokens on
    each, which a count over the whole group takes once. `network_bytes` leave this rank.
    """

    flops: float = 0.0
    fp8_flops: float = 0.0
    weight_bytes: float = 0.0
    sharded_bytes: float = 0.0
    replicated_bytes: float = 0.0
    network_bytes: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Everything this rank moves to and from its memory."""
        return self.weight_bytes + self.sharded_bytes + self.replicated_bytes

    def __add__(self, other: "Work") -> "Work":
        return Work(
            flops=self.flops + other.flops,
            fp8_flops=self.fp8_flops + other.fp8_flops,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            sharded_bytes=self.sharded_bytes + other.sharded_bytes,
            replicated_bytes=self.replicated_bytes + other.replicated_bytes,
            network_bytes=self.network_bytes + other.network_bytes,
        )


class Operation(nn.Module):
    """A leaf of the operation graph.

    Subclasses name the resource that bounds them, and where it is not the usual: the tokens they compute, whether they
    touch the KV cache, whether their result takes the place of their only input in memory (`is_in_place`), and whether
    they only lay the decode and the prefill rows of one value side by side (`is_join`), which costs nothing where both
    already lie in one buffer.
    `work` must be given by every operation that costs time, so that costs follow from the model and nothing else.
    """

    resource: ClassVar[Resource]
    tokens: ClassVar[TokenKind] = TokenKind.ALL
    cache: ClassVar[CacheUse] = CacheUse.NONE
    is_in_place: ClassVar[bool] = False
    is_join: ClassVar[bool] = False
    # Computes `kernel`, where a rank has compiled it.
    compiled: CompiledKernel | None = None

    def kernel(self, dtype: str, block_size: int) -> Kernel | None:
        """What `forward` computes as a function of tensors, if compiling it for a CPU pays: of the values that
        `forward` takes, then of `step_tensors`, then of `weights`.

        `dtype` is the name of the activations' number format, `block_size` that of the KV cache, in tokens.
        """
        return None

    def step_tensors(self, step: StepInputs) -> tuple[Tensor, ...]:
        """What its kernel takes of the step's inputs."""
        return ()

    def weights(self) -> tuple[Tensor, ...]:
        """What its kernel takes that is the same in every step."""
        return ()

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """The work of this rank for the tokens of `shape`, with activations of `element_bytes` an element."""
        raise NotImplementedError(f"{type(self).__name__} does not say how much work it is: give it a work() method.")

    @property
    def is_identity(self) -> bool:
        """Whether it does nothing here, as a collective in a group of one; a graph leaves such operations out."""
        return False

    @property
    def is_computed_elsewhere(self) -> bool:
        """Whether it was told by whom (`computed_by`)."""
        return "forward" in vars(self)

    def into(self, output: Tensor, *inputs: object) -> None:
        """Compute as `forward` does, with the result in `output`, which has its shape and dtype."""
        output.copy_(self(*inputs))

    def computed_by(self, compute: Callable[..., Tensor]) -> None:
        """From now on `compute` does what `forward` and `into` do: of their inputs, and with an `output` by that name.

        Both become attributes of this operation, so layers need not know who computes them.
        """

        def into(output: Tensor, *inputs: object) -> None:
            compute(*inputs, output=output)

        self.forward = compute
        self.into = into  # type: ignore[method-assign]
