r"""The ledger: spot holdings, perpetual margin accounts and collateralised loans carried along every path.

All money is in units of the starting capital, all prices relative to the start, so that float32 keeps its digits.

**One probability of liquidation, two uses.** Each account has a probability of being liquidated during a step, given
the step's end points (see `instrument.first_passage`). The drawn branch compares it with an addressed uniform: each
path has one outcome, and a liquidated account keeps what liquidation leaves. The survival branch ignores the draw: it
carries the probability F of having been liquidated by now and the F-weighted value liquidation leaves, for unbiased
smooth estimates of liquidation probabilities and for gradients (conditional Monte Carlo).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.instrument import loan, perpetual
from qpo_sim.instrument.first_passage import Options, Survival, survive
from qpo_sim.instrument.loan import Loan, LoanShape
from qpo_sim.instrument.perpetual import Perpetual, PerpetualShape
from qpo_sim.numerics import Pair, Rows
from qpo_sim.random import Stream
from qpo_sim.types import Array, Context, Stage, Upstream

ACCOUNTS = ("price", "funding", "interest", "fees", "liquidation")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Book:
    """Positions and their accounts (differentiable leaves) and their static shape.

    Attributes:
      capital: starting equity in USD; only reports use it.
      cash: cash outside any account, in units of the capital.
      spot: holdings by asset in `spot_assets`, value at the start in units of the capital.
      perpetuals: one `Perpetual` per margin account.
      loans: one `Loan` per loan.
      assets: names of the market's assets (static).

    Pathwise gradient: every leaf, exact for the survival branch; in the drawn branch and in `step` monitoring the
    movement of the liquidation time is not seen.
    """

    capital: Float[Array, ""]
    cash: Float[Array, ""]
    spot: Float[Array, " holdings"]
    perpetuals: tuple[Perpetual, ...]
    loans: tuple[Loan, ...]
    assets: tuple[str, ...] = field(metadata={"static": True})
    spot_assets: tuple[int, ...] = field(default=(), metadata={"static": True})
    perpetual_shapes: tuple[PerpetualShape, ...] = field(default=(), metadata={"static": True})
    loan_shapes: tuple[LoanShape, ...] = field(default=(), metadata={"static": True})

    @property
    def account_names(self) -> tuple[str, ...]:
        """Names of the accounts that can be liquidated: perpetual accounts, then loans."""
        return tuple(shape.name for shape in (*self.perpetual_shapes, *self.loan_shapes))

    @property
    def n_accounts(self) -> int:
        """Number of accounts that can be liquidated."""
        return len(self.perpetual_shapes) + len(self.loan_shapes)

    @property
    def components(self) -> tuple[tuple[str, str], ...]:
        """(position, account) of each P&L component, in the order of `Outcome.components`."""
        names = self.assets
        rows = [(f"{names[i]} spot", "spot") for i in self.spot_assets]
        for shape in self.perpetual_shapes:
            rows += [(f"{names[i]} perpetual", shape.name) for i in shape.assets]
            rows.append(("funding and liquidation", shape.name))
        for shape in self.loan_shapes:
            rows += [(f"{names[i]} collateral", shape.name) for i in shape.collateral_assets]
            rows += [(f"{names[i]} debt", shape.name) for i in shape.debt_assets]
            rows.append(("interest and liquidation", shape.name))
        return tuple(rows)

    def accounts(self) -> list[tuple[Any, Any, Any]]:
        """(kind, parameters, shape) of every account that can be liquidated, in the order of `account_names`."""
        rows = [(perpetual, p, s) for p, s in zip(self.perpetuals, self.perpetual_shapes, strict=True)]
        return rows + [(loan, p, s) for p, s in zip(self.loans, self.loan_shapes, strict=True)]


class Marks(NamedTuple):
    """Relative prices, the step's scale and a pair of uniforms for every two accounts."""

    prices: Rows
    scale: Any
    uniforms: tuple[Any, ...]


class Margins(NamedTuple):
    """Output of the margin stage: value of cash and spot, one check per account, and the uniforms."""

    outright: Array
    accounts: tuple[Any, ...]
    uniforms: tuple[Any, ...]


class LedgerState(NamedTuple):
    """State of the settle stage: both branches per account (`drawn` is empty when that branch is left out)."""

    survival: tuple[Survival, ...]
    drawn: tuple[Any, ...]


class Conditional(NamedTuple):
    """Terminal values of the survival branch, for gradients and conditional Monte Carlo; rows by account.

    Account j is worth `survived[j]` with probability 1 - F[j] and, in the mean over its liquidation times,
    `liquidated[j] / F[j]` with probability F[j] (`liquidated` is already weighted with F); `outright` is cash and spot.
    """

    outright: Array
    survived: Array
    liquidated: Array
    hit_probability: Array


class Closing(NamedTuple):
    """What the ledger says of finished paths; drawn-branch fields are None when that branch was left out.

    What has one row per account or component is a tuple of rows, in `conditional` too: a kernel cannot stack them.
    `liquidated` is 1 where the account has been liquidated, else 0.
    """

    conditional: Conditional
    liquidated: tuple[Array, ...] | None
    account_equity: tuple[Array, ...] | None
    accounts: dict[str, Array] | None
    components: tuple[Array, ...] | None


