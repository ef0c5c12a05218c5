"""A custom logits processor, which engine cores of the tests import."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class PositionBias:
    """Adds to the logits of every `period`-th token: other ones at every position."""

    def __init__(self, arguments: dict[str, Any], prompt: Sequence[int], vocab_size: int) -> None:
        self.period, self.amount = arguments["period"], np.float32(arguments["amount"])
        self.start = len(prompt)

    def __call__(self, output: Sequence[int], logits: npt.NDArray[np.float32]) -> None:
        logits[(self.start + len(output)) % self.period :: self.period] += self.amount
