r"""Liquidation as a first passage: probability, hazard and timing per account, from survival weights.

Per path and account the simulator gives $F_t$, the conditional probability given the path's step ends of having been
liquidated by t. Its mean over paths is the liquidation probability, and its sample variance the error: never larger
than that of counting drawn liquidations (conditional Monte Carlo, Asmussen & Glynn 2007, V.4). With step monitoring F
is 0 or 1 and the same formulas count.
"""

import numpy as np
from jaxtyping import Float

from qpo_sim.risk.moments import mean, probability
from qpo_sim.types import Array, Estimate


def liquidation_probability(total: Array, total_square: Array, n: float) -> Estimate:
    """Probability of having been liquidated from the sums of F and F^2 over n paths.

    Where every F is 0 or 1 (and so might all be 0) the Agresti-Coull error is used, which then does not read 0.
    """
    estimate = mean(total, total_square, n)
    counted = probability(total, n)
    is_count = np.abs(total - total_square) <= 1e-12 * np.maximum(total, 1.0)
    return Estimate(estimate.value, np.where(is_count, counted.std_error, estimate.std_error))


def hazard(cumulative: Float[Array, "dates ..."]) -> Float[Array, "dates ..."]:
    """Probability of being liquidated in each interval given survival until its start."""
    before = np.concatenate([np.zeros_like(cumulative[:1]), cumulative[:-1]])
    return (cumulative - before) / np.maximum(1.0 - before, 1e-300)
