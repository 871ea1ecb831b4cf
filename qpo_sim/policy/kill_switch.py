r"""Kill switch: closes positions on a drawdown, a weak health factor or a high margin ratio; later opens them again.

On -> off when equity <= peak (1 - drawdown), health <= its minimum or margin ratio >= its maximum. Off -> on when
`cooldown` steps have passed and equity has recovered from its low since; the peak starts again from there. It is
decided at the end of a step, on that step's equity, which may lie well beyond the threshold, and carried out at the
prices of that moment or later ones: the drawdown that is realised exceeds the one that triggers.

The state machine is a step function of rows of paths without randomness. Pathwise gradient: none (switching times are
indicators); the amounts of its actions have one.
"""

from typing import NamedTuple

import jax.numpy as jnp

from qpo_sim.errors import InputError
from qpo_sim.types import Array


class KillSwitch(NamedTuple):
    """Thresholds (see `thresholds`); arrays or numbers."""

    drawdown: Array
    cooldown: Array
    recovery: Array
    health_min: Array
    margin_ratio_max: Array


class State(NamedTuple):
    """State after a step, rows of paths.

    Attributes:
      on: 1 while positions may be held, else 0.
      peak: greatest equity since the start or since the switch last went on.
      low: least equity since it went off.
      waited: steps since it went off.
    """

    on: Array
    peak: Array
    low: Array
    waited: Array


class Decision(NamedTuple):
    """What a step decided; 1 or 0 each but for `drawdown`.

    Attributes:
      fires: positions are to be closed.
      resumes: positions may be opened again.
      by_drawdown: drawdown was among the causes of firing.
      by_health: the health factor was.
      by_margin: the margin ratio was.
      drawdown: 1 - equity/peak as it was decided.
    """

    fires: Array
    resumes: Array
    by_drawdown: Array
    by_health: Array
    by_margin: Array
    drawdown: Array


def thresholds(
    *,
    drawdown: float = 1.0,
    cooldown: float = 0,
    recovery: float = 0.0,
    health_min: float = 0.0,
    margin_ratio_max: float = float("inf"),
) -> KillSwitch:
    """Checked thresholds; the defaults never fire while equity is above 0.

    Args:
      drawdown: from the peak, as a share of it, in (0, 1].
      cooldown: steps that must pass before it goes on again; inf for never.
      recovery: rise from the low, as a share of it, that must be seen before it goes on again.
      health_min: health factor at or below which it fires; 0 for none.
      margin_ratio_max: maintenance margin over equity at or above which it fires; inf for none.

    Raises:
      InputError: a threshold out of bounds.
    """
    if not 0.0 < drawdown <= 1.0:
        raise InputError(f"kill switch: drawdown is {drawdown}; it must lie in (0, 1], e.g. 0.2 for 20 %.")
    if not (cooldown >= 0 and (cooldown == float("inf") or int(cooldown) == cooldown)):
        raise InputError(f"kill switch: cooldown is {cooldown}; it must be a whole number of steps, 0 or more, or inf.")
    if not 0.0 <= recovery < float("inf"):
        raise InputError(f"kill switch: recovery is {recovery}; it must be a number of at least 0, e.g. 0.05 for 5 %.")
    if not 0.0 <= health_min < float("inf"):
        raise InputError(f"kill switch: health_min is {health_min}; it must be a number of at least 0, 0 for none.")
    if not margin_ratio_max > 0.0:
        raise InputError(f"kill switch: margin_ratio_max is {margin_ratio_max}; it must be above 0, inf for none.")
    return KillSwitch(drawdown, cooldown, recovery, health_min, margin_ratio_max)


def init(equity: Array) -> State:
    """State before the first step: on, the peak at the starting equity."""
    equity = jnp.asarray(equity)
    equity = equity.astype(jnp.result_type(equity.dtype, jnp.float32))
    return State(jnp.ones_like(equity), equity, equity, jnp.zeros_like(equity))


