import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.expert_routing import ExpertRouting, route


def assert_sorted_stably(routing: ExpertRouting, num_tokens: int) -> None:
    """Places, starts and order follow from the experts alone, as a stable sort on the host would have them."""
    experts = routing.experts.cpu()
    assert bool((experts[num_tokens:] == -1).all())
    sorted_experts, order = experts[:num_tokens].flatten().sort(stable=True)
    torch.testing.assert_close(routing.order.cpu()[: len(order)].long(), order)
    starts = torch.searchsorted(sorted_experts, torch.arange(routing.num_experts + 1, dtype=torch.int32))
    torch.testing.assert_close(routing.starts.cpu().long(), starts)


def distinct_logits(num_tokens: int, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Logits of which no two of a token are equal in any type: what is chosen is then not a matter of ties."""
    ranks = torch.stack([torch.randperm(num_experts) for _ in range(num_tokens)])
    return (ranks.float() / 16 - 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_choices"),
    [(1, 8, 2), (33, 8, 2), pytest.param(70, 60, 4, marks=pytest.mark.slow), (40, 128, 8), (7, 3, 3), (5, 1, 1)],
)
def test_routes_as_the_layer_does(
    num_tokens: int, num_experts: int, num_choices: int, normalise: bool, dtype: torch.dtype, device: torch.device
) -> None:
    logits = distinct_logits(num_tokens, num_experts, dtype).to(device)
    routing = route(logits, num_choices, normalise=normalise, round_scores=False)
    scores, experts = torch.softmax(logits, -1, dtype=torch.float32).topk(num_choices)
    if normalise:
        scores = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.experts.long(), experts)
    torch.testing.assert_close(routing.scores, scores, rtol=3e-6, atol=1e-7)
    assert_sorted_stably(routing, num_tokens)
    rounded = route(logits, num_choices, normalise=normalise, round_scores=True)
    assert rounded.scores.dtype is dtype
    torch.testing.assert_close(rounded.scores.float(), scores, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("num_tokens", [0, 1, 32, 45, 50])
def test_padded_tokens_get_no_place(num_tokens: int, device: torch.device) -> None:
    logits = torch.randn(50, 6, device=device)
    logits[num_tokens:] = float("nan")
    positions_T = torch.where(torch.arange(50, device=device) < num_tokens, 7, -1)
    routing = route(logits, 2, normalise=True, round_scores=False, positions_T=positions_T)
    assert_sorted_stably(routing, num_tokens)
    assert int(routing.starts[-1]) == 2 * num_tokens


def test_all_tokens_on_one_expert_and_every_other_one_empty(device: torch.device) -> None:
    logits = torch.zeros(100, 9, device=device)
    logits[:, 4] = 5
    routing = route(logits, 1, normalise=True, round_scores=False)
    assert routing.starts.tolist() == [0] * 5 + [100] * 5
    assert routing.order.tolist() == list(range(100))
    assert routing.scores.flatten().tolist() == [1.0] * 100


def test_equal_logits_choose_the_first_experts(device: torch.device) -> None:
    routing = route(torch.zeros(40, 10, device=device), 3, normalise=True, round_scores=False)
    assert routing.experts.tolist() == [[0, 1, 2]] * 40
    assert_sorted_stably(routing, 40)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_overflowed_is_routed_somewhere_and_harms_no_other(value: float, device: torch.device) -> None:
    logits = torch.randn(34, 8, device=device)
    whole = route(logits, 2, normalise=True, round_scores=False)
    logits[5] = value
    routing = route(logits, 2, normalise=True, round_scores=False)
    assert sorted(set(routing.experts[5].tolist())) == routing.experts[5].tolist()
    assert_sorted_stably(routing, 34)
    others = [token for token in range(34) if token != 5]
    assert torch.equal(routing.experts[others], whole.experts[others])
    assert torch.equal(routing.scores[others], whole.scores[others])


def test_no_tokens_are_no_copies(device: torch.device) -> None:
    routing = route(torch.empty(0, 4, device=device), 2, normalise=True, round_scores=False)
    assert routing.starts.tolist() == [0] * 5
    assert routing.order.numel() == 0


def test_what_cannot_be_routed_is_refused(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="5 of 4 experts"):
        route(torch.zeros(3, 4, device=device), 5, normalise=True, round_scores=False)
    with pytest.raises(ConfigError, match="float64"):
        route(torch.zeros(3, 4, device=device).double(), 2, normalise=True, round_scores=False)
    with pytest.raises(ConfigError, match="positions_T"):
        two = torch.zeros(2, dtype=torch.int32, device=device)
        route(torch.zeros(3, 4, device=device), 2, normalise=True, round_scores=False, positions_T=two)
