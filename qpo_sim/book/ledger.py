r"""The ledger: spot holdings, perpetual margin accounts and collateralised loans carried along every path.

All money is in units of the starting capital, all prices relative to the start, so that float32 keeps its digits.

**Liquidation is a first passage.** Each account has a distance to liquidation $x = \log(\text{assets side} /
\text{liabilities side})$, liquidated when $x \le 0$. For a perpetual account the condition equity < maintenance margin,
with the active tier (r, c) of each position, is rearranged so that both sides are positive:

$$ M - \sum q_i E_i + \sum c_i + \sum (q_i - |q_i| r_i) P_i < 0 , $$

cash-like terms and price terms on the side of their sign. For a loan $x$ is the log health factor. In both cases x is
the log-price itself, shifted, when one asset moves it (isolated position, one-collateral loan), and a log-ratio of two
baskets else; its conditional variance over a step is $w'\Sigma w$ with the elasticities $w_i = \partial x/\partial \log
P_i$. Between two step ends the Brownian-bridge crossing probability $p = \exp(-2 x_0 x_1/\sigma_x^2)$ follows: exact for
one asset, first order in the step for several.

**One probability, two uses.** The drawn branch compares p with an addressed uniform: each path has one outcome, and a
liquidated account keeps what liquidation leaves. The survival branch ignores the draw: it carries the probability F of
having been liquidated by now and the F-weighted value liquidation leaves, for unbiased smooth estimates of liquidation
probabilities and for gradients (conditional Monte Carlo).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.market import model as market_model
from qpo_sim.numerics import bridge_crossing, safe_log
from qpo_sim.random import Stream
from qpo_sim.types import Array, Context, Stage, Upstream
from qpo_sim.venue import health_factor, tiered_margin
from qpo_sim.venue.tiered_margin import TierSchedule

ACCOUNTS = ("price", "funding", "interest", "fees", "liquidation")


class Perpetual(NamedTuple):
    """Parameters of a perpetual margin account; arrays run over its positions.

    `quantity` is the signed notional at the starting price, `entry` the entry price over the starting price, `margin`
    the account's wallet balance; `schedule` has the tier axis first. Money in units of the starting capital.
    """

    margin: Float[Array, ""]
    quantity: Float[Array, " positions"]
    entry: Float[Array, " positions"]
    schedule: TierSchedule
    funding_rate: Float[Array, " positions"]
    liquidation_fee: Float[Array, " positions"]
    liquidation_slippage: Float[Array, " positions"]


class Loan(NamedTuple):
    """Parameters of a collateralised loan: collateral by asset, debt in cash and in assets, and the venue's rule."""

    collateral: Float[Array, " collaterals"]
    threshold: Float[Array, " collaterals"]
    bonus: Float[Array, " collaterals"]
    debt_cash: Float[Array, ""]
    debt: Float[Array, " debts"]
    borrow_rate_per_hour: Float[Array, ""]
    close_factor: Float[Array, ""]
    full_close_health: Float[Array, ""]
    small_position: Float[Array, ""]


class PerpetualShape(NamedTuple):
    """Static shape of a perpetual account."""

    name: str
    assets: tuple[int, ...]
    mode: str
    venue: str
    funding_interval_hours: float


class LoanShape(NamedTuple):
    """Static shape of a loan."""

    name: str
    collateral_assets: tuple[int, ...]
    debt_assets: tuple[int, ...]
    venue: str


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
        """(position, account) of each P&L component, in the order of `Outcome.contributions`."""
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


# ----------------------------------------------------------------------------- distance to liquidation


class Distance(NamedTuple):
    """Log distance x to liquidation and its elasticities to the log-prices of the account's assets."""

    x: Array
    elasticity: tuple[Array, ...]


