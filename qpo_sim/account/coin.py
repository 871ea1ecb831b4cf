"""Coins that accounts hold beside the market's assets: stablecoins, and tokens that stand for an asset.

The price of a coin is that of its asset (1 for a stablecoin) times its price in terms of it, which the market's `peg`
process of the coin's name gives; without such a process the coin is at par. Paths start at par.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.instrument.contract import USD
from qpo_sim.instrument.scene import Scene
from qpo_sim.market.side.peg import Peg
from qpo_sim.market.side.view import named
from qpo_sim.types import Array, Context

STABLECOINS = ("USD", "USDT", "USDC", "DAI", "USDS", "USDe", "FDUSD", "PYUSD", "GHO", "LUSD", "crvUSD", "FRAX")


@dataclass(frozen=True)
class Coin:
    """A coin; static.

    Attributes:
      name: of the coin, also that of its peg process.
      asset: number of the asset it follows, or `USD`.
      is_pegged: whether a peg process of its name moves its price; the asset itself has none.
    """

    name: str
    asset: int
    is_pegged: bool

    def price(self, context: Context, scene: Scene) -> Array:
        """Price in USD over the starting price of its asset."""
        one = jnp.ones_like(scene.prices[0])
        price = one if self.asset == USD else scene.prices[self.asset]
        if not self.is_pegged:
            return price
        for bound in context.market.side:
            component = bound.component
            if isinstance(component, Peg) and self.name in component.coins:
                (output,) = named(component, {"peg": ()})
                return price * scene.side[output][component.coins.index(self.name)]
        return price


def coin_of(described: str | Mapping[str, Any], place: str, assets: Sequence[str]) -> Coin:
    """Coin of a name or of a description `{name, asset}`.

    Args:
      described: an asset of the market, a stablecoin of `STABLECOINS`, or a mapping for any other coin: `name`, also
        that of its peg process, and `asset`, what it follows (USD when left out).
      place: for messages.
      assets: the market's assets.

    Raises:
      InputError: neither, or an asset that is not in the market.
    """
    if isinstance(described, Mapping):
        for key in described:
            if key not in ("name", "asset"):
                raise InputError(f"{place} has no option {key!r}: {did_you_mean(str(key), ('name', 'asset'))}")
        name, asset = described.get("name"), described.get("asset", "USD")
        if not name:
            raise InputError(f"{place}.name is missing: the name of the coin and of its peg process.")
        if asset != "USD" and asset not in assets:
            raise InputError(f"{place}.asset is {asset!r}: {did_you_mean(str(asset), ['USD', *assets])}")
        return Coin(str(name), USD if asset == "USD" else list(assets).index(asset), True)
    if described in assets:
        return Coin(str(described), list(assets).index(described), False)
    if described in STABLECOINS:
        return Coin(str(described), USD, described != "USD")
    known = did_you_mean(str(described), [*assets, *STABLECOINS])
    raise InputError(f"{place} is {described!r}, neither an asset nor a known stablecoin: {known}")


def gas_price(scene: Scene, like: Array) -> Array:
    """Gas price of the market's process; 1 without one."""
    return scene.side["gas"] if "gas" in scene.side else jnp.ones_like(like)
