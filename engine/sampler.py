"""Drawing tokens from logits: stateless, vectorised, and without a host synchronisation on a GPU.

A drawn token depends on its logits row, its parameters, its seed and its position, and on nothing else: not on the
batch, the row, the rank or what was drawn before. Order of operations (vLLM's): raw log-probabilities are kept;
logit_bias, min_tokens, penalties, temperature, top_k, top_p (of what top_k left), min_p, then Gumbel-max. Equal
logits are ordered by token id, lowest first.

Legend: K drawn rows, U of them drawn from the whole vocabulary, F filtered by top_k or top_p, P penalised; V
vocabulary; C candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gumbel import gumbel_noise
from engine.sampling_table import SamplingPlan
from engine.token_pool import TokenPool

# Logits handled at once: bounds scratch memory, and on a CPU keeps it where malloc recycles it (page faults of larger
# arrays cost more than the arithmetic).
_CPU_LOGITS = 2**20
_CUDA_LOGITS = 2**25
# Candidates tried first for a top_p without top_k on a CPU, where looking at the result costs nothing; and the factor
# by which their number grows while they are too few.
_FIRST_CANDIDATES = 64
_MORE_CANDIDATES = 32
# Neighbouring ids whose maximum is looked at first; real vocabularies are multiples of it, most of twice as many, which
# is faster where only the best is wanted.
_CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Drawn tokens [K] int64 and, for the L rows that asked: log-probability [L], best values and ids [L, n]."""

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_token_ids: Tensor | None = None


def sample(logits_KV: Tensor, plan: SamplingPlan, staged: dict[str, Tensor], pool: TokenPool) -> Drawn:
    """Draw one token per row of `logits_KV`, which may be overwritten; `staged` holds `plan.arrays`.

    All arithmetic is in float32. Rows that only ask for their best token need none, and of narrower logits no copy.
    """
    if not plan.arrays and logits_KV.dtype is not torch.float64:
        return Drawn(token_ids=best_token_ids(logits_KV))
    logits_KV = logits_KV.float()
    edited = any(name in staged for name in ("bias_index", "banned_index", "penalised_index"))
    raw_KV = logits_KV.clone() if edited and "logprobs_index" in staged else logits_KV
    _edit(logits_KV, staged)
    for part in _parts(staged, "penalised", logits_KV):
        _penalise(logits_KV, part, pool.history(part["row"], plan.history_width))
    num_random = sum(len(staged[name]) for name in ("plain_index", "filtered_index") if name in staged)
    if num_random == len(logits_KV):
        tokens_K = torch.empty(num_random, dtype=torch.int64, device=logits_KV.device)
    else:
        tokens_K = best_token_ids(logits_KV)
    for part in _parts(staged, "plain", logits_KV):
        tokens_K[part["index"]] = _draw_plain(logits_KV[part["index"]], part, plan.uses_min_p)
    for part in _parts(staged, "filtered", logits_KV):
        _draw_filtered(tokens_K, logits_KV, part, plan)
    if "logprobs_index" not in staged:
        return Drawn(token_ids=tokens_K)
    return _with_logprobs(tokens_K, raw_KV, staged, int(plan.num_top.max()))


