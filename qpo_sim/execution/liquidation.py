r"""What a liquidation closes and who gets what, on path arrays.

A venue's `LiquidationProcess` decides the share of the positions to close; closing it costs slippage and a clearance
fee on the closed notional only. What is left of the margin stays with the user in a closing into the book, and goes to
the fund in a take-over. Losses beyond the margin are a shortfall for the waterfall (`execution.waterfall`):

equity before = equity after + fee + slippage - shortfall.

Elementwise, path axis last. Pathwise gradient: yes, but for the decisions themselves (thresholds, which tier).
Sources: Binance, liquidation protocol; Hyperliquid documentation, "Liquidations"; OKX, "Tiered maintenance margin ratio
rules" and forced partial liquidation.
"""

from typing import NamedTuple

import jax.numpy as jnp

from qpo_sim.errors import InputError
from qpo_sim.types import Array
from qpo_sim.venue.tiered_margin import LiquidationProcess, TierSchedule


class Close(NamedTuple):
    """Outcome of closing positions by force; all at least 0 but for `equity` of an account that keeps positions.

    Attributes:
      equity: what stays in the account.
      fee: what the insurance fund gets.
      slippage: what is lost to the book.
      shortfall: loss beyond the margin.
    """

    equity: Array
    fee: Array
    slippage: Array
    shortfall: Array


def is_below_maintenance(equity: Array, maintenance: Array, *, fee: Array = 0.0) -> Array:
    """Whether an account is liquidated: equity <= maintenance + liquidation fee, up to 1e-12 of the maintenance."""
    required = maintenance + fee
    return equity <= required * (1.0 + 1e-12)


def margin_ratio(equity: Array, maintenance: Array, *, fee: Array = 0.0) -> Array:
    """Equity over maintenance margin plus liquidation fee, at or below 1 when liquidated; infinite without positions.

    OKX's convention. Its reciprocal is the ratio that Binance shows.
    """
    required = maintenance + fee
    held = required > 0.0
    return jnp.where(held, equity / jnp.where(held, required, 1.0), jnp.inf)


def is_backstopped(equity: Array, maintenance: Array, *, backstop: Array) -> Array:
    """Whether the fund takes the account over: equity below `backstop` (Hyperliquid: 2/3) times its maintenance."""
    return equity < backstop * maintenance


def partial_close_share(equity: Array, maintenance: Array, cost: Array, *, target: Array = 1.0) -> Array:
    r"""Share of all positions to close so that the rest is compliant, within one tier: $s = (tM - e)/(tM - C)$.

    The root of $e - s C = t M (1 - s)$. Deductions make maintenance fall faster than this, so the share is exact in the
    first tiers and more than enough in higher ones; see `tiered_close_share` for one position. 1 where closing costs
    more than it frees, 0 where the account is compliant.

    Args:
      equity: e.
      maintenance: M.
      cost: C, fee and slippage of closing everything.
      target: t, equity over maintenance afterwards.
    """
    missing, freed = target * maintenance - equity, target * maintenance - cost
    frees = freed > 0.0
    share = jnp.where(frees, missing / jnp.where(frees, freed, 1.0), 1.0)
    return jnp.where(missing > 0.0, jnp.clip(share, 0.0, 1.0), 0.0)


def tiered_close_share(
    schedule: TierSchedule,
    notional: Array,
    equity: Array,
    *,
    cost_rate: Array = 0.0,
    other_maintenance: Array = 0.0,
    target: Array = 1.0,
) -> Array:
    r"""Smallest share of one position to close so that the account is compliant, exact across tiers.

    With the notional v that is kept, $e - (V - v) k \ge t\,(MM(v) + M_o)$. MM is the largest of its tiers' lines, so
    this is one inequality per tier n, $v (t r_n - k) \le e - V k - t M_o + t c_n$, and the largest v is the smallest of
    their bounds. Where $t r_n \le k$ the line bounds v from below: if the others leave nothing above it, no share is
    enough and the position is closed whole.

    Args:
      schedule: tiers by notional.
      notional: V, at least 0.
      equity: e, of the whole account.
      cost_rate: k, fee and slippage per closed notional.
      other_maintenance: M_o, of the account's other positions, not closed.
      target: t, equity over maintenance afterwards.
    """
    left = equity - notional * cost_rate - target * other_maintenance
    most, least, required = notional, 0.0 * notional, 0.0 * notional
    for n in range(schedule.rate.shape[0]):
        slope, room = target * schedule.rate[n] - cost_rate, left + target * schedule.deduction[n]
        required = jnp.maximum(required, schedule.rate[n] * notional - schedule.deduction[n])
        rises = slope > 0.0
        bound = room / jnp.where(slope != 0.0, slope, 1.0)
        most = jnp.where(rises, jnp.minimum(most, bound), most)
        # A level line is kept by every v or by none.
        floor = jnp.where(slope < 0.0, bound, jnp.where(room >= 0.0, 0.0, jnp.inf))
        least = jnp.where(rises, least, jnp.maximum(least, floor))
    held = notional > 0.0
    share = 1.0 - jnp.where(held, most / jnp.where(held, notional, 1.0), 0.0)
    share = jnp.where((most > 0.0) & (most >= least), jnp.clip(share, 0.0, 1.0), 1.0)
    is_compliant = equity >= target * (required + other_maintenance)
    return jnp.where(held & ~is_compliant, share, 0.0)