def perpetual_distance(account: Perpetual, margin: Array, prices: tuple[Array, ...]) -> Distance:
    """Distance of a perpetual account with wallet balance `margin` at the given relative prices."""
    up, down = jnp.zeros_like(margin), jnp.zeros_like(margin)
    constant = margin
    terms = []
    for i, price in enumerate(prices):
        quantity = account.quantity[i]
        long, short = jnp.maximum(quantity, 0.0), jnp.maximum(-quantity, 0.0)
        schedule = TierSchedule(*(table[:, i] for table in account.schedule))
        rate, deduction = tiered_margin.active_tier(schedule, (long + short) * price)
        rate = jnp.asarray(rate, price.dtype)
        asset, liability = long * (1.0 - rate) * price, short * (1.0 + rate) * price
        constant = constant + deduction - quantity * account.entry[i]
        up, down = up + asset, down + liability
        terms.append((asset, liability))
    up = up + jnp.maximum(constant, 0.0)
    down = down + jnp.maximum(-constant, 0.0)
    # An empty side is far away (or far gone), not infinite.
    up, down = jnp.maximum(up, 1e-12), jnp.maximum(down, 1e-12)
    return Distance(safe_log(up / down), tuple(asset / up - liability / down for asset, liability in terms))


def loan_distance(account: Loan, growth: Array, collateral_prices: tuple[Array, ...], debt_prices: tuple[Array, ...]) -> Distance:
    """Log health factor of a loan whose debt has grown by the factor `growth`."""
    assets = [account.threshold[i] * account.collateral[i] * price for i, price in enumerate(collateral_prices)]
    debts = [growth * account.debt[i] * price for i, price in enumerate(debt_prices)]
    up = jnp.maximum(sum(assets), 1e-12)
    down = jnp.maximum(sum(debts, growth * account.debt_cash), 1e-12)
    elasticity = tuple(a / up for a in assets) + tuple(-d / down for d in debts)
    return Distance(safe_log(up / down), elasticity)


def _variance(distance: Distance, assets: tuple[int, ...], context: Context, scale) -> tuple[Array, tuple[Array, ...]]:
    # Var x and the regression slopes cov(log P_i, x) / var(x) of the step.
    covariance = [
        sum(
            market_model.step_covariance(context.market, scale, i, j) * w
            for j, w in zip(assets, distance.elasticity, strict=True)
        )
        for i in assets
    ]
    variance = sum(w * c for w, c in zip(distance.elasticity, covariance, strict=True))
    variance = jnp.maximum(variance, 1e-20)
    return variance, tuple(c / variance for c in covariance)


def _shift(price: Array, x: Array, slope: Array) -> Array:
    # Price at the moment the account touches its barrier: the log-price moved back by its regression on x. For one
    # asset this is the liquidation price itself. The clip only concerns crossings too improbable to be drawn.
    return price * jnp.exp(jnp.clip(-x * slope, -4.0, 4.0))


# ----------------------------------------------------------------------------- states and latches


class Survival(NamedTuple):
    """Survival branch of an account: probability F of having been liquidated by now, and what a liquidation leaves,
    weighted with F: a value for a perpetual account, shares of collateral and debt for a loan. `distance` is the log
    distance to liquidation, kept only where paths are recorded."""  # fmt: skip

    hit_probability: Array
    left: tuple[Array, ...]
    distance: Array | tuple[()] = ()


class DrawnPerpetual(NamedTuple):
    """Drawn branch of a perpetual account: alive (1 or 0), payoff once closed, frozen price rows, P&L accounts."""

    alive: Array
    payoff: Array
    frozen: tuple[Array, ...]
    funding: Array
    fees: Array
    liquidation: Array
    equity: Array


class DrawnLoan(NamedTuple):
    """Drawn branch of a loan: shares of collateral and debt left, whether liquidated, P&L accounts by component."""

    collateral_left: Array
    debt_left: Array
    liquidated: Array
    price: tuple[Array, ...]
    previous: tuple[Array, ...]
    interest: Array
    liquidation: Array
    equity: Array


class PerpetualLatch(NamedTuple):
    """What settling a perpetual account needs: margin, distance, crossing probability, P&L at mark and at barrier."""

    margin: Array
    distance: Array
    crossing: Array
    profit: Array
    hit_profit: Array
    hit_fee: Array
    hit_slippage: Array
    prices: tuple[Array, ...]
    hit_prices: tuple[Array, ...]