def _parts(staged: dict[str, Tensor], section: str, logits_KV: Tensor) -> Iterator[dict[str, Tensor]]:
    """The arrays of a section of the plan, without its prefix, some rows at a time; nothing when no row needs it."""
    if f"{section}_index" not in staged:
        return
    prefix = f"{section}_"
    arrays = {name.removeprefix(prefix): array for name, array in staged.items() if name.startswith(prefix)}
    step = max(1, (_CUDA_LOGITS if logits_KV.is_cuda else _CPU_LOGITS) // logits_KV.shape[1])
    for first in range(0, len(arrays["index"]), step):
        yield {name: array[first : first + step] for name, array in arrays.items()}


def _with_logprobs(tokens_K: Tensor, raw_KV: Tensor, staged: dict[str, Tensor], num_top: int) -> Drawn:
    """The tokens with the log-probabilities of the rows that asked."""
    chosen, top_values, top_ids = [], [], []
    for part in _parts(staged, "logprobs", raw_KV):
        raw_LV = raw_KV[part["index"]]
        total_L1 = raw_LV.logsumexp(-1, keepdim=True)
        top_ids.append(top_token_ids(raw_LV, num_top))
        top_values.append(raw_LV.gather(1, top_ids[-1]) - total_L1)
        chosen.append((raw_LV.gather(1, tokens_K[part["index"], None]) - total_L1)[:, 0])
    return Drawn(
        token_ids=tokens_K,
        logprobs=torch.cat(chosen),
        top_logprobs=torch.cat(top_values),
        top_token_ids=torch.cat(top_ids),
    )


def best_token_ids(scores_RV: Tensor) -> Tensor:
    """The id of each row's largest score, of equal ones the lowest: [R] int64.

    On a CPU torch finds a maximum several times faster than its place, so the place is looked for in one chunk only;
    and faster of float32 than of anything narrower, so that is widened, which changes no order.
    """
    num_rows, vocab_size = scores_RV.shape
    if scores_RV.is_cuda or vocab_size % _CHUNK:
        return scores_RV.argmax(-1)
    step = max(1, _CPU_LOGITS // vocab_size)
    if num_rows > step:
        return torch.cat([best_token_ids(scores_RV[row : row + step]) for row in range(0, num_rows, step)])
    if scores_RV.itemsize < 4:
        scores_RV = scores_RV.float()
    chunk_size = _CHUNK if vocab_size % (2 * _CHUNK) else 2 * _CHUNK
    chunks_RNC = scores_RV.view(num_rows, -1, chunk_size)
    chunk_R = chunks_RNC.amax(-1).argmax(-1)
    best_RC = chunks_RNC[torch.arange(num_rows), chunk_R]
    return torch.add(best_RC.argmax(-1), chunk_R, alpha=chunk_size)


def top_token_ids(scores_RV: Tensor, count: int) -> Tensor:
    """The ids of the `count` best float32 scores, best first, equal scores by ascending id: [R, count] int64.

    The `count` best are in the `count` best chunks: every other chunk's best has one before it in each of those.
    """
    vocab_size = scores_RV.shape[1]
    ids_V = torch.arange(vocab_size, device=scores_RV.device)
    if vocab_size % _CHUNK or 2 * count * _CHUNK > vocab_size:
        return _ranked(scores_RV, ids_V, count)
    maxima_RN = scores_RV.view(len(scores_RV), -1, _CHUNK).amax(-1)
    chunks_RC = _ranked(maxima_RN, ids_V[: maxima_RN.shape[1]], count)
    ids_RC = (chunks_RC[:, :, None] * _CHUNK + ids_V[:_CHUNK]).flatten(1)
    return _ranked(scores_RV.gather(1, ids_RC), ids_RC, count)


def _ranked(scores_RC: Tensor, ids: Tensor, count: int) -> Tensor:
    """The `count` best of the given ids [C] or [R, C]. Score and id form one 64-bit key, so no two keys are equal and
    every device and every `count` agree on the order."""
    bits_RC = (scores_RC + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered_RC = bits_RC ^ ((bits_RC >> 31) & 0x7FFFFFFF)  # orders like the floats do
    keys_RC = ordered_RC.long().bitwise_left_shift_(32).bitwise_or_(0xFFFFFFFF - ids)
    if 8 * count < keys_RC.shape[1]:
        best = keys_RC.topk(count).values
    else:
        best = keys_RC.sort(descending=True).values[:, :count]
    return 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _edit(logits_KV: Tensor, staged: dict[str, Tensor]) -> None:
    """Apply logit biases and forbid the ids that `min_tokens` holds back."""
    if "bias_index" in staged:
        bias = staged["bias_value"].float()
        logits_KV.index_put_((staged["bias_index"], staged["bias_token"]), bias, accumulate=True)
    if "banned_index" in staged:
        nothing = logits_KV.new_full((), -torch.inf)  # a Python number would be copied from the host
        logits_KV.index_put_((staged["banned_index"], staged["banned_token"]), nothing)


def _penalise(logits_KV: Tensor, part: dict[str, Tensor], history_PN: Tensor) -> None:
    """Repetition looks at prompt and output, presence and frequency at the output only (OpenAI, vLLM).

    Only the logits of known tokens change, so the arithmetic is done per token of the history.
    """
    positions_N = torch.arange(history_PN.shape[1], device=logits_KV.device)
    known_PN = positions_N < part["position"][:, None]
    output_PN = known_PN & (positions_N >= part["prompt_length"][:, None])
    tokens_PN = torch.where(known_PN, history_PN, history_PN[:, :1])
    counts_PV = logits_KV.new_zeros(len(history_PN), logits_KV.shape[1])
    counts_PN = counts_PV.scatter_add_(1, tokens_PN, output_PN.float()).gather(1, tokens_PN)
    places = (part["index"][:, None], tokens_PN)
    logits_PN = logits_KV[places]
    repetition_P1 = part["repetition"].float()[:, None]
    logits_PN = torch.where(logits_PN > 0, logits_PN / repetition_P1, logits_PN * repetition_P1)
    logits_PN -= part["presence"].float()[:, None] * (counts_PN > 0)
    logits_PN -= part["frequency"].float()[:, None] * counts_PN
    logits_KV.index_put_(places, logits_PN)  # a token that occurs twice gets the same value twice


def _draw_plain(logits_UV: Tensor, part: dict[str, Tensor], uses_min_p: bool) -> Tensor:
    """Gumbel-max over the whole vocabulary: [U]."""
    vocabulary_V = torch.arange(logits_UV.shape[1], dtype=torch.int32, device=logits_UV.device)
    scores_UV = logits_UV.div_(part["temperature"].float()[:, None])
    if uses_min_p:
        floor_U1 = scores_UV.amax(-1, keepdim=True) + part["min_p"].float().log()[:, None]
        scores_UV.masked_fill_(scores_UV < floor_U1, -torch.inf)
    return best_token_ids(scores_UV.add_(gumbel_noise(part["seed"], part["position"], vocabulary_V)))


def _draw_filtered(tokens_K: Tensor, logits_KV: Tensor, part: dict[str, Tensor], plan: SamplingPlan) -> None:
    """Gumbel-max over the best tokens. Without a top_k the number that top_p needs is known only on the device: a
    CPU looks and widens for the rows that need it, a GPU orders the whole vocabulary rather than wait for itself."""
    vocab_size = logits_KV.shape[1]
    if plan.all_top_k:
        width = plan.max_top_k
    elif logits_KV.is_cuda:
        width = vocab_size
    else:
        width = min(vocab_size, max(plan.max_top_k, _FIRST_CANDIDATES))
    while True:
        tokens_F, complete_F = _draw_from_best(logits_KV[part["index"]], part, width, plan.all_top_k)
        tokens_K[part["index"]] = tokens_F
        if plan.all_top_k or width == vocab_size or bool(complete_F.all()):
            return
        part = {name: array[~complete_F] for name, array in part.items()}
        width = min(vocab_size, _MORE_CANDIDATES * width)


def _draw_from_best(logits_FV: Tensor, part: dict[str, Tensor], width: int, all_top_k: bool) -> tuple[Tensor, Tensor]:
    """Draw among the `width` best tokens of each row; also whether those cover what the row's filters keep, [F].

    Sums are float64, so that they do not depend on how a device orders them.
    """
    ids_FC = top_token_ids(logits_FV, width)
    temperature_F1 = part["temperature"].float()[:, None]
    scores_FC = logits_FV.gather(1, ids_FC) / temperature_F1
    top_k_F1 = part["top_k"][:, None]
    in_top_k_FC = (torch.arange(width, device=ids_FC.device) < top_k_F1) | (top_k_F1 == 0)
    relative_FC = (scores_FC - scores_FC[:, :1]).double().exp() * in_top_k_FC  # to the best token's probability
    total_F1 = relative_FC.sum(-1, keepdim=True)
    if not all_top_k:
        all_F1 = (logits_FV / temperature_F1 - scores_FC[:, :1]).exp_().sum(-1, keepdim=True, dtype=torch.float64)
        total_F1 = torch.where(top_k_F1 == 0, all_F1, total_F1)
    cumulative_FC = relative_FC.cumsum(-1)
    mass_F1 = part["top_p"][:, None] * total_F1
    kept_FC = in_top_k_FC & (cumulative_FC - relative_FC < mass_F1) & (relative_FC >= part["min_p"][:, None])
    noise_FC = gumbel_noise(part["seed"], part["position"], ids_FC)
    best_F1 = torch.where(kept_FC, scores_FC + noise_FC, -torch.inf).argmax(-1, keepdim=True)
    complete_F1 = (top_k_F1 > 0) | (cumulative_FC[:, -1:] >= mass_F1)
    return ids_FC.gather(1, best_F1)[:, 0], complete_F1[:, 0]
