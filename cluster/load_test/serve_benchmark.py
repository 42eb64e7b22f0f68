"""`ServeBenchmark`: one load test of an endpoint, from a first probing request to the report.

The probe tells whether the endpoint works at all and how many tokens a word has there. What the load looks like is
the `Workload`'s matter, how it is sent the `LoadGenerator`'s, what it means the `LatencyReport`'s.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import uvloop
from tqdm import tqdm

from cluster.load_test.latency_report import LatencyReport, ServiceLevel
from cluster.load_test.load_generator import LoadGenerator
from cluster.load_test.load_prompts import LoadPrompts, TokenPrompts, WordPrompts
from cluster.load_test.load_target import Endpoint, LoadTarget
from cluster.load_test.request_outcome import RequestOutcome
from cluster.load_test.served_losses import losses_between, read_replicas
from engine import ConfigError, LossWaterfall, PlannedRequest, SyntheticPrompts, Workload

PROBE_SEED_OFFSET = 1_000_003  # the probe must not put a measured prompt into the prefix cache
PROBE_PROMPT_TOKENS, PROBE_OUTPUT_TOKENS = 64, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchmark:
    """One load test. `vocab_size` None means prompts of words."""

    target: LoadTarget
    workload: Workload
    vocab_size: int | None
    seed: int
    concurrency: int | None
    timeout: float
    service_level: ServiceLevel

    def run(self) -> tuple[LatencyReport, LossWaterfall | None]:
        """Probe, measure, report; raises `ConfigError` when the probe fails. Control-C reports what there is.

        The waterfall is of the servers during the test, None where they export none.
        """
        return uvloop.run(self._run())

    async def _run(self) -> tuple[LatencyReport, LossWaterfall | None]:
        prompts = await self._probed_prompts()
        with tqdm(total=len(self.workload.requests), unit="req", desc="answered", disable=None) as bar:
            num_failed = 0

            def finished(outcome: RequestOutcome) -> None:
                nonlocal num_failed
                if not outcome.is_ok:
                    num_failed += 1
                    bar.set_postfix(failed=num_failed)
                bar.update()

            generator = self._generator(self.workload, prompts, self.concurrency, finished)
            before = await read_replicas(self.target.url)
            wall, processor = time.perf_counter(), time.process_time()
            outcomes = await generator.run()
            busy = (time.process_time() - processor) / (time.perf_counter() - wall)
            losses = losses_between(before, await read_replicas(self.target.url))
        report = LatencyReport.of(
            outcomes,
            num_planned=len(self.workload.requests),
            offered_rate=None if self.concurrency else self.workload.offered_rate,
            client_busy=busy,
            service_level=self.service_level,
        )
        return report, losses

    async def _probed_prompts(self) -> LoadPrompts:
        """Send one small request; the prompts of the test, which for words rest on what it costs in tokens."""
        planned = PlannedRequest(num_prompt_tokens=PROBE_PROMPT_TOKENS, num_output_tokens=PROBE_OUTPUT_TOKENS)
        workload = Workload(requests=(planned,), description="probe")
        generator = self._generator(workload, self._prompts(self.seed + PROBE_SEED_OFFSET, 1.0), 1)
        outcomes = await generator.run()
        if not outcomes:
            raise asyncio.CancelledError
        probe = outcomes[0]
        if not probe.is_ok:
            raise ConfigError(
                f"The endpoint {self.target.request_url} failed a first request: {probe.error} {probe.detail}"
            )
        tokens_per_word = probe.num_prompt_tokens / PROBE_PROMPT_TOKENS if probe.num_prompt_tokens else 1.0
        return self._prompts(self.seed, tokens_per_word)

    def _prompts(self, seed: int, tokens_per_word: float) -> LoadPrompts:
        if self.vocab_size is None or self.target.endpoint is Endpoint.CHAT:
            return WordPrompts(seed=seed, tokens_per_word=tokens_per_word)
        return TokenPrompts(synthetic=SyntheticPrompts(vocab_size=self.vocab_size, seed=seed))

    def _generator(
        self,
        workload: Workload,
        prompts: LoadPrompts,
        concurrency: int | None,
        finished: Callable[[RequestOutcome], None] = lambda outcome: None,
    ) -> LoadGenerator:
        return LoadGenerator(
            self.target, workload, prompts, concurrency=concurrency, timeout=self.timeout, finished=finished
        )
