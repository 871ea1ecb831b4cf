r"""European options on a forward, settled in USD (linear) or in the coin itself (inverse): Black-76, payoffs, fees.

With $v = \sigma\sqrt T$, $d_1 = \ln(F/K)/v + v/2$, $d_2 = d_1 - v$ and w = 1 for a call, -1 for a put,

$$V = D\,w\,(F\,N(w d_1) - K\,N(w d_2)),$$

F the forward of the same expiry, D the discount factor (1 by the convention of Deribit). A coin-settled option on one
coin is worth $c = V/F$ coins and pays $\max(w(S-K), 0)/S$ coins: never more than one coin for a call, without bound
for a put as S goes to 0. Black (1976); Deribit, "Options" (contract introduction).

Prices and strikes share a unit, times are in years (of 365 days), volatilities per square root of a year. `is_call` is
a bool or an array of bools. Everything broadcasts; the path axis is last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import erfc

from qpo_sim.numerics import safe_log, safe_sqrt
from qpo_sim.types import DAYS_PER_YEAR, Array

# Standard deviations beyond which the normal distribution is 0 or 1 in double precision.
_FAR = 39.0
_LEAST_TOTAL_VOLATILITY = 1e-15
_GREATEST_TOTAL_VOLATILITY = 20.0
_SQRT_HALF = 0.7071067811865476


def normal_cdf(x: Array) -> Array:
    """Distribution function of the standard normal, with full relative precision in the lower tail."""
    return 0.5 * erfc(-_SQRT_HALF * x)


def sign_of(is_call: Any) -> Any:
    """The w of the formulas: 1 for calls, -1 for puts."""
    return (1.0 if is_call else -1.0) if isinstance(is_call, bool) else jnp.where(is_call, 1.0, -1.0)


def total_volatility(years: Array, volatility: Array) -> Array:
    """Volatility over the life of an option, sigma sqrt(T), kept above 1e-15 so that it can divide.

    Pathwise gradient: both; years only where above 0.
    """
    v = volatility * safe_sqrt(years)
    # Added rather than clipped: at sigma = 0 the derivative in sigma is that of the limit.
    return jnp.where(v > _LEAST_TOTAL_VOLATILITY, v, _LEAST_TOTAL_VOLATILITY + v)


def scores(log_moneyness: Array, total: Array) -> tuple[Array, Array]:
    """d1 and d2 for ln(F/K) and a total volatility above 0, constant where they are some 39 or more.

    Pathwise gradient: both, finite; zero where constant.
    """
    far = jnp.abs(log_moneyness) > _FAR * total
    middle = jnp.where(far, _FAR * jnp.sign(log_moneyness), log_moneyness / jnp.where(far, 1.0, total))
    # Without the half of the total: the limit of a vanishing volatility.
    return middle + 0.5 * total, middle - 0.5 * total


def value(
    forward: Array, strike: Array, years: Array, volatility: Array, *, is_call: Any, discount: Array = 1.0
) -> Array:
    """Black-76 value of an option on one unit, in the unit of the forward.

    The intrinsic value at expiry or without volatility. The option out of the money is computed and the other one
    follows by parity: parity holds to rounding, and the error in float32 is some 1e-7 of the smaller of forward and
    strike, whatever the moneyness.

    Pathwise gradient: all but `is_call`. At the money in the limit of no volatility delta is w/2.
    """
    w = sign_of(is_call)
    d1, d2 = scores(safe_log(forward / strike), total_volatility(years, volatility))
    out = jnp.where(strike >= forward, 1.0, -1.0)
    time_value = out * (forward * normal_cdf(out * d1) - strike * normal_cdf(out * d2))
    # Not jnp.maximum: its derivative at a tie, here at expiry, is half of the right one.
    time_value = jnp.where(time_value < 0.0, 0.0, time_value)
    intrinsic = jnp.where(w * out < 0.0, w * (forward - strike), 0.0)
    return discount * (intrinsic + time_value)


def coin_value(
    forward: Array, strike: Array, years: Array, volatility: Array, *, is_call: Any, discount: Array = 1.0
) -> Array:
    """Value of a coin-settled option on one coin, c = V/F coins.

    Pathwise gradient: as `value`.
    """
    return value(forward, strike, years, volatility, is_call=is_call, discount=discount) / forward


def parity_gap(
    call: Array, put: Array, forward: Array, strike: Array, *, discount: Array = 1.0, is_coin_settled: bool = False
) -> Array:
    """How far a call and a put are off parity: C - P - D (F - K), or in coin c - p - D (1 - K/F); 0 without arbitrage.

    Args:
      call: value of the call, in coins if `is_coin_settled`.
      put: value of the put of the same strike and expiry.
      forward: forward of the expiry.
      strike: strike of both.
      discount: discount factor.
      is_coin_settled: values are in coins.
    """
    owed = discount * (forward - strike)
    return call - put - (owed / forward if is_coin_settled else owed)


def payoff(price: Array, strike: Array, *, is_call: Any, multiplier: Array = 1.0) -> Array:
    """What a linear option pays at expiry, multiplier x max(w (S - K), 0), in the unit of the price.

    `multiplier`: coins per contract (10 for SOL on Deribit). S is the delivery price, on Deribit the average of the
    index over the 30 minutes before 08:00 UTC (support.deribit.com 25944750999581).

    Pathwise gradient: price, strike, multiplier.
    """
    return multiplier * jnp.maximum(sign_of(is_call) * (price - strike), 0.0)


def coin_payoff(price: Array, strike: Array, *, is_call: Any) -> Array:
    """What a coin-settled option on one coin pays at expiry, max(w (S - K), 0) / S coins.

    Pathwise gradient: price, strike.
    """
    return payoff(price, strike, is_call=is_call) / price


def profit(
    quantity: Array,
    premium: Array,
    price: Array,
    strike: Array,
    *,
    is_call: Any,
    multiplier: Array = 1.0,
    is_coin_settled: bool = False,
) -> Array:
    """Profit at expiry of `quantity` contracts (negative: written) bought at `premium` per coin, before fees.

    In coins if `is_coin_settled` (the premium then too), else in the unit of the price.

    Pathwise gradient: all but `is_call`.
    """
    if is_coin_settled:
        return quantity * multiplier * (coin_payoff(price, strike, is_call=is_call) - premium)
    return quantity * multiplier * (payoff(price, strike, is_call=is_call) - premium)


def fee(quantity: Array, price: Array, *, underlying: Array, rate: Array, cap: Array) -> Array:
    """Fee of a trade or a delivery, |quantity| x min(rate x underlying, cap x price), positive.

    Deribit: rate 0.0003 for coin-settled options (0.0001 maker, 0.0005 taker for linear ones), cap 0.125
    (support.deribit.com 25944746248989); at delivery 0.00015 of the underlying, the same share of the option's value at
    most.

    Args:
      quantity: contracts times coins per contract, either sign.
      price: of the option per coin, in the currency of the fee; the payoff at delivery.
      underlying: price of one coin in the currency of the fee: 1 for coin-settled options.
      rate: share of the underlying.
      cap: share of the option's price that the fee cannot exceed.

    Pathwise gradient: all.
    """
    return jnp.abs(quantity) * jnp.minimum(rate * underlying, cap * price)


class _Bracket(NamedTuple):
    low: Array
    high: Array


@jax.jit
def implied_volatility(
    price: Array, forward: Array, strike: Array, years: Array, *, is_call: Any, discount: Array = 1.0
) -> Array:
    """Volatility at which `value` is `price`, per square root of a year.

    0 at the intrinsic value; NaN where no volatility gives the price (below the intrinsic value, at or above D F for a
    call or D K for a put) or no time is left. Bisection of the total volatility on [0, 20], then Newton steps. Prices
    deep in the money hold few digits of it.

    Pathwise gradient: all but `is_call`, by the implicit function.
    """
    w = sign_of(is_call)
    intrinsic = jnp.maximum(w * (forward - strike), 0.0)
    time_value = price / discount - intrinsic
    smaller = jnp.minimum(forward, strike)
    # In the money the time value is a difference of larger numbers.
    rounding = 8.0 * jnp.finfo(jnp.result_type(float, time_value)).eps * jnp.maximum(forward, strike)
    is_possible = (time_value > -rounding) & (time_value < smaller) & (years > 0.0)
    has_time_value = is_possible & (time_value > jnp.where(intrinsic > 0.0, rounding, 0.0))

    target = lax.stop_gradient(jnp.where(has_time_value, time_value, 0.5 * smaller))
    f, k = lax.stop_gradient((forward, strike))
    root = jnp.sqrt(jnp.where(years > 0.0, years, 1.0))

    def worth(total):
        return value(f, k, 1.0, total, is_call=k >= f)

    def halve(_, bracket):
        middle = 0.5 * (bracket.low + bracket.high)
        is_low = worth(middle) < target
        return _Bracket(jnp.where(is_low, middle, bracket.low), jnp.where(is_low, bracket.high, middle))

    ends = _Bracket(0.0 * (target + f + k), 0.0 * (target + f + k) + _GREATEST_TOTAL_VOLATILITY)
    low, high = lax.fori_loop(0, 50, halve, ends)

    def newton(total, wanted, f, k):
        d1, _ = scores(safe_log(f / k), lax.stop_gradient(total))
        slope = lax.stop_gradient(f * normal_density(d1))
        miss = value(f, k, 1.0, total, is_call=k >= f) - wanted
        return total - jnp.where(slope > 0.0, miss / jnp.where(slope > 0.0, slope, 1.0), 0.0)

    total = newton(0.5 * (low + high), target, f, k)
    # The last step carries the derivatives in the price, the forward and the strike.
    total = newton(lax.stop_gradient(total), jnp.where(has_time_value, time_value, target), forward, strike)
    return jnp.where(has_time_value, total / root, jnp.where(is_possible, 0.0, jnp.nan))


def normal_density(x: Array) -> Array:
    """Density of the standard normal."""
    return 0.3989422804014327 * jnp.exp(-0.5 * x * x)


def revaluation(
    forward: Array,
    strike: Array,
    years: Array,
    volatility: Array,
    *,
    is_call: Any,
    is_coin_settled: bool = False,
    discount: Array = 1.0,
) -> Callable[[Array, Callable[[Array, Array], Array]], Array]:
    """The option as a scan of price and volatility asks for it (see `venue.portfolio_margin.Position`).

    Returns:
      A function (price_factor, shock) -> value of one unit at the forward times `price_factor` and at the volatility
      shock(volatility, days to expiry), no time passing; in coins if `is_coin_settled`.
    """
    worth = coin_value if is_coin_settled else value

    def revalue(price_factor, shock):
        moved = shock(volatility, DAYS_PER_YEAR * years)
        return worth(forward * price_factor, strike, years, moved, is_call=is_call, discount=discount)

    return revalue


class RawSvi(NamedTuple):
    r"""One expiry's smile in total variance, $w(k) = a + b(\rho(k - m) + \sqrt{(k - m)^2 + s^2})$, k = ln(K/F).

    b >= 0, |rho| < 1, s > 0. Gatheral & Jacquier (2014), section 3.1.
    """

    a: Array
    b: Array
    rho: Array
    m: Array
    s: Array

    def total_variance(self, log_moneyness: Array) -> Array:
        """w(k), implied volatility squared times the time to expiry."""
        x = log_moneyness - self.m
        return self.a + self.b * (self.rho * x + jnp.sqrt(x * x + self.s * self.s))

    def butterfly(self, log_moneyness: Array) -> Array:
        r"""Durrleman's $g = (1 - \frac{k w'}{2w})^2 - \frac{w'^2}{4}(\frac1w + \frac14) + \frac{w''}{2}$.

        The smile has no butterfly arbitrage where g >= 0 for all k (and call prices vanish for large k).
        """
        x = log_moneyness - self.m
        root = jnp.sqrt(x * x + self.s * self.s)
        w = self.total_variance(log_moneyness)
        first = self.b * (self.rho + x / root)
        second = self.b * self.s * self.s / root**3
        inner = 1.0 - 0.5 * log_moneyness * first / w
        return inner * inner - 0.25 * first * first * (1.0 / w + 0.25) + 0.5 * second

    def steepest_wing(self) -> Array:
        """Slope b (1 + |rho|) of the steeper wing; at most 2 without arbitrage (Lee 2004)."""
        return self.b * (1.0 + jnp.abs(self.rho))

    def least_variance(self) -> Array:
        """The minimum of w over k, a + b s sqrt(1 - rho^2); it must not be negative."""
        return self.a + self.b * self.s * jnp.sqrt(1.0 - self.rho * self.rho)


def carried_log_moneyness(strike: Array, forward: Array, start: Array, *, stickiness: Array) -> Array:
    """Log-moneyness at which a smile given at the start is read once the forward has moved, ln(K/F) + R ln(F/F_0).

    R = 0: the smile keeps to moneyness (sticky delta); R = 1: each strike keeps its volatility.

    Pathwise gradient: all.
    """
    return safe_log(strike / forward) + stickiness * safe_log(forward / start)
