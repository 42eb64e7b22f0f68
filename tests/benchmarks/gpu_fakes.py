"""A device for the parts of `make gpu` on a machine without one: a timer that only calls, and small models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from gpu_parts.bench_device import BenchDevice
from gpu_parts.ledger import Ledger, Row
from gpu_parts.model_sizes import ExpertSizes, ModelSizes
from gpu_parts.part import COMMON_GROUPS, GROUPS, Part
from gpu_parts.timing import Timing

HEADING = {"device": "a fake", "date": "today"}
TINY_MODEL = ModelSizes(
    hidden=64, intermediate=48, num_heads=4, num_kv_heads=2, head_dim=16, vocabulary=300, block_size=16
)
TINY_EXPERTS = ExpertSizes(name="tiny", num_experts=4, num_choices=2, hidden=64, intermediate=48)


class CallingTimer:
    """Calls the first run of each, as the others differ in their numbers only; the n-th contestant took n ms."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def time(
        self, contestants: Mapping[str, Sequence[Callable[[], object]]], seconds: float
    ) -> dict[str, Timing | Exception]:
        results: dict[str, Timing | Exception] = {}
        for name, runs in contestants.items():
            self.names.append(name)
            try:
                runs[0]()
            except Exception as error:
                results[name] = error
            else:
                results[name] = Timing(seconds=1e-3 * len(self.names), spread=0.01, num_replays=5)
        return results


def fake_device(num_sms: int = 6) -> BenchDevice:
    return BenchDevice(device=torch.device("cpu"), num_sms=num_sms, cache_bytes=1000, timer=CallingTimer())


class KnownLedger(Ledger):
    """Refuses rows of groups that the part has not, as the ledger of figures would not show them."""

    def add(self, row: Row) -> None:
        if self.part in set(Part):
            assert row.group in (*GROUPS[Part(self.part)], *COMMON_GROUPS), f"{self.part} has no group {row.group}"
        super().add(row)


def quiet_ledger(folder: Path, part: str = "part") -> Ledger:
    return KnownLedger(part, folder, dict(HEADING), quiet=True)
