"""`TokenPool`: the device's tables of token ids and block ids, one row per running sequence.

The host names (row, position); the values stay here, so a step can be launched before the tokens that the previous
one drew have reached the host (mini-sglang's scheme). It does not know which rows are in use.
"""

import torch
from torch import Tensor


class TokenPool:
    """`tokens` [max_sequences, max_model_len + 1] int32 and `block_tables` [max_sequences, max_blocks] int64.

    The last column takes the token drawn from a full sequence. Rows are overwritten by the next admission, never
    cleared: nothing reads beyond a row's length.
    """

    def __init__(
        self, *, max_sequences: int, max_model_len: int, max_blocks_per_sequence: int, device: torch.device
    ) -> None:
        self.tokens = torch.zeros(max_sequences, max_model_len + 1, dtype=torch.int32, device=device)
        # As wide as what reads it wants; the tokens, a block's times as many, are not.
        self.block_tables = torch.zeros(max_sequences, max_blocks_per_sequence, dtype=torch.int64, device=device)
        self._no_tables = self.block_tables.new_empty(0, 0)

    def write_tokens(self, rows_N: Tensor, positions_N: Tensor, tokens_N: Tensor) -> None:
        """Set the tokens at the (row, position) pairs."""
        self.tokens[rows_N, positions_N] = tokens_N.to(torch.int32)

    def read_tokens(self, rows_N: Tensor, positions_N: Tensor) -> Tensor:
        """The tokens [N] int64 at the (row, position) pairs."""
        return self.tokens[rows_N, positions_N].long()

    def history(self, rows_N: Tensor, width: int) -> Tensor:
        """The first `width` tokens of each row, [N, width] int64; beyond a row's length they mean nothing."""
        return self.tokens[:, :width].index_select(0, rows_N).long()

    def write_blocks(self, rows_U: Tensor, indices_U: Tensor, blocks_U: Tensor) -> None:
        """Set entries of the rows' block tables."""
        self.block_tables[rows_U, indices_U] = blocks_U

    def tables(self, rows_N: Tensor, width: int) -> Tensor:
        """The first `width` block ids of each row, [N, width] int64; only no rows have a width of 0."""
        return self.block_tables[:, :width].index_select(0, rows_N) if width else self._no_tables

    def slots(self, rows_T: Tensor, indices_T: Tensor, offsets_T: Tensor, block_size: int) -> Tensor:
        """Where keys and values are kept: (id of the row's block at the index) * block size + offset, [T] int64."""
        return torch.add(offsets_T, self.block_tables[rows_T, indices_T], alpha=block_size)
