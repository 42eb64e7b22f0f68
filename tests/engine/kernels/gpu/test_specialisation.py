"""A step of any number of tokens runs kernels that exist: compiling one takes a second, in the middle of serving.

Triton makes another kernel of a function for an integer that is 1 or a multiple of 16 and for a pointer that is one.
Sizes of a model may decide that, and rows of activations are multiples of 16 bytes; how many tokens there are, and
where a slice of positions or lengths begins, may not.
"""

import pytest
import torch

from engine.kernels.gpu.activation import silu_mul, silu_mul_fp8
from engine.kernels.gpu.all_reduce_add import add_partials
from engine.kernels.gpu.decode_attention import decode_attention
from engine.kernels.gpu.decode_config import decode_config
from engine.kernels.gpu.decode_plan import DecodeScratch
from engine.kernels.gpu.embedding import embedding
from engine.kernels.gpu.gemm import gemm
from engine.kernels.gpu.gemm_config import CANDIDATES
from engine.kernels.gpu.mixture_of_experts import mixture_of_experts
from engine.kernels.gpu.norm import add_rms_norm, rms_norm_fp8
from engine.kernels.gpu.prefill_attention import prefill_attention
from engine.kernels.gpu.quantise import quantise_rows
from engine.kernels.gpu.rotary import rotate_and_write
from engine.kernels.gpu.sampling import best_tokens, draw_tokens
from engine.kernels.gpu.scaled_gemm import scaled_gemm
from tests.engine.kernels.gpu.sm90 import Sm90Compiler

TOKENS = (1, 16, 17, 34)
HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 256, 4, 2, 64


def rows(num_rows: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Behind a row that is not given, as a slice of a step would be."""
    return torch.zeros(num_rows + 1, *shape, dtype=dtype)[1:]


def activations() -> None:
    weight_E, weight_FE = torch.zeros(HIDDEN).bfloat16(), torch.zeros(64, HIDDEN).bfloat16()
    eighth_FE, scales_F = torch.zeros(64, HIDDEN, dtype=torch.float8_e4m3fn), torch.zeros(64)
    for num_tokens in TOKENS:
        hidden_TE, scales_T = rows(num_tokens, HIDDEN), rows(num_tokens, dtype=torch.float32)
        eighth_TE = rows(num_tokens, HIDDEN, dtype=torch.float8_e4m3fn)
        embedding(rows(num_tokens, dtype=torch.int64), weight_FE, first_row=num_tokens)
        add_rms_norm(hidden_TE, hidden_TE.clone(), weight_E, 1e-5)
        rms_norm_fp8(hidden_TE, weight_E, 1e-5, eighth_TE, scales_T)
        quantise_rows(hidden_TE, eighth_TE, scales_T)
        silu_mul(hidden_TE)
        silu_mul_fp8(hidden_TE, rows(num_tokens, HIDDEN // 2, dtype=torch.float8_e4m3fn), scales_T)
        add_partials([hidden_TE, hidden_TE])
        gemm(hidden_TE, weight_FE, num_sms=100, config=CANDIDATES[0])
        scaled_gemm(eighth_TE, scales_T, eighth_FE, scales_F, num_sms=100, config=CANDIDATES[0])


def attention() -> None:
    keys = torch.zeros(8, NUM_KV_HEADS, 16, HEAD_DIM).bfloat16()
    config = decode_config(head_dim=HEAD_DIM, group_size=2, cache_bytes=2, query_bytes=2, num_ctas=100)
    for num_tokens in TOKENS:
        width = 1 + num_tokens // 2
        query_THd = rows(num_tokens, NUM_HEADS, HEAD_DIM)
        integers_T = rows(num_tokens, dtype=torch.int32)
        tables_TB = rows(num_tokens, width, dtype=torch.int32)
        scratch = DecodeScratch.allocate(
            max_rows=num_tokens,
            max_blocks=width,
            block_size=16,
            group_size=2,
            head_dim=HEAD_DIM,
            max_ctas=100,
            tile=config.tile,
            device="cpu",
        )
        rotate_and_write(
            rows(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM),
            integers_T,
            integers_T,
            keys[:num_tokens],
            keys[:num_tokens],
            torch.zeros(num_tokens, HEAD_DIM),
            num_heads=NUM_HEADS,
        )
        decode_attention(query_THd, keys, keys, tables_TB, integers_T, scale=1.0, num_ctas=100, scratch=scratch)
        starts_T1 = rows(num_tokens + 1, dtype=torch.int32)
        prefill_attention(query_THd, keys, keys, tables_TB, starts_T1, integers_T, scale=1.0, window=num_tokens)


def experts() -> None:
    gate_up_XOE, down_XEF = torch.zeros(8, 128, HIDDEN).bfloat16(), torch.zeros(8, HIDDEN, 64).bfloat16()
    for num_tokens in (1, 16, 17, 340):
        mixture_of_experts(
            rows(num_tokens, HIDDEN),
            rows(num_tokens, 8),
            gate_up_XOE,
            down_XEF,
            2,
            normalise=True,
            round_scores=True,
            num_sms=100,
            positions_T=rows(num_tokens, dtype=torch.int64),
        )


def draws() -> None:
    for num_tokens in (*TOKENS, 600, 1100):
        logits_KV = torch.zeros(1, 131072).expand(num_tokens, -1)
        integers_K, floats_K = rows(num_tokens, dtype=torch.int64), rows(num_tokens, dtype=torch.float64)
        best_tokens(logits_KV, rows(num_tokens, dtype=torch.int64))
        draw_tokens(logits_KV, integers_K, integers_K, floats_K, top_k_K=integers_K, top_p_K=floats_K, min_p_K=floats_K)


@pytest.mark.parametrize(
    ("step", "most"),
    # As many as one number of tokens has.
    [(activations, 9), (attention, 5), (experts, 5), (draws, 4)],
)
def test_the_number_of_tokens_makes_no_other_kernel(step: object, most: int, sm90: Sm90Compiler) -> None:
    assert callable(step)
    variants = sm90.variants(step)
    found = sorted(variant[:2000] for variant in set(variants))
    assert len(found) <= most, "\n".join(found)
