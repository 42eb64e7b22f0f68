"""`WeightScales`: where the scales of a weight stored in FP8 are, and how many of its elements share each.

A weight [O, I] stands for its stored values times scales that are one number, one of each row, or one of each block.
Checking is done on headers alone; torch is needed only to read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from engine.checkpoint import FP8, Checkpoint
from engine.errors import CheckpointError
from engine.fp8_checkpoint import Fp8Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

# The second one multiplies, too: it is the inverse of what values were multiplied with to be stored.
_SUFFIXES: Final = ("_scale", "_scale_inv")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScales:
    """`tensor` holds scales [rows, columns], each shared by `rows_per_scale` x `columns_per_scale` elements."""

    tensor: str
    num_columns: int
    rows_per_scale: int
    columns_per_scale: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, weight: str, fp8: Fp8Checkpoint | None) -> "WeightScales | str":
        """Of a weight stored as e4m3, or in words what is wrong with them."""
        stored = checkpoint.tensors[weight]
        names = [weight + suffix for suffix in _SUFFIXES]
        name = next((name for name in names if name in checkpoint.tensors), None)
        if name is None:
            return f"{weight} is stored as {FP8}, but there is neither {names[0]} nor {names[1]}"
        if len(stored.shape) != 2:
            return f"{weight} of shape {list(stored.shape)} is stored as {FP8}, which only matrices can be"
        scales = checkpoint.tensors[name]
        if not scales.is_float or scales.dtype == FP8:
            return f"{name} is stored as {scales.dtype}, which is not a supported floating-point dtype"
        num_rows, num_columns = stored.shape
        kinds: dict[tuple[int, ...], tuple[int, int]] = {}
        if fp8 is not None and fp8.block is not None:
            rows, columns = fp8.block
            kinds[-(-num_rows // rows), -(-num_columns // columns)] = fp8.block
        kinds[()] = kinds[1,] = kinds[1, 1] = num_rows, num_columns
        kinds[num_rows,] = kinds[num_rows, 1] = 1, num_columns
        if scales.shape not in kinds:
            return f"{name} has shape {list(scales.shape)}, which are the scales of no rows or blocks of {weight}"
        rows, columns = kinds[scales.shape]
        return cls(
            tensor=name,
            num_columns=-(-num_columns // columns),
            rows_per_scale=rows,
            columns_per_scale=columns,
        )

    def read(self, tensors: Any, source: Sequence[slice]) -> "Tensor":
        """Float32 scales [rows, 1] or [rows, columns] of this part of the weight; `tensors` is the opened file.

        Raises `CheckpointError` for values that scale nothing.
        """
        import torch

        scales: Tensor = tensors.get_tensor(self.tensor).float().reshape(-1, self.num_columns)
        if not (scales.isfinite() & (scales >= 0)).all():
            raise CheckpointError(f"{self.tensor} has scales that are negative or not finite: the file is damaged.")
        rows = torch.arange(source[0].start, source[0].stop) // self.rows_per_scale
        scales = scales[rows]
        if self.num_columns == 1:
            return scales
        return scales[:, torch.arange(source[1].start, source[1].stop) // self.columns_per_scale]
