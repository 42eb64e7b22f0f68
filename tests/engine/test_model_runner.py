"""The runner with a small real model: the same tokens in any batch, any chunking, any row, and one step ahead."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import EngineConfig
from engine.input_preparation import InputPreparation
from engine.kv_cache import KVCache
from engine.model_config import Architecture, DType
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.pending_step import PendingStep
from engine.pipeline.pipeline import Pipeline
from engine.random_checkpoint import sized_config
from engine.request import SamplingParams
from engine.sampler import sample
from engine.sampling_table import SamplingTable
from engine.staging import stage
from engine.step_inputs import DecodePart, StepInputs
from engine.tensor_parallel import TensorParallel
from engine.token_pool import TokenPool
from tests.engine.batch_script import BatchScript

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
NUM_BLOCKS = 64
# float64: a product of another shape must not decide between two tokens.
CONFIG = EngineConfig(
    model=sized_config(Architecture.LLAMA, vocab_size=300, dtype=DType.FLOAT64),
    checkpoint=Path("/nonexistent"),
    dtype=DType.FLOAT64,
    max_model_len=96,
    max_batch_tokens=64,
    max_sequences=6,
    block_size=4,
)
PROMPTS = [list(range(7, 30)), [5], [40, 41, 42, 43], list(range(100, 117))]
SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.9, frequency_penalty=0.6, presence_penalty=0.3),
    SamplingParams(seed=3, top_k=40, repetition_penalty=1.2, logprobs=2),
]
NUM_TOKENS = 12


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the runner computes."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def model(device: torch.device) -> Decoder:
    """Random weights, large enough that tokens differ."""
    model = build_model(CONFIG.model, TensorParallel(), torch.float64, device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator))
    return model


def make_runner(model: Decoder, device: torch.device) -> ModelRunner:
    return ModelRunner(
        CONFIG, model, Pipeline(model, CONFIG.model.hidden_size), KVCache.allocate(CONFIG, NUM_BLOCKS, device), device
    )


@pytest.fixture
def launch(model: Decoder, device: torch.device) -> Callable[[Batch], PendingStep]:
    """`launch` of a fresh runner."""
    return make_runner(model, device).launch


def drawn(pending: PendingStep) -> list[int]:
    tokens: list[int] = pending.wait().token_ids.tolist()
    return tokens


@pytest.fixture(scope="module")
def alone(model: Decoder, device: torch.device) -> list[list[int]]:
    """The tokens of each prompt in batches of its own: the whole prompt, then one decode after the other."""
    results = []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
        runner = make_runner(model, device)
        script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
        script.admit(0, prompt, sampling)
        tokens = drawn(runner.launch(script.step(prefills=[(0, len(prompt))])))
        while len(tokens) < NUM_TOKENS:
            tokens += drawn(runner.launch(script.step(decodes=[0])))
        results.append(tokens)
    assert all(len(set(tokens)) > NUM_TOKENS // 2 for tokens in results), "the model repeats itself: tests mean little"
    return results


def next_token(model: Decoder, device: torch.device, prompt: list[int], drawn: list[int], index: int) -> int:
    """What follows, from one prefill of everything into consecutive blocks, with inputs written out by hand."""
    history = prompt + drawn
    length = len(history)
    tokens = torch.tensor(history, device=device)
    positions = torch.arange(length, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    step = StepInputs(
        tokens=tokens,
        positions=positions,
        slots=positions,
        decode_block_tables=nothing.view(0, 1),
        decode_lengths=nothing,
        prefill_block_tables=torch.arange(-(-length // CONFIG.block_size), device=device)[None],
        num_decodes=0,
        max_decode_length=0,
        prefill_chunk_sizes=(length,),
        prefill_context_lengths=(length,),
        kv_cache=KVCache.allocate(CONFIG, NUM_BLOCKS, device),
    )
    pool = TokenPool(max_sequences=1, max_model_len=length, max_blocks_per_sequence=1, device=device)
    pool.tokens[0, :length] = tokens
    table = SamplingTable(1, CONFIG.model.vocab_size, CONFIG.model.eos_token_ids)
    table.admit(0, SAMPLINGS[index], len(prompt))
    plan = table.plan(np.zeros(1, np.int64), np.array([length]), with_logprobs=False)
    with torch.inference_mode():
        logits = model.logits(model(step)[-1:])
        return int(sample(logits, plan, stage(plan.arrays, device), pool).token_ids[0])


def test_tokens_are_those_of_the_model(model: Decoder, device: torch.device, alone: list[list[int]]) -> None:
    """Every token again by hand, from everything before it, which no runner's or cache's state can have influenced."""
    for index, (prompt, tokens) in enumerate(zip(PROMPTS, alone, strict=True)):
        for count, token in enumerate(tokens):
            assert next_token(model, device, prompt, tokens[:count], index) == token


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_prompt_meets_the_last_feed_forward_with_one_token(
    model: Decoder, launch: Callable[[Batch], PendingStep], alone: list[list[int]]
) -> None:
    num_rows: list[int] = []
    last = model.get_submodule(f"layers.{CONFIG.model.num_layers - 1}.feed_forward.down_proj")
    hook = last.register_forward_hook(lambda module, inputs, output: num_rows.append(len(output)))
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    script.admit(0, PROMPTS[0], SAMPLINGS[0])
    outputs = [launch(script.step(prefills=[(0, 10)])).wait(), launch(script.step(prefills=[(0, 13)])).wait()]
    outputs.append(launch(script.step(decodes=[0])).wait())
    hook.remove()
    assert num_rows[-2:] == [1, 1], "of the first chunk, which draws nothing, no row at all"
    assert [output.skips_tail for output in outputs] == [True, True, False]
    assert [token for output in outputs for token in output.token_ids.tolist()] == alone[0][:2]


def test_chunks_in_mixed_batches(launch: Callable[[Batch], PendingStep], alone: list[list[int]]) -> None:
    """Prompts cut across block borders, beside decodes of other rows and other prompts' chunks."""
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    rows = {0: 4, 1: 0, 2: 5, 3: 2}  # prompt -> row
    tokens: dict[int, list[int]] = {row: [] for row in rows.values()}
    for prompt, row in rows.items():
        script.admit(row, PROMPTS[prompt], SAMPLINGS[prompt])
    prefills = {4: [9, 3, 10, 1], 0: [1], 5: [3, 1], 2: [2, 2, 12, 1]}
    decoding: list[int] = []
    while any(len(row_tokens) < NUM_TOKENS for row_tokens in tokens.values()):
        chunks = [(row, sizes.pop(0)) for row, sizes in prefills.items() if sizes]
        active = [row for row in decoding if len(tokens[row]) < NUM_TOKENS]
        batch = script.step(decodes=active, prefills=chunks)
        scheduled = [*active, *(row for row, _ in chunks)]
        for index, token in zip(batch.sampled.tolist(), drawn(launch(batch)), strict=True):
            tokens[scheduled[index]].append(token)
        decoding += [row for row, _ in chunks if not prefills[row]]
    assert [tokens[row] for row in rows.values()] == alone


