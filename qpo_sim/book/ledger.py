r"""The ledger: spot holdings, perpetual margin accounts and collateralised loans carried along every path.

All money is in units of the starting capital, all prices relative to the start, so that float32 keeps its digits.

**One probability of liquidation, two uses.** Each account has a probability of being liquidated during a step, given
the step's end points (see `instrument.first_passage`). The drawn branch compares it with an addressed uniform: each
path has one outcome, and a liquidated account keeps what liquidation leaves. The survival branch ignores the draw: it
carries the probability F of having been liquidated by now and the F-weighted value liquidation leaves, for unbiased
smooth estimates of liquidation probabilities and for gradients (conditional Monte Carlo).
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.book import desk
from qpo_sim.book.desk import DeskState, TradingCosts
from qpo_sim.instrument import loan, perpetual
from qpo_sim.instrument.first_passage import Options, Survival, survive
from qpo_sim.instrument.loan import Loan, LoanShape
from qpo_sim.instrument.perpetual import Perpetual, PerpetualShape
from qpo_sim.numerics import Pair, Rows
from qpo_sim.random import Stream
from qpo_sim.types import Array, Context, Stage, Upstream

ACCOUNTS = ("price", "funding", "interest", "fees", "liquidation", "trading", "income")

# Slot of the first uniform of accounts whose positions change; the others use the slots before it.
_HOLDINGS_SLOT = 1024


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
      holdings: accounts whose positions may change along a path (see `account`).
      policies: what trades after each step, in their order (see `policy`).
      trading_costs: of outright trades; None without policies.
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
    holdings: tuple[Any, ...] = ()
    policies: tuple[Any, ...] = ()
    trading_costs: TradingCosts | None = None
    spot_assets: tuple[int, ...] = field(default=(), metadata={"static": True})
    perpetual_shapes: tuple[PerpetualShape, ...] = field(default=(), metadata={"static": True})
    loan_shapes: tuple[LoanShape, ...] = field(default=(), metadata={"static": True})

    @property
    def account_names(self) -> tuple[str, ...]:
        """Names of the accounts that can be liquidated: perpetual accounts, loans, then other holdings."""
        fixed = (shape.name for shape in (*self.perpetual_shapes, *self.loan_shapes))
        return (*fixed, *(holding.name for holding in self.holdings if holding.can_be_liquidated))

    @property
    def n_accounts(self) -> int:
        """Number of accounts that can be liquidated."""
        return self.n_fixed + sum(holding.can_be_liquidated for holding in self.holdings)

    @property
    def account_venues(self) -> tuple[str, ...]:
        """Venue of each account that can be liquidated, in the order of `account_names`."""
        fixed = (shape.venue for shape in (*self.perpetual_shapes, *self.loan_shapes))
        return (*fixed, *(holding.venue for holding in self.holdings if holding.can_be_liquidated))

    @property
    def venues(self) -> tuple[str, ...]:
        """Venues that can liquidate something, in order of first mention."""
        return tuple(dict.fromkeys(self.account_venues))

    @property
    def n_fixed(self) -> int:
        """Number of accounts whose positions stay what they are until they are liquidated."""
        return len(self.perpetual_shapes) + len(self.loan_shapes)

    @property
    def is_path_dependent(self) -> bool:
        """Whether there are holdings that change along a path, or policies."""
        return bool(self.holdings or self.policies)

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
        for holding in self.holdings:
            rows += [(label, holding.name) for label in holding.components(names)]
            rows.append(("everything else", holding.name))
        if self.policies:
            rows.append(("trading costs", "spot"))
        return tuple(rows)

    def accounts(self) -> list[tuple[Any, Any, Any]]:
        """(kind, parameters, shape) of every account with fixed positions, in the order of `account_names`."""
        rows = [(perpetual, p, s) for p, s in zip(self.perpetuals, self.perpetual_shapes, strict=True)]
        return rows + [(loan, p, s) for p, s in zip(self.loans, self.loan_shapes, strict=True)]


class Marks(NamedTuple):
    """Relative prices, the step's scale and a pair of uniforms for every two accounts; then those of `holdings`."""

    prices: Rows
    scale: Any
    uniforms: tuple[Any, ...]
    holdings: tuple[Any, ...] = ()


