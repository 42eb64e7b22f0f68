"""Models computed by the kernels of a GPU draw the tokens that plain torch draws."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from engine.gpu_model import unsupported, use_gpu_kernels
from engine.kv_cache import KVCache
from engine.model_config import Architecture, DType
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.operation import Operation, TokenKind
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.rank_agreement import RankAgreement
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.step_parts import StepParts
from engine.request import SamplingParams
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from tests.engine.gpu_case import DEVICE, GREEDY, NUM_TOKENS, answers, config_of, random_model, runner_of

pytest.importorskip("triton")

SAMPLED = [
    SamplingParams(seed=1),
    GREEDY,
    SamplingParams(seed=2, top_p=0.9, top_k=20),
    SamplingParams(seed=3, temperature=0.7, min_p=0.05),
]
# Penalties and log-probabilities are not for the kernels.
EDITED = [GREEDY, SamplingParams(seed=4, repetition_penalty=1.3), SamplingParams(temperature=0, logprobs=2), GREEDY]


def tokens_of(runner: ModelRunner, architecture: Architecture, samplings: list[SamplingParams]) -> list[list[int]]:
    return answers(config_of(architecture), lambda batch: runner.launch(batch).wait(), samplings)


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture.MISTRAL,
        Architecture.QWEN3,
        pytest.param(Architecture.LLAMA, marks=pytest.mark.slow),
        pytest.param(Architecture.MIXTRAL, marks=pytest.mark.slow),
        pytest.param(Architecture.QWEN2, marks=pytest.mark.slow),
        pytest.param(Architecture.QWEN3_MOE, marks=pytest.mark.slow),
    ],
)
def test_every_architecture_draws_the_same_tokens(architecture: Architecture) -> None:
    config = config_of(architecture)
    plain, kernels = (runner_of(config, kernels=kernels) for kernels in (False, True))
    expected = tokens_of(plain, architecture, [GREEDY] * 4)
    assert [len(row) for row in expected] == [NUM_TOKENS] * 4 and len({tuple(row) for row in expected}) == 4
    assert tokens_of(kernels, architecture, [GREEDY] * 4) == expected


@pytest.mark.parametrize("samplings", [SAMPLED, EDITED], ids=["sampled", "edited"])
def test_tokens_are_drawn_as_by_the_sampler(samplings: list[SamplingParams]) -> None:
    config = config_of(Architecture.LLAMA)
    plain, kernels = (runner_of(config, kernels=kernels) for kernels in (False, True))
    drawn: list[int] = []
    draw = kernels._model.lm_head.draw
    assert draw is not None

    def counted(*arguments: object) -> torch.Tensor:
        tokens = draw(*arguments)
        drawn.append(len(tokens))
        return tokens

    kernels._model.lm_head.draw = counted
    assert tokens_of(kernels, Architecture.LLAMA, samplings) == tokens_of(plain, Architecture.LLAMA, samplings)
    assert (sum(drawn) == 4 * NUM_TOKENS) == (samplings is SAMPLED)


def test_nano_batches_draw_the_same_tokens() -> None:
    """Two ranges of every step, with plans of their own for decodes, and chunks that the border runs through."""
    config = config_of(Architecture.LLAMA)
    plain, kernels = (runner_of(config, kernels=kernels) for kernels in (False, True))
    half = NanoBatch(num_decodes=4, num_prefills=8)
    schedule = split_schedule(kernels.pipeline.graph, Cut(nano_batches=(half, half)))
    kernels.use(PlanChoice(schedule), overlaps=False)
    assert tokens_of(kernels, Architecture.LLAMA, [GREEDY] * 4) == tokens_of(plain, Architecture.LLAMA, [GREEDY] * 4)


def test_parts_of_a_step_have_their_chunks_on_the_device() -> None:
    """As the host's integers say, wherever a part begins and ends."""
    sizes, lengths, num_decodes = (5, 1, 7, 3), (9, 1, 20, 3), 3
    num_tokens = num_decodes + sum(sizes)
    cut = Cut(nano_batches=(NanoBatch(num_decodes=num_decodes, num_prefills=sum(sizes)),))
    nothing = torch.zeros(num_tokens, dtype=torch.int64)
    step = StepInputs(
        tokens=nothing,
        positions=nothing,
        slots=nothing,
        decode_block_tables=nothing[:num_decodes, None],
        decode_lengths=nothing[:num_decodes],
        prefill_block_tables=nothing[: len(sizes), None],
        num_decodes=num_decodes,
        max_decode_length=0,
        prefill_chunk_sizes=sizes,
        prefill_context_lengths=lengths,
        kv_cache=KVCache(num_layers=0, num_blocks=0, num_kv_heads=1, block_size=16, head_dim=16, dtype=torch.float32),
        prefill_starts=torch.tensor((0, *accumulate(sizes))),
        prefill_lengths=torch.tensor(lengths),
    )
    parts = StepParts(step, cut)
    for start in range(num_tokens):
        for stop in range(start + 1, num_tokens + 1):
            part = parts.part(start, stop, TokenKind.PREFILL)
            if not part.prefill_chunk_sizes:
                assert part.prefill_starts is None
                continue
            assert part.prefill_starts is not None and part.prefill_lengths is not None
            assert part.prefill_starts.diff().tolist() == list(part.prefill_chunk_sizes) and part.prefill_starts[0] == 0
            assert part.prefill_lengths.tolist() == list(part.prefill_context_lengths)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": DType.FLOAT64}, "compute in float32, bfloat16, float16, not in float64"),
        ({"block_size": 8}, "blocks of 16, 32, 64, 128 tokens, not of 8"),
        ({"head_dim": 24}, "heads of 16, 32, 64, 128, 256 elements, not of 24"),
        ({"hidden_size": 65552}, "hidden states of at most 65536 elements, not of 65552"),
        ({"num_experts": 513}, "at most 512 experts, not to 513"),
        ({"moe_intermediate_size": 50}, "rows of a multiple of 16 bytes, not of 50 elements"),
    ],
)
def test_what_kernels_cannot_do_stays_with_plain_torch(changes: dict[str, object], words: str) -> None:
    config = config_of(Architecture.MIXTRAL)
    assert unsupported(config) is None
    of_model = {name: value for name, value in changes.items() if hasattr(config.model, name) and name != "dtype"}
    of_engine = {name: value for name, value in changes.items() if name not in of_model}
    config = replace(config, model=replace(config.model, **of_model), **of_engine)  # type: ignore[arg-type]
    assert words in (unsupported(config) or "")