class LoanLatch(NamedTuple):
    """What settling a loan needs: distances at both ends, variance, regression slopes and marks."""

    start: Array
    end: Array
    variance: Array
    crossing: Array
    slopes: tuple[Array, ...]
    prices: tuple[Array, ...]


class Marks(NamedTuple):
    """Relative prices, the step's scale and one uniform per account."""

    prices: Any
    scale: Any
    uniforms: tuple[Array, ...]


class MarginLatch(NamedTuple):
    """Output of the margin stage."""

    outright: Array
    perpetuals: tuple[PerpetualLatch, ...]
    loans: tuple[LoanLatch, ...]
    uniforms: tuple[Array, ...]


class LedgerState(NamedTuple):
    """State of the settle stage: survival branch per account, then the drawn branch (empty when it is left out)."""

    survival: tuple[Survival, ...]
    perpetuals: tuple[DrawnPerpetual, ...]
    loans: tuple[DrawnLoan, ...]


def stages(book: Book, *, monitoring: str, attribution: bool, drawn: bool, record: bool) -> tuple[Stage, ...]:
    """The book's part of the line: marks, then distances to liquidation, then settlement.

    The last stage's state is the `LedgerState` and its latch the book's equity after the step.

    Args:
      book: its static shape decides the program.
      monitoring: "bridge" tests for liquidation between the step ends too, "step" at the step ends only.
      attribution: keep what the P&L by position needs.
      drawn: carry the drawn branch beside the survival branch; without it the latch is cash and spot alone.
      record: keep the distance to liquidation in the state, for recorded paths.
    """
    attribution = attribution and drawn
    n_uniforms = book.n_accounts if drawn else 0
    bridge = monitoring == "bridge"
    n_perpetuals = len(book.perpetual_shapes)

    # ---- marks
    def marks_init(context: Context):
        one = _ones(context)
        return (), Marks((one,) * len(book.assets), _idle_scale(context, one), (0.5 * one,) * n_uniforms)

    def marks_step(context: Context, t, state, upstream: Upstream):
        log_price, scale = upstream.state, upstream.latch
        prices = tuple(jnp.exp(log_price[i]) for i in range(len(book.assets)))
        words = [
            word
            for slot in range((n_uniforms + 1) // 2)
            for word in random.bits(context.keys[Stream.LIQUIDATION], context.path, t, slot)
        ]
        uniforms = tuple(random.uniform(word).astype(context.market.drift.dtype) for word in words[:n_uniforms])
        return (), Marks(prices, scale, uniforms)

    # ---- margin: distances and crossing probabilities of accounts that are never liquidated
    def margin_state(context: Context, one):
        margins = tuple(account.margin * one for account in context.book.perpetuals)
        perpetuals = tuple(
            (margin, perpetual_distance(account, margin, (one,) * len(shape.assets)).x)
            for account, margin, shape in zip(context.book.perpetuals, margins, book.perpetual_shapes, strict=True)
        )
        loans = tuple(
            loan_distance(account, 1.0, (one,) * len(shape.collateral_assets), (one,) * len(shape.debt_assets)).x
            for account, shape in zip(context.book.loans, book.loan_shapes, strict=True)
        )
        return perpetuals, loans

    def margin_init(context: Context):
        one = _ones(context)
        zero = 0.0 * one
        perpetuals = tuple(
            PerpetualLatch(
                account.margin * one, one, zero, zero, zero, zero, zero,
                (one,) * len(shape.assets) if attribution else (), (one,) * len(shape.assets) if attribution else (),
            )
            for account, shape in zip(context.book.perpetuals, book.perpetual_shapes, strict=True)
        )  # fmt: skip
        loans = tuple(
            LoanLatch(one, one, one, zero, (zero,) * n, (one,) * n)
            for n in (len(shape.collateral_assets) + len(shape.debt_assets) for shape in book.loan_shapes)
        )
        return margin_state(context, one), MarginLatch(one, perpetuals, loans, (0.5 * one,) * n_uniforms)

    def margin_step(context: Context, t, state, upstream: Upstream):
        marks: Marks = upstream.latch
        prices = marks.prices
        outright = _outright(context.book, book, prices)
        perpetual_states, perpetual_latches = [], []
        for account, shape, (margin, start) in zip(context.book.perpetuals, book.perpetual_shapes, state[0], strict=True):
            own = tuple(prices[i] for i in shape.assets)
            payment = sum(account.funding_rate[i] * account.quantity[i] * price for i, price in enumerate(own))
            margin = margin - _funding_stamps(context, shape, t) * payment
            distance = perpetual_distance(account, margin, own)
            if bridge:
                variance, slopes = _variance(distance, shape.assets, context, marks.scale)
                crossing = bridge_crossing(start, distance.x, variance)
                hit = tuple(_shift(p, distance.x, s) for p, s in zip(own, slopes, strict=True))
            else:
                crossing, hit = (distance.x <= 0.0).astype(margin.dtype), own
            gross = [jnp.abs(account.quantity[i]) * price for i, price in enumerate(hit)]
            perpetual_states.append((margin, distance.x))
            perpetual_latches.append(
                PerpetualLatch(
                    margin,
                    distance.x,
                    crossing,
                    _profit(account, own),
                    _profit(account, hit),
                    sum(account.liquidation_fee[i] * g for i, g in enumerate(gross)),
                    sum(account.liquidation_slippage[i] * g for i, g in enumerate(gross)),
                    own if attribution else (),
                    hit if attribution else (),
                )
            )
        loan_states, loan_latches = [], []
        for account, shape, start in zip(context.book.loans, book.loan_shapes, state[1], strict=True):
            collateral = tuple(prices[i] for i in shape.collateral_assets)
            debts = tuple(prices[i] for i in shape.debt_assets)
            distance = loan_distance(account, _growth(context, account, t + 1), collateral, debts)
            if bridge:
                variance, slopes = _variance(distance, shape.collateral_assets + shape.debt_assets, context, marks.scale)
                crossing = bridge_crossing(start, distance.x, variance)
            else:
                variance = jnp.ones_like(distance.x)
                slopes = (jnp.zeros_like(distance.x),) * (len(collateral) + len(debts))
                crossing = (distance.x <= 0.0).astype(variance.dtype)
            loan_states.append(distance.x)
            loan_latches.append(LoanLatch(start, distance.x, variance, crossing, slopes, collateral + debts))
        latch = MarginLatch(outright, tuple(perpetual_latches), tuple(loan_latches), marks.uniforms)
        return (tuple(perpetual_states), tuple(loan_states)), latch

    # ---- settle
    def settle_init(context: Context):
        one = _ones(context)
        zero = 0.0 * one
        far = one if record else ()
        survival = [Survival(zero, (zero,), far)] * n_perpetuals + [Survival(zero, (zero, zero), far)] * len(book.loan_shapes)
        perpetuals, loans = [], []
        if drawn:
            for account, shape in zip(context.book.perpetuals, book.perpetual_shapes, strict=True):
                equity = account.margin * one + _profit(account, (one,) * len(shape.assets))
                frozen = (one,) * len(shape.assets) if attribution else ()
                perpetuals.append(DrawnPerpetual(one, zero, frozen, zero, zero, zero, equity))
            for account, shape in zip(context.book.loans, book.loan_shapes, strict=True):
                n = len(shape.collateral_assets) + len(shape.debt_assets)
                equity = one * (jnp.sum(account.collateral) - account.debt_cash - jnp.sum(account.debt))
                loans.append(DrawnLoan(one, one, zero, (zero,) * n, (one,) * n, zero, zero, equity))
        return LedgerState(tuple(survival), tuple(perpetuals), tuple(loans)), one

    def settle_step(context: Context, t, state: LedgerState, upstream: Upstream):
        latch: MarginLatch = upstream.latch
        survival, perpetuals, loans = [], [], []
        for j, (account, row) in enumerate(zip(context.book.perpetuals, latch.perpetuals, strict=True)):
            payoff = _payoff(row)
            survival.append(_survive(state.survival[j], row.crossing, (payoff,), row.distance))
            if drawn:
                perpetuals.append(
                    _settle_perpetual(account, state.perpetuals[j], row, payoff, latch.uniforms[j], attribution)
                )
        for j, (account, shape, row) in enumerate(zip(context.book.loans, book.loan_shapes, latch.loans, strict=True)):
            rule = _LoanRule(account, shape, row, _growth(context, account, t), _growth(context, account, t + 1), bridge)
            one = jnp.ones_like(row.end)
            left = rule.liquidated(one, one, row.end)
            survival.append(
                _survive(state.survival[n_perpetuals + j], row.crossing, (left.collateral_left, left.debt_left), row.end)
            )
            if drawn:
                loans.append(_settle_loan(rule, state.loans[j], latch.uniforms[n_perpetuals + j]))
        equity = latch.outright
        for account_state in (*perpetuals, *loans):
            equity = equity + account_state.equity
        return LedgerState(tuple(survival), tuple(perpetuals), tuple(loans)), equity

    return (
        Stage("marks", marks_init, marks_step),
        Stage("margin", margin_init, margin_step),
        Stage("settle", settle_init, settle_step),
    )


def _survive(before: Survival, crossing: Array, left: tuple[Array, ...], distance: Array) -> Survival:
    newly = (1.0 - before.hit_probability) * crossing
    return Survival(
        before.hit_probability + newly,
        tuple(total + newly * share for total, share in zip(before.left, left, strict=True)),
        distance if hasattr(before.distance, "dtype") else (),
    )


def _payoff(row: PerpetualLatch) -> Array:
    return jnp.maximum(row.margin + row.hit_profit - row.hit_fee - row.hit_slippage, 0.0)


def _settle_perpetual(
    account: Perpetual, before: DrawnPerpetual, row: PerpetualLatch, payoff: Array, uniform: Array, attribution: bool
) -> DrawnPerpetual:
    hit_equity = row.margin + row.hit_profit
    closes = before.alive * (uniform < row.crossing).astype(uniform.dtype)
    alive = before.alive - closes
    frozen = before.frozen
    if attribution:
        frozen = tuple(
            old + before.alive * (jnp.where(closes > 0.0, hit, price) - old)
            for old, price, hit in zip(before.frozen, row.prices, row.hit_prices, strict=True)
        )
    paid = before.payoff + closes * payoff
    return DrawnPerpetual(
        alive=alive,
        payoff=paid,
        frozen=frozen,
        funding=jnp.where(before.alive > 0.0, row.margin - account.margin, before.funding),
        fees=before.fees - closes * row.hit_fee,
        # Slippage paid, and what the insurance fund takes over when the account ends below zero.
        liquidation=before.liquidation + closes * (payoff - hit_equity + row.hit_fee),
        equity=jnp.where(alive > 0.0, row.margin + row.profit, paid),
    )


class _LoanLeft(NamedTuple):
    collateral_left: Array
    debt_left: Array
    cost: Array
    prices: tuple[Array, ...]


class _LoanRule(NamedTuple):
    """One loan at one step: values of its sides and what a liquidation leaves of them."""

    account: Loan
    shape: LoanShape
    row: LoanLatch
    growth_before: Array
    growth: Array
    bridge: bool

    @property
    def collateral_units(self) -> list[Array]:
        return [self.account.collateral[i] for i in range(len(self.shape.collateral_assets))]

    @property
    def debt_units(self) -> list[Array]:
        return [self.account.debt[i] for i in range(len(self.shape.debt_assets))]

    def collateral(self, prices: tuple[Array, ...]) -> Array:
        return sum(u * p for u, p in zip(self.collateral_units, prices, strict=False))

    def debt(self, prices: tuple[Array, ...]) -> Array:
        """Debt before interest, at the given prices."""
        own = prices[len(self.collateral_units) :]
        return sum((u * p for u, p in zip(self.debt_units, own, strict=True)), self.account.debt_cash)

    def liquidated(self, collateral_left: Array, debt_left: Array, x: Array) -> _LoanLeft:
        """Shares left by a liquidation at distance x from the barrier, its cost, and the prices at which it happens."""
        row, account = self.row, self.account
        prices = row.prices
        health = jnp.exp(jnp.minimum(x, 0.0))
        if self.bridge:
            prices = tuple(_shift(p, x, s) for p, s in zip(row.prices, row.slopes, strict=True))
            health = jnp.ones_like(x)
        collateral = collateral_left * self.collateral(prices)
        debt = debt_left * self.growth * self.debt(prices)
        weights = [u * p for u, p in zip(self.collateral_units, prices, strict=False)]
        bonus = sum(account.bonus[i] * w for i, w in enumerate(weights)) / jnp.maximum(sum(weights), 1e-12)
        result = health_factor.liquidate(
            collateral, debt, health, bonus=bonus, close_factor=account.close_factor,
            full_close_health=account.full_close_health, small_position=account.small_position,
        )  # fmt: skip
        removed = result.repaid + result.bad_debt
        return _LoanLeft(
            collateral_left * (1.0 - result.seized / jnp.maximum(collateral, 1e-12)),
            debt_left * (1.0 - removed / jnp.maximum(debt, 1e-12)),
            removed - result.seized,
            prices,
        )


def _settle_loan(rule: _LoanRule, before: DrawnLoan, uniform: Array) -> DrawnLoan:
    row, growth = rule.row, rule.growth
    # Collateral and debt shrink proportionally, so a liquidation moves the distance by the log of their shares' ratio.
    is_open = (before.debt_left > 1e-6) & (before.collateral_left > 1e-6)
    offset = safe_log(jnp.where(is_open, before.collateral_left / jnp.maximum(before.debt_left, 1e-12), 1.0))
    if rule.bridge:
        crossing = bridge_crossing(row.start + offset, row.end + offset, row.variance)
    else:
        crossing = (row.end + offset <= 0.0).astype(uniform.dtype)
    hits = (is_open & (uniform < crossing)).astype(uniform.dtype)
    left = rule.liquidated(before.collateral_left, before.debt_left, row.end + offset)
    collateral_left = before.collateral_left + hits * (left.collateral_left - before.collateral_left)
    debt_left = before.debt_left + hits * (left.debt_left - before.debt_left)

    # Each side earns its price move up to the liquidation on the shares before it, and the rest on those after it.
    n_collateral = len(rule.collateral_units)
    units = rule.collateral_units + [-growth * u for u in rule.debt_units]
    held = [before.collateral_left] * n_collateral + [before.debt_left] * len(rule.debt_units)
    kept = [collateral_left] * n_collateral + [debt_left] * len(rule.debt_units)
    turning = tuple(jnp.where(hits > 0.0, hit, p) for hit, p in zip(left.prices, row.prices, strict=True))
    price = tuple(
        old + unit * (share * (turn - previous) + after * (p - turn))
        for old, unit, share, after, p, previous, turn in zip(
            before.price, units, held, kept, row.prices, before.previous, turning, strict=True
        )
    )
    return DrawnLoan(
        collateral_left=collateral_left,
        debt_left=debt_left,
        liquidated=jnp.maximum(before.liquidated, hits),
        price=price,
        previous=row.prices,
        interest=before.interest - before.debt_left * (growth - rule.growth_before) * rule.debt(before.previous),
        liquidation=before.liquidation + hits * left.cost,
        equity=collateral_left * rule.collateral(row.prices) - debt_left * growth * rule.debt(row.prices),
    )


def _outright(params: Book, book: Book, prices) -> Array:
    total = params.cash * jnp.ones_like(prices[0])
    for k, i in enumerate(book.spot_assets):
        total = total + params.spot[k] * prices[i]
    return total


def _profit(account: Perpetual, prices: tuple[Array, ...]) -> Array:
    return sum(account.quantity[i] * (price - account.entry[i]) for i, price in enumerate(prices))


def _growth(context: Context, account: Loan, t: Array) -> Array:
    return jnp.exp(account.borrow_rate_per_hour * (context.step_hours * t.astype(account.borrow_rate_per_hour.dtype)))


def _funding_stamps(context: Context, shape: PerpetualShape, t: Array) -> Array:
    # Stamps in (start, end] of the step; the run starts right after one.
    interval = shape.funding_interval_hours
    ends = np.floor(np.arange(context.n_steps + 1) * context.step_hours / interval + 1e-9)
    return jnp.asarray(np.diff(ends), context.market.drift.dtype)[jnp.clip(t, 0, context.n_steps - 1)]


def _ones(context: Context) -> Array:
    return jnp.ones(context.path.shape, context.market.drift.dtype)


def _idle_scale(context: Context, one: Array):
    n_masks = context.market.initial_cuts.shape[0]
    return market_model.Scale((0.0 * one,) * n_masks, one)


# ----------------------------------------------------------------------------- what a finished path tells


class Conditional(NamedTuple):
    """Terminal values for gradients and for conditional Monte Carlo; rows by account where there is more than one.

    Account j is worth `survived[j]` with probability 1 - F[j] and, in the mean over its liquidation times,
    `liquidated[j] / F[j]` with probability F[j] (`liquidated` is already weighted with F); `outright` is cash and spot.
    """

    outright: Array
    survived: Array
    liquidated: Array
    hit_probability: Array


class Closing(NamedTuple):
    """What the ledger says of finished paths; drawn-branch fields are None when that branch was left out."""

    conditional: Conditional
    is_liquidated: Array | None
    account_equity: Array | None
    accounts: dict[str, Array] | None
    components: Array | None


def close(
    book: Book, context: Context, log_price: Any, margin_state: Any, ledger: LedgerState, *, attribution: bool, drawn: bool
) -> Closing:
    """P&L accounts, components and conditional values at the end of the last step."""
    prices = tuple(jnp.exp(log_price[i]) for i in range(len(book.assets)))
    params: Book = context.book
    zero = jnp.zeros(context.path.shape, context.market.drift.dtype)

    def stack(rows: list[Array]) -> Array:
        return jnp.stack(rows) if rows else jnp.zeros((0, *zero.shape), zero.dtype)

    survived, liquidated = [], []
    for account, shape, (margin, _), s in zip(
        params.perpetuals, book.perpetual_shapes, margin_state[0], ledger.survival, strict=False
    ):
        survived.append(margin + _profit(account, tuple(prices[i] for i in shape.assets)))
        liquidated.append(s.left[0])
    for account, shape, s in zip(
        params.loans, book.loan_shapes, ledger.survival[len(params.perpetuals) :], strict=True
    ):
        growth = _growth(context, account, jnp.asarray(context.n_steps))
        collateral = sum(account.collateral[k] * prices[i] for k, i in enumerate(shape.collateral_assets))
        own = (account.debt[k] * prices[i] for k, i in enumerate(shape.debt_assets))
        debt = growth * sum(own, account.debt_cash + zero)
        survived.append(collateral - debt)
        liquidated.append(s.left[0] * collateral - s.left[1] * debt)
    conditional = Conditional(
        _outright(params, book, prices), stack(survived), stack(liquidated), stack([s.hit_probability for s in ledger.survival])
    )
    if not drawn:
        return Closing(conditional, None, None, None, None)
    is_liquidated = stack([s.alive < 0.5 for s in ledger.perpetuals] + [s.liquidated > 0.5 for s in ledger.loans])
    account_equity = stack([s.equity for s in (*ledger.perpetuals, *ledger.loans)])
    if not attribution:
        return Closing(conditional, is_liquidated, account_equity, None, None)
    spot = [params.spot[k] * (prices[i] - 1.0) for k, i in enumerate(book.spot_assets)]
    components = list(spot)
    price = sum(spot, zero)
    funding, interest, fees, liquidation = zero, zero, zero, zero
    for account, s in zip(params.perpetuals, ledger.perpetuals, strict=True):
        rows = [account.quantity[i] * (frozen - 1.0) for i, frozen in enumerate(s.frozen)]
        components += [*rows, s.funding + s.fees + s.liquidation]
        price = sum(rows, price)
        funding, fees, liquidation = funding + s.funding, fees + s.fees, liquidation + s.liquidation
    for s in ledger.loans:
        components += [*s.price, s.interest + s.liquidation]
        price = sum(s.price, price)
        interest, liquidation = interest + s.interest, liquidation + s.liquidation
    accounts = dict(zip(ACCOUNTS, (price, funding, interest, fees, liquidation), strict=True))
    return Closing(conditional, is_liquidated, account_equity, accounts, stack(components))
