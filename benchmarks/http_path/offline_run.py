"""`nanoserve bench offline` on the same requests, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from http_path.http_load import HttpLoad
from http_path.server_process import ROOT, ServerError, ServerOptions


def run_offline(options: ServerOptions, load: HttpLoad, seed: int) -> float:
    """Tokens out per second; raises `ServerError` where the command fails."""
    with tempfile.TemporaryDirectory(prefix="http-path-") as name:
        result = Path(name) / "result.json"
        command = [sys.executable, "-m", "cluster.cli", "bench", "offline", str(options.checkpoint), "--device", "cpu"]
        command += ["--input-len", str(load.num_prompt_tokens), "--output-len", str(load.num_output_tokens)]
        command += ["--num-requests", str(load.num_requests), "--seed", str(seed)]
        command += ["--threads", str(options.num_threads), "--json", str(result)]
        environment = os.environ | dict(options.rank_variables)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServerError(f"bench offline failed: {done.stderr[-2000:]}")
        return float(json.loads(result.read_text())["output_tokens_per_second"])