def test_a_model_that_kernels_cannot_compute_is_left_as_it_was() -> None:
    config = replace(config_of(Architecture.LLAMA), block_size=4)
    model = build_model(config.model, TensorParallel(), torch.float32, DEVICE)
    told: list[str] = []
    assert not use_gpu_kernels(model, config, DEVICE, told.append)
    assert len(told) == 1 and "plain torch" in told[0] and "not of 4" in told[0]
    assert not any("forward" in vars(module) for module in model.modules()) and model.lm_head.draw is None


def test_without_triton_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = config_of(Architecture.LLAMA)
    model = build_model(config.model, TensorParallel(), torch.float32, DEVICE)
    told: list[str] = []
    assert not use_gpu_kernels(model, config, DEVICE, told.append)
    assert told == ["layers are computed by plain torch and no step becomes a CUDA graph: Triton is not installed"]
    assert model.lm_head.draw is None


@pytest.mark.parametrize(("is_able", "others_are"), [(True, True), (True, False), (False, True)])
def test_kernels_compute_on_every_rank_of_a_group_or_on_none(
    is_able: bool, others_are: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(Architecture.LLAMA)
    model = random_model(config, kernels=False)
    told: list[str] = []
    monkeypatch.setattr("engine.gpu_model.refusal", lambda *_: None if is_able else "Triton is not installed")
    ranks = RankAgreement(TensorParallel(rank=1, size=2), DEVICE)
    monkeypatch.setattr(ranks, "smallest", lambda numbers: [min(number, others_are) for number in numbers])
    assert use_gpu_kernels(model, config, DEVICE, told.append, ranks) is (is_able and others_are)
    assert any(module.is_computed_elsewhere for module in model.modules() if isinstance(module, Operation)) is (
        is_able and others_are
    )
    reasons = "".join(told)
    assert ("another rank cannot compute by kernels" in reasons) is (is_able and not others_are)
    assert ("Triton is not installed" in reasons) is not is_able
    assert ("This rank cannot compute by kernels" in caplog.text) is not is_able
