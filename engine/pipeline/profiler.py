"""The profiler: measures the operations of one traced layer on this device with these libraries, as the runtime runs them.

Every node alone over a grid of tokens and contexts, then in pairs: the network beside whatever computes and, on a GPU,
compute beside memory too. Repetitions go round the grid so that a disturbance hits all points alike; a point counts
with its median. All ranks measure the same things in the same order and agree on every number, so that they end with
the same profile: the slowest rank's time, and for a collective the time of the rank that entered it last.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.config import DeviceKind, EngineConfig
from engine.errors import ConfigError
from engine.layers.collective import CollectiveOperation
from engine.operation import Resource, TokenKind
from engine.pipeline.cost_model import Mode
from engine.pipeline.fingerprint import Fingerprint, differences
from engine.pipeline.graph import Node
from engine.pipeline.layer_bench import LayerBench
from engine.pipeline.profile import Interference, NodeProfile, Profile, Sample
from engine.pipeline.schedule import ALL_UNITS
from engine.pipeline.timer import CudaTimer, HostTimer, Load, Timer
from engine.pipeline.tracer import TracedLayer
from engine.tensor_parallel import TensorParallel

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_MIN_ROUNDS, _MAX_ROUNDS = 3, 100
_MAX_COLLECTIVES = 8
_CONTEXT_LIMIT = 4096