class Margins(NamedTuple):
    """Output of the margin stage: value of cash and spot, one check per account, and the uniforms.

    `marks` is what the desk reads of the step, None in a book whose positions are fixed.
    """

    outright: Array
    accounts: tuple[Any, ...]
    uniforms: tuple[Any, ...]
    marks: Marks | None = None


class LedgerState(NamedTuple):
    """State of the settle stage: both branches per account (`drawn` is empty when that branch is left out).

    Holdings have one entry in either as well, with the compensator as the probability (see `account`). `masks` and
    `exposure` (see `exposures`) are those of the step, kept only where paths are recorded.
    """

    survival: tuple[Survival, ...]
    drawn: tuple[Any, ...]
    desk: DeskState | None = None
    masks: tuple[Array, ...] = ()
    exposure: tuple[Array, ...] = ()


class Conditional(NamedTuple):
    """Terminal values of the survival branch, for gradients and conditional Monte Carlo; rows by account.

    Account j is worth `survived[j]` with probability 1 - F[j] and, in the mean over its liquidation times,
    `liquidated[j] / F[j]` with probability F[j] (`liquidated` is already weighted with F); `outright` is cash and spot.
    """

    outright: Array
    survived: Array
    liquidated: Array
    hit_probability: Array


class Liquidations(NamedTuple):
    """What liquidations did on each path, one row per account that can be liquidated or per venue.

    Attributes:
      bad_debt: what others bear of an account's losses (insurance fund, lenders), units of the capital, >= 0.
      cost: fees, slippage and bonuses of an account's liquidations, and margin a venue keeps; units of the capital.
        Where the account ends below zero, part of it is in the bad debt.
      needless: per account with fixed positions, the probability given the path's step ends that it is liquidated
        although, left alone, it would end the path above its maintenance margin: F times 1{distance > 0}.
      venue_bad_debt: sum of `bad_debt` over the accounts of each of `Book.venues`.
      venue_cost: the same of `cost`.
      venue_liquidated: 1 where any account of the venue has been liquidated.
    """

    bad_debt: tuple[Array, ...]
    cost: tuple[Array, ...]
    needless: tuple[Array, ...]
    venue_bad_debt: tuple[Array, ...]
    venue_cost: tuple[Array, ...]
    venue_liquidated: tuple[Array, ...]


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
    liquidations: Liquidations | None = None


