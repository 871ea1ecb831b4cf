r"""Contracts that a margin account may hold: what one unit is worth, how it settles and when it expires.

An account's equity is its balances at their prices plus the sum of quantity times `mark`. Entry prices are in the
balance, so that equity is linear in the quantities and a trade at the mark moves nothing: buying dq units takes
dq x mark out of the balance in the contract's settlement currency. A linear perpetual entered at E is q units at mark P
and a balance of W - q E; an inverse one of N USD is N units at mark -1 and a balance of W + N/E coins, whose value
(W + N/E) P - N is the wallet and the profit N (1/E - 1/P) in coin at the price P.

Prices are relative to the start, money in units of the starting capital.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.instrument import option
from qpo_sim.instrument.scene import Scene
from qpo_sim.market.side import implied_volatility
from qpo_sim.types import Array

# Settlement in USD rather than in a coin.
USD = -1
# Within this many years of the expiry, half a minute, it has come.
EXPIRY_SLACK = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearPerpetual:
    """Perpetual on one asset, settled in USD; the unit is one coin. Mark: the price."""

    asset: int = field(metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """Assets whose prices the mark depends on."""
        return (self.asset,)

    @property
    def settlement(self) -> int:
        """Asset it settles in, or `USD`."""
        return USD

    @property
    def expiry_years(self) -> Any:
        """Time of expiry since the start; None for contracts without."""
        return None

    def mark(self, scene: Scene) -> Array:
        """Value of one unit."""
        return scene.prices[self.asset]

    def notional(self, scene: Scene) -> Array:
        """Value of the position that one unit stands for."""
        return scene.prices[self.asset]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InversePerpetual:
    """Perpetual settled in its own coin; the unit is one USD of notional. Mark: -1."""

    asset: int = field(metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `LinearPerpetual`."""
        return (self.asset,)

    @property
    def settlement(self) -> int:
        """See `LinearPerpetual`."""
        return self.asset

    @property
    def expiry_years(self) -> Any:
        """See `LinearPerpetual`."""
        return None

    def mark(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return -jnp.ones_like(scene.prices[self.asset])

    def notional(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return jnp.ones_like(scene.prices[self.asset])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantoPerpetual:
    """Perpetual on one asset that pays a fixed number of coins of another per unit of price, `settlement`.

    The unit pays the change of the relative price in coins (whose price is relative too). Mark: product of both prices.
    """

    asset: int = field(metadata={"static": True})
    settlement: int = field(metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `LinearPerpetual`."""
        return (self.asset, self.settlement)

    @property
    def expiry_years(self) -> Any:
        """See `LinearPerpetual`."""
        return None

    def mark(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return scene.prices[self.asset] * scene.prices[self.settlement]

    def notional(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return self.mark(scene)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DatedFuture:
    """Future settled in USD at the price at expiry; before it the mark is the forward P exp(carry x time left)."""

    carry_per_year: Float[Array, ""]
    expiry_years: Float[Array, ""]
    asset: int = field(metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `LinearPerpetual`."""
        return (self.asset,)

    @property
    def settlement(self) -> int:
        """See `LinearPerpetual`."""
        return USD

    def time_left(self, scene: Scene) -> Array:
        """Years to expiry, not below 0; 0 within half a minute of it."""
        return _time_left(self.expiry_years, scene)

    def mark(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return scene.prices[self.asset] * jnp.exp(self.carry_per_year * self.time_left(scene))

    def notional(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return self.mark(scene)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Option:
    """European option on the forward of one asset, settled in USD or in its coin; the unit is one coin.

    The mark is the Black-76 value at the market's implied-volatility surface; where the market has none, at
    `volatility`, which then stays with the strike. Coin settlement changes the currency of what is paid, not the value:
    c = V/F coins are V in USD at the forward (domain of inverse options: payoff max(w (S - K), 0)/S coins).

    Attributes:
      strike: over the starting price of the asset.
      expiry_years: time of expiry since the start.
      volatility: per square root of a year.
      carry_per_year: forward = P exp(carry x time left).
      asset: the underlying (static).
      is_call: else a put (static).
      is_coin_settled: else settled in USD (static).
    """

    strike: Float[Array, ""]
    expiry_years: Float[Array, ""]
    volatility: Float[Array, ""]
    carry_per_year: Float[Array, ""]
    asset: int = field(metadata={"static": True})
    is_call: bool = field(metadata={"static": True})
    is_coin_settled: bool = field(default=False, metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `LinearPerpetual`."""
        return (self.asset,)

    @property
    def settlement(self) -> int:
        """See `LinearPerpetual`."""
        return self.asset if self.is_coin_settled else USD

    def forward(self, scene: Scene) -> Array:
        """Forward price of its expiry."""
        return scene.prices[self.asset] * jnp.exp(self.carry_per_year * self.time_left(scene))

    def time_left(self, scene: Scene) -> Array:
        """Years to expiry, not below 0; 0 within half a minute of it."""
        return _time_left(self.expiry_years, scene)

    def implied_volatility(self, scene: Scene) -> Array:
        """Volatility at its strike and expiry."""
        if "iv_level" not in scene.side:
            return self.volatility * jnp.ones_like(scene.prices[self.asset])
        log_moneyness = jnp.log(self.strike / self.forward(scene))
        surface = implied_volatility.of_asset(scene.side, self.asset)
        return implied_volatility.implied_volatility(log_moneyness, self.time_left(scene), surface)

    def mark(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return self.mark_at(scene, self.implied_volatility(scene))

    def mark_at(self, scene: Scene, volatility: Array) -> Array:
        """Value of one unit at a given volatility."""
        forward = self.forward(scene)
        value = option.value(forward, self.strike, self.time_left(scene), volatility, is_call=self.is_call)
        # Coins at the forward are paid at the price.
        return value * (scene.prices[self.asset] / forward) if self.is_coin_settled else value

    def notional(self, scene: Scene) -> Array:
        """See `LinearPerpetual`."""
        return scene.prices[self.asset]


def _time_left(expiry_years: Array, scene: Scene) -> Array:
    left = expiry_years - scene.years
    return jnp.where(left > EXPIRY_SLACK, left, 0.0)


Contract = LinearPerpetual | InversePerpetual | QuantoPerpetual | DatedFuture | Option
