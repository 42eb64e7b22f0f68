"""`PlannedSchedule`: what a folder of plans holds for a device to run: schedules as `plan --schedule-out` writes them
(`.schedule`, `.txt`) and stored sets of plans (`.json`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.pipeline.bucket import buckets
from engine.pipeline.plan_set import PlanSet, SelectedPlan
from engine.pipeline.schedule import Mechanism, Schedule

_TEXTS = (".schedule", ".txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSchedule:
    """One schedule, and what its file calls it."""

    name: str
    schedule: Schedule

    @property
    def mechanism(self) -> Mechanism:
        """What lanes overlap by."""
        return self.schedule.mechanism

    @property
    def title(self) -> str:
        """Name and mechanism."""
        return f"{self.name} ({self.mechanism})"

    def plans(self, max_batch_tokens: int, max_sequences: int) -> PlanSet:
        """The schedule for every bucket that it fits, of those that a loaded engine's batches are in: the largest."""
        every = buckets(max_batch_tokens, max_sequences)
        large = (bucket for bucket in every if 2 * bucket.num_tokens > max_batch_tokens)
        batches = (bucket.batch(max_sequences) for bucket in large)
        plans = tuple(
            SelectedPlan(
                num_decodes=batch[0],
                num_prefills=batch[1],
                schedule=self.schedule,
                sequential_seconds=1.0,
                plan_seconds=1.0,
                predicted_seconds=1.0,
            )
            for batch in batches
            if batch is not None and self.schedule.fits(*batch)
        )
        return PlanSet(fingerprint={"schedule": self.name}, max_batch_tokens=max_batch_tokens, plans=plans)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A file that nothing could be made of."""

    name: str
    reason: str


def planned_schedules(folder: Path | None) -> Iterator[PlannedSchedule | LeftOut]:
    """Of every file of the folder, by name. A folder without any is said, too."""
    if folder is None:
        return
    num_files = 0
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix in _TEXTS:
                found = [PlannedSchedule(name=path.stem, schedule=Schedule.parse(path.read_text()))]
            elif path.suffix == ".json":
                plans = PlanSet.parse(path.read_text(), path.name).plans
                found = [
                    PlannedSchedule(
                        name=f"{path.stem[:8]} {plan.num_decodes}+{plan.num_prefills}", schedule=plan.schedule
                    )
                    for plan in plans
                    if plan.schedule is not None
                ]
            else:
                continue
        except OSError as error:  # a folder, or a file that is somebody else's
            yield LeftOut(name=path.name, reason=f"{path} cannot be read: {error.strerror}")
        except (ConfigError, UnicodeDecodeError) as error:
            yield LeftOut(name=path.name, reason=str(error))
        else:
            yield from found
        num_files += 1
    if not num_files:
        yield LeftOut(name=folder.name, reason=f"{folder} holds no {', '.join(_TEXTS)} or .json file")
