"""Benchmarks are scripts: their folder is on the path of the interpreter that runs them, and of these tests.

Without a GPU Triton's kernels are interpreted, which must be known before the first of them is made.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_gpu_*.py"]
