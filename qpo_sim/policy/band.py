r"""When a portfolio has drifted far enough to be traded back, and to where.

For one risky asset of weight $\pi$, relative risk aversion R and volatility $\sigma$ the drifted weight moves with
volatility $\sigma\pi(1-\pi)$ and a deviation h costs growth of $R\sigma^2h^2/2$. The widths below are the leading order
for small costs. They hold for leverage ($\pi > 1$ or $\pi < 0$) too. Trades are signed, positive is bought.
"""

import jax.numpy as jnp
from jax import lax

from qpo_sim.types import Array

_NEWTON_STEPS = 6


def _root(x: Array, power: float) -> Array:
    """x^power for 0 < power < 1; 0 with gradient 0 at x <= 0."""
    positive = x > 0.0
    return jnp.where(positive, jnp.exp(power * jnp.log(jnp.where(positive, x, 1.0))), 0.0)


def _drift_factor(weight: Array) -> Array:
    """Square of pi (1 - pi), the volatility of the weight over that of the asset."""
    slope = weight * (1.0 - weight)
    return slope * slope


def half_width(weight: Array, risk_aversion: Array, cost: Array) -> Array:
    r"""Half-width of the no-trade band, in weight, $(\frac{3}{2R} \pi^2(1-\pi)^2 \lambda)^{1/3}$.

    The best policy for proportional costs is to trade to the nearer edge. Janecek & Shreve (2004), Asymptotic analysis
    for optimal investment and consumption with transaction costs; Gerhold, Guasoni, Muhle-Karbe & Schachermayer (2014),
    Transaction costs, trading volume, and the liquidity premium.

    Args:
      weight: pi, the target.
      risk_aversion: R > 0; 1 is log utility.
      cost: lambda, one-way and proportional: half of a bid-ask spread.

    Pathwise gradient: all arguments; taken as zero where the width is 0.
    """
    return _root(1.5 / risk_aversion * _drift_factor(weight) * cost, 1.0 / 3.0)


def half_width_of_spread(weight: Array, risk_aversion: Array, spread: Array) -> Array:
    r"""`half_width` for a bid-ask spread, twice the one-way cost: $(\frac{3}{4R} \pi^2(1-\pi)^2 s)^{1/3}$.

    Pathwise gradient: all arguments; taken as zero where the width is 0.
    """
    return half_width(weight, risk_aversion, 0.5 * spread)


def liquidity_premium(risk_aversion: Array, volatility: Array, half_width: Array) -> Array:
    r"""Growth per unit of time lost to costs with the best band, $\frac{R\sigma^2}{2} h^2$.

    A third of it is tracking error, two thirds are trading costs. Gerhold, Guasoni, Muhle-Karbe & Schachermayer (2014).

    Args:
      risk_aversion: R.
      volatility: sigma per square root of the unit of time.
      half_width: h of the best band.

    Pathwise gradient: all arguments.
    """
    return 0.5 * risk_aversion * volatility * volatility * half_width * half_width


def turnover(weight: Array, volatility: Array, half_width: Array) -> Array:
    r"""Purchases plus sales per unit of time as a share of wealth, traded to the edge, $\sigma^2\pi^2(1-\pi)^2/(2h)$.

    Half of it on each side.

    Pathwise gradient: all arguments, half_width > 0.
    """
    return volatility * volatility * _drift_factor(weight) / (2.0 * half_width)


def tracking_loss(risk_aversion: Array, volatility: Array, half_width: Array) -> Array:
    r"""Growth per unit of time lost to deviations in a band traded to its edge, $\frac{R\sigma^2}{2} \frac{h^2}{3}$.

    The weight is uniform over the band. With `turnover` times the cost the loss for any width.

    Pathwise gradient: all arguments.
    """
    return liquidity_premium(risk_aversion, volatility, half_width) / 3.0


def fixed_cost_half_width(weight: Array, risk_aversion: Array, cost_share: Array) -> Array:
    r"""Half-width when each trade costs a fixed sum and goes to the target, $(\frac{12}{R}\pi^2(1-\pi)^2 F/W)^{1/4}$.

    Altarovici, Muhle-Karbe & Soner (2015), Asymptotics for fixed transaction costs.

    Args:
      weight: pi, the target.
      risk_aversion: R > 0.
      cost_share: F/W, the sum (gas) over wealth.

    Pathwise gradient: all arguments; taken as zero where the width is 0.
    """
    return _root(12.0 / risk_aversion * _drift_factor(weight) * cost_share, 0.25)


