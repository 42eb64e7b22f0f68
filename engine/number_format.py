"""`NumberFormat`: what a recipe's `dtype` and `kv_cache_dtype` may name.

Beside the dtypes of `engine.model_config` there is FP8, which nothing computes in: numbers are stored in it and matrix
products take it, while everything between the products stays in bfloat16. Torch-free.
"""

from enum import StrEnum

from engine.model_config import DType


class NumberFormat(StrEnum):
    """The dtypes, under their names, and FP8: e4m3 (float8_e4m3fn), up to 448, used with scales."""

    FLOAT64 = DType.FLOAT64.value
    FLOAT32 = DType.FLOAT32.value
    FLOAT16 = DType.FLOAT16.value
    BFLOAT16 = DType.BFLOAT16.value
    FP8 = "fp8"

    @property
    def dtype(self) -> DType:
        """What activations have where a user chose this."""
        return DType.BFLOAT16 if self is NumberFormat.FP8 else DType(self.value)

    @property
    def torch_name(self) -> str:
        """The attribute of `torch` that elements stored in this have."""
        return "float8_e4m3fn" if self is NumberFormat.FP8 else self.value

    @property
    def num_bytes(self) -> int:
        """Bytes of one stored element."""
        return 1 if self is NumberFormat.FP8 else self.dtype.num_bytes
