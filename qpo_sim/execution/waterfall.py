r"""Who bears the loss of a bankrupt account: its margin, the insurance fund, winners by auto-deleveraging, everybody.

Each layer takes what the one before it leaves; the layers sum to the loss. Winners are taken by a queue, highest rank
first, or pro rata of their profits. Accounts are the first axis, paths the last.

On 2025-10-10 a queue took between 51.7 and 650 million USD more from winners than the loss; pro-rata rules would have
taken about 3 million more (arXiv 2602.15182, and press on arXiv 2512.01112).

Sources: BitMEX and Binance, "Auto-deleveraging"; dYdX v4 documentation, "Deleveraging"; Hyperliquid documentation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.types import Array

RULES = ("queue", "pro_rata")


class Layers(NamedTuple):
    """A loss by who bears it; their sum is the loss."""

    margin: Array
    fund: Array
    deleveraging: Array
    socialised: Array


class Waterfall(NamedTuple):
    """Outcome of a loss for everybody.

    Attributes:
      layers: by layer.
      fund: of the insurance fund, what is left.
      haircuts: what auto-deleveraging takes from each account's profit, (accounts, paths).
      socialised: what socialised loss takes from each account, (accounts, paths).
      uncovered: loss that nobody's equity is left for.
    """

    layers: Layers
    fund: Array
    haircuts: Array
    socialised: Array
    uncovered: Array


def layers(loss: Array, *, margin: Array, fund: Array, deleveraging: Array) -> Layers:
    """Loss split in the order of the waterfall; each layer at most what it holds (negative holdings count as none).

    Args:
      loss: at least 0.
      margin: residual margin of the bankrupt account.
      fund: insurance fund.
      deleveraging: profit that auto-deleveraging can take.
    """

    def take(rest: Array, held: Array) -> tuple[Array, Array]:
        part = jnp.minimum(rest, jnp.maximum(held, 0.0))
        return part, rest - part

    from_margin, rest = take(loss, margin)
    from_fund, rest = take(rest, fund)
    from_winners, rest = take(rest, deleveraging)
    return Layers(from_margin, from_fund, from_winners, rest)


def effective_leverage(profit: Array, margin: Array, notional: Array) -> Array:
    """Notional over equity, notional / (margin + profit); infinite without equity."""
    equity = margin + profit
    has = equity > 0.0
    return jnp.where(has, notional / jnp.where(has, equity, 1.0), jnp.inf)


def adl_rank(profit: Array, margin: Array, notional: Array) -> Array:
    r"""Rank of a position for auto-deleveraging, highest first.

    With return $p$ = profit / margin and effective leverage l: $p\,l$ for winners, $p / l$ for losers. 0 for a loser
    without equity. Margin and notional are above 0.
    """
    ratio, equity = profit / margin, jnp.maximum(margin + profit, 0.0)
    wins = profit > 0.0
    winner = ratio * notional / jnp.where(wins, margin + profit, 1.0)
    return jnp.where(wins, winner, ratio * equity / notional)


def queue_shares(
    needed: Array, available: Float[Array, "accounts ..."], rank: Float[Array, "accounts ..."]
) -> Float[Array, "accounts ..."]:
    """What each account gives when the highest rank gives all it has first, until `needed` is reached.

    Args:
      needed: deficit (money), or quantity to be closed.
      available: profits, or sizes of the opposite positions; negative ones give nothing.
      rank: see `adl_rank`; equal ranks in the order of the accounts.

    Pathwise gradient: of needed and available; not of the order.
    """
    order = jnp.argsort(-rank, axis=0, stable=True)
    held = jnp.maximum(jnp.take_along_axis(available, order, axis=0), 0.0)
    before = jnp.cumsum(held, axis=0) - held
    given = jnp.clip(needed - before, 0.0, held)
    return jnp.take_along_axis(given, jnp.argsort(order, axis=0), axis=0)


def pro_rata_shares(needed: Array, available: Float[Array, "accounts ..."]) -> Float[Array, "accounts ..."]:
    """What each account gives in proportion to what it has, D a_i / sum a, at most a_i; negative ones give nothing."""
    held = jnp.maximum(available, 0.0)
    total = jnp.sum(held, axis=0)
    some = total > 0.0
    return held * jnp.where(some, jnp.minimum(needed / jnp.where(some, total, 1.0), 1.0), 0.0)


def queue_closed_haircuts(
    deficit: Array,
    quantity: Array,
    available: Float[Array, "accounts ..."],
    rank: Float[Array, "accounts ..."],
) -> tuple[Float[Array, "accounts ..."], Float[Array, "accounts ..."]]:
    """Quantities that a queue closes against a bankrupt position, and what that takes from each account.

    Opposite positions are closed at the bankruptcy price, which is worse for them than the mark by the deficit per
    coin: the haircuts sum to the deficit where the whole position finds counterparts.

    Args:
      deficit: loss of the bankrupt position beyond its margin at the mark.
      quantity: its size in coins, above 0.
      available: sizes of the opposite positions in coins.
      rank: see `adl_rank`.
    """
    closed = queue_shares(quantity, available, rank)
    return closed, closed * (deficit / quantity)


def waterfall(
    loss: Array,
    *,
    margin: Array,
    fund: Array,
    profit: Float[Array, "accounts ..."],
    equity: Float[Array, "accounts ..."],
    rank: Float[Array, "accounts ..."] | None = None,
    rule: str = "pro_rata",
) -> Waterfall:
    """A loss carried through margin, insurance fund, auto-deleveraging and socialised loss.

    Args:
      loss: at least 0.
      margin: residual margin of the bankrupt account.
      fund: insurance fund.
      profit: unrealised profit of the accounts on the opposite side.
      equity: of the same accounts, profit included; socialised loss is pro rata of what deleveraging leaves of it.
      rank: order of the queue, see `adl_rank`; needed for the rule `queue`.
      rule: `queue` or `pro_rata`.

    Raises:
      InputError: unknown rule, or a queue without ranks.
    """
    if rule not in RULES:
        raise InputError(f"deleveraging rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    if rule == "queue" and rank is None:
        raise InputError("deleveraging rule is `queue` and rank is missing; give the ranks, or take `pro_rata`.")
    # An account cannot give more than it has, however large its profit on this position.
    takeable = jnp.minimum(jnp.maximum(profit, 0.0), jnp.maximum(equity, 0.0))
    split = layers(loss, margin=margin, fund=fund, deleveraging=jnp.sum(takeable, axis=0))
    if rank is None or rule == "pro_rata":
        haircuts = pro_rata_shares(split.deleveraging, takeable)
    else:
        haircuts = queue_shares(split.deleveraging, takeable, rank)
    socialised = pro_rata_shares(split.socialised, equity - haircuts)
    uncovered = split.socialised - jnp.sum(socialised, axis=0)
    return Waterfall(split, fund - split.fund, haircuts, socialised, uncovered)