def half_width_to_target(weight: Array, risk_aversion: Array, cost: Array, cost_share: Array = 0.0) -> Array:
    r"""Half-width of the band whose trades go to the target, with proportional and fixed costs.

    It minimises $\frac{R\sigma^2}{2}\frac{h^2}{6} + (F/W + \lambda h)\frac{\sigma^2\pi^2(1-\pi)^2}{h^2}$ (triangular
    density of the deviation, mean time $h^2/(\sigma\pi(1-\pi))^2$ between trades): the root of
    $h^4 = \frac{6}{R}\pi^2(1-\pi)^2 (2 F/W + \lambda h)$. Without fixed costs $(6\pi^2(1-\pi)^2\lambda/R)^{1/3}$.

    Args:
      weight: pi, the target.
      risk_aversion: R > 0.
      cost: lambda, one-way and proportional.
      cost_share: F/W.

    Pathwise gradient: all arguments; taken as zero where the width is 0.
    """
    scale = 6.0 / risk_aversion * _drift_factor(weight)
    constant, slope = 2.0 * scale * cost_share, scale * cost
    # The root is between the greater of these and its 2^(1/3): Newton falls on it from above.
    start = 2.0 ** (1.0 / 3.0) * jnp.maximum(_root(constant, 0.25), _root(slope, 1.0 / 3.0))
    is_positive = start > 0.0
    h = lax.stop_gradient(jnp.where(is_positive, start, 1.0))

    def newton(h, constant, slope):
        # In units of h^4, which underflows in single precision for small costs.
        excess = 1.0 - slope / (h * h * h) - constant / (h * h) / (h * h)
        return h - h * excess / (4.0 - slope / (h * h * h))

    for _ in range(_NEWTON_STEPS):
        h = newton(h, lax.stop_gradient(constant), lax.stop_gradient(slope))
    return jnp.where(is_positive, newton(h, constant, slope), 0.0)


def soft_threshold(x: Array, threshold: Array) -> Array:
    r"""Part of x beyond the threshold, $\mathrm{sign}(x) (|x| - h)^+$.

    Pathwise gradient: all arguments (almost everywhere; 1-Lipschitz in x).
    """
    return x - jnp.clip(x, -threshold, threshold)


def trade_to_edge(weight: Array, target: Array, half_width: Array) -> Array:
    """Trade, in weight, to the nearer edge of the band; 0 inside it. Minus the soft threshold of the deviation.

    Pathwise gradient: all arguments (almost everywhere).
    """
    return -soft_threshold(weight - target, half_width)


def trade_to_target(weight: Array, target: Array, half_width: Array) -> Array:
    """Trade, in weight, to the target when the band is left; 0 inside it.

    Pathwise gradient: weight, target; none in half_width, which only decides when.
    """
    return trade_towards(weight, target, half_width, 0.0)


def trade_towards(weight: Array, target: Array, half_width: Array, landing: Array) -> Array:
    """Trade, in weight, when the band is left, to `landing` half-widths from the target on the side it came from.

    Args:
      weight: at present.
      target: centre of the band.
      half_width: of the band.
      landing: 0 the target, 1 the edge, 0.5 midway.

    Pathwise gradient: weight, target, landing; half_width as far as the landing depends on it.
    """
    deviation = weight - target
    leaves = jnp.abs(deviation) > half_width
    return jnp.where(leaves, jnp.sign(deviation) * landing * half_width - deviation, 0.0)


def is_due(step: Array, interval: int) -> Array:
    """Calendar rule: whether a trade is due at the end of step 1, 2, ...; every `interval` steps."""
    return jnp.asarray(step) % interval == 0


def leverage_trade(equity: Array, exposure: Array, leverage: Array, *, cost: Array = 0.0) -> Array:
    r"""Notional to buy so that exposure is `leverage` times equity after the cost of the trade.

    $q = (L E - X)/(1 + s c L)$ with s the sign of the trade. After a return r from target leverage it is L (L-1) r E
    without costs: leverage above 1 buys what has risen.

    Args:
      equity: E before the trade.
      exposure: X, signed notional held.
      leverage: L, signed.
      cost: c, proportional to the notional, paid from equity; |c L| < 1.

    Pathwise gradient: all arguments (almost everywhere).
    """
    gap = leverage * equity - exposure
    return gap / (1.0 + jnp.sign(gap) * cost * leverage)


def leverage_drift_trade(equity: Array, leverage: Array, simple_return: Array) -> Array:
    r"""Notional to buy to restore leverage L after a return, $L(L-1) r E$ with E the equity before the return.

    Pathwise gradient: all arguments.
    """
    return leverage * (leverage - 1.0) * simple_return * equity
