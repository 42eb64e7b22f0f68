"""Which multiprocessors a stream's kernels run on: every program of a large grid notes the number of its own."""

# mypy: disable-error-code="misc, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

NUM_PROGRAMS = 2048
_NUM_WARPS = 32  # so that two fill a multiprocessor, and the grid all of them


def note_sm_ids(ids: Tensor, num_programs: int = NUM_PROGRAMS) -> None:
    """Into an int32 tensor of as many elements as programs; there is no interpreter for it."""
    _note[(num_programs,)](ids, num_warps=_NUM_WARPS)


@triton.jit
def _note(ids: tl.tensor) -> None:
    program = tl.program_id(0)
    number = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r,r", [program], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
    tl.store(ids + program, number)
