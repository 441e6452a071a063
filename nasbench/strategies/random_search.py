"""Random search: the baseline that every other strategy must beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.strategies.base import Strategy


class RandomSearch(Strategy):
    """Uniform random architectures, distinct within a batch; learns nothing."""

    def ask(self, n: int) -> Proposals:
        return self._proposals(self._untaught(n))

    def tell(
        self,
        proposals: Proposals,
        values: NDArray[np.float64],
        violations: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> None:
        pass