def stages(book: Book, options: Options) -> tuple[Stage, ...]:
    """The book's part of the line: marks, then distances to liquidation, then settlement.

    The last stage's state is the `LedgerState`; its output is the book's equity after the step (cash and spot alone
    when the drawn branch is left out).

    Args:
      book: its static shape decides the program.
      options: what is tested and kept.
    """
    # At step ends an account is liquidated or not: nothing is left to draw.
    n_uniforms = book.n_fixed if options.drawn and options.bridge else 0
    n_holdings = len(book.holdings) if options.bridge else 0

    def ones(context: Context) -> Array:
        return jnp.ones(context.path.shape, context.market.drift.dtype)

    def marks_init(context: Context):
        return ()

    def marks_step(context: Context, t, state, upstream: Upstream):
        log_price, scale = upstream.state, upstream.output
        prices = jax.tree.map(jnp.exp, log_price)
        # Two accounts share an address: the cipher gives two words.
        key = context.keys[Stream.LIQUIDATION]

        def pairs(first: int, n: int) -> tuple[Pair, ...]:
            words = (random.bits(key, context.path, t, first + slot) for slot in range((n + 1) // 2))
            return tuple(Pair(*map(random.uniform, pair)) for pair in words)

        return (), Marks(prices, scale, pairs(0, n_uniforms), pairs(_HOLDINGS_SLOT, n_holdings))

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
        kept = marks if book.is_path_dependent or options.record else None
        margins = Margins(outright, tuple(check for _, check in rows), marks.uniforms, kept)
        return tuple(state for state, _ in rows), margins

    def settle_init(context: Context):
        one = ones(context)
        survival, drawn = [], []
        for kind, account, shape in context.book.accounts():
            survival.append(Survival(0.0 * one, (0.0 * one,) * kind.N_LEFT, one if options.record else ()))
            if options.drawn:
                drawn.append(kind.drawn_init(account, shape, one, options))
        masks, exposure = (), ()
        if options.record:
            masks = (0.0 * one,) * (context.market.drift.shape[0] - 1)
            exposure = (one,) * book.n_accounts
        if not book.is_path_dependent:
            return LedgerState(tuple(survival), tuple(drawn), None, masks, exposure)
        state = desk.init(context, context.book, options)
        return _with_holdings(book, survival, drawn, state, options)._replace(masks=masks, exposure=exposure)

    def settle_step(context: Context, t, state: LedgerState, upstream: Upstream):
        margins: Margins = upstream.output
        uniforms = [u.astype(margins.outright.dtype) for pair in margins.uniforms for u in pair]
        survival, drawn, equity, after_desk = [], [], margins.outright, None
        if margins.marks is not None and state.desk is not None:
            marks = margins.marks
            drawn_by = [u.astype(margins.outright.dtype) for pair in marks.holdings for u in pair][: len(book.holdings)]
            drawn_by = drawn_by or [0.5 * ones(context)] * len(book.holdings)
            after_desk = desk.step(context, context.book, t, state.desk, marks.prices, marks.scale, drawn_by, options)
            equity = sum((status.equity for status in after_desk.statuses), desk.outright(context.book, after_desk))
        for j, (kind, account, shape) in enumerate(context.book.accounts()):
            check = margins.accounts[j]
            left = kind.left(context, t, account, shape, check, options)
            survival.append(survive(state.survival[j], check.crossing, left, check.distance, options))
            if options.drawn:
                uniform = uniforms[j] if n_uniforms else 0.5 * ones(context)
                after = kind.drawn_step(context, t, account, shape, state.drawn[j], check, uniform, options)
                drawn.append(after)
                equity = equity + after.equity
        after = LedgerState(tuple(survival), tuple(drawn))
        if after_desk is not None:
            after = _with_holdings(book, survival, drawn, after_desk, options)
        if options.record and margins.marks is not None:
            masks, prices = tuple(margins.marks.scale.masks), margins.marks.prices
            after = after._replace(masks=masks, exposure=exposures(context.book, prices, after))
        return after, equity

    return (
        Stage("marks", marks_init, marks_step),
        Stage("margin", margin_init, margin_step),
        Stage("settle", settle_init, settle_step),
    )


def _with_holdings(
    book: Book, survival: list[Survival], drawn: list[Any], state: DeskState, options: Options
) -> LedgerState:
    statuses = [s for s, holding in zip(state.statuses, book.holdings, strict=True) if holding.can_be_liquidated]
    survival += [Survival(s.hit_probability, (), s.distance if options.record else ()) for s in statuses]
    return LedgerState(tuple(survival), (*drawn, *statuses) if options.drawn else (), state)


def exposures(book: Book, prices: Rows, state: LedgerState) -> tuple[Array, ...]:
    """Gross value at risk in each account that can be liquidated, in units of the capital; drawn branch.

    Sum of the absolute notionals of a perpetual or margin account, value of a loan's collateral; NaN of an account that
    does not say.
    """
    zero, rows = jnp.zeros_like(prices[0]), []
    for (kind, account, shape), drawn in zip(book.accounts(), state.drawn, strict=False):
        own = [prices[i] for i in kind.assets(shape)]
        if kind is perpetual:
            gross = sum((jnp.abs(account.quantity[i]) * price for i, price in enumerate(own)), zero)
            rows.append(drawn.alive * gross)
        else:
            rows.append(drawn.collateral_left * loan.collateral_value(account, shape, tuple(own)))
    if state.desk is not None and state.drawn:
        for holding, own_state in zip(book.holdings, state.desk.accounts, strict=True):
            if holding.can_be_liquidated:
                gross = getattr(holding, "gross", None)
                rows.append(zero + jnp.nan if gross is None else gross(own_state, state.desk.scene))
    return tuple(rows) if rows else (zero,) * book.n_accounts


def close(context: Context, log_price: Any, margins: tuple[Any, ...], state: LedgerState, options: Options) -> Closing:
    """P&L accounts, components and conditional values at the end of the last step."""
    book: Book = context.book
    prices = jax.tree.map(jnp.exp, log_price)
    zero = jnp.zeros_like(prices[0])
    accounts = book.accounts()
    terminal = [
        kind.close_survival(context, account, shape, margin, survival, prices)
        for (kind, account, shape), margin, survival in zip(accounts, margins, state.survival, strict=False)
    ]
    # Holdings have one branch: their value counts as outright.
    outright, none = _outright(book, prices), (zero,) * (book.n_accounts - book.n_fixed)
    if state.desk is not None:
        outright = sum((status.equity for status in state.desk.statuses), desk.outright(book, state.desk))
    conditional = Conditional(
        outright,
        (*(survived for survived, _ in terminal), *none),
        (*(liquidated for _, liquidated in terminal), *none),
        tuple(survival.hit_probability for survival in state.survival),
    )
    if not options.drawn:
        return Closing(conditional, None, None, None, None)
    liquidated = tuple(drawn.liquidated for drawn in state.drawn)
    account_equity = tuple(drawn.equity for drawn in state.drawn)
    if not options.attribution:
        return Closing(conditional, liquidated, account_equity, None, None)
    spot = [book.spot[k] * (prices[i] - 1.0) for k, i in enumerate(book.spot_assets)]
    if state.desk is not None:
        spot = list(state.desk.price)
    components, totals = list(spot), {name: zero for name in ACCOUNTS}
    totals["price"] = sum(spot, zero)
    booked = [
        kind.profit_and_loss(account, drawn) for (kind, account, _), drawn in zip(accounts, state.drawn, strict=False)
    ]
    if state.desk is not None:
        booked += [status.booking for status in state.desk.statuses]
    for pnl in booked:
        causes = {name: getattr(pnl, name) for name in ACCOUNTS[1:] if hasattr(pnl, name)}
        components += [*pnl.price, sum(causes.values())]
        totals["price"] = sum(pnl.price, totals["price"])
        for name, amount in causes.items():
            totals[name] = totals[name] + amount
    if book.policies and state.desk is not None:
        totals["trading"] = totals["trading"] + state.desk.trading
        components.append(state.desk.trading)
    liquidations = _liquidations(book, margins, state, booked) if book.n_accounts else None
    return Closing(conditional, liquidated, account_equity, totals, tuple(components), liquidations)


def _liquidations(book: Book, margins: tuple[Any, ...], state: LedgerState, booked: list[Any]) -> Liquidations:
    can_be = [True] * book.n_fixed + [holding.can_be_liquidated for holding in book.holdings]
    booked = [pnl for pnl, counts in zip(booked, can_be, strict=True) if counts]
    bad_debt = tuple(drawn.bad_debt for drawn in state.drawn)
    # What others bear is booked as a gain of the holder.
    cost = tuple(b - pnl.fees - pnl.liquidation for b, pnl in zip(bad_debt, booked, strict=True))
    needless = tuple(
        survival.hit_probability * (getattr(margin, "distance", margin) > 0.0)
        for margin, survival in zip(margins, state.survival, strict=False)
    )
    here = [[j for j, venue in enumerate(book.account_venues) if venue == name] for name in book.venues]
    liquidated = [drawn.liquidated for drawn in state.drawn]
    zero = jnp.zeros_like(bad_debt[0])
    return Liquidations(
        bad_debt,
        cost,
        needless,
        tuple(sum((bad_debt[j] for j in own), zero) for own in here),
        tuple(sum((cost[j] for j in own), zero) for own in here),
        tuple(functools.reduce(jnp.maximum, (liquidated[j] for j in own)) for own in here),
    )


def _outright(book: Book, prices: Rows) -> Array:
    total = book.cash * jnp.ones_like(prices[0])
    for k, i in enumerate(book.spot_assets):
        total = total + book.spot[k] * prices[i]
    return total
