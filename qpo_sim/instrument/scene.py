"""What an instrument is valued in: the prices, the time and the side processes of one moment."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from qpo_sim.numerics import Rows, rows_like
from qpo_sim.types import Array

TRIGGERS = ("index", "mark", "last", "oracle")


class Scene(NamedTuple):
    """One moment of all paths.

    Attributes:
      prices: index price of each asset over its starting price.
      years: time since the start.
      side: outputs of the market's side processes by name, rows by asset where a process has one per asset.
    """

    prices: Rows
    years: Array
    side: dict[str, Any]

    def at_prices(self, assets: Sequence[int], prices: Sequence[Array]) -> "Scene":
        """The same moment at other prices of some assets."""
        rows = list(self.prices)
        for asset, price in zip(assets, prices, strict=True):
            rows[asset] = price
        return self._replace(prices=rows_like(self.prices, rows))

    def at_trigger(self, trigger: str, feeds: tuple[int, ...] = ()) -> "Scene":
        """The scene at the prices that a venue looks at: its index, its mark or last price, or an oracle's report.

        Without a process for it in the market the price is the index.

        Args:
          trigger: one of `TRIGGERS`.
          feeds: asset of each feed of the oracle.
        """
        rows = list(self.prices)
        if trigger == "oracle" and "oracle_log_price" in self.side:
            for asset, reported in zip(feeds, self.side["oracle_log_price"], strict=True):
                rows[asset] = jnp.exp(reported)
        elif f"{trigger}_ratio" in self.side:
            rows = [price * ratio for price, ratio in zip(rows, self.side[f"{trigger}_ratio"], strict=True)]
        else:
            return self
        return self._replace(prices=rows_like(self.prices, rows))
