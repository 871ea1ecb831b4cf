"""Hedging: trades one position so that the book's delta or vega in an asset stays near a target."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import rounded
from qpo_sim.policy import clock
from qpo_sim.policy.orders import DeskView, Order, Orders
from qpo_sim.types import Array, Context

BUILDERS = ("hedge",)

GREEKS = ("delta", "vega")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hedge:
    """Buys units of one position of one account so that the book's Greek in an asset is the target.

    Delta is the change of the book's equity per relative change of the asset's price, of spot and of every account;
    vega that of its options per 1.00 of implied volatility. Both in units of the starting capital.

    Attributes:
      target: of the Greek.
      band: deviation from it that is left alone.
      every_hours: see `clock.is_due` (static).
      account: number of the account that is traded (static).
      position: number of the position in it (static).
      greek: "delta" or "vega" (static).
      asset: underlying (static).
      spot: numbers of the outright holdings of the asset (static).
      exposures: (account, entry of its `delta`) for every account that depends on the asset (static).
      options: (account, position) of the options on the asset (static).

    Pathwise gradient: target.
    """

    target: Float[Array, ""]
    band: Float[Array, ""]
    every_hours: float = field(metadata={"static": True})
    account: int = field(metadata={"static": True})
    position: int = field(metadata={"static": True})
    greek: str = field(metadata={"static": True})
    asset: int = field(metadata={"static": True})
    spot: tuple[int, ...] = field(metadata={"static": True})
    exposures: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    options: tuple[tuple[int, int], ...] = field(metadata={"static": True})

    def init(self, view: DeskView) -> tuple[()]:
        """No state."""
        return ()

    def step(self, context: Context, t: Array, state: tuple[()], view: DeskView) -> tuple[tuple[()], Orders]:
        """Orders after step t."""
        seen = view.accounts[self.account]
        zero = jnp.zeros_like(view.cash)
        if self.greek == "delta":
            held = sum(
                (view.accounts[j].delta[k] for j, k in self.exposures), sum((view.spot[k] for k in self.spot), zero)
            )
            unit = seen.unit_delta[self.position]
        else:
            rows = (view.accounts[j].quantity[k] * view.accounts[j].unit_vega[k] for j, k in self.options)
            held, unit = sum(rows, zero), seen.unit_vega[self.position]
        # An option about to expire has no Greek to trade with.
        trades = jnp.abs(unit) > 1e-4
        off = held - self.target
        acts = trades & (jnp.abs(off) > self.band)
        due = clock.is_due(context, t, self.every_hours)
        units = jnp.where(acts, -off / jnp.where(trades, unit, 1.0), 0.0) * due
        return (), Orders(accounts=((self.account, Order(trade=((self.position, units),))),))


def hedge(
    *,
    account: str,
    position: int,
    asset: str,
    greek: str = "delta",
    target: float = 0.0,
    band: float = 0.0,
    every_hours: float = 0.0,
    accounts: Sequence[str],
    assets: Sequence[str],
    spot: Sequence[str],
    account_assets: Sequence[Sequence[int]],
    account_options: Sequence[Sequence[int]],
    n_positions: Sequence[int],
    dtype: Any = jnp.float32,
) -> Hedge:
    """Delta or vega hedge; see `Hedge`.

    Args:
      account: the account that is traded.
      position: number of the position in it, from 0.
      asset: underlying.
      greek: "delta" or "vega".
      target: of the book's Greek.
      band: deviation that is left alone.
      every_hours: time between dates on which it acts; 0 for every step.
      accounts: names of the accounts that can be traded.
      assets: names of the market's assets.
      spot: assets held outright.
      account_assets: assets each account depends on.
      account_options: for every account, the underlying of each of its positions that is an option, else -1.
      n_positions: positions of each account.
      dtype: precision of the paths.

    Raises:
      InputError: unknown account, position, asset or Greek, a negative band.
    """
    if greek not in GREEKS:
        raise InputError(f"hedge: greek is {greek!r}; it must be one of {', '.join(GREEKS)}.")
    number = clock.account_number("hedge", account, accounts)
    if asset not in assets:
        raise InputError(f"hedge: there is no asset {asset!r} in the market; it has {', '.join(assets)}.")
    if not 0 <= position < n_positions[number]:
        raise InputError(
            f"hedge: position is {position}; account {account} has positions 0..{n_positions[number] - 1}."
        )
    if not (np.isfinite(band) and band >= 0.0):
        raise InputError(f"hedge: band is {band}; it must not be negative.")
    clock.check("hedge", every_hours)
    index = list(assets).index(asset)
    exposures = [(j, list(own).index(index)) for j, own in enumerate(account_assets) if index in own]
    options = [(j, k) for j, row in enumerate(account_options) for k, under in enumerate(row) if under == index]
    if greek == "vega" and (number, position) not in options:
        raise InputError(f"hedge: position {position} of {account} is not an option on {asset}, so it has no vega.")
    return Hedge(
        target=rounded(target, dtype),
        band=rounded(band, dtype),
        every_hours=float(every_hours),
        account=number,
        position=int(position),
        greek=greek,
        asset=index,
        spot=tuple(k for k, name in enumerate(spot) if name == asset),
        exposures=tuple(exposures),
        options=tuple(options),
    )
