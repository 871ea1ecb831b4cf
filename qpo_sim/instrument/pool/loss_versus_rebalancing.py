r"""What a pool loses to arbitrageurs: loss versus rebalancing, and the part of it that fees win back.

$$ \ell = \tfrac12 \sigma^2 P^2 |x'(P)| $$

per unit of time for the amount x(P) of the risky coin in the pool: the cost of trading at stale prices against the
portfolio that holds x(P) and trades at the market. Its mean is that of the impermanent loss of a share held against a
driftless price; a value taken along the path contains it already. Milionis, Moallemi, Roughgarden & Zhang (2022),
Automated market making and loss-versus-rebalancing.

With a fee g on either side of the mid and blocks, arbitrage pays only a share of it to arbitrageurs; the rest comes
back to the pool as their fees.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qpo_sim.instrument.pool import concentrated
from qpo_sim.types import Array

# Nezlobin & Tassy (2025), Loss-versus-rebalancing under deterministic and generalized block-times: their spread is 2g.
_CONSTANT_BLOCKS = 1.7164
_POISSON_BLOCKS = 2.0**0.5


def rate(base_holding: Callable[[Array], Array], price: Array, volatility: Array) -> Array:
    r"""Loss per unit of time in the quote coin, $\frac12 \sigma^2 P^2 |x'(P)|$, of any pool.

    Args:
      base_holding: x(P), amount of the base coin at external price P, elementwise.
      price: P.
      volatility: sigma per square root of the unit of time.

    Pathwise gradient: volatility; price as far as x has a second derivative.
    """
    price = jnp.asarray(price)
    price = price.astype(jnp.result_type(price.dtype, jnp.float32))
    _, slope = jax.jvp(base_holding, (price,), (jnp.ones_like(price),))
    return 0.5 * volatility * volatility * price * price * jnp.abs(slope)


def constant_product(volatility: Array) -> Array:
    r"""Loss per unit of time over the value of the pool, $\sigma^2/8$.

    Pathwise gradient: yes.
    """
    return volatility * volatility / 8.0


def weighted(volatility: Array, weight: Array) -> Array:
    r"""Loss per unit of time over the value of a two-coin pool with weight w, $w(1-w)\sigma^2/2$.

    Pathwise gradient: all arguments.
    """
    return 0.5 * weight * (1.0 - weight) * volatility * volatility


def concentrated_range(liquidity: Array, price: Array, lower: Array, upper: Array, volatility: Array) -> Array:
    r"""Loss per unit of time in the quote coin of a position, $L \sigma^2 \sqrt P/4$ in range, else 0.

    Pathwise gradient: liquidity, price, volatility; none in the ends of the range.
    """
    active = concentrated.is_in_range(price, lower, upper)
    return jnp.where(active, 0.25 * liquidity * volatility * volatility * jnp.sqrt(price), 0.0)


def arbitrage_share_poisson(volatility: Array, fee: Array, block_time: Array) -> Array:
    r"""Share of the loss that arbitrageurs keep when blocks come at random, $1/(1 + \sqrt2 g/\sigma_b)$.

    Milionis, Moallemi & Roughgarden (2023), Automated market making and arbitrage profits in the presence of fees.

    Args:
      volatility: sigma > 0 per square root of a unit of time.
      fee: g, one-sided, in log price: -log(1 - f), f to first order. Half of a bid-ask spread.
      block_time: mean time between blocks, in the same unit, > 0; sigma_b = sigma sqrt(block_time).

    Pathwise gradient: all arguments.
    """
    per_block = volatility * jnp.sqrt(block_time)
    return per_block / (per_block + _POISSON_BLOCKS * fee)


def arbitrage_share_constant(volatility: Array, fee: Array, block_time: Array) -> Array:
    r"""Share of the loss that arbitrageurs keep with blocks at constant spacing, $1/(1 + 1.7164 g/\sigma_b)$.

    Nezlobin & Tassy (2025), Loss-versus-rebalancing under deterministic and generalized block-times; asymptotic for
    fees large against the volatility of a block. Arguments as in `arbitrage_share_poisson`.

    Pathwise gradient: all arguments.
    """
    per_block = volatility * jnp.sqrt(block_time)
    return per_block / (per_block + _CONSTANT_BLOCKS * fee)


def recaptured(loss: Array, arbitrage_share: Array) -> Array:
    """Part of the loss that arbitrageurs pay back as fees; income beside a value that follows the external price.

    Pathwise gradient: all arguments.
    """
    return loss * (1.0 - arbitrage_share)


def carry(fee_income: Array, loss: Array, arbitrage_share: Array) -> Array:
    """Expected profit of a share hedged against the price: fees of other traders less what arbitrageurs keep.

    All per unit of time and in the same unit (money, or over the value of the share).

    Pathwise gradient: all arguments.
    """
    return fee_income - loss * arbitrage_share
