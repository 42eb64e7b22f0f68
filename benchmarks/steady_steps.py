"""`SteadySteps`: batches of a constant shape, as a loaded engine composes them, without an engine.

A fixed set of rows decodes, one token a step, over a context that was never computed: zeros, which take as long. The
rest of every batch is prefill of prompts that are admitted anew in each step. Rows keep their blocks. The same steps
go to every rank.
"""

import numpy as np

from engine.batch import Admission, Batch
from engine.config import EngineConfig
from engine.request import SamplingParams


class SteadySteps:
    """Batches of `num_decodes` sequences with about `context` tokens each, and `num_prefills` tokens of new prompts."""

    def __init__(self, config: EngineConfig, num_decodes: int, num_prefills: int, context: int) -> None:
        prompt = config.max_model_len // 2
        sizes = [prompt] * (num_prefills // prompt) + [num_prefills % prompt] * bool(num_prefills % prompt)
        self._prompts = dict(enumerate(sizes, num_decodes))
        self._context = min(context, prompt)
        self._num_decodes = num_decodes
        self._vocab_size = config.model.vocab_size
        self._generator = np.random.default_rng(0)
        width = config.max_blocks_per_sequence
        rows = np.repeat(np.arange(num_decodes + len(sizes)), width)
        columns = np.tile(np.arange(width), num_decodes + len(sizes))
        self._updates = np.stack([rows, columns, np.arange(len(rows))], axis=1).astype(np.int32)
        self._step = 0
        self.num_blocks = len(rows)

    def next(self) -> Batch:
        """The next step."""
        decodes = np.arange(self._num_decodes)
        prefills = np.array(list(self._prompts), dtype=np.int64)
        starts = np.concatenate([np.full(len(decodes), self._context), np.zeros(len(prefills), dtype=np.int64)])
        counts = np.concatenate(
            [np.ones(len(decodes), dtype=np.int64), np.array(list(self._prompts.values()), np.int64)]
        )
        admitted = self._prompts
        if self._step == 0:
            admitted = dict.fromkeys(range(self._num_decodes), self._context + 1) | self._prompts
        batch = self._batch(admitted, np.concatenate([decodes, prefills]), starts, counts, len(decodes))
        self._context += 1
        return batch

    def _batch(
        self,
        admitted: dict[int, int],
        rows: "np.typing.NDArray[np.int64]",
        starts: "np.typing.NDArray[np.int64]",
        counts: "np.typing.NDArray[np.int64]",
        num_decodes: int,
    ) -> Batch:
        admissions = tuple(
            Admission(
                row=row,
                token_ids=self._generator.integers(0, self._vocab_size, size).astype(np.int32),
                num_prompt_tokens=size,
                sampling=SamplingParams(max_tokens=1, temperature=0.0),
            )
            for row, size in admitted.items()
        )
        updates = self._updates[np.isin(self._updates[:, 0], list(admitted))]
        self._step += 1
        return Batch(
            step=self._step,
            admissions=admissions,
            block_updates=updates,
            rows=rows.astype(np.int32),
            starts=starts.astype(np.int32),
            counts=counts.astype(np.int32),
            num_decodes=num_decodes,
            sampled=np.arange(len(rows), dtype=np.int32),
        )
