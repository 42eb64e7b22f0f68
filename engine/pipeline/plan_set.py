"""`PlanSet`: the plans of one layer on one device, a bucket of batches each, with how each was chosen.

    {"format": 2, "fingerprint": {...}, "max_batch_tokens": 2048, "is_complete": true,
     "profile": {...} or null,
     "plans": [{"num_decodes": 1024, "num_prefills": 1024, "schedule": ["nano-batches: ...", ...] or null,
                "sequential_seconds": 0.21, "plan_seconds": 0.17, "predicted_seconds": 0.16}, ...]}

A schedule is its text form line by line, so that changes read well; null means that sequential was the fastest. A set
that is not complete was cut short, and lacks plans for buckets that may be worth one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from engine.errors import ConfigError
from engine.pipeline.bucket import Bucket, bucket_of
from engine.pipeline.fingerprint import Fingerprint
from engine.pipeline.json_value import JsonValue, json_number
from engine.pipeline.profile import Profile
from engine.pipeline.schedule import Schedule, ScheduleError

FORMAT = 2
_KEYS = ("format", "fingerprint", "max_batch_tokens", "is_complete", "profile", "plans")
_PLAN_KEYS = (
    "num_decodes", "num_prefills", "schedule", "sequential_seconds", "plan_seconds", "predicted_seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedPlan:
    """What to do with the batches of one bucket. `schedule` None: run the operations one after the other.

    Planned, and measured, for `num_decodes` and `num_prefills`: seconds of a whole step run sequentially and by the
    best plan tried, and those that the cost model predicted for that plan.
    """

    num_decodes: int
    num_prefills: int
    schedule: Schedule | None
    sequential_seconds: float
    plan_seconds: float
    predicted_seconds: float


@dataclass(frozen=True, kw_only=True)
class PlanSet:
    """One file. `PlanSet.parse(str(plans)) == plans`. At most one plan per bucket (construction checks it)."""

    fingerprint: Fingerprint
    max_batch_tokens: int
    is_complete: bool = True
    profile: Profile | None = None
    plans: tuple[SelectedPlan, ...] = field(default=())

    def __post_init__(self) -> None:
        seen: set[Bucket] = set()
        for plan in self.plans:
            batch = f"the plan for {plan.num_decodes} decodes and {plan.num_prefills} prefill tokens"
            bucket = self._bucket_of(plan.num_decodes, plan.num_prefills)
            if bucket is None:
                raise ConfigError(f"{batch} is for a smaller batch than any bucket of {self.max_batch_tokens} tokens.")
            if bucket in seen:
                raise ConfigError(f"{batch} is the second one for batches of {bucket}.")
            if plan.schedule is not None and not plan.schedule.fits(plan.num_decodes, plan.num_prefills):
                raise ConfigError(f"the schedule of {batch} lacks one of these kinds of token.")
            seen.add(bucket)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """All schedules but the sequential one."""
        return tuple(plan.schedule for plan in self.plans if plan.schedule is not None)

    def lookup(self, num_decodes: int, num_prefills: int) -> SelectedPlan | None:
        """The plan of the batch's bucket; None for a small batch or a bucket without a plan: run sequentially.

        Decided by the batch alone, so that every rank with these plans finds the same. A schedule found here fits.
        """
        bucket = self._bucket_of(num_decodes, num_prefills)
        return None if bucket is None else self._by_bucket.get(bucket)

    @property
    def served(self) -> Iterator[tuple[Schedule, Bucket]]:
        """The same, with the batches that run by each."""
        for bucket, plan in self._by_bucket.items():
            if plan.schedule is not None:
                yield plan.schedule, bucket

    @cached_property
    def _by_bucket(self) -> Mapping[Bucket, SelectedPlan]:
        found = {self._bucket_of(plan.num_decodes, plan.num_prefills): plan for plan in self.plans}
        return {bucket: plan for bucket, plan in found.items() if bucket is not None}

    def _bucket_of(self, num_decodes: int, num_prefills: int) -> Bucket | None:
        return bucket_of(num_decodes, num_prefills, self.max_batch_tokens)

    @classmethod
    def parse(cls, text: str, where: str = "plans") -> "PlanSet":
        """Read the text form; raises `ConfigError` that names `where`, the path inside and what would be right."""
        return cls.of(JsonValue.parse(text, where))

    @classmethod
    def of(cls, value: JsonValue) -> "PlanSet":
        """Check a value of a JSON file; raises `ConfigError` that says where it is wrong."""
        entries = value.object(_KEYS)
        entries["format"].integer(FORMAT, FORMAT)
        profile = entries["profile"]
        fingerprint = {key: text.text() for key, text in entries["fingerprint"].entries().items()}
        max_batch_tokens = entries["max_batch_tokens"].integer(1)
        is_complete = entries["is_complete"]
        if not isinstance(is_complete.value, bool):
            is_complete.refuse("true or false")
        plans = tuple(_plan(item) for item in entries["plans"].items())
        try:
            return cls(
                fingerprint=fingerprint,
                max_batch_tokens=max_batch_tokens,
                is_complete=is_complete.value,
                profile=None if profile.value is None else Profile.of(profile),
                plans=plans,
            )
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if message.startswith(value.file) else f"{value.where}: {message}") from None

    def __str__(self) -> str:
        plans = ",\n".join(map(_plan_text, self.plans))
        return (
            f'{{\n"format": {FORMAT},\n'
            f'"fingerprint": {json.dumps(dict(self.fingerprint), indent=1)},\n'
            f'"max_batch_tokens": {self.max_batch_tokens},\n'
            f'"is_complete": {json.dumps(self.is_complete)},\n'
            f'"plans": [\n{plans}\n],\n'
            f'"profile": {"null" if self.profile is None else str(self.profile).rstrip()}\n}}\n'
        )


def _plan(value: JsonValue) -> SelectedPlan:
    entries = value.object(_PLAN_KEYS)
    lines = entries["schedule"]
    schedule = None
    if lines.value is not None:
        text = "".join(f"{line.text()}\n" for line in lines.items())
        try:
            schedule = Schedule.parse(text)
        except ScheduleError as error:
            raise ConfigError(f"{lines.where}: {error}") from None
    return SelectedPlan(
        num_decodes=entries["num_decodes"].integer(0),
        num_prefills=entries["num_prefills"].integer(0),
        schedule=schedule,
        sequential_seconds=entries["sequential_seconds"].number(),
        plan_seconds=entries["plan_seconds"].number(),
        predicted_seconds=entries["predicted_seconds"].number(),
    )


def _plan_text(plan: SelectedPlan) -> str:
    lines = None if plan.schedule is None else str(plan.schedule).splitlines()
    return (
        f' {{"num_decodes": {plan.num_decodes}, "num_prefills": {plan.num_prefills}, '
        f'"sequential_seconds": {json_number(plan.sequential_seconds)}, '
        f'"plan_seconds": {json_number(plan.plan_seconds)}, '
        f'"predicted_seconds": {json_number(plan.predicted_seconds)},\n'
        f'  "schedule": {json.dumps(lines, indent=3)}}}'
    )
