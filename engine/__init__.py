"""An LLM engine for one tensor-parallel group. Knows token ids; not text, HTTP or Ray.

A step: the `Scheduler` composes a `Batch` from the sequences and the free blocks; the `Executor` sends it to every
rank's `Worker`; the `ModelRunner` turns it into device tensors and runs the model; the sampler draws tokens on the
device; the `LLMEngine`, already one step ahead, delivers them as `TokenOutput`s.

This module is the port: everything another package needs. It imports no torch; a worker does, when it is made.
"""

from engine.batch import Admission, Batch, StepOutput, StepTimes
from engine.config import CompileMode, DeviceKind, EngineConfig, PipelineMode
from engine.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    NanoserveError,
    RequestError,
)
from engine.executor import CacheCapacity, Executor
from engine.finished_request import FinishedRequest
from engine.fp8_support import check_cpu
from engine.host_cpus import num_usable_cpus
from engine.host_memory import resident_memory
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine, OutputSink
from engine.loss import Loss
from engine.loss_waterfall import LossWaterfall
from engine.memory_budget import check_host_memory
from engine.memory_use import MemoryMeter, MemoryPart, MemoryUse
from engine.model_config import DType, ModelConfig
from engine.number_format import NumberFormat
from engine.recorded_step import RecordedStep
from engine.request import FinishReason, Request, RequestId, SamplingParams, TokenLogprob, TokenOutput
from engine.simulated_executor import SimulatedExecutor
from engine.stats import EngineStats
from engine.step_picture import draw_notice, draw_recorded_step
from engine.user_cache import cache_directory
from engine.weights import check_checkpoint
from engine.workloads.length_distribution import LengthRange
from engine.workloads.named_workload import WorkloadName
from engine.workloads.synthetic_prompt import SyntheticPrompts
from engine.workloads.workload import PlannedRequest, Workload
from engine.workloads.workload_source import WorkloadSource

__all__ = [
    "Admission",
    "Batch",
    "CacheCapacity",
    "CapacityError",
    "CheckpointError",
    "CompileMode",
    "ConfigError",
    "DType",
    "DeviceKind",
    "EngineConfig",
    "EngineDeadError",
    "EngineStats",
    "Executor",
    "FinishReason",
    "FinishedRequest",
    "InlineExecutor",
    "LLMEngine",
    "LengthRange",
    "Loss",
    "LossWaterfall",
    "MemoryMeter",
    "MemoryPart",
    "MemoryUse",
    "ModelConfig",
    "NanoserveError",
    "NumberFormat",
    "OutputSink",
    "PipelineMode",
    "PlannedRequest",
    "RecordedStep",
    "Request",
    "RequestError",
    "RequestId",
    "SamplingParams",
    "SimulatedExecutor",
    "StepOutput",
    "StepTimes",
    "SyntheticPrompts",
    "TokenLogprob",
    "TokenOutput",
    "Workload",
    "WorkloadName",
    "WorkloadSource",
    "cache_directory",
    "check_checkpoint",
    "check_cpu",
    "check_host_memory",
    "draw_notice",
    "draw_recorded_step",
    "num_usable_cpus",
    "resident_memory",
]
