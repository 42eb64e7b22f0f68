"""What it costs to send one step to the ranks of a tensor-parallel group and to get rank 0's tokens back.

    python benchmarks/step_transport.py [--ranks 2] [--sequences 256] [--steps 2000]

Compares plain Ray actor calls, a compiled Ray graph, and the Unix sockets of `cluster.step_transport`, interleaved so
that a noisy machine disturbs all three alike. The ranks compute nothing; a row shows the transport alone.
"""

import argparse
import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray on the loopback interface

import numpy as np
import ray
from ray.dag import InputNode, MultiOutputNode

from cluster.step_transport import RankLink, RankSocket, encode
from engine import Batch, StepOutput

ROUND = 50


def decode_batch(num_sequences: int) -> Batch:
    """A steady decode step: every row computes one token, one in 16 takes a new block."""
    rows = np.arange(num_sequences, dtype=np.int32)
    updates = np.stack([rows[::16], rows[::16], rows[::16]], axis=1)
    return Batch(
        step=1,
        admissions=(),
        block_updates=updates,
        rows=rows,
        starts=rows + 100,
        counts=np.ones_like(rows),
        num_decodes=num_sequences,
        sampled=rows,
    )


@ray.remote(num_cpus=0)
class EchoRank:
    """A rank without a model."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def execute(self, batch: Batch) -> StepOutput | None:
        """Rank 0 returns one token per sampled sequence."""
        return StepOutput(step=batch.step, token_ids=batch.sampled) if self._rank == 0 else None

    def serve(self, path: str) -> None:
        """The same over a socket, until it closes."""
        rank_socket = RankSocket(path)
        while isinstance(batch := rank_socket.receive(), Batch):
            output = self.execute(batch)
            if output is not None:
                rank_socket.send(output)


class SocketGroup:
    """The engine's side of the socket transport, bare."""

    def __init__(self, num_ranks: int, directory: Path) -> None:
        path = str(directory / "ranks")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self._actors = []
        self._links = []
        for rank in range(num_ranks):
            actor = EchoRank.remote(rank)  # type: ignore[attr-defined]
            actor.serve.remote(path)
            self._actors.append(actor)
            self._links.append(RankLink(listener.accept()[0]))
        loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[Any] = loop.create_future()
        loop.add_reader(self._links[0].fileno(), self._on_readable)

    async def step(self, batch: Batch) -> StepOutput:
        """One batch to every rank, one answer."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        frame = encode(batch)
        for link in self._links:
            link.send(frame, loop)
        output = await self._waiting
        assert isinstance(output, StepOutput)
        return output

    def _on_readable(self) -> None:
        for output in self._links[0].receive():
            self._waiting.set_result(output)


async def measure(num_ranks: int, num_sequences: int, num_steps: int) -> None:
    """Print the table."""
    batch = decode_batch(num_sequences)
    actors = [EchoRank.remote(rank) for rank in range(num_ranks)]  # type: ignore[attr-defined]
    graph_ranks = [EchoRank.remote(rank) for rank in range(num_ranks)]  # type: ignore[attr-defined]
    with InputNode() as node:
        graph = MultiOutputNode([rank.execute.bind(node) for rank in graph_ranks]).experimental_compile(
            enable_asyncio=True
        )

    async def actor_calls() -> StepOutput:
        outputs: list[StepOutput] = await asyncio.gather(*[actor.execute.remote(batch) for actor in actors])
        return outputs[0]

    async def compiled_graph() -> StepOutput:
        futures = await graph.execute_async(batch)
        outputs: list[StepOutput] = await asyncio.gather(*futures)
        return outputs[0]

    with tempfile.TemporaryDirectory(prefix="steps-") as directory:
        group = SocketGroup(num_ranks, Path(directory))
        transports: dict[str, Callable[[], Awaitable[StepOutput]]] = {
            "Ray actor calls": actor_calls,
            "compiled Ray graph": compiled_graph,
            "Unix sockets": lambda: group.step(batch),
        }
        seconds: dict[str, list[float]] = {name: [] for name in transports}
        for turn in range(num_steps // ROUND + 1):
            for name, step in transports.items():
                for _ in range(ROUND):
                    started = time.perf_counter()
                    output = await step()
                    if turn:  # the first turn warms up
                        seconds[name].append(time.perf_counter() - started)
                    assert len(output.token_ids) == num_sequences
    graph.teardown()
    size = len(encode(batch))
    print(
        f"\n{num_ranks} ranks, {num_sequences} sequences ({size} bytes), {num_steps} steps each, {os.cpu_count()} cores"
    )
    print(f"{'transport':20} {'p50 ms':>8} {'p99 ms':>8}")
    for name, values in seconds.items():
        p50, p99 = np.percentile(np.asarray(values) * 1e3, [50, 99])
        print(f"{name:20} {p50:8.3f} {p99:8.3f}")


def main() -> None:
    """Parse the arguments and run on a private local Ray."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="steps-ray-") as directory:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=directory)
        try:
            asyncio.run(measure(arguments.ranks, arguments.sequences, arguments.steps))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
