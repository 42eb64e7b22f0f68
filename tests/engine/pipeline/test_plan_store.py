"""Plans are found by fingerprint and bucket; what cannot be used is reported and set aside; writers do not collide."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.number_format import NumberFormat
from engine.pipeline import plan_store
from engine.pipeline.bucket import Bucket, DecodeShare, bucket_of, buckets, ladder
from engine.pipeline.plan_set import PlanSet, SelectedPlan
from engine.pipeline.plan_store import PlanStore, shipped_directory
from engine.pipeline.profile import NodeProfile, Profile, Sample
from engine.pipeline.schedule import Schedule
from engine.user_cache import cache_directory

FINGERPRINT = {"device": "a test", "torch": "2.13"}
SCHEDULE = Schedule.parse("nano-batches: 128+128 128+128\ncompute: o_proj[0:256] o_proj[256:512]@1\n")
PROFILE = Profile(
    fingerprint=FINGERPRINT,
    source="a test",
    number_format=NumberFormat.FLOAT32,
    nodes={"o_proj": NodeProfile((Sample(BatchShape(num_decodes=0, num_prefills=8), 0.1 + 0.2),))},
)


def _plan(num_decodes: int, num_prefills: int, schedule: Schedule | None = SCHEDULE) -> SelectedPlan:
    return SelectedPlan(
        num_decodes=num_decodes,
        num_prefills=num_prefills,
        schedule=schedule,
        sequential_seconds=0.3,
        plan_seconds=0.2,
        predicted_seconds=0.19,
    )


def _plans(**changes: Any) -> PlanSet:
    settings: dict[str, Any] = dict(
        fingerprint=FINGERPRINT,
        max_batch_tokens=512,
        profile=PROFILE,
        plans=(_plan(256, 256), _plan(64, 448), _plan(0, 512, None)),
    )
    return PlanSet(**(settings | changes))


@given(
    max_batch_tokens=st.integers(1, 5000),
    batch=st.tuples(st.integers(0, 5000), st.integers(0, 5000)).filter(any),
)
def test_every_batch_has_one_bucket_whose_plan_fits_it(max_batch_tokens: int, batch: tuple[int, int]) -> None:
    steps = ladder(max_batch_tokens)
    bucket = bucket_of(*batch, max_batch_tokens)
    assert list(steps) == sorted(set(steps)) and steps[-1] == max_batch_tokens
    if bucket is None:
        assert sum(batch) < steps[0]
        return
    assert bucket.num_tokens == max(step for step in steps if step <= sum(batch))
    representative = bucket.batch(max_sequences=sum(batch))
    if bucket.num_tokens <= 8 and (representative is None or bucket_of(*representative, max_batch_tokens) != bucket):
        return  # so few tokens cannot hold every mix
    assert representative is not None
    assert sum(representative) == bucket.num_tokens
    assert bucket_of(*representative, max_batch_tokens) == bucket
    assert all(wanted > 0 or given == 0 for wanted, given in zip(representative, batch, strict=True))


@given(max_batch_tokens=st.integers(1, 5000), max_sequences=st.integers(1, 5000))
def test_the_buckets_to_plan_are_those_that_can_occur(max_batch_tokens: int, max_sequences: int) -> None:
    max_sequences = min(max_sequences, max_batch_tokens)
    listed = list(buckets(max_batch_tokens, max_sequences))
    assert len(set(listed)) == len(listed) <= 5 * len(ladder(max_batch_tokens))
    for bucket in listed:
        batch = bucket.batch(max_sequences)
        assert batch is not None and batch[0] <= max_sequences
        assert bucket_of(*batch, max_batch_tokens) == bucket


def test_a_plan_serves_its_bucket_and_no_other() -> None:
    plans = _plans()
    mixed, mostly_prefill, all_prefill = plans.plans
    assert plans.lookup(256, 256) is mixed
    assert plans.lookup(300, 213) is mixed
    assert plans.lookup(1, 511) is mostly_prefill
    assert plans.lookup(0, 512) is all_prefill
    assert plans.lookup(0, 511) is None  # a smaller step of the ladder, without a plan
    assert plans.lookup(512, 0) is None
    assert plans.lookup(3, 100) is None
    for batch in ((256, 256), (1, 511), (129, 383), (383, 129)):
        plan = plans.lookup(*batch)
        assert plan is not None and plan.schedule is not None
        assert plan.schedule.fits(*batch)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ((_plan(256, 256), _plan(200, 312)), "second one for batches of 512 tokens, mixed"),
        ((_plan(3, 3),), "smaller batch than any bucket"),
        ((_plan(0, 512), _plan(512, 0, Schedule.parse("nano-batches: 0+512\ncompute: o_proj[0:512]\n"))), "lacks one"),
    ],
)
def test_plans_that_contradict_each_other_are_refused(plans: tuple[SelectedPlan, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plans(plans=plans)


def test_the_text_form_is_exact() -> None:
    for plans in (_plans(), _plans(profile=None, plans=()), _plans(is_complete=False)):
        assert PlanSet.parse(str(plans)) == plans
        json.loads(str(plans))


def test_saved_plans_are_found_again(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    assert store.find(FINGERPRINT).plans is None
    path = store.save(_plans())
    assert path.is_relative_to(tmp_path)
    found = PlanStore(tmp_path).find(dict(reversed(list(FINGERPRINT.items()))))
    assert found.plans == _plans()
    assert str(path) in found.reason
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_another_fingerprint_misses_and_says_why(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    assert store.find(FINGERPRINT).reason == "no plans are stored yet"
    store.save(_plans())
    store.save(_plans(fingerprint={"device": "another", "torch": "2.12"}))
    missed = store.find({"device": "a test", "torch": "2.14"})
    assert missed.plans is None
    assert "torch 2.13 -> 2.14" in missed.reason and "another" not in missed.reason


def test_shipped_plans_are_used_until_there_are_own_ones(tmp_path: Path) -> None:
    shipped, cache = tmp_path / "schedules", tmp_path / "cache"
    store = PlanStore(cache, shipped)
    file = shipped / "some-device" / store.plans_path(FINGERPRINT).name
    file.parent.mkdir(parents=True)
    file.write_text(str(_plans()))
    assert store.find(FINGERPRINT).plans == _plans()
    assert "torch 2.13 -> 3" in store.find({**FINGERPRINT, "torch": "3"}).reason
    store.save(_plans(plans=()))
    assert store.find(FINGERPRINT).plans == _plans(plans=())


_TEXT = str(_plans())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON"),
        (_TEXT[: len(_TEXT) // 2], "JSON"),
        (_TEXT.replace("o_proj[0:256]", "o_proj[256:0]"), r"plans\[0\]\.schedule: line 2"),
        (_TEXT.replace('"num_decodes": 64', '"num_decodes": -64'), r"plans\[1\]\.num_decodes must be"),
        (_TEXT.replace('"seconds": 0.30', '"seconds": "0.30'), "JSON"),
        (
            _TEXT.replace('"number_format": "float32"', '"number_format": "int8"'),
            r"profile\.number_format must be one of",
        ),
        (_TEXT.replace('"is_complete": true', '"is_complete": 1'), "is_complete must be true or false"),
        (_TEXT.replace('"torch": "2.13"', '"torch": "2.12"'), "another fingerprint"),
    ],
)
def test_a_file_that_cannot_be_used_is_reported_and_moved_aside(
    text: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = PlanStore(tmp_path)
    path = store.save(_plans())
    assert text != _TEXT
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert store.find(FINGERPRINT).plans is None
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert re.search(message, record.getMessage())
    assert path.with_suffix(".corrupt").read_text() == text and not path.exists()
    store.save(_plans())
    assert store.find(FINGERPRINT).plans == _plans()


def test_a_file_that_cannot_be_read_stays_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PlanStore(tmp_path)
    path = store.plans_path(FINGERPRINT)
    path.mkdir(parents=True)
    assert store.find(FINGERPRINT).plans is None
    (record,) = caplog.records
    assert f"{path} cannot be read" in record.getMessage()
    assert path.is_dir() and not path.with_suffix(".corrupt").exists()
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    assert store.find(FINGERPRINT).plans is None
    assert path.with_suffix(".corrupt").exists()


def test_a_shipped_file_that_cannot_be_used_stays_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PlanStore(tmp_path / "cache", tmp_path / "schedules")
    file = tmp_path / "schedules" / "device" / store.plans_path(FINGERPRINT).name
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert store.find(FINGERPRINT).plans is None
    assert str(file) in caplog.text
    assert file.exists()


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        PlanStore(tmp_path / "file").save(_plans())


def _write_often(folder: Path, count: int) -> None:
    for number in range(count):
        PlanStore(folder).save(_plans(plans=(_plan(256, 256), _plan(64, 448))[: 1 + number % 2]))


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PlanStore(tmp_path)
    store.save(_plans())
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(_write_often, tmp_path, 100) for _ in range(2)]
        while not all(writer.done() for writer in writers):
            assert store.find(FINGERPRINT).plans is not None
        for writer in writers:
            writer.result()
    assert not caplog.records
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [store.plans_path(FINGERPRINT)]


def test_the_cache_directory_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path
    assert PlanStore().plans_path(FINGERPRINT).is_relative_to(tmp_path)
    monkeypatch.delenv("NANOSERVE_CACHE_DIR")
    assert "nanoserve" in str(cache_directory())


def test_shipped_plans_are_those_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_store, "__file__", str(tmp_path / "engine" / "pipeline" / "plan_store.py"))
    assert shipped_directory() is None
    (tmp_path / "deploy" / "schedules").mkdir(parents=True)
    assert shipped_directory() is None, "a folder among installed packages is not ours"
    (tmp_path / "pyproject.toml").touch()
    assert shipped_directory() == tmp_path / "deploy" / "schedules"


def test_shares_are_counted_in_whole_tokens() -> None:
    assert DecodeShare.of(0, 5) is DecodeShare.ALL_PREFILL
    assert DecodeShare.of(1, 3) is DecodeShare.MOSTLY_PREFILL
    assert DecodeShare.of(2, 3) is DecodeShare.MIXED
    assert DecodeShare.of(3, 1) is DecodeShare.MOSTLY_DECODE
    assert DecodeShare.of(5, 0) is DecodeShare.ALL_DECODE
    assert Bucket(2048, DecodeShare.ALL_DECODE).batch(max_sequences=256) is None
