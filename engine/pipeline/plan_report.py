"""`PlanReport`: a plan with all that tells how good it is; `plan_summary` writes it for people.

Times and rates are of the layers of a step: the embedding, the output head and sampling come on top. For the same
reason the optimum counts the parameters of the layers alone.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.errors import ConfigError
from engine.number_format import NumberFormat
from engine.optimum import active_parameters, wide_parameters
from engine.pipeline.plan import Candidate, Plan
from engine.pipeline.plan_request import PlanRequest
from engine.pipeline.serving_estimate import ServingEstimate
from engine.pipeline.simulator import Simulator
from engine.pipeline.timeline import Timeline
from engine.weight_layout import rank_weight_bytes


@dataclass(frozen=True)
class PlanReport:
    """What was asked and what was found."""

    request: PlanRequest
    plan: Plan

    @property
    def title(self) -> str:
        """What was planned."""
        request = self.request
        return f"{request.name} on {request.num_devices} x {request.device.name}, {request.num_tokens:,} tokens a step"

    @property
    def heading(self) -> str:
        """What came out, in a line."""
        return (
            f"predicted: {1e3 * self.plan.best.step_seconds:.5g} ms a step, "
            f"{self.tokens_per_second_per_device:,.0f} tokens/s per device, {self.plan.speedup:.2f} times as fast as "
            f"sequential ({1e3 * self.plan.sequential.step_seconds:.5g} ms)"
        )

    @cached_property
    def timeline(self) -> Timeline:
        """The predicted step."""
        request = self.request
        costs = request.costs_of(self.plan.schedule)
        simulator = Simulator(self.plan.schedule, request.traced.graph, costs, request.shape)
        return simulator.timeline(self.plan.num_layers, self.title)

    @property
    def tokens_per_second_per_device(self) -> float:
        """Prompt and output tokens together. Raises `ConfigError` where the costs say that nothing takes time."""
        if self.plan.best.step_seconds <= 0:
            raise ConfigError(f"A step takes no time by these costs ({self.request.costs.source}): measure them again.")
        return self.request.num_tokens / self.plan.best.step_seconds / self.request.num_devices

    @property
    def layer_parameters(self) -> int:
        """Parameters of the layers that a token meets."""
        model = self.request.model
        return active_parameters(model) - model.hidden_size * model.vocab_size

    @property
    def optimal_tokens_per_second_per_device(self) -> float:
        """Compute / (2 P) (NanoFlow, equation 5): what the devices' peak allows when it never waits.

        In FP8 that is the peak in FP8, but for the routers of experts, whose products are not in it.
        """
        request, model = self.request, self.request.model
        num_fp8 = 0
        if request.number_format is NumberFormat.FP8:
            num_fp8 = active_parameters(model) - wide_parameters(model)
        return 1 / request.device.compute_seconds(2 * self.layer_parameters, request.element_bytes, 2 * num_fp8)

    @property
    def peak_flops_per_second(self) -> float:
        """Of one device, in the format that the layers' products are in."""
        return self.request.device.flops_per_second[self.request.number_format.num_bytes]

    @property
    def percent_of_optimal(self) -> float:
        """100 where the products of matrices run at the devices' peak all the time."""
        return 100 * self.tokens_per_second_per_device / self.optimal_tokens_per_second_per_device

    @property
    def lower_bound_seconds(self) -> float:
        """Of a step: no pipeline of the family has a shorter period, and a step has one for each layer."""
        return min(self.plan.num_layers * self.plan.lower_bound_seconds, self.plan.best.step_seconds)

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know before they rely on it."""
        request = self.request
        estimate = ServingEstimate(
            config=request.model,
            device=request.device,
            num_devices=request.num_devices,
            element_bytes=request.number_format.num_bytes,
        )
        weights = request.num_devices * rank_weight_bytes(
            request.model,
            request.number_format.dtype,
            request.num_devices,
            in_fp8=request.number_format is NumberFormat.FP8,
        )
        cache = request.shape.num_decodes * request.shape.decode_context * estimate.kv_bytes_per_token
        room = request.num_devices * request.device.memory_bytes
        notes = ["Times are of the layers; the embedding, the output head and sampling come on top."]
        if weights + cache > room:
            notes.append(
                f"This batch does not fit: weights {weights / 1e9:,.1f} GB and KV cache {cache / 1e9:,.1f} GB, "
                f"memory {room / 1e9:,.1f} GB."
            )
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """Everything, in seconds, bytes and operations."""
        request, plan = self.request, self.plan
        return {
            "model": request.name,
            "device": request.device.name,
            "num_devices": request.num_devices,
            "dtype": request.number_format.value,
            "num_tokens": request.num_tokens,
            "num_decodes": int(request.shape.num_decodes),
            "num_prefills": int(request.shape.num_prefills),
            "num_prompt_tokens": request.num_prompt_tokens,
            "num_output_tokens": request.num_output_tokens,
            "costs": request.costs.source,
            "sequential_seconds": plan.sequential.step_seconds,
            "planned_seconds": plan.best.step_seconds,
            "lower_bound_seconds": self.lower_bound_seconds,
            "speedup": plan.speedup,
            "gap": plan.gap,
            "period": {
                "sequential_seconds": plan.sequential.period_seconds,
                "planned_seconds": plan.best.period_seconds,
                "lower_bound_seconds": plan.lower_bound_seconds,
            },
            "solve_seconds": plan.solve_seconds,
            "stop_reason": plan.stop_reason.value,
            "num_partitions": plan.num_partitions,
            "num_solved": plan.num_solved,
            "family": plan.family,
            "tokens_per_second_per_device": self.tokens_per_second_per_device,
            "percent_of_optimal": self.percent_of_optimal,
            "optimal_tokens_per_second_per_device": self.optimal_tokens_per_second_per_device,
            "peak_flops_per_second": self.peak_flops_per_second,
            "peak_source": request.device.source,
            "layer_parameters": self.layer_parameters,
            "operations": self._operations(),
            "schedule": str(plan.schedule),
            "candidates": [_candidate(candidate) for candidate in plan.candidates],
        }

    def _operations(self) -> list[dict[str, Any]]:
        """All layers of a step on all devices, each with the cost model's price of it in one piece."""
        return [
            {
                "name": row.name,
                "flops": row.flops,
                "memory_bytes": row.memory_bytes,
                "network_bytes": row.network_bytes,
                "compute_seconds": row.compute_seconds,
                "memory_seconds": row.memory_seconds,
                "network_seconds": row.network_seconds,
                "bound": row.bound.value,
                "seconds": self.request.price(row.name),
            }
            for row in self.request.table.rows
        ]


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"planned_seconds": candidate.step_seconds, "schedule": str(candidate.schedule)}
