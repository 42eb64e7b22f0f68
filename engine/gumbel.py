"""Gumbel noise from a counter: a pure function of (request seed, position, token id), with no generator state.

Each row's (seed, position) is mixed to 64 key bits by the finaliser of SplitMix64 (Steele, Lea, Flood 2014). Per
token, `id * 0x9E3779B9 + low key` goes through the 32-bit multiply-xorshift hash "lowbias32" (C. Wellons, hash
prospector; measured avalanche bias 0.17) with the high key mixed in between its two rounds. 31 bits of the result
give v in (0, 1) with full relative precision near 0, and -log(-log(1 - v)) is Gumbel(0, 1): the token with the
largest logit + noise is a draw from the softmax (Gumbel-max). All integer arithmetic wraps modulo 2^32 or 2^64.
"""

import torch
from torch import Tensor


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant."""
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
_SPLITMIX_1 = _signed(0xBF58476D1CE4E5B9, 64)
_SPLITMIX_2 = _signed(0x94D049BB133111EB, 64)
_GOLDEN_32 = _signed(0x9E3779B9, 32)
_LOWBIAS_1 = _signed(0x7FEB352D, 32)
_LOWBIAS_2 = _signed(0x846CA68B, 32)


def _mix_64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; the masks make torch's arithmetic shifts logical ones."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _SPLITMIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SPLITMIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _xor_shifted(x: Tensor, shift: int, scratch: Tensor) -> None:
    """x ^= x >>> shift, in place."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    scratch &= (1 << (32 - shift)) - 1
    x ^= scratch


def hash_bits(seeds_R: Tensor, positions_R: Tensor, token_ids: Tensor) -> Tensor:
    """31 random bits per (row, token), [R, V] int32; `token_ids` is [V] or [R, V]."""
    keys_R = _mix_64(_mix_64(seeds_R) + positions_R * _GOLDEN_64)
    low_R1 = keys_R.to(torch.int32)[:, None]
    high_R1 = (keys_R >> 32).to(torch.int32)[:, None]
    bits_RV = token_ids.to(torch.int32) * _GOLDEN_32 + low_R1
    scratch_RV = torch.empty_like(bits_RV)
    _xor_shifted(bits_RV, 16, scratch_RV)
    bits_RV *= _LOWBIAS_1
    _xor_shifted(bits_RV, 15, scratch_RV)
    bits_RV ^= high_R1
    bits_RV *= _LOWBIAS_2
    _xor_shifted(bits_RV, 16, scratch_RV)
    bits_RV &= 0x7FFFFFFF
    return bits_RV


def gumbel_noise(seeds_R: Tensor, positions_R: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel(0, 1) noise per (row, token), [R, V] float32; always finite. `token_ids` is [V] or [R, V]."""
    noise_RV = hash_bits(seeds_R, positions_R, token_ids).float()
    noise_RV += 0.5
    noise_RV *= 2.0**-31
    noise_RV.clamp_(max=1 - 2.0**-24)  # float32 rounds the last values to 1
    return noise_RV.neg_().log1p_().neg_().log_().neg_()
