"""The ways in which the ranks of a group on GPUs exchange something, set up once when a rank has joined its group.

Three: the group's own communicator; a second one (NCCL, `network_ctas` execution units at most, a stream of high
priority) for collectives that run beside other work, which would lose what the first takes; and sums of small messages
through symmetric memory, where ranks can have that. Every function here is a collective.
"""

import logging
import socket
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.config import EngineConfig, PipelineMode
from engine.errors import first_line
from engine.pipeline.rank_agreement import RankAgreement
from engine.symmetric_sums import SymmetricSums, fastest_below, unsupported
from engine.tensor_parallel import TensorParallel

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

# Messages beyond it are bound by the links, which NCCL fills.
_LARGEST_MEASURED = 2**23


def network_of(config: EngineConfig, rank: int, device: torch.device, timeout: timedelta) -> TensorParallel:
    """Of a rank that has joined the default group, by all that its device and `config` offer."""
    plain = TensorParallel(rank=rank, size=config.tensor_parallel, group=dist.group.WORLD)
    if device.type != "cuda":
        return plain
    narrow_group = None
    if config.pipeline is PipelineMode.OVERLAP:
        narrow_group = dist.new_group(
            backend="nccl", timeout=timeout, pg_options=narrow_options(config.network_ctas, timeout), device_id=device
        )
    return TensorParallel(
        rank=rank,
        size=config.tensor_parallel,
        group=plain.group,
        narrow_group=narrow_group,
        small_sums=_small_sums(config, plain, device),
    )


def narrow_options(num_ctas: int, timeout: timedelta) -> Any:
    """NCCL on so many execution units at most, whose kernels get onto the device before those of a product."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options._timeout = timeout  # else torch warns that the group's replaces it
    options.config.min_ctas = 1
    options.config.max_ctas = num_ctas
    return options


def _small_sums(config: EngineConfig, plain: TensorParallel, device: torch.device) -> SymmetricSums | None:
    """None where NCCL does all sums: by wish (`symmetric_bytes` 0), or because there is no other way, which is said."""
    if config.symmetric_bytes == 0:
        return None
    agreement = RankAgreement(plain, device)
    try:
        sums = _working_sums(config, plain, agreement, device)
    except _LackingError as error:
        _log.warning("NCCL sums small messages, too: %s.", error)
        return None
    if config.symmetric_bytes is None:
        sums.limit = fastest_below(sums, plain, agreement, device)
        if plain.rank == 0:
            _log.info("Sums of up to %d bytes go through symmetric memory: there it beat NCCL.", sums.limit)
    return sums


class _LackingError(Exception):
    """There are no sums through symmetric memory; says why."""


def _working_sums(
    config: EngineConfig, plain: TensorParallel, agreement: RankAgreement, device: torch.device
) -> SymmetricSums:
    """For messages of `symmetric_bytes`, or as large as can be measured or summed; raises `_LackingError`."""
    dtype: torch.dtype = getattr(torch, config.dtype.value)
    step_bytes = config.max_batch_tokens * config.model.hidden_size * dtype.itemsize
    num_bytes = min(config.symmetric_bytes or _LARGEST_MEASURED, step_bytes)
    reason = unsupported(dtype)
    if reason is not None:
        raise _LackingError(reason)
    if not _is_one_machine(agreement):
        raise _LackingError("the ranks are on several machines")  # some would wait for handles that never come
    sums = _by_all(
        agreement,
        "memory for them could not be had",
        lambda: SymmetricSums.allocate(dtype, device, num_bytes, plain.size),
    )
    _by_all(agreement, "ranks cannot see each other's memory", lambda: sums.meet(plain.group))
    sums.agree_on_multicast(_is_everywhere(agreement, sums.has_multicast))
    _by_all(agreement, "tried out, they fail", sums.try_out)
    return sums


def _by_all(agreement: RankAgreement, words: str, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns, once it has succeeded on every rank: in the next step a rank without would be waited for.

    Raises `_LackingError` on every rank otherwise.
    """
    reason, result = "", None
    try:
        result = attempt()
    except Exception as error:  # torch raises what its driver says: any kind of it means the same
        reason = f"{words}: {first_line(error).rstrip('.')}"
    if not _is_everywhere(agreement, not reason):
        raise _LackingError(reason or "another rank cannot sum through symmetric memory")
    return result  # type: ignore[return-value]


def _is_one_machine(agreement: RankAgreement) -> bool:
    """Whether all ranks run under the same boot of the same kernel, by a number that a float holds exactly."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = socket.gethostname()
    number = float(zlib.crc32(name.encode()))
    return agreement.smallest([number]) == agreement.largest([number])


def _is_everywhere(agreement: RankAgreement, is_here: bool) -> bool:
    (smallest,) = agreement.smallest([float(is_here)])
    return bool(smallest)