def stages(book: Book, options: Options) -> tuple[Stage, ...]:
    """The book's part of the line: marks, then distances to liquidation, then settlement.

    The last stage's state is the `LedgerState`; its output is the book's equity after the step (cash and spot alone
    when the drawn branch is left out).

    Args:
      book: its static shape decides the program.
      options: what is tested and kept.
    """
    # At step ends an account is liquidated or not: nothing is left to draw.
    n_uniforms = book.n_accounts if options.drawn and options.bridge else 0

    def ones(context: Context) -> Array:
        return jnp.ones(context.path.shape, context.market.drift.dtype)

    def marks_init(context: Context):
        return ()

    def marks_step(context: Context, t, state, upstream: Upstream):
        log_price, scale = upstream.state, upstream.output
        prices = jax.tree.map(jnp.exp, log_price)
        # Two accounts share an address: the cipher gives two words.
        key = context.keys[Stream.LIQUIDATION]
        words = (random.bits(key, context.path, t, slot) for slot in range((n_uniforms + 1) // 2))
        return (), Marks(prices, scale, tuple(Pair(*map(random.uniform, pair)) for pair in words))

    def margin_init(context: Context):
        one = ones(context)
        return tuple(kind.margin_init(account, shape, one) for kind, account, shape in context.book.accounts())

    def margin_step(context: Context, t, state, upstream: Upstream):
        marks: Marks = upstream.output
        rows = [
            kind.margin_step(context, t, account, shape, before, marks.prices, marks.scale, options)
            for (kind, account, shape), before in zip(context.book.accounts(), state, strict=True)
        ]
        outright = _outright(context.book, marks.prices)
        margins = Margins(outright, tuple(check for _, check in rows), marks.uniforms)
        return tuple(state for state, _ in rows), margins

    def settle_init(context: Context):
        one = ones(context)
        survival, drawn = [], []
        for kind, account, shape in context.book.accounts():
            survival.append(Survival(0.0 * one, (0.0 * one,) * kind.N_LEFT, one if options.record else ()))
            if options.drawn:
                drawn.append(kind.drawn_init(account, shape, one, options))
        return LedgerState(tuple(survival), tuple(drawn))

    def settle_step(context: Context, t, state: LedgerState, upstream: Upstream):
        margins: Margins = upstream.output
        uniforms = [u.astype(margins.outright.dtype) for pair in margins.uniforms for u in pair]
        survival, drawn, equity = [], [], margins.outright
        for j, (kind, account, shape) in enumerate(context.book.accounts()):
            check = margins.accounts[j]
            left = kind.left(context, t, account, shape, check, options)
            survival.append(survive(state.survival[j], check.crossing, left, check.distance, options))
            if options.drawn:
                uniform = uniforms[j] if n_uniforms else 0.5 * ones(context)
                after = kind.drawn_step(context, t, account, shape, state.drawn[j], check, uniform, options)
                drawn.append(after)
                equity = equity + after.equity
        return LedgerState(tuple(survival), tuple(drawn)), equity

    return (
        Stage("marks", marks_init, marks_step),
        Stage("margin", margin_init, margin_step),
        Stage("settle", settle_init, settle_step),
    )


def close(context: Context, log_price: Any, margins: tuple[Any, ...], state: LedgerState, options: Options) -> Closing:
    """P&L accounts, components and conditional values at the end of the last step."""
    book: Book = context.book
    prices = jax.tree.map(jnp.exp, log_price)
    zero = jnp.zeros_like(prices[0])
    accounts = book.accounts()
    terminal = [
        kind.close_survival(context, account, shape, margin, survival, prices)
        for (kind, account, shape), margin, survival in zip(accounts, margins, state.survival, strict=True)
    ]
    conditional = Conditional(
        _outright(book, prices),
        tuple(survived for survived, _ in terminal),
        tuple(liquidated for _, liquidated in terminal),
        tuple(survival.hit_probability for survival in state.survival),
    )
    if not options.drawn:
        return Closing(conditional, None, None, None, None)
    liquidated = tuple(drawn.liquidated for drawn in state.drawn)
    account_equity = tuple(drawn.equity for drawn in state.drawn)
    if not options.attribution:
        return Closing(conditional, liquidated, account_equity, None, None)
    spot = [book.spot[k] * (prices[i] - 1.0) for k, i in enumerate(book.spot_assets)]
    components, totals = list(spot), {name: zero for name in ACCOUNTS}
    totals["price"] = sum(spot, zero)
    for (kind, account, _), drawn in zip(accounts, state.drawn, strict=True):
        pnl = kind.profit_and_loss(account, drawn)
        components += [*pnl.price, pnl.funding + pnl.interest + pnl.fees + pnl.liquidation]
        totals["price"] = sum(pnl.price, totals["price"])
        for name in ACCOUNTS[1:]:
            totals[name] = totals[name] + getattr(pnl, name)
    return Closing(conditional, liquidated, account_equity, totals, tuple(components))


def _outright(book: Book, prices: Rows) -> Array:
    total = book.cash * jnp.ones_like(prices[0])
    for k, i in enumerate(book.spot_assets):
        total = total + book.spot[k] * prices[i]
    return total
