"""The rows `engine` of the part `correctness`: tiny random models through the whole engine, on the CPU and on the GPU.

Prompts come all at once, some with the beginning of others, into a cache too small for them, so that decodes and chunks
are mixed, prefixes are found again and sequences are preempted; a row is wrong where any of that did not happen. In
float32, without TF32, greedy and sampled tokens must be the same: where rounding parts a sequence, a failure is looked
at before it is believed. In bfloat16 and FP8 sequences part for good at the first other token, so the CPU is asked for
every token anew, behind what the GPU had drawn so far: how often it draws the same, and how far the best tokens'
log-probabilities are apart.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row

from engine.config import CompileMode, DeviceKind, EngineConfig
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.model_config import Architecture, ModelConfig
from engine.number_format import NumberFormat
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.request import Request, RequestId, SamplingParams, TokenLogprob
from engine.stats import EngineStats

# Of what is compared token by token: the least share of equal tokens, greedy and sampled; the largest error of the
# best tokens' log-probabilities, of the norm. FP8 rounds activations to three bits, on both sides.
BOUNDS = {NumberFormat.BFLOAT16: (0.9, 0.8, 0.03), NumberFormat.FP8: (0.8, 0.7, 0.1)}
NUM_LOGPROBS = 5
SECONDS_EACH = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What is asked: prompts of these lengths, of which every other one begins with `num_shared` tokens of all.

    `num_short` requests of `short_outputs` tokens go ahead, from which the engine learns that answers are short: so it
    admits more than `num_blocks` can hold; `num_long` requests of `long_outputs` come with the others and fill them.
    """

    lengths: tuple[int, ...] = (1, 180, 7, 240, 50, 370, 120, 305, 125)
    num_shared: int = 130
    num_outputs: int = 24
    num_short: int = 40
    short_outputs: int = 8
    num_long: int = 8
    long_outputs: int = 150
    num_blocks: int = 16
    max_batch_tokens: int = 256
    max_model_len: int = 448


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Tokens, and where they were asked for the best tokens with their log-probabilities."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]


def check_engine(
    ledger: Ledger,
    budget: Budget,
    folder: Path,
    device: DeviceKind = DeviceKind.CUDA,
    architectures: Sequence[Architecture] = tuple(Architecture),
    crowd: Crowd | None = None,
    formats: Sequence[NumberFormat] = (NumberFormat.FLOAT32, *BOUNDS),
) -> None:
    """One row per architecture and number format: the first architecture in all, then the others, the exact format
    first.
    """
    crowd = crowd or Crowd()
    first, *others = architectures
    turns = [(first, one) for one in formats] + [(other, one) for one in formats for other in others]
    for architecture, number_format in turns:
        name = f"{architecture.value} {number_format.value}"
        if not budget.has(SECONDS_EACH):
            ledger.skip("engine", name, NO_TIME)
            continue
        try:
            ledger.add(_compared(name, architecture, folder / architecture.name, device, crowd, number_format))
        except Exception as error:  # the others may still be right
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            ledger.add(Row(group="engine", name=name, is_right=False, note=note))


def _compared(
    name: str, architecture: Architecture, folder: Path, device: DeviceKind, crowd: Crowd, number_format: NumberFormat
) -> Row:
    """CPU against the device."""
    if not folder.exists():
        window = 48 if architecture is Architecture.MISTRAL else None
        write_random_checkpoint(
            folder, sized_config(architecture, max_position_embeddings=1024, sliding_window=window), seed=3
        )
    config = EngineConfig(
        model=ModelConfig.from_checkpoint(folder),
        checkpoint=folder,
        dtype=number_format.dtype,
        product_format=number_format,
        device=device,
        max_model_len=crowd.max_model_len,
        max_batch_tokens=crowd.max_batch_tokens,
        max_sequences=32,
        block_size=64,
        num_threads=1,  # for models this small others only wait
        compile=CompileMode.NEVER,
        num_blocks=crowd.num_blocks,
    )
    reference = replace(config, device=DeviceKind.CPU, num_blocks=40 * crowd.num_blocks)
    requests = _requests(crowd, with_logprobs=number_format in BOUNDS)
    told: list[str] = []
    got, stats = _answers(config, requests, told, crowd)
    missing = [
        what
        for what, count in (("preemption", stats.num_preemptions), ("prefix found", stats.num_cached_prompt_tokens))
        if not count
    ]
    if number_format in BOUNDS:
        row = _close_row(name, requests, got, _continued(reference, requests, got), BOUNDS[number_format])
    else:
        expected, _ = _answers(reference, requests, [])
        equal = sum(a.tokens == b.tokens for a, b in zip(expected, got, strict=True))
        note = f"{equal} of {len(got)} sequences equal on CPU and GPU"
        row = Row(
            group="engine", name=name, value=equal / len(got), is_right=equal == len(got), note=note
        )  # fmt: skip
    note = f"{row.note}; {stats.num_preemptions} preemptions, {stats.num_cached_prompt_tokens} tokens of prefixes"
    if missing:
        note += f"; NOT EXERCISED: no {' and no '.join(missing)}"
    # What an engine says on a GPU, but for plans that it looked for, is that it runs without kernels or graphs.
    warned = [text for text in told if device is DeviceKind.CUDA and not text.startswith("pipeline:")]
    is_right = bool(row.is_right) and not missing and not warned
    return replace(row, is_right=is_right, note="; ".join([note, *warned]), details=row.details | {"told": told})


