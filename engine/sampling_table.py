"""`SamplingTable`: how each row samples, kept on the host; `SamplingPlan`: what one step needs of it.

The host knows every parameter, so it decides which rows need which work and the device never has to be asked. A row
that uses no feature appears in no section of the plan and costs nothing. The same rows draw step after step, so what
does not depend on positions is worked out once for them. Token values never come here.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams
from engine.staging import HostArray

Int64s = NDArray[np.int64]

# Below this the softmax is a point mass in float32 and dividing by it would overflow: greedy.
MIN_TEMPERATURE = 1e-5

_COLUMNS = [
    *((name, np.int64) for name in ("seed", "top_k", "logprobs", "prompt_length", "min_tokens")),
    *((name, np.float64) for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")),
    *((name, np.bool_) for name in ("random", "filtered", "penalised", "edited")),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """The sampling of one step: which of the K drawn rows need what, by the host's knowledge.

    `arrays` are staged to the device; a section's arrays are there only if some row needs it. Names and shapes:
    plain_{index,seed,position,temperature,min_p} [U] rows drawn from the whole vocabulary; filtered_{...,top_k,top_p}
    [F] rows with top_k or top_p; penalised_{index,row,position,prompt_length,presence,frequency,repetition} [P];
    bias_{index,token,value} and banned_{index,token} one entry per edited logit; logprobs_index [L].
    """

    arrays: dict[str, HostArray]
    uses_min_p: bool
    max_top_k: int
    all_top_k: bool
    history_width: int
    logprobs_indices: Int64s
    num_top: Int64s

    @property
    def only_draws(self) -> bool:
        """Whether tokens are drawn from the logits as they are, and nothing else is wanted."""
        return all(name.startswith(("plain_", "filtered_")) for name in self.arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sections:
    """What some rows need at every position: the indices of those in each section, and the plan without positions."""

    plain: Int64s
    filtered: Int64s
    penalised: Int64s
    edited: Int64s
    prompt_lengths: Int64s
    min_tokens: Int64s
    plan: SamplingPlan


class SamplingTable:
    """Sampling parameters of `max_sequences` rows. `eos_token_ids` are banned with the stop ids by `min_tokens`."""

    def __init__(self, max_sequences: int, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self._rows = np.zeros(max_sequences, dtype=_COLUMNS)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._biases: dict[int, tuple[Int64s, NDArray[np.float64]]] = {}
        self._stops: dict[int, Int64s] = {}
        self._known: tuple[bytes, bool, _Sections] | None = None

    def admit(self, row: int, sampling: SamplingParams, num_prompt_tokens: int) -> None:
        """`row` samples by `sampling` from now on; its former parameters are forgotten."""
        self._known = None
        top_k = 0 if sampling.top_k >= self._vocab_size else sampling.top_k
        random = sampling.temperature >= MIN_TEMPERATURE
        penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
        self._rows[row] = (
            np.array([sampling.seed & (2**64 - 1)], dtype=np.uint64).view(np.int64)[0],
            top_k,
            -1 if sampling.logprobs is None else sampling.logprobs,
            num_prompt_tokens,
            sampling.min_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            *penalties,
            random,
            random and (top_k > 0 or sampling.top_p < 1),
            penalties != (0, 0, 1),
            bool(sampling.logit_bias) or sampling.min_tokens > 0,
        )
        self._biases.pop(row, None)
        self._stops.pop(row, None)
        if sampling.logit_bias:
            tokens, values = zip(*sampling.logit_bias, strict=True)
            self._biases[row] = np.array(tokens, dtype=np.int64), np.array(values, dtype=np.float64)
        if sampling.min_tokens > 0:
            stops = sorted(token for token in sampling.stop_token_ids | self._eos_token_ids if token < self._vocab_size)
            self._stops[row] = np.array(stops, dtype=np.int64)

    def plan(self, rows: Int64s, positions: Int64s, with_logprobs: bool) -> SamplingPlan:
        """What drawing the tokens at (`rows`, `positions`) [K] takes; no log-probabilities unless `with_logprobs`."""
        key = rows.tobytes()
        if self._known is None or self._known[:2] != (key, with_logprobs):
            self._known = key, with_logprobs, self._sections(rows, with_logprobs)
        sections = self._known[2]
        if not sections.plan.arrays and not sections.edited.size:
            return sections.plan
        arrays = dict(sections.plan.arrays)
        for name in ("plain", "filtered", "penalised"):
            indices: Int64s = getattr(sections, name)
            if indices.size:
                arrays[f"{name}_position"] = positions[indices]
        if sections.edited.size:
            too_short = positions - sections.prompt_lengths < sections.min_tokens
            self._add_edits(arrays, sections.edited, rows, too_short)
        history_width = int(positions[sections.penalised].max(initial=0))
        return replace(sections.plan, arrays=arrays, history_width=history_width)

    def _sections(self, rows: Int64s, with_logprobs: bool) -> _Sections:
        """What of the plan for these rows is the same at every position."""
        table = self._rows[rows]
        draw = ("seed", "temperature", "min_p")
        plain = np.flatnonzero(table["random"] & ~table["filtered"])
        filtered = np.flatnonzero(table["filtered"])
        penalised = np.flatnonzero(table["penalised"])
        logprobs = np.flatnonzero(table["logprobs"] >= 0) if with_logprobs else np.empty(0, dtype=np.int64)
        arrays = {
            **_section("plain", plain, table, draw),
            **_section("filtered", filtered, table, (*draw, "top_k", "top_p")),
            **_section("penalised", penalised, table, ("prompt_length", "presence", "frequency", "repetition")),
        }
        if penalised.size:
            arrays["penalised_row"] = rows[penalised]
        if logprobs.size:
            arrays["logprobs_index"] = logprobs
        top_ks = table["top_k"][filtered]
        return _Sections(
            plain=plain,
            filtered=filtered,
            penalised=penalised,
            edited=np.flatnonzero(table["edited"]),
            prompt_lengths=table["prompt_length"],
            min_tokens=table["min_tokens"],
            plan=SamplingPlan(
                arrays=arrays,
                uses_min_p=bool((table["min_p"][plain] > 0).any()),
                max_top_k=int(top_ks.max(initial=0)),
                all_top_k=bool((top_ks > 0).all()),
                history_width=0,
                logprobs_indices=logprobs,
                num_top=table["logprobs"][logprobs],
            ),
        )

    def _add_edits(
        self, arrays: dict[str, HostArray], edited: Int64s, rows: Int64s, too_short: NDArray[np.bool_]
    ) -> None:
        """Add the logits that a bias or an unreached `min_tokens` changes, as (index, token[, value]) entries."""
        biases = [(index, *self._biases[row]) for index in edited.tolist() if (row := int(rows[index])) in self._biases]
        banned = [(index, self._stops[int(rows[index])]) for index in edited.tolist() if too_short[index]]
        if biases:
            arrays["bias_index"] = np.repeat(
                [index for index, _, _ in biases], [len(tokens) for _, tokens, _ in biases]
            )
            arrays["bias_token"] = np.concatenate([tokens for _, tokens, _ in biases])
            arrays["bias_value"] = np.concatenate([values for _, _, values in biases])
        if banned:
            arrays["banned_index"] = np.repeat([index for index, _ in banned], [len(stops) for _, stops in banned])
            arrays["banned_token"] = np.concatenate([stops for _, stops in banned])


def _section(name: str, indices: Int64s, table: NDArray[np.void], columns: tuple[str, ...]) -> dict[str, HostArray]:
    """A section with the given columns of the rows at `indices`, if there are any."""
    if not indices.size:
        return {}
    return {f"{name}_index": indices, **{f"{name}_{column}": table[column][indices] for column in columns}}
