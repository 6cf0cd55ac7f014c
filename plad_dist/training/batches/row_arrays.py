"""Arrays of the rows of a micro-batch, which are filled row by row.

Shape suffixes: R rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class RowArrays:
    """Arrays ``[R, T]`` of token ids and bounds, and the predictors of each response.

    The fields have the meaning of those of
    :class:`~plad_dist.training.batches.micro_batch.MicroBatch`.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    # In 32 bits, because attention kernels read the bounds for every block.
    prompt_starts: NDArray[np.int32]
    prompt_ends: NDArray[np.int32]
    branch_starts: NDArray[np.int32]
    predictors: list[NDArray[np.int64]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: int, width: int, filler: int, responses: int) -> RowArrays:
        """Return rows of padding."""
        shape = (rows, width)
        return cls(
            input_ids=np.full(shape, filler, np.int64),
            position_ids=np.zeros(shape, np.int64),
            prompt_starts=np.full(shape, -1, np.int32),
            prompt_ends=np.full(shape, -1, np.int32),
            branch_starts=np.zeros(shape, np.int32),
            predictors=[np.empty(0, np.int64)] * responses,
        )