def test_steps_are_launched_before_earlier_tokens_are_read(
    launch: Callable[[Batch], PendingStep], alone: list[list[int]]
) -> None:
    """All steps are queued before any result is looked at: no value of a running row goes through the host."""
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    for row, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        script.admit(row, prompt, sampling)
    steps = [script.step(prefills=[(row, len(prompt)) for row, prompt in enumerate(PROMPTS)])]
    steps += [script.step(decodes=range(len(PROMPTS))) for _ in range(NUM_TOKENS - 1)]
    pending = [launch(step) for step in steps]
    results = [drawn(step) for step in pending]
    assert [list(tokens) for tokens in zip(*results, strict=True)] == alone


@pytest.mark.parametrize("told", [False, True], ids=["prepared anew", "told that it repeats"])
def test_a_repeated_step_is_the_same_step(
    launch: Callable[[Batch], PendingStep], alone: list[list[int]], told: bool
) -> None:
    """Rows that sample in every way, over block borders, with others coming and going between the repeats."""
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    rows = range(len(PROMPTS))
    for row in rows:
        script.admit(row, PROMPTS[row], SAMPLINGS[row])
    tokens = [[token] for token in drawn(launch(script.step(prefills=[(row, len(PROMPTS[row])) for row in rows])))]
    num_repeats = 0
    for decoding in [rows] * 5 + [[3, 1]] * 3 + [[0, 2]] * 4 + [[1, 3]] * 3 + [rows]:
        if decoding == [0, 2] and len(tokens[0]) == 7:
            script.admit(5, [3, 4], SamplingParams())
            launch(script.step(decodes=[], prefills=[(5, 1)]))
        batch = script.step(decodes=decoding)
        num_repeats += batch.repeats
        output = drawn(launch(replace(batch, repeats=batch.repeats and told)))
        for row, token in zip(decoding, output, strict=True):
            tokens[row].append(token)
    assert num_repeats == 10
    assert [len(row_tokens) for row_tokens in tokens] == [11, 13, 11, 13]
    assert [row_tokens[:11] for row_tokens in tokens] == [row_tokens[:11] for row_tokens in alone]