def _close_row(
    name: str,
    requests: Sequence[Request],
    got: Sequence[Answer],
    expected: Sequence[Answer],
    bounds: tuple[float, float, float],
) -> Row:
    """Rates of equal tokens, greedy and sampled, and how far log-probabilities are apart, by their norms."""
    equal: dict[bool, list[bool]] = {True: [], False: []}
    difference = norm = 0.0
    for request, one, other in zip(requests, got, expected, strict=True):
        is_greedy = request.sampling.temperature == 0
        equal[is_greedy] += [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            if a is not None and b is not None:
                known = dict(a.top)
                shared = [(known[token], value) for token, value in b.top if token in known]
                difference += sum((value - wanted) ** 2 for value, wanted in shared)
                norm += sum(wanted**2 for _, wanted in shared)
    greedy, sampled = (sum(equal[kind]) / max(1, len(equal[kind])) for kind in (True, False))
    error = math.sqrt(difference / norm) if norm else math.nan
    is_right = greedy >= bounds[0] and sampled >= bounds[1] and error <= bounds[2]
    note = (
        f"{100 * greedy:.1f} % greedy tokens as the CPU's (least {100 * bounds[0]:.0f}), {100 * sampled:.1f} % sampled "
        f"(least {100 * bounds[1]:.0f}); logprobs of the best (most {bounds[2]:.0e})"
    )
    details = {"greedy_equal": greedy, "sampled_equal": sampled, "logprob_error": error}
    return Row(group="engine", name=name, value=error, unit="norm", is_right=is_right, note=note, details=details)


def _requests(crowd: Crowd, *, with_logprobs: bool) -> list[Request]:
    """Greedy and sampled continuations of prompts; of those that are greedy every other one asks for logprobs."""
    generator = np.random.default_rng(0)
    shared = generator.integers(1, 500, crowd.num_shared)
    requests = []
    for index, length in enumerate(crowd.lengths):
        prompt = generator.integers(1, 500, length)
        if index % 2 and length > crowd.num_shared:
            prompt[: crowd.num_shared] = shared
        for temperature in (0.0, 0.8):
            sampling = SamplingParams(
                max_tokens=crowd.num_outputs,
                temperature=temperature,
                top_p=0.95,
                seed=length,
                ignore_eos=True,
                logprobs=NUM_LOGPROBS if with_logprobs and not temperature and index % 2 == 0 else None,
            )
            request_id = RequestId(f"{length}-{temperature}")
            requests.append(Request(request_id=request_id, prompt_token_ids=tuple(prompt.tolist()), sampling=sampling))
    return requests


def _fillers(kind: str, num_requests: int, num_outputs: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=num_outputs, temperature=0.0, ignore_eos=True)
    return [
        Request(request_id=RequestId(f"{kind}-{number}"), prompt_token_ids=(1,) * (20 + number), sampling=sampling)
        for number in range(num_requests)
    ]


def _continued(config: EngineConfig, requests: Sequence[Request], got: Sequence[Answer]) -> list[Answer]:
    """What the engine of `config` draws at every place of the answers, behind what they hold before it."""
    places = [
        replace(
            request,
            request_id=RequestId(f"{request.request_id}+{number}"),
            prompt_token_ids=(*request.prompt_token_ids, *answer.tokens[:number]),
            sampling=replace(request.sampling, max_tokens=1),
        )
        for request, answer in zip(requests, got, strict=True)
        for number in range(len(answer.tokens))
    ]
    drawn = iter(_answers(config, places, [])[0])
    answers = []
    for answer in got:
        ones = [next(drawn) for _ in answer.tokens]
        answers.append(
            Answer(tokens=tuple(one.tokens[0] for one in ones), logprobs=tuple(one.logprobs[0] for one in ones))
        )
    return answers


def _answers(
    config: EngineConfig, requests: Sequence[Request], told: list[str], crowd: Crowd | None = None
) -> tuple[list[Answer], EngineStats]:
    """All at once, in a crowd as described if there is one; and what the engine counted."""
    short = [] if crowd is None else _fillers("short", crowd.num_short, crowd.short_outputs)
    long = [] if crowd is None else _fillers("long", crowd.num_long, crowd.long_outputs)

    async def one(engine: LLMEngine, request: Request) -> Answer:
        outputs = [output async for output in engine.generate(request)]
        tokens = [token for output in outputs for token in output.token_ids]
        logprobs = [entry for output in outputs for entry in output.logprobs or (None,) * len(output.token_ids)]
        return Answer(tokens=tuple(tokens), logprobs=tuple(logprobs))

    async def run() -> tuple[list[Answer], EngineStats]:
        emulates_fp8 = config.device is DeviceKind.CPU and config.product_format is NumberFormat.FP8
        engine = LLMEngine(config, InlineExecutor(config, tell=told.append, emulates_fp8=emulates_fp8))
        await engine.start()
        try:
            await asyncio.gather(*(one(engine, request) for request in short))
            answers = await asyncio.gather(*(one(engine, request) for request in (*long, *requests)))
            return answers[len(long) :], engine.stats()
        finally:
            await engine.close()

    return asyncio.run(run())
