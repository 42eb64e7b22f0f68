"""OpenVINO GenAI's continuous batching, on the checkpoint as Optimum Intel exports it (in its own number format).

The KV cache has the number format of the model: for some models and chips the default is a smaller one.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

from peer_engines.peer import Peer
from peer_engines.peer_engine import MAX_BATCH_TOKENS, EngineSetup, PeerRequest
from peer_engines.worker_loop import serve

PEERS: Final = (
    Peer(
        name="openvino",
        module="peer_engines.openvino_engine",
        environment="openvino",
        torch="2.13.0",  # for the export only
        requirements=("openvino-genai==2026.4.1", "optimum-intel[openvino]==2.2.0", "transformers==5.5.4"),
        unwanted=("torchvision",),  # there is none for a CPU build of torch, and transformers fails to import another
        variables={"HF_HUB_OFFLINE": "1"},
    ),
)
_PRECISIONS: Final = {"bfloat16": "bf16", "float32": "f32"}
_WEIGHT_FORMATS: Final = {
    "bfloat16": (),
    "float32": ("--weight-format", "fp32"),
}  # "bf16" is not a choice, but the default


class OpenVinoEngine:
    """A `ContinuousBatchingPipeline` on the CPU."""

    def __init__(self, setup: EngineSetup) -> None:
        import openvino_genai  # type: ignore[import-not-found]

        self.version = version("openvino-genai")
        precision = _PRECISIONS[setup.dtype]
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-setup.cache_tokens // 32) + setup.max_sequences  # its blocks on a CPU: 32 tokens
        scheduler.max_num_batched_tokens = MAX_BATCH_TOKENS
        scheduler.max_num_seqs = setup.max_sequences
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": setup.num_threads,
        }
        model = str(_exported(setup))
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def run(self, requests: list[PeerRequest]) -> list[list[int]]:
        """Submit all requests at once and return the tokens generated for each."""
        import numpy as np
        import openvino  # type: ignore[import-not-found]
        import openvino_genai

        prompts, settings = [], []
        for request in requests:
            prompts.append(openvino.Tensor(np.array([request.prompt], dtype=np.int64)))
            generation = openvino_genai.GenerationConfig()
            generation.max_new_tokens = request.num_output_tokens
            generation.ignore_eos = True
            generation.do_sample = False
            settings.append(generation)
        return [list(result.m_generation_ids[0]) for result in self._pipeline.generate(prompts, settings)]

    def close(self) -> None:
        """Free the model."""
        del self._pipeline


def _exported(setup: EngineSetup) -> Path:
    """The checkpoint in OpenVINO's format, made once; takes some 20 seconds."""
    folder = setup.converted / "openvino"
    if not folder.exists():
        partial = setup.converted / "openvino.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["--model", str(setup.checkpoint), "--task", "text-generation-with-past"]
        subprocess.run([*command, *_WEIGHT_FORMATS[setup.dtype], str(partial)], check=True)
        partial.rename(folder)
    return folder


if __name__ == "__main__":
    serve(OpenVinoEngine)