def step(
    switch: KillSwitch, state: State, equity: Array, *, health: Array | None = None, margin_ratio: Array | None = None
) -> tuple[State, Decision]:
    """State after a step and what was decided.

    Args:
      switch: thresholds.
      state: before the step.
      equity: at the end of the step.
      health: health factor at the end of the step, where the book has a loan.
      margin_ratio: maintenance margin over equity at the end of the step, where the book has a margin account.
    """
    one = jnp.ones_like(state.on)
    equity = equity * one
    was_on = state.on > 0.0
    peak = jnp.where(was_on, jnp.maximum(state.peak, equity), state.peak)
    falls = equity <= peak * (1.0 - switch.drawdown)
    weak = (one < 0.0) if health is None else (health * one <= switch.health_min) & (switch.health_min > 0.0)
    strained = (one < 0.0) if margin_ratio is None else margin_ratio * one >= switch.margin_ratio_max
    fires = was_on & (falls | weak | strained)

    waited = jnp.where(was_on, 0.0, state.waited + 1.0)
    low = jnp.where(was_on, equity, jnp.minimum(state.low, equity))
    recovered = (waited >= switch.cooldown) & (equity >= low * (1.0 + switch.recovery))
    resumes = ~was_on & recovered & ~weak & ~strained

    def flag(mask: Array) -> Array:
        return jnp.where(mask, one, 0.0)

    after = State(
        flag((was_on & ~fires) | resumes),
        jnp.where(resumes, equity, peak),
        low,
        jnp.where(resumes, 0.0, waited),
    )
    decision = Decision(
        flag(fires),
        flag(resumes),
        flag(fires & falls),
        flag(fires & weak),
        flag(fires & strained),
        1.0 - equity / jnp.where(peak > 0.0, peak, 1.0),
    )
    return after, decision


def sale_to_health(collateral: Array, debt: Array, threshold: Array, target: Array, *, cost: Array = 0.0) -> Array:
    r"""Collateral to sell, and debt to repay with it, that lifts the health factor to h: $s = (hD - LT C)/(h - LT)$.

    With a relative cost k of the sale s (1 - k) is repaid and $s = (hD - LT C)/(h(1-k) - LT)$. 0 where the loan is
    healthy already; never more than the collateral, nor than clears the debt.

    Args:
      collateral: C, its value.
      debt: D, its value.
      threshold: LT, liquidation threshold, weighted by value.
      target: h > LT/(1 - k).
      cost: k in [0, 1).

    Pathwise gradient: all arguments (almost everywhere).
    """
    wanted = (target * debt - threshold * collateral) / (target * (1.0 - cost) - threshold)
    return jnp.clip(wanted, 0.0, jnp.minimum(collateral, debt / (1.0 - cost)))


def repayment_to_health(collateral: Array, debt: Array, threshold: Array, target: Array) -> Array:
    r"""Debt to repay from outside that lifts the health factor to h: $(D - LT C/h)^+$.

    Pathwise gradient: all arguments (almost everywhere).
    """
    return jnp.maximum(debt - threshold * collateral / target, 0.0)


def top_up_to_health(collateral: Array, debt: Array, threshold: Array, target: Array) -> Array:
    r"""Value of collateral to add from outside that lifts the health factor to h: $(hD/LT - C)^+$.

    Pathwise gradient: all arguments (almost everywhere).
    """
    return jnp.maximum(target * debt / threshold - collateral, 0.0)


def reduction_to_margin_ratio(margin_ratio: Array, target: Array) -> Array:
    """Share of all positions to close that brings the margin ratio down to the target: 1 - target/ratio, at least 0.

    For maintenance margin in proportion to the size and a closing that costs nothing.

    Pathwise gradient: all arguments (almost everywhere).
    """
    needs = margin_ratio > target
    return jnp.where(needs, 1.0 - target / jnp.where(needs, margin_ratio, 1.0), 0.0)
