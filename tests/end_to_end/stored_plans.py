"""A plan store made by hand: every bucket of a served model gets a schedule of two nano-batches that overlap.

Imported by tests and by the ranks that tell what a schedule of their layer and the fingerprint of their setup are.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig
from engine.local_group import LocalGroup
from engine.pipeline.bucket import buckets
from engine.pipeline.fingerprint import Fingerprint, fingerprint_of
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.plan_set import PlanSet, SelectedPlan
from engine.pipeline.plan_store import PlanStore
from engine.pipeline.schedule import Schedule
from engine.pipeline.split_schedule import split_schedule
from engine.worker import Worker

Counts = tuple[int, int]


def store_plans(config: EngineConfig, cache: Path) -> set[str]:
    """Write a plan for each bucket of `config` into `cache`; the names that metrics will call them by."""
    batches = [
        batch
        for bucket in buckets(config.max_batch_tokens, config.max_sequences)
        if (batch := bucket.batch(config.max_sequences)) is not None
    ]
    with LocalGroup(replace(config, plan_seconds=0)) as group:
        fingerprint, schedules = group.run(_describe, batches)[0]
    plans = tuple(
        SelectedPlan(
            num_decodes=num_decodes,
            num_prefills=num_prefills,
            schedule=Schedule.parse(schedule),
            sequential_seconds=2.0,
            plan_seconds=1.0,
            predicted_seconds=1.0,
        )
        for (num_decodes, num_prefills), schedule in zip(batches, schedules, strict=True)
    )
    PlanStore(cache).save(PlanSet(fingerprint=fingerprint, max_batch_tokens=config.max_batch_tokens, plans=plans))
    return {f"{num_decodes}+{num_prefills}" for num_decodes, num_prefills in batches}


def _describe(worker: Worker, batches: Sequence[Counts]) -> tuple[Fingerprint, list[str]]:
    """Of this rank: what its setup is called in a plan store, and a schedule for each batch."""
    pipeline = worker.runner.pipeline
    fingerprint = fingerprint_of(worker.config, pipeline.graph.signature, worker.tensor_parallel)
    schedules = [split_schedule(pipeline.graph, Cut(_halves(*counts))) for counts in batches]
    for schedule in schedules:
        pipeline.check(schedule)
    return fingerprint, list(map(str, schedules))


def _halves(num_decodes: int, num_prefills: int) -> tuple[NanoBatch, NanoBatch]:
    first = NanoBatch(num_decodes // 2, num_prefills - num_prefills // 2)
    return first, NanoBatch(num_decodes - first.num_decodes, num_prefills - first.num_prefills)