def tier_close_share(
    schedule: TierSchedule, size: Array, *, tiers_down: int, equity: Array, value: Array, fee_rate: Array = 0.0
) -> Array:
    """Share to close so that a position falls by `tiers_down` tiers of size, to the top of the lower tier.

    Positions in the first `tiers_down` tiers, and those whose equity would not do in the first tier either, are closed
    whole.

    Args:
      schedule: tiers by size in coins.
      size: of the position in coins, at least 0.
      tiers_down: how many tiers to go down (OKX: 2).
      equity: of the account.
      value: of the position, in the currency of the equity.
      fee_rate: liquidation fee that counts as maintenance.
    """
    # What each tier's positions are cut to, by tier; summed over the tiers below the size, as in `active_tier`.
    kept = [0.0 * schedule.floor[0]] * tiers_down + [
        # A touch below the edge, lest rounding leave the rest in the tier above.
        schedule.floor[n - tiers_down + 1] * (1.0 - 1e-6)
        for n in range(tiers_down, schedule.floor.shape[0])
    ]
    target = kept[0] + 0.0 * size
    for n in range(1, schedule.floor.shape[0]):
        target = target + (size > schedule.floor[n]) * (kept[n] - kept[n - 1])
    is_saved = equity > value * (schedule.rate[0] + fee_rate)
    held = size > 0.0
    return jnp.where(is_saved & held, 1.0 - target / jnp.where(held, size, 1.0), 1.0)


def close_share(
    process: LiquidationProcess,
    *,
    equity: Array,
    maintenance: Array,
    notional: Array,
    cost: Array,
    compliant_share: Array | None = None,
    tier_share: Array | None = None,
) -> Array:
    """Share of the positions that the venue closes of an account to be liquidated.

    Args:
      process: the venue's.
      equity: of the account.
      maintenance: its maintenance margin.
      notional: of the positions to close, in USD where the process has a threshold.
      cost: fee and slippage of closing all of it.
      compliant_share: share that makes it compliant, such as `tiered_close_share`; `partial_close_share` if omitted.
      tier_share: `tier_close_share`, needed for processes that go down by tiers.

    Raises:
      InputError: the process goes down by tiers and `tier_share` is missing.
    """
    whole = jnp.ones_like(equity)
    if process.process != "partial":
        return whole
    if process.partial == "share":
        share = jnp.where(notional > process.share_above_usd, process.share, whole)
    elif process.partial == "tiers":
        if tier_share is None:
            raise InputError("liquidation.partial is `tiers`, which needs a venue with tiers by size of the position.")
        share = tier_share
    elif compliant_share is None:
        share = partial_close_share(equity, maintenance, cost, target=process.target)
    else:
        share = compliant_share
    return jnp.where(is_backstopped(equity, maintenance, backstop=process.backstop), whole, share)


def close_out(equity: Array, notional: Array, *, share: Array, fee_rate: Array, slippage_rate: Array) -> Close:
    """Closing a share of the positions into the book: slippage first, then the fee out of what is left.

    Args:
      equity: before, at mark prices; below 0 it is a shortfall whatever the share.
      notional: of the positions.
      share: to close, in [0, 1].
      fee_rate: clearance fee on the closed notional.
      slippage_rate: loss against the mark on the closed notional.
    """
    closed = share * notional
    slippage = slippage_rate * closed
    left = equity - slippage
    positive = jnp.maximum(left, 0.0)
    fee = jnp.minimum(fee_rate * closed, positive)
    return Close(positive - fee, fee, slippage, positive - left)


def takeover(equity: Array, notional: Array, *, slippage_rate: Array) -> Close:
    """The fund takes positions and margin at the bankruptcy price and unwinds them: the user keeps nothing.

    The fund gains what equity leaves after slippage; where that is negative it is a shortfall.
    """
    slippage = slippage_rate * notional
    left = equity - slippage
    fee = jnp.maximum(left, 0.0)
    return Close(jnp.zeros_like(fee), fee, slippage, fee - left)


def liquidate(
    process: LiquidationProcess,
    *,
    equity: Array,
    maintenance: Array,
    notional: Array,
    share: Array,
    fee_rate: Array,
    slippage_rate: Array,
) -> Close:
    """Outcome for an account that is liquidated: a take-over where the process or the backstop says so, else a closing.

    `share` is that of `close_share`; other arguments as in `close_out`.
    """
    taken = takeover(equity, notional, slippage_rate=slippage_rate)
    if process.process == "takeover":
        return taken
    closed = close_out(equity, notional, share=share, fee_rate=fee_rate, slippage_rate=slippage_rate)
    if process.backstop == 0.0:
        return closed
    is_taken = is_backstopped(equity, maintenance, backstop=process.backstop)
    return Close(*(jnp.where(is_taken, a, b) for a, b in zip(taken, closed, strict=True)))


def tier_of(schedule: TierSchedule, notional: Array) -> Array:
    """Number of the tier, from 1, that holds a notional (a size, for tiers by size)."""
    return 1.0 + sum((notional > schedule.floor[n]) * 1.0 for n in range(1, schedule.floor.shape[0]))
