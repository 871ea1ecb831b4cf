r"""Liquidation-at-Risk: the margin or collateral at which an account is liquidated with a given probability.

The margin m solves $P(\text{liquidated within the horizon}; m) = x$ on one set of paths (common random numbers), on
which P falls continuously in m. Its error follows from that of P by the delta method, $\mathrm{se}(m) =
\mathrm{se}(P) / |P'(m)|$.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from qpo_sim.errors import InputError
from qpo_sim.types import Estimate

# Multiples of the present margin between which the answer is sought, by doubling.
_REACH = 2.0**12
# Relative half-width of the difference that gives the slope.
_SLOPE_STEP = 0.02


class MarginNeeded(NamedTuple):
    """Multiple of the present margin that is needed; NaN where no multiple within reach does.

    `slope` is the derivative of the probability in the multiple there.
    """

    multiple: Estimate
    slope: float


def margin_needed(
    probability: Callable[[float], Estimate], level: float, *, tolerance: float = 1e-4, place: str = "level"
) -> MarginNeeded:
    """Multiple of the margin at which the probability of liquidation is `level`, by bracketing and bisection.

    Args:
      probability: of liquidation when the margin is multiplied by its argument (> 0), with its standard error; falling,
        on the same paths for every argument.
      level: wanted probability, in (0, 1).
      tolerance: relative accuracy of the multiple.
      place: what the level is called in messages.

    Raises:
      InputError: the level is no probability.
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"{place} is {level}; it must be a probability between 0 and 1, such as 0.01.")

    def excess(multiple: float) -> float:
        return float(probability(multiple).value) - level

    low = high = 1.0
    if excess(1.0) > 0.0:
        while excess(high) > 0.0:
            low, high = high, 2.0 * high
            if high > _REACH:
                return MarginNeeded(Estimate(math.nan, math.nan), math.nan)
    else:
        while excess(low) <= 0.0:
            low, high = 0.5 * low, low
            if low < 1.0 / _REACH:
                return MarginNeeded(Estimate(math.nan, math.nan), math.nan)
    while high > low * (1.0 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    multiple = math.sqrt(low * high)
    here, step = probability(multiple), _SLOPE_STEP * multiple
    rise = float(probability(multiple + step).value) - float(probability(multiple - step).value)
    slope = rise / (2.0 * step)
    error = float(here.std_error) / -slope if slope < 0.0 else math.nan
    return MarginNeeded(Estimate(multiple, error), slope)
