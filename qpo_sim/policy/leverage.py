"""Policies on one account: keep its leverage, sell down in steps as the margin ratio rises, or add collateral."""

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

BUILDERS = ("constant_leverage", "ladder", "top_up")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConstantLeverage:
    """Scales all positions of an account so that gross notional over equity is `leverage`, where it is out of the band.

    Attributes:
      leverage: target.
      band: relative deviation that is left alone.
      every_hours: see `clock.is_due` (static).
      account: number of the account (static).

    Pathwise gradient: leverage.
    """

    leverage: Float[Array, ""]
    band: Float[Array, ""]
    every_hours: float = field(metadata={"static": True})
    account: int = field(metadata={"static": True})

    def init(self, view: DeskView) -> tuple[()]:
        """No state."""
        return ()

    def step(self, context: Context, t: Array, state: tuple[()], view: DeskView) -> tuple[tuple[()], Orders]:
        """Orders after step t."""
        seen = view.accounts[self.account]
        trades = (seen.gross > 0.0) & (seen.equity > 0.0)
        factor = self.leverage * seen.equity / jnp.where(trades, seen.gross, 1.0)
        is_out = trades & (jnp.abs(1.0 / jnp.where(trades, factor, 1.0) - 1.0) > self.band)
        acts = is_out * clock.is_due(context, t, self.every_hours)
        return (), Orders(accounts=((self.account, Order(keep=jnp.where(acts > 0.0, factor, 1.0))),))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ladder:
    """Keeps a share of all positions of an account (of a loan's debt) at each step that ends above a margin ratio.

    Attributes:
      ratio: increasing margin ratios, requirement over margin equity (one over the health factor of a loan).
      keep: decreasing shares that are kept above each.
      account: number of the account (static).

    Pathwise gradient: keep.
    """

    ratio: Float[Array, " rungs"]
    keep: Float[Array, " rungs"]
    account: int = field(metadata={"static": True})

    def init(self, view: DeskView) -> tuple[()]:
        """No state."""
        return ()

    def step(self, context: Context, t: Array, state: tuple[()], view: DeskView) -> tuple[tuple[()], Orders]:
        """Orders after step t."""
        seen = view.accounts[self.account].ratio
        keep = jnp.ones_like(seen)
        for k in range(self.ratio.shape[0]):
            keep = jnp.where(seen > self.ratio[k], self.keep[k], keep)
        return (), Orders(accounts=((self.account, Order(keep=keep)),))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopUp:
    """Moves cash into an account whose margin ratio exceeds a trigger, up to a target; repays debt of a loan.

    Attributes:
      trigger: margin ratio above which it acts.
      target: margin ratio afterwards, as far as the cash goes.
      account: number of the account (static).
      repays: the account is a loan: cash reduces the requirement rather than adds to the collateral (static).

    Pathwise gradient: target.
    """

    trigger: Float[Array, ""]
    target: Float[Array, ""]
    account: int = field(metadata={"static": True})
    repays: bool = field(metadata={"static": True})

    def init(self, view: DeskView) -> tuple[()]:
        """No state."""
        return ()

    def step(self, context: Context, t: Array, state: tuple[()], view: DeskView) -> tuple[tuple[()], Orders]:
        """Orders after step t."""
        seen = view.accounts[self.account]
        if self.repays:
            needed = seen.requirement - self.target * seen.collateral
        else:
            needed = seen.requirement / self.target - seen.collateral
        amount = jnp.where(seen.ratio > self.trigger, jnp.maximum(needed, 0.0), 0.0)
        return (), Orders(accounts=((self.account, Order(transfer=amount)),))


def constant_leverage(
    *,
    account: str,
    leverage: float,
    band: float = 0.1,
    every_hours: float = 0.0,
    accounts: Sequence[str],
    dtype: Any = jnp.float32,
) -> ConstantLeverage:
    """Constant leverage of a margin account; see `ConstantLeverage`.

    Raises:
      InputError: unknown account, leverage not positive, band negative.
    """
    if not (np.isfinite(leverage) and leverage > 0.0):
        raise InputError(f"constant_leverage: leverage is {leverage}; it must be positive.")
    if not (np.isfinite(band) and band >= 0.0):
        raise InputError(f"constant_leverage: band is {band}; it must not be negative.")
    clock.check("constant_leverage", every_hours)
    number = clock.account_number("constant_leverage", account, accounts)
    return ConstantLeverage(rounded(leverage, dtype), rounded(band, dtype), float(every_hours), number)


def ladder(
    *, account: str, ratios: Sequence[float], keep: Sequence[float], accounts: Sequence[str], dtype: Any = jnp.float32
) -> Ladder:
    """De-risking ladder; see `Ladder`.

    Args:
      account: its name.
      ratios: increasing margin ratios in (0, 1).
      keep: shares kept above each, decreasing, in [0, 1).
      accounts: names of the accounts that can be traded.
      dtype: precision of the paths.

    Raises:
      InputError: unknown account, or rungs out of order.
    """
    rungs, shares = np.asarray(ratios, np.float64), np.asarray(keep, np.float64)
    if rungs.shape != shares.shape or rungs.ndim != 1 or rungs.size == 0:
        raise InputError(f"ladder: ratios {list(ratios)} and keep {list(keep)} must be lists of the same length.")
    if not (np.all(np.diff(rungs) > 0.0) and rungs[0] > 0.0 and rungs[-1] < 1.0):
        raise InputError(f"ladder: ratios are {list(ratios)}; they must increase within (0, 1).")
    if not (np.all(np.diff(shares) < 0.0) and shares[-1] >= 0.0 and shares[0] < 1.0):
        raise InputError(f"ladder: keep is {list(keep)}; the shares must decrease within [0, 1).")
    return Ladder(rounded(rungs, dtype), rounded(shares, dtype), clock.account_number("ladder", account, accounts))


def top_up(
    *,
    account: str,
    trigger: float,
    target: float,
    accounts: Sequence[str],
    loans: Sequence[str] = (),
    dtype: Any = jnp.float32,
) -> TopUp:
    """Collateral top-up; see `TopUp`.

    Args:
      account: its name.
      trigger: margin ratio above which it acts, in (0, 1); for a loan one over the health factor.
      target: margin ratio afterwards, below the trigger.
      accounts: names of the accounts that can be traded.
      loans: those of them that are loans.
      dtype: precision of the paths.

    Raises:
      InputError: unknown account, or numbers out of order.
    """
    if not 0.0 < target < trigger < 1.0:
        raise InputError(
            f"top_up: target is {target} and trigger {trigger}; they must satisfy 0 < target < trigger < 1."
        )
    number = clock.account_number("top_up", account, accounts)
    return TopUp(rounded(trigger, dtype), rounded(target, dtype), number, account in loans)