@pytest.mark.parametrize("told", [False, True], ids=["prepared anew", "told that it repeats"])
def test_decodes_in_order_of_length(
    launch: Callable[[Batch], PendingStep], alone: list[list[int]], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every length is a part of its own, decodes lie in another order than their batch's, alone and beside
    chunks, also where lengths come apart while the same rows go on.
    """
    monkeypatch.setattr("engine.decode_order._PART_BYTES", 0)
    parts_used: list[int] = []
    original = InputPreparation._parts

    def counted(
        self: InputPreparation, ranges: Sequence[tuple[int, int, int]], rows: Tensor, lengths: Tensor
    ) -> tuple[DecodePart, ...]:
        parts_used.append(len(ranges))
        return original(self, ranges, rows, lengths)

    monkeypatch.setattr(InputPreparation, "_parts", counted)
    launch.__self__._preparation._orders_decodes = True  # type: ignore[attr-defined]
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    rows = range(len(PROMPTS))
    for row in rows:
        script.admit(row, PROMPTS[row], SAMPLINGS[row])
    tokens = [[token] for token in drawn(launch(script.step(prefills=[(row, len(PROMPTS[row])) for row in rows])))]
    while len(tokens[0]) < NUM_TOKENS:
        chunks = [(5, 1)] if len(tokens[0]) in (4, 5) else []
        if len(tokens[0]) == 4:
            script.admit(5, [3, 4, 5], SamplingParams())
        batch = script.step(decodes=rows, prefills=chunks)
        for row, token in zip(rows, drawn(launch(replace(batch, repeats=batch.repeats and told))), strict=True):
            tokens[row].append(token)
    assert tokens == alone
    assert max(parts_used) >= 3


def test_preempted_sequence_goes_on_in_another_row(
    launch: Callable[[Batch], PendingStep], alone: list[list[int]]
) -> None:
    """Prompt and generated tokens are computed again in another row, other blocks, and the draws continue."""
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    for index, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        script.admit(0, prompt, sampling)
        tokens = drawn(launch(script.step(prefills=[(0, len(prompt))])))
        for _ in range(4):
            tokens += drawn(launch(script.step(decodes=[0])))
        script.admit(0, [9] * 30, SamplingParams())  # the row's next owner, with the freed blocks
        script.admit(3, prompt + tokens, sampling, num_prompt_tokens=len(prompt))
        length = len(prompt) + len(tokens)
        first = script.step(prefills=[(0, 30), (3, length - 1)])
        launch(first).wait()
        tokens += drawn(launch(script.step(prefills=[(3, 1)])))
        while len(tokens) < NUM_TOKENS:
            tokens += drawn(launch(script.step(decodes=[0, 3])))[1:]
        assert tokens == alone[index]


def test_block_updates_move_a_row(model: Decoder, device: torch.device, alone: list[list[int]]) -> None:
    """A table entry that changes between steps is used by the next one, and by that row alone."""
    cache = KVCache.allocate(CONFIG, NUM_BLOCKS, device)
    runner = ModelRunner(CONFIG, model, Pipeline(model, CONFIG.model.hidden_size), cache, device)
    script = BatchScript(NUM_BLOCKS // 2, CONFIG.block_size)
    script.admit(0, PROMPTS[0], SAMPLINGS[0])
    first = script.step(prefills=[(0, len(PROMPTS[0]))])
    tokens = drawn(runner.launch(first))
    moved = first.block_updates.copy()
    moved[:, 2] += NUM_BLOCKS // 2
    for old, new in zip(first.block_updates[:, 2].tolist(), moved[:, 2].tolist(), strict=True):
        for layer in range(CONFIG.model.num_layers):
            for tensor in cache.layer(layer):
                tensor[new] = tensor[old]
                tensor[old] = 0
    while len(tokens) < NUM_TOKENS:
        batch = script.step(decodes=[0])
        updates = np.concatenate([moved, batch.block_updates]) if len(tokens) == 1 else batch.block_updates
        tokens += drawn(runner.launch(replace(batch, block_updates=updates)))
    assert tokens == alone[0]


def test_output_of_a_step_that_draws_nothing(launch: Callable[[Batch], PendingStep]) -> None:
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    script.admit(0, PROMPTS[0], SAMPLINGS[3])
    output = launch(script.step(prefills=[(0, 5)])).wait()
    assert (output.step, output.token_ids.tolist(), output.logprobs) == (0, [], None)
    assert output.device_seconds > 0


def test_logprobs_stand_at_the_rows_that_asked(
    model: Decoder, device: torch.device, launch: Callable[[Batch], PendingStep], alone: list[list[int]]
) -> None:
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    script.admit(0, PROMPTS[1], SAMPLINGS[0])
    script.admit(1, PROMPTS[3], SAMPLINGS[3])
    script.admit(2, PROMPTS[3], SamplingParams(temperature=0, logprobs=0))
    batch = script.step(prefills=[(0, 1), (1, 17), (2, 17)])
    output = launch(batch).wait()
    assert output.logprobs is not None
    nothing, two, none = output.logprobs
    assert nothing is None and two is not None and none is not None
    assert len(two.top) == 2 and two.top[0][1] >= two.top[1][1]
    assert none.top == () and none.logprob == two.top[0][1] and int(output.token_ids[2]) == two.top[0][0]
    assert int(output.token_ids[1]) == alone[3][0]
    cache = KVCache.allocate(CONFIG, NUM_BLOCKS, device)
    silent = (
        ModelRunner(CONFIG, model, Pipeline(model, CONFIG.model.hidden_size), cache, device, returns_logprobs=False)
        .launch(batch)
        .wait()
    )
    assert silent.logprobs is None
    assert silent.token_ids.tolist() == output.token_ids.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_launching_does_not_wait_for_the_device(
    device: torch.device, launch: Callable[[Batch], PendingStep], alone: list[list[int]]
) -> None:
    """torch raises at any synchronisation inside a launch; the tokens are still right."""
    if device.type != "cuda":
        return
    script = BatchScript(NUM_BLOCKS, CONFIG.block_size)
    for row, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        script.admit(row, prompt, sampling)
    launch(script.step(prefills=[(row, len(prompt)) for row, prompt in enumerate(PROMPTS)])).wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [launch(script.step(decodes=range(len(PROMPTS)))) for _ in range(NUM_TOKENS - 1)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results = [drawn(step) for step in pending]
    assert [list(tokens) for tokens in zip(*results, strict=True)] == [tokens[1:] for tokens in alone]
