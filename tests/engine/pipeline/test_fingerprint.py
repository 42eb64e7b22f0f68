"""The fingerprint tells apart what costs differently, and says how."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.model_config import DType
from engine.number_format import NumberFormat
from engine.pipeline import fingerprint
from engine.pipeline.fingerprint import differences, fingerprint_hash, fingerprint_of
from engine.tensor_parallel import TensorParallel

ConfigMaker = Callable[..., EngineConfig]


def test_it_is_stable_and_names_the_setup(engine_config: ConfigMaker) -> None:
    facts = fingerprint_of(engine_config(num_threads=1), "abc", TensorParallel())
    assert facts == fingerprint_of(engine_config(num_threads=1), "abc", TensorParallel())
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in facts.items())
    assert (facts["torch"], facts["dtype"], facts["layer"], facts["threads"]) == (
        torch.__version__,
        "float32",
        "abc",
        "1",
    )
    backwards = dict(reversed(list(facts.items())))
    assert fingerprint_hash(facts) == fingerprint_hash(backwards)
    assert len(fingerprint_hash(facts)) == 12


def test_every_setting_that_changes_costs_changes_it(engine_config: ConfigMaker) -> None:
    base = engine_config(num_threads=1)
    changed = (
        engine_config(num_threads=2),
        engine_config(num_threads=1, dtype=DType.BFLOAT16),
        engine_config(num_threads=1, dtype=DType.BFLOAT16, product_format=NumberFormat.FP8),
        engine_config(num_threads=1, kv_cache_format=NumberFormat.FP8),
        engine_config(num_threads=1, max_batch_tokens=128),
        engine_config(num_threads=1, block_size=8),
        engine_config(num_threads=1, max_sequences=base.max_sequences - 1),
        engine_config(num_threads=1, max_model_len=base.max_model_len // 2),
        engine_config(num_threads=1, tensor_parallel=2),
        engine_config(num_threads=1, model=replace(base.model, num_kv_heads=1)),
        engine_config(num_threads=1, model=replace(base.model, sliding_windows=(64, 64))),
    )
    group = TensorParallel()  # the configuration says how many ranks there will be; here one process asks
    hashes = [fingerprint_hash(fingerprint_of(config, "abc", group)) for config in (base, *changed)]
    hashes.append(fingerprint_hash(fingerprint_of(base, "another layer", group)))
    assert len(set(hashes)) == len(hashes)


def test_differences_are_said_in_words() -> None:
    old, new = {"torch": "2.12", "dtype": "float32", "gone": "x"}, {"torch": "2.13", "dtype": "float32", "new": "y"}
    assert differences(old, new) == ("torch 2.12 -> 2.13", "gone x -> unknown", "new unknown -> y")
    assert differences(new, new) == ()


def test_files_of_the_kernel_are_read_or_done_without(tmp_path: Path) -> None:
    cpuinfo, driver, speed = (tmp_path / name for name in ("cpuinfo", "version", "speed"))
    assert fingerprint._cpu_model(cpuinfo)
    assert fingerprint._nvidia_driver(driver) == "unknown"
    assert fingerprint._link_speed(speed) == ""
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nmodel name\t: Other\n")
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\nGCC version:\n")
    speed.write_text("-1\n")
    assert fingerprint._cpu_model(cpuinfo) == "Some CPU @ 2.0GHz"
    assert fingerprint._nvidia_driver(driver) == "570.86.15"
    assert fingerprint._link_speed(speed) == ""
    speed.write_text("10000\n")
    assert fingerprint._link_speed(speed) == "10000 Mbit/s"


def test_the_network_names_its_interface(engine_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    pair = fingerprint_of(engine_config(tensor_parallel=2, num_threads=1), "abc", TensorParallel())
    assert pair["network"].startswith("gloo over lo")
    alone = fingerprint_of(engine_config(num_threads=1), "abc", TensorParallel())
    assert alone["network"] == "none"


def test_loopback_has_its_real_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("127.0.0.1", "127.0.1.1"):
        monkeypatch.setattr("socket.gethostbyname", lambda _, found=address: found)
        assert fingerprint._own_interface() == "lo"


def test_the_version_of_the_program_is_part_of_it(engine_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    for version, expected in ((lambda _: "1.2.3", "1.2.3"), (missing, "source")):
        monkeypatch.setattr("importlib.metadata.version", version)
        assert fingerprint_of(engine_config(num_threads=1), "abc", TensorParallel())["nanoserve"].startswith(
            f"{expected}, measuring "
        )


def test_a_rate_limit_is_part_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tc = tmp_path / "tc"
    tc.write_text("#!/bin/sh\necho 'qdisc tbf 8001: root refcnt 2 rate 1Gbit burst 256Kb lat 50ms'\n")
    tc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert fingerprint._shaping("any") == "limited by tbf to 1Gbit"
    tc.write_text("#!/bin/sh\necho 'qdisc noqueue 0: root refcnt 2'\n")
    assert fingerprint._shaping("any") == ""
