"""Traces of every understood format, from small files of each form and, where they are at hand, the real ones."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from engine import ConfigError, LengthRange, WorkloadName, WorkloadSource
from engine.workloads.named_workload import NAMED_WORKLOADS
from engine.workloads.request_trace import read_trace

TRACES = Path(os.environ.get("NANOSERVE_TEST_DATA", Path(__file__).parents[4] / "shared")) / "traces"

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-17 00:00:00.0000000,5,6
"""
NANOFLOW = "TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,107,15\nXXX,396,513\n"
SERVEGEN = (
    "timestamp,request_id,input_tokens,output_tokens,reason_ratio\n1.5000,0,205,476,0.722\n1.6092,1,73,3879,0.89\n"
)
MOONCAKE = """{"timestamp": 3000, "input_length": 600, "output_length": 500, "hash_ids": [0, 7]}
{"timestamp": 6000, "input_length": 512, "output_length": 1, "hash_ids": [0]}
"""
LENGTHS_ONLY = '{"turn": 0, "input_length": 1030, "hash_ids": [4, 5]}\n'


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_azure_times_are_relative_to_the_first_and_keep_their_digits(tmp_path: Path, name: str) -> None:
    workload = read_trace(write(tmp_path, name, AZURE))
    assert [item.arrival_seconds for item in workload.requests] == pytest.approx(
        [0.0, 4.314579, 20653.319410], abs=1e-6
    )
    assert (workload.requests[1].num_prompt_tokens, workload.requests[1].num_output_tokens) == (396, 109)


def test_a_trace_without_times_has_no_arrivals(tmp_path: Path) -> None:
    workload = read_trace(write(tmp_path, "trace.csv", NANOFLOW))
    assert not workload.has_arrivals
    assert workload.num_prompt_tokens == 503


def test_servegen_times_are_seconds(tmp_path: Path) -> None:
    workload = read_trace(write(tmp_path, "trace.csv", SERVEGEN))
    assert [item.arrival_seconds for item in workload.requests] == pytest.approx([0.0, 0.1092])
    assert workload.num_output_tokens == 4355


def test_mooncake_times_are_milliseconds_and_blocks_are_kept(tmp_path: Path) -> None:
    workload = read_trace(write(tmp_path, "trace.jsonl.gz", MOONCAKE))
    assert [item.arrival_seconds for item in workload.requests] == [0.0, 3.0]
    assert workload.requests[0].block_ids == (0, 7)


def test_missing_output_lengths_are_drawn(tmp_path: Path) -> None:
    trace = write(tmp_path, "trace.jsonl", LENGTHS_ONLY)
    workload = WorkloadSource(trace=trace, output=LengthRange(low=9, high=9)).load()
    assert workload.requests[0].num_output_tokens == 9


def test_a_number_of_requests_takes_the_first_ones(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path, "trace.csv", AZURE), 2).requests) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trace.txt", AZURE, r"must be a \.csv or \.jsonl"),
        ("trace.csv", "a,b\n1,2\n", "line 2: cannot make a request"),
        ("trace.csv", AZURE.replace("374", "many"), "line 2: cannot make a request"),
        ("trace.csv", AZURE.splitlines()[0] + "\n", "has no requests"),
        ("trace.jsonl", "{nonsense\n", "Cannot read the trace"),
        ("trace.csv", NANOFLOW + "2023-11-16 18:15:50.9,1,1\n", "times for some requests only"),
    ],
)
def test_a_bad_trace_is_an_error_that_says_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path, name, text))


def test_a_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode())[:-20])
    with pytest.raises(ConfigError, match="Cannot read the trace"):
        read_trace(path)


def real(name: str) -> Path:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"needs the trace {name}: set NANOSERVE_TEST_DATA to the folder that holds traces/")
    return path


def test_the_whole_azure_trace() -> None:
    workload = read_trace(real("azure_conv_30min.csv.gz"))
    assert len(workload.requests) == 10_108
    assert workload.offered_rate == pytest.approx(5.62, abs=0.01)
    assert workload.num_prompt_tokens / 10_108 == pytest.approx(1243.3, abs=0.1)


def test_the_whole_mooncake_trace() -> None:
    workload = read_trace(real("mooncake_conversation.jsonl.gz"))
    assert len(workload.requests) == 12_031
    assert all(len(item.block_ids) == -(-item.num_prompt_tokens // 512) for item in workload.requests)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (WorkloadName.AZURE_CONVERSATION, "azure_conv_30min.csv.gz"),
        (WorkloadName.LMSYS, "nanoflow_lmsys.csv.gz"),
        (WorkloadName.SHAREGPT, "nanoflow_sharegpt.csv.gz"),
        (WorkloadName.DEEPSEEK_R1, "servegen_deepseek_r1.csv.gz"),
    ],
)
def test_named_workloads_match_their_traces(name: WorkloadName, file: str) -> None:
    recorded = np.array([(item.num_prompt_tokens, item.num_output_tokens) for item in read_trace(real(file)).requests])
    recorded = recorded[(recorded[:, 0] <= 50_000) & (recorded[:, 1] <= 50_000)]
    if name is WorkloadName.SHAREGPT:
        recorded = recorded[(recorded[:, 0] <= 8192) & (recorded[:, 1] <= 4096)]
    shape = NAMED_WORKLOADS[name]
    drawn = np.array(shape.draw(200_000, np.random.default_rng(1)))
    assert drawn.mean(axis=0) == pytest.approx(recorded.mean(axis=0), rel=0.03)
    assert np.median(drawn, axis=0) == pytest.approx(np.median(recorded, axis=0), rel=0.03)
    assert recorded.max(axis=0).tolist() == [shape.prompt.maximum, shape.output.maximum]
    correlation = np.corrcoef(np.log(np.maximum(recorded, 1)).T)[0, 1]
    assert shape.correlation == pytest.approx(correlation, abs=0.01)
