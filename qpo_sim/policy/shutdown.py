"""The kill switch as a policy: closes everything when it fires, opens the same again in proportion when it resumes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import rounded
from qpo_sim.policy import kill_switch as machine
from qpo_sim.policy.orders import DeskView, Order, Orders
from qpo_sim.types import Array, Context

BUILDERS = ("kill_switch",)

_LEAST_STRAIN = 1e-9


class State(NamedTuple):
    """The machine, and what was held when it fired.

    Attributes:
      machine: see `policy.kill_switch`.
      spot: value of each outright holding per unit of the book's equity.
      exposure: by account and position, per unit of the book's equity: delta, or units of an option.
    """

    machine: machine.State
    spot: tuple[Array, ...]
    exposure: tuple[tuple[Array, ...], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shutdown:
    """Closes spot and all accounts where the kill switch fires (see `policy.kill_switch`), and while it is off.

    When it resumes spot and the positions of margin accounts are bought again, with as much delta per unit of the
    book's equity as there was (options: as many units); accounts without positions, as loans and pool shares, stay
    closed. Orders are filled at the prices of the step's end, which a trigger within the step may be far from: the
    drawdown that is realised exceeds the one that triggers.

    Attributes:
      drawdown: of the book's equity from its peak that fires; 1 for none.
      recovery: rise from the low since that resumes.
      health_min: health factor of a loan that fires; 0 for none.
      ratio_max: margin ratio of another account, requirement over margin equity, that fires; infinity for none.
      cooldown: steps before it may resume; infinity for never.
      is_loan: by account (static).
      is_option: by account and position (static).

    Pathwise gradient: none in its parameters.
    """

    drawdown: Float[Array, ""]
    recovery: Float[Array, ""]
    health_min: Float[Array, ""]
    ratio_max: Float[Array, ""]
    cooldown: Float[Array, ""]
    is_loan: tuple[bool, ...] = field(metadata={"static": True})
    is_option: tuple[tuple[bool, ...], ...] = field(metadata={"static": True})

    def init(self, view: DeskView) -> State:
        """On, the peak at the starting equity."""
        start = machine.init(view.equity)
        zero = jnp.zeros_like(view.equity)
        exposure = tuple(tuple(zero for _ in account.quantity) for account in view.accounts)
        return State(start, tuple(zero for _ in view.spot), exposure)

    def halts(self, state: State) -> Array:
        """1 while everything is to stay closed."""
        return 1.0 - state.machine.on

    def step(self, context: Context, t: Array, state: State, view: DeskView) -> tuple[State, Orders]:
        """Orders after step t."""
        strain, loan_strain = jnp.zeros_like(view.equity), jnp.zeros_like(view.equity)
        for is_loan, account in zip(self.is_loan, view.accounts, strict=True):
            ratio = account.is_open * account.ratio
            if is_loan:
                loan_strain = jnp.maximum(loan_strain, ratio)
            else:
                strain = jnp.maximum(strain, ratio)
        # A book without debt is healthy.
        health = 1.0 / jnp.maximum(loan_strain, _LEAST_STRAIN)
        switch = machine.KillSwitch(self.drawdown, self.cooldown, self.recovery, self.health_min, self.ratio_max)
        after, decision = machine.step(switch, state.machine, view.equity, health=health, margin_ratio=strain)
        fires, resumes, is_closed = decision.fires, decision.resumes, 1.0 - after.on
        scale = 1.0 / jnp.maximum(view.equity, 1e-9)

        def kept(old: Array, now: Array) -> Array:
            return jnp.where(fires > 0.0, now * scale, old)

        # Nobody reopens with nothing.
        wealth = jnp.maximum(view.equity, 0.0)
        spot = tuple(kept(old, now) for old, now in zip(state.spot, view.spot, strict=True))
        bought = tuple(resumes * share * wealth - is_closed * now for share, now in zip(spot, view.spot, strict=True))
        exposure, orders = [], []
        for j, (row, account) in enumerate(zip(state.exposure, view.accounts, strict=True)):
            units = [
                jnp.ones_like(wealth) if is_option else delta
                for is_option, delta in zip(self.is_option[j], account.unit_delta, strict=True)
            ]
            row = tuple(kept(old, q * unit) for old, q, unit in zip(row, account.quantity, units, strict=True))
            exposure.append(row)
            reopened = tuple(
                (k, resumes * share * wealth / unit) for k, (share, unit) in enumerate(zip(row, units, strict=True))
            )
            orders.append((j, Order(keep=1.0 - is_closed, trade=reopened)))
        return State(after, spot, tuple(exposure)), Orders(spot=bought if bought else None, accounts=tuple(orders))


def kill_switch(
    *,
    drawdown: float = 1.0,
    margin_ratio: float | None = None,
    health_factor: float | None = None,
    cooldown: float | None = None,
    recovery: float = 0.0,
    accounts: Sequence[str],
    loans: Sequence[str] = (),
    account_options: Sequence[Sequence[int]],
    dtype: Any = jnp.float32,
) -> Shutdown:
    """Kill switch of the whole book.

    Args:
      drawdown: of the book's equity from its peak that fires, e.g. 0.2; 1 for none.
      margin_ratio: margin ratio of any margin account that fires, e.g. 0.7; none when left out.
      health_factor: health factor of any loan that fires, e.g. 1.15; none when left out.
      cooldown: whole steps before it may resume; never when left out or infinite.
      recovery: rise of the equity from its low that must be seen before it resumes.
      accounts: names of the accounts that can be traded.
      loans: those of them that have no margin ratio but a health factor, or neither.
      account_options: for every account, the underlying of each of its positions that is an option, else -1.
      dtype: precision of the paths.

    Raises:
      InputError: a threshold out of bounds, or nothing that could fire.
    """
    wait = np.inf if cooldown is None else cooldown
    machine.thresholds(drawdown=drawdown, cooldown=wait, recovery=recovery)
    if margin_ratio is not None and not 0.0 < margin_ratio < 1.0:
        raise InputError(f"kill_switch: margin_ratio is {margin_ratio}; it must lie in (0, 1), e.g. 0.7.")
    if health_factor is not None and not 1.0 < health_factor < np.inf:
        raise InputError(f"kill_switch: health_factor is {health_factor}; it must be above 1, e.g. 1.15.")
    if drawdown >= 1.0 and margin_ratio is None and health_factor is None:
        raise InputError("kill_switch: nothing fires it; give drawdown, margin_ratio or health_factor.")
    return Shutdown(
        drawdown=rounded(drawdown, dtype),
        recovery=rounded(recovery, dtype),
        health_min=rounded(0.0 if health_factor is None else health_factor, dtype),
        ratio_max=rounded(np.inf if margin_ratio is None else margin_ratio, dtype),
        cooldown=rounded(wait, dtype),
        is_loan=tuple(name in loans for name in accounts),
        is_option=tuple(tuple(under >= 0 for under in row) for row in account_options),
    )
