r"""Greeks of European options on a forward, counted in USD and counted in the coin.

With the notation of `option` (n the normal density):

$$\Delta = D w N(w d_1),\ \Gamma = D \frac{n(d_1)}{F v},\ \text{vega} = D F n(d_1)\sqrt T,\
\Theta = -D \frac{F n(d_1)\sigma}{2\sqrt T} + r V,\ \text{vanna} = -D \frac{n(d_1) d_2}{\sigma},\
\text{volga} = \text{vega}\,\frac{d_1 d_2}{\sigma}.$$

Vega and volga are per 1.00 of volatility (a venue's figure per point is a hundredth), theta per year (a 365th per day)
with the forward held, r = -ln(D)/T. In coin, $c = V/F$, $dc/dF = (\Delta - c)/F$,
$d^2c/dF^2 = (\Gamma F - 2\Delta + 2c)/F^2$.

One who counts in USD hedges a coin-settled option with delta, and the coins it is worth too; one who counts in coins
hedges with the premium-adjusted delta, $\Delta - c$.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from qpo_sim.instrument import option
from qpo_sim.numerics import safe_log, safe_sqrt
from qpo_sim.types import DAYS_PER_YEAR, Array


class Greeks(NamedTuple):
    """Value of a long option on one coin in USD, and its derivatives.

    `delta` and `gamma` in the forward; `vega`, `volga` per 1.00 of volatility; `vanna` of delta per 1.00 of volatility;
    `theta` per year that passes.
    """

    value: Array
    delta: Array
    gamma: Array
    vega: Array
    theta: Array
    vanna: Array
    volga: Array


class CoinGreeks(NamedTuple):
    """Price of a long option on one coin in coins, and its derivatives.

    `delta` is premium-adjusted: coins of the underlying to hold short so that the P&L in coins does not move.
    `first` is dc/dF, `second` d2c/dF2, `vega` per 1.00 of volatility, `theta` per day that passes.
    """

    price: Array
    delta: Array
    first: Array
    second: Array
    vega: Array
    theta: Array


def greeks(
    forward: Array, strike: Array, years: Array, volatility: Array, *, is_call: Any, discount: Array = 1.0
) -> Greeks:
    """Black-76 value and Greeks; arguments as in `option.value`.

    Finite at expiry and without volatility: their limits away from the money; at the money gamma is large instead of
    infinite, and theta 0 once no time is left.
    """
    w = option.sign_of(is_call)
    root, total = safe_sqrt(years), option.total_volatility(years, volatility)
    d1, d2 = option.scores(safe_log(forward / strike), total)
    density = option.normal_density(d1)
    value = option.value(forward, strike, years, volatility, is_call=is_call, discount=discount)
    vega = discount * forward * density * root
    has_time = years > 0.0
    time = jnp.where(has_time, years, 1.0)
    decay = jnp.where(has_time, -0.5 * vega * volatility / time, 0.0)
    rate = jnp.where(has_time, -safe_log(discount) / time, 0.0)
    # d2/sigma as d2 sqrt(T)/v, whose limit for a vanishing sigma is finite at the money.
    per_volatility = root / total
    return Greeks(
        value=value,
        delta=discount * w * option.normal_cdf(w * d1),
        gamma=discount * density / (forward * total),
        vega=vega,
        theta=decay + rate * value,
        vanna=-discount * density * d2 * per_volatility,
        volga=vega * d1 * d2 * per_volatility,
    )


def coin_greeks(
    forward: Array, strike: Array, years: Array, volatility: Array, *, is_call: Any, discount: Array = 1.0
) -> CoinGreeks:
    """Price and Greeks in coins; arguments as in `option.value`."""
    usd = greeks(forward, strike, years, volatility, is_call=is_call, discount=discount)
    price = usd.value / forward
    return CoinGreeks(
        price=price,
        delta=usd.delta - price,
        first=(usd.delta - price) / forward,
        second=(usd.gamma * forward - 2.0 * usd.delta + 2.0 * price) / forward**2,
        vega=usd.vega / forward,
        theta=usd.theta / (forward * DAYS_PER_YEAR),
    )
