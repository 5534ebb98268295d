"""A tokenised document, and what makes one of its tokens a target."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

IGNORE: Final = -100
"""Label of a token that is not a target (the Hugging Face convention; the loss shifts)."""


class Document(NamedTuple):
    """ids: int32[n]. labels: int32[n], the token's own id where it is a target, else IGNORE.

    Wider integers only before they have been checked.
    """

    ids: npt.NDArray[np.signedinteger]
    labels: npt.NDArray[np.signedinteger]

    @property
    def targets(self) -> int:
        """Targets that a token before them can predict: the first token has none."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))
