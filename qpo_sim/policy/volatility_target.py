r"""Volatility targeting: scales what is held so that its volatility stays near a target.

What is held earned the returns $r_t$ per unit of exposure (value of spot, gross notional of an account). Their variance
per year is estimated by $\hat\sigma^2_t = d\,\hat\sigma^2_{t-1} + (1 - d)\,r_t^2/\Delta$ with the step $\Delta$ in
years and $d = 2^{-\Delta/h}$ of a half-life h: what an investor knows at the end of the step. J.P. Morgan & Reuters
(1996), RiskMetrics technical document; Moreira & Muir (2017), Volatility-managed portfolios.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import rounded
from qpo_sim.policy import clock
from qpo_sim.policy.orders import DeskView, Order, Orders
from qpo_sim.types import HOURS_PER_YEAR, Array, Context

BUILDERS = ("volatility_target",)

_TINY = 1e-9


class State(NamedTuple):
    """Variance per year so far, and prices and exposure to each asset per unit of gross exposure at the last step."""

    variance: Array
    price: tuple[Array, ...]
    share: tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VolatilityTarget:
    r"""Scales spot, or all positions of an account, to the exposure $\min(\sigma^*/\hat\sigma, \text{greatest})$.

    Exposure is the value of spot over that of cash and spot, or the gross notional of an account over its equity. It is
    left alone while it is within a relative band around that.

    Attributes:
      volatility: target per square root of a year.
      start_volatility: estimate before the first step, per unit of exposure.
      half_life_hours: of the estimate.
      greatest: exposure.
      band: relative deviation that is left alone.
      every_hours: see `clock.is_due` (static).
      account: number of the account, None for spot (static).
      assets: numbers of the assets of the exposure (static).

    Pathwise gradient: volatility, start_volatility, half_life_hours, greatest.
    """

    volatility: Float[Array, ""]
    start_volatility: Float[Array, ""]
    half_life_hours: Float[Array, ""]
    greatest: Float[Array, ""]
    band: Float[Array, ""]
    every_hours: float = field(metadata={"static": True})
    account: int | None = field(metadata={"static": True})
    assets: tuple[int, ...] = field(metadata={"static": True})

    def _exposures(self, view: DeskView) -> tuple[tuple[Array, ...], Array, Array]:
        # By asset, gross, and the value they are set against.
        if self.account is None:
            gross = sum(view.spot, jnp.zeros_like(view.cash))
            return view.spot, gross, gross + view.cash
        seen = view.accounts[self.account]
        return seen.delta, seen.gross, seen.equity

    def _seen(self, variance: Array, view: DeskView) -> State:
        exposures, gross, _ = self._exposures(view)
        shares = tuple(e / jnp.maximum(gross, _TINY) for e in exposures)
        return State(variance, tuple(view.prices[i] for i in self.assets), shares)

    def init(self, view: DeskView) -> State:
        """The given estimate."""
        return self._seen(self.start_volatility * self.start_volatility * jnp.ones_like(view.equity), view)

    def step(self, context: Context, t: Array, state: State, view: DeskView) -> tuple[State, Orders]:
        """Orders after step t."""
        moves = [view.prices[i] / old - 1.0 for i, old in zip(self.assets, state.price, strict=True)]
        earned = sum(share * move for share, move in zip(state.share, moves, strict=True))
        decay = jnp.exp2(-context.step_hours / self.half_life_hours)
        variance = decay * state.variance + (1.0 - decay) * earned * earned * (HOURS_PER_YEAR / context.step_hours)
        _, gross, value = self._exposures(view)
        wanted = jnp.minimum(self.volatility / jnp.sqrt(jnp.maximum(variance, _TINY)), self.greatest)
        can_trade = (gross > _TINY) & (value > _TINY)
        factor = jnp.where(can_trade, wanted * value / jnp.where(can_trade, gross, 1.0), 1.0)
        is_out = can_trade & (jnp.abs(1.0 / factor - 1.0) > self.band)
        factor = jnp.where(is_out & (clock.is_due(context, t, self.every_hours) > 0.0), factor, 1.0)
        after = self._seen(variance, view)
        if self.account is None:
            return after, Orders(spot=tuple((factor - 1.0) * held for held in view.spot))
        return after, Orders(accounts=((self.account, Order(keep=factor)),))


def volatility_target(
    *,
    volatility_per_year: float,
    account: str | None = None,
    start_volatility_per_year: float,
    half_life_hours: float = 720.0,
    greatest: float = 1.0,
    band: float = 0.1,
    every_hours: float = 0.0,
    accounts: Sequence[str],
    assets: Sequence[str],
    spot: Sequence[str],
    account_assets: Sequence[Sequence[int]],
    dtype: Any = jnp.float32,
) -> VolatilityTarget:
    """Volatility target of spot or of a margin account; see `VolatilityTarget`.

    Args:
      volatility_per_year: target, per square root of a year.
      account: name of a margin account; spot when left out.
      start_volatility_per_year: estimate of the volatility per unit of exposure at the start.
      half_life_hours: of the estimate.
      greatest: exposure; at most 1 for spot, which cannot be borrowed for.
      band: relative deviation that is left alone.
      every_hours: time between dates on which it acts; 0 for every step.
      accounts: names of the accounts that can be traded.
      assets: names of the market's assets.
      spot: assets held outright.
      account_assets: assets each account depends on.
      dtype: precision of the paths.

    Raises:
      InputError: unknown account, nothing held as spot, a number out of bounds.
    """
    numbers = {
        "volatility_per_year": volatility_per_year,
        "start_volatility_per_year": start_volatility_per_year,
        "half_life_hours": half_life_hours,
        "greatest": greatest,
    }
    for key, number in numbers.items():
        if not (np.isfinite(number) and number > 0.0):
            raise InputError(f"volatility_target: {key} is {number}; it must be positive.")
    if not (np.isfinite(band) and band >= 0.0):
        raise InputError(f"volatility_target: band is {band}; it must not be negative.")
    clock.check("volatility_target", every_hours)
    if account is None:
        if not spot:
            raise InputError("volatility_target: the book holds no spot; name an account.")
        if greatest > 1.0:
            raise InputError(f"volatility_target: greatest is {greatest}; spot cannot exceed 1.")
        number, own = None, tuple(list(assets).index(name) for name in spot)
    else:
        number = clock.account_number("volatility_target", account, accounts)
        own = tuple(account_assets[number])
    return VolatilityTarget(
        rounded(volatility_per_year, dtype),
        rounded(start_volatility_per_year, dtype),
        rounded(half_life_hours, dtype),
        rounded(greatest, dtype),
        rounded(band, dtype),
        float(every_hours),
        number,
        own,
    )
