r"""Almgren-Chriss: how fast to trade when impact is linear and waiting is risky.

N trades of equal spacing $\tau = T/N$; holdings $x_0 = X, \dots, x_N = 0$, trades $n_j = x_{j-1} - x_j$. Permanent
impact $\gamma$ per unit traded, temporary impact $\epsilon + \eta n_j/\tau$, price volatility $\sigma$ in price units
per square root of the unit of time. Almgren & Chriss (2000), Optimal execution of portfolio transactions.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.types import Array

# Below this (kappa T)^2 the holdings come from their series, which has a derivative at risk aversion 0.
_NEARLY_LINEAR = 1e-3


class Schedule(NamedTuple):
    """A plan of trades.

    Attributes:
      holdings: before the first and after each trade, (trades + 1, *paths).
      trades: sold in each interval, (trades, *paths).
      expected_cost: E in money.
      variance: of the cost, V in money squared.
    """

    holdings: Float[Array, "times ..."]
    trades: Float[Array, "trades ..."]
    expected_cost: Array
    variance: Array


def adjusted_temporary(temporary: Array, permanent: Array, interval: Array) -> Array:
    r"""Temporary impact net of the permanent impact inside an interval, $\tilde\eta = \eta - \gamma\tau/2$.

    It must be above 0, else trading at once is free of temporary cost and no plan is optimal.

    Pathwise gradient: all arguments.
    """
    return temporary - 0.5 * permanent * interval


def urgency(risk_aversion: Array, volatility: Array, adjusted: Array, interval: Array) -> Array:
    r"""Rate $\kappa$ at which holdings decay: $2(\cosh\kappa\tau - 1)/\tau^2 = \lambda\sigma^2/\tilde\eta$.

    Pathwise gradient: all arguments, where risk aversion and volatility are above 0.
    """
    # 2 (cosh z - 1) = 4 sinh^2(z/2), which does not cancel.
    return 2.0 * jnp.arcsinh(0.5 * interval * volatility * jnp.sqrt(risk_aversion / adjusted)) / interval


def expected_cost(
    holdings: Float[Array, "times ..."], interval: Array, *, permanent: Array, temporary: Array, fixed: Array = 0.0
) -> Array:
    r"""Mean cost of a plan of sales, $\gamma X^2/2 + \epsilon\sum|n_j| + (\tilde\eta/\tau) \sum n_j^2$.

    Args:
      holdings: see `Schedule`; the last is 0.
      interval: tau.
      permanent: gamma, price per unit.
      temporary: eta, price per unit and time.
      fixed: epsilon, price: half spread and fees.

    Pathwise gradient: all arguments.
    """
    trades = holdings[:-1] - holdings[1:]
    adjusted = adjusted_temporary(temporary, permanent, interval)
    quadratic = adjusted / interval * jnp.sum(trades * trades, axis=0)
    return 0.5 * permanent * holdings[0] * holdings[0] + fixed * jnp.sum(jnp.abs(trades), axis=0) + quadratic


def cost_variance(holdings: Float[Array, "times ..."], interval: Array, volatility: Array) -> Array:
    r"""Variance of the cost of a plan, $\sigma^2 \tau \sum_{j\ge1} x_j^2$.

    Pathwise gradient: all arguments.
    """
    return volatility * volatility * interval * jnp.sum(holdings[1:] * holdings[1:], axis=0)


def optimal_schedule(
    quantity: Array,
    duration: Array,
    n_trades: int,
    *,
    volatility: Array,
    permanent: Array,
    temporary: Array,
    risk_aversion: Array,
    fixed: Array = 0.0,
) -> Schedule:
    r"""Plan that minimises $E + \lambda V$: $x_j = X \sinh(\kappa(T - t_j))/\sinh(\kappa T)$.

    Args:
      quantity: X to be sold; negative to be bought, with the same costs.
      duration: T > 0.
      n_trades: N (static).
      volatility: sigma, price per square root of time, >= 0.
      permanent: gamma >= 0.
      temporary: eta > gamma tau/2; else the result is NaN.
      risk_aversion: lambda >= 0, per money; 0 gives equal trades.
      fixed: epsilon.

    Pathwise gradient: all arguments, at risk aversion 0 too.
    """
    interval = duration / n_trades
    adjusted = adjusted_temporary(temporary, permanent, interval)
    adjusted = jnp.where(adjusted > 0.0, adjusted, jnp.nan)
    # (kappa_tilde tau)^2; kappa T is a function of its root, its square of itself.
    squared = risk_aversion * volatility * volatility * interval * interval / adjusted
    is_linear = squared * (n_trades * n_trades) < _NEARLY_LINEAR
    z = 2.0 * n_trades * jnp.arcsinh(0.5 * jnp.sqrt(jnp.where(is_linear, 1.0, squared)))
    z_squared = n_trades * n_trades * squared * (1.0 - squared / 12.0 * (1.0 - squared * 2.0 / 15.0))
    rank = max(jnp.ndim(quantity), jnp.ndim(z))
    u = ((n_trades - jnp.arange(n_trades + 1)) / n_trades).astype(z.dtype).reshape((n_trades + 1,) + (1,) * rank)
    ratio = jnp.exp((u - 1.0) * z) * jnp.expm1(-2.0 * u * z) / jnp.expm1(-2.0 * z)
    bend = (1.0 - u * u) * z_squared / 6.0
    series = u * (1.0 - bend + bend * z_squared * (7.0 - 3.0 * u * u) / 60.0)
    plan = quantity * jnp.where(is_linear, series, ratio)
    return Schedule(
        plan,
        plan[:-1] - plan[1:],
        expected_cost(plan, interval, permanent=permanent, temporary=temporary, fixed=fixed),
        cost_variance(plan, interval, volatility),
    )
