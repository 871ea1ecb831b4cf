r"""Barriers: knock-in and knock-out options on a forward, touch probabilities, survival of a step, discrete dates.

Prices follow geometric Brownian motion. For one without drift, $(F/H)\,G(H^2/F)$ is what paths that touch H
contribute to the value $G(F)$ of a payoff on its untouched side (reflection), so that a knock-out option is worth

$$V = G(F) - \frac{F}{H}\,G(H^2/F),\quad
G(x) = E[w (S_T - K)\,1\{w(S_T - K) > 0,\ S_T \text{ on the untouched side of } H\} \mid S_0 = x]$$

and a knock-in one what is left of the option without barrier: the eight formulas of Reiner & Rubinstein (1991) at zero
carry and rebate. Monitoring at discrete dates acts like a barrier further away by the factor
$\exp(0.5826\,\sigma\sqrt{dt})$ (Broadie, Glasserman & Kou 1997).

Arguments as in `option`. `is_up`: the barrier is above the price.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from qpo_sim.instrument import option
from qpo_sim.numerics import bridge_crossing, safe_log, safe_sqrt
from qpo_sim.types import Array

# -zeta(1/2) / sqrt(2 pi).
DISCRETE_SHIFT = 1.4603545088095868 / math.sqrt(2.0 * math.pi)
# Standard deviations beyond which a touch is certain or impossible.
_FAR = 37.0
_LEAST_TOTAL_VOLATILITY = 1e-4


def _side(is_up: Any) -> Any:
    # 1 for a barrier below, whose untouched side is above it.
    return -option.sign_of(is_up)


def shifted_barrier(barrier: Array, volatility: Array, step_years: Array, *, is_up: Any) -> Array:
    """Continuous barrier that is touched about as often as `barrier` is at dates `step_years` apart.

    Further away: H exp(-0.5826 sigma sqrt(dt)) below the price, H exp(+...) above it. The error is of smaller order
    than sqrt(dt).

    Pathwise gradient: barrier, volatility; step_years where above 0.
    """
    return barrier * jnp.exp(-_side(is_up) * DISCRETE_SHIFT * volatility * safe_sqrt(step_years))


def value(
    forward: Array,
    strike: Array,
    barrier: Array,
    years: Array,
    volatility: Array,
    *,
    is_call: Any,
    is_up: Any,
    is_in: Any,
    discount: Array = 1.0,
    step_years: Array = 0.0,
) -> Array:
    """Value of a barrier option without rebate, in the unit of the forward.

    A forward at or beyond the barrier counts as a touch: a knock-out option is worth nothing, a knock-in option what
    the option without barrier is.

    Args:
      forward: forward of the expiry, taken as the monitored price.
      strike: strike.
      barrier: level that knocks in or out.
      years: time to expiry.
      volatility: the same for all strikes.
      is_call: else a put.
      is_up: the barrier is above.
      is_in: a touch brings the option to life; else it ends it.
      discount: discount factor.
      step_years: time between monitoring dates, 0 for continuous monitoring (see `shifted_barrier`).

    Pathwise gradient: forward, strike, barrier, years, volatility, discount, where the barrier is not touched yet.
    """
    w, side = option.sign_of(is_call), _side(is_up)
    is_untouched = side * (forward - barrier) > 0.0
    level = shifted_barrier(barrier, volatility, step_years, is_up=is_up)
    total = option.total_volatility(years, volatility)

    def beyond(x, least):
        # Mean of S - K where S is at least (for w side > 0: on the option's own side of) `least`, started from x.
        d1, d2 = option.scores(safe_log(x / least), total)
        return w * (x * option.normal_cdf(w * d1) - strike * option.normal_cdf(w * d2))

    # The end of the payoff's range nearest to the money: the strike, or the barrier when that cuts into it.
    nearest = jnp.where(w > 0.0, jnp.maximum(strike, level), jnp.minimum(strike, level))

    def region(x):
        return jnp.where(w * side > 0.0, beyond(x, nearest), beyond(x, strike) - beyond(x, nearest))

    out = discount * (region(forward) - forward / level * region(level * level / forward))
    plain = option.value(forward, strike, years, volatility, is_call=is_call, discount=discount)
    out = jnp.where(is_untouched, out, 0.0)
    return jnp.where(is_in, plain - out, out)


def touch_probability(
    price: Array, barrier: Array, years: Array, volatility: Array, *, drift: Array = 0.0, step_years: Array = 0.0
) -> Array:
    r"""Probability that a price touches a barrier within `years`; the barrier may be on either side.

    With $x = |\ln(B/S)|$ and m the mean move of the log-price away from the barrier, $\pm(\mu - \sigma^2/2)T$:
    $\Phi(-(x+m)/v) + e^{-2mx/v^2}\,\Phi((m-x)/v)$, by reflection. 1 where the price is at the barrier.

    Args:
      price: price at the start.
      barrier: level.
      years: horizon.
      volatility: per square root of a year.
      drift: mu per year, so that E S_T = S_0 exp(mu T).
      step_years: time between monitoring dates, 0 for continuous monitoring (see `shifted_barrier`).

    Pathwise gradient: all but step_years, where the barrier is not touched at the start.
    """
    is_up = barrier > price
    level = shifted_barrier(barrier, volatility, step_years, is_up=is_up)
    x = _side(is_up) * safe_log(price / level)
    move = _side(is_up) * (drift - 0.5 * volatility**2) * years
    v = volatility * safe_sqrt(years)
    v = jnp.where(v > _LEAST_TOTAL_VOLATILITY, v, _LEAST_TOTAL_VOLATILITY)

    is_sure, is_out_of_reach = x + move < -_FAR * v, x - jnp.abs(move) > _FAR * v
    is_open = ~(is_sure | is_out_of_reach)
    x, move = jnp.where(is_open, x, v), jnp.where(is_open, move, 0.0)
    # In one exponent: either factor alone overflows or vanishes.
    reflected = jnp.exp(jnp.minimum(-2.0 * move * x / (v * v) + log_ndtr((move - x) / v), 0.0))
    touched = option.normal_cdf(-(x + move) / v) + reflected
    touched = jnp.where(is_open, touched, jnp.where(is_sure, 1.0, 0.0))
    return jnp.where(price == barrier, 1.0, touched)


def step_survival(before: Array, after: Array, barrier: Array, variance: Array, *, is_up: Any) -> Array:
    """Probability that a path does not touch the barrier during a step, given its prices at both ends.

    The product over the steps of a path is its weight in a knock-out option: unbiased for continuous monitoring at any
    step, and smooth.

    Args:
      before: price at the start of the step.
      after: price at its end.
      barrier: level.
      variance: of the log-return of the step.
      is_up: the barrier is above.

    Pathwise gradient: before, after, barrier, variance where both prices are on the untouched side.
    """
    side = _side(is_up)
    return 1.0 - bridge_crossing(side * safe_log(before / barrier), side * safe_log(after / barrier), variance)
