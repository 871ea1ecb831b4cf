r"""Interest of lending protocols: rate curves and how rates accrue. Rates are simple rates per year.

The two-slope curve of Aave, $r = b + s_1 U/U^*$ for $U \le U^*$, else $b + s_1 + s_2 (U - U^*)/(1 - U^*)$, and the rate
of its suppliers are `kinked_rate` and `supplied_rate` of the market's borrow rates, offered here under the same names.
Sources: aave-v3-origin, DefaultReserveInterestRateStrategyV2 and MathUtils; compound-finance/comet, Comet.sol;
morpho-org/morpho-blue-irm, AdaptiveCurveIrm.sol, and morpho-blue, MathLib.sol.
"""

import jax.numpy as jnp

from qpo_sim.market.side.borrow_rate import kinked_rate, supplied_rate
from qpo_sim.types import Array

__all__ = [
    "adaptive_curve_rate",
    "adapted_rate_at_target",
    "annual_yield",
    "binomial_growth",
    "compound_growth",
    "continuous_growth",
    "kinked_rate",
    "linear_growth",
    "mean_adaptive_rate",
    "per_unit_rate",
    "supplied_rate",
    "supply_rate",
    "taylor_growth",
    "utilisation",
]

SECONDS_PER_YEAR = 365.0 * 86_400.0


def utilisation(debt: Array, cash: Array) -> Array:
    """Debt over debt plus cash; 0 for an empty pool."""
    whole = debt + cash
    return jnp.where(whole > 0.0, debt / jnp.where(whole > 0.0, whole, 1.0), 0.0)


def supply_rate(
    borrow_rate: Array,
    debt: Array,
    cash: Array,
    *,
    reserve_factor: Array,
    unbacked: Array = 0.0,
    deficit: Array = 0.0,
) -> Array:
    """Rate of Aave's suppliers, r_b debt / (cash + debt + unbacked + deficit) (1 - RF).

    Args:
      borrow_rate: of the pool.
      debt: owed to the pool.
      cash: not lent out.
      reserve_factor: share of interest that suppliers do not get.
      unbacked: supply without assets behind it.
      deficit: bad debt that nobody has covered.
    """
    return borrow_rate * (debt / (cash + debt + unbacked + deficit)) * (1.0 - reserve_factor)


def annual_yield(rate: Array, *, periods: float = SECONDS_PER_YEAR) -> Array:
    """Yield of a year that compounds `periods` times, (1 + r / n)^n - 1; by the second when omitted."""
    return jnp.expm1(periods * jnp.log1p(jnp.asarray(rate) / periods))


def compound_growth(rate: Array, seconds: Array) -> Array:
    """Factor of a debt that compounds every second, (1 + r / year)^seconds."""
    return jnp.exp(seconds * jnp.log1p(jnp.asarray(rate) / SECONDS_PER_YEAR))


def binomial_growth(rate: Array, seconds: Array) -> Array:
    """Factor of Aave's debt index: the first three terms of (1 + x)^n, below the exact one by about (x n)^4 / 24."""
    x, n = rate / SECONDS_PER_YEAR, jnp.asarray(seconds)
    second = jnp.maximum(n - 1.0, 0.0)
    third = jnp.maximum(n - 2.0, 0.0)
    return 1.0 + n * x * (1.0 + second * x / 2.0 * (1.0 + third * x / 3.0))


def linear_growth(rate: Array, seconds: Array) -> Array:
    """Factor of Aave's supply index between two interactions, 1 + r t."""
    return 1.0 + rate * seconds / SECONDS_PER_YEAR


def taylor_growth(rate: Array, seconds: Array) -> Array:
    """Factor of Morpho's debt: 1 + x + x^2 / 2 + x^3 / 6 with x = r t."""
    x = rate * seconds / SECONDS_PER_YEAR
    return 1.0 + x * (1.0 + x / 2.0 * (1.0 + x / 3.0))


def continuous_growth(rate: Array, seconds: Array) -> Array:
    """Factor under continuous compounding, exp(r t): the limit of the others for small r t."""
    return jnp.exp(rate * seconds / SECONDS_PER_YEAR)


def per_unit_rate(utilisation: Array, *, base: Array, low: Array, high: Array, kink: Array) -> Array:
    """Rate of Compound III, base + low min(U, kink) + high max(U - kink, 0): slopes per unit of utilisation.

    Pathwise gradient: yes, almost everywhere.
    """
    u = jnp.asarray(utilisation)
    return base + low * jnp.minimum(u, kink) + high * jnp.maximum(u - kink, 0.0)


def _error(utilisation: Array, target: Array) -> Array:
    u = jnp.asarray(utilisation)
    return (u - target) / jnp.where(u > target, 1.0 - target, target)


def adaptive_curve_rate(
    utilisation: Array, rate_at_target: Array, *, target: Array = 0.9, steepness: Array = 4.0
) -> Array:
    r"""Rate of Morpho's adaptive curve at a moment.

    $r = r_T (1 + (C - 1) e)$ for e > 0, else $r_T (1 + (1 - 1/C) e)$, with the error $e = (U - U_T)/(1 - U_T)$ above
    the target and $(U - U_T)/U_T$ below: from $r_T / C$ in an empty pool to $C r_T$ in a full one.
    """
    error = _error(utilisation, target)
    slope = jnp.where(error > 0.0, steepness - 1.0, 1.0 - 1.0 / steepness)
    return rate_at_target * (1.0 + slope * error)


def adapted_rate_at_target(
    rate_at_target: Array,
    utilisation: Array,
    years: Array,
    *,
    target: Array = 0.9,
    speed: Array = 50.0,
    low: Array = 0.001,
    high: Array = 2.0,
) -> Array:
    """Rate at target after a time at one utilisation: r_T exp(speed error years), within [low, high]."""
    return jnp.clip(rate_at_target * jnp.exp(speed * _error(utilisation, target) * years), low, high)


def mean_adaptive_rate(
    utilisation: Array,
    rate_at_target: Array,
    years: Array,
    *,
    target: Array = 0.9,
    steepness: Array = 4.0,
    speed: Array = 50.0,
) -> Array:
    """Rate that Morpho charges over a time at one utilisation: the curve at the mean of r_T.

    The mean is taken as on chain, by the trapezoid rule at start, middle and end.
    """
    middle = adapted_rate_at_target(rate_at_target, utilisation, 0.5 * years, target=target, speed=speed)
    end = adapted_rate_at_target(rate_at_target, utilisation, years, target=target, speed=speed)
    mean = 0.25 * (rate_at_target + end + 2.0 * middle)
    return adaptive_curve_rate(utilisation, mean, target=target, steepness=steepness)
