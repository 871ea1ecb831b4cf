r"""Volume and fee income of pools in reduced form."""

import jax.numpy as jnp

from qpo_sim.types import Array


def volume(turnover: Array, log_return: Array, volatility: Array, *, base: Array, sensitivity: Array) -> Array:
    r"""Volume of a step, $turnover (base + \kappa |r|/\sigma)$: pools trade more when prices move.

    For normal returns of standard deviation sigma the mean is turnover (base + kappa sqrt(2/pi)). A reduced form, not
    confirmed by a published table.

    Args:
      turnover: of a step, in money.
      log_return: r of the step.
      volatility: sigma, standard deviation of r, > 0.
      base: share of turnover that does not depend on the move.
      sensitivity: kappa.

    Pathwise gradient: all arguments (log_return not at 0).
    """
    return turnover * (base + sensitivity * jnp.abs(log_return) / volatility)


def fee_income(volume: Array, fee: Array, share: Array) -> Array:
    """Fees that a share of a full-range pool earns: fee x volume x share of the pool's liquidity.

    Pathwise gradient: all arguments.
    """
    return fee * volume * share


def compounded(liquidity: Array, income: Array, value: Array) -> Array:
    r"""Liquidity (L, k or D) after fees stayed in the pool, $L (1 + income/V)$: values are linear in it.

    Args:
      liquidity: L, k or D before.
      income: fees, in the currency of `value`, put in at the pool's own ratio of coins.
      value: V > 0 of the share before the fees.

    Pathwise gradient: all arguments.
    """
    return liquidity * (1.0 + income / value)
