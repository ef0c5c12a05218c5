"""A logits processor that breaks, for requests that ask for it. The core imports this file."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from footplate.backend.logits.processor import LogitsProcessor


class Broken(LogitsProcessor):
    """From the fourth token on makes rows what its request names, or raises."""

    def __call__(self, output_token_ids: Sequence[int], logits: npt.NDArray[np.float32]) -> None:
        if len(output_token_ids) < 3:
            return
        if self.arguments["how"] == "raise":
            raise ValueError("this processor is broken")
        logits[:] = np.float32(self.arguments["how"])
