"""Collateralised loan with a health factor (Aave v3 form): collateral in assets, debt in cash and in assets.

The distance to liquidation is the log health factor. A liquidation repays part of the debt and takes collateral worth
the repayment plus a bonus, pro rata over the collaterals; the loan lives on with what is left and can be liquidated
again.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.instrument.first_passage import (
    Distance,
    Options,
    ProfitAndLoss,
    Survival,
    price_at_barrier,
    step_moments,
)
from qpo_sim.numerics import bridge_crossing, materialised, safe_log
from qpo_sim.types import Array, Context
from qpo_sim.venue import health_factor


class Loan(NamedTuple):
    """Parameters of a loan: collateral by asset, debt in cash and in assets, and the venue's rule.

    Values at the starting prices in units of the starting capital.
    """

    collateral: Float[Array, " collaterals"]
    threshold: Float[Array, " collaterals"]
    bonus: Float[Array, " collaterals"]
    debt_cash: Float[Array, ""]
    debt: Float[Array, " debts"]
    borrow_rate_per_hour: Float[Array, ""]
    close_factor: Float[Array, ""]
    full_close_health: Float[Array, ""]
    small_position: Float[Array, ""]


class LoanShape(NamedTuple):
    """Static shape of a loan."""

    name: str
    collateral_assets: tuple[int, ...]
    debt_assets: tuple[int, ...]
    venue: str


class Check(NamedTuple):
    """What settling needs: distances at both ends, variance, crossing probability, covariances with x and marks."""

    start: Array
    distance: Array
    variance: Array
    crossing: Array
    covariance: tuple[Array, ...]
    prices: tuple[Array, ...]


class Drawn(NamedTuple):
    """Drawn branch: shares of collateral and debt left, whether liquidated, P&L by component, last prices, equity.

    `bad_debt` is what the lenders have lost, kept under attribution.
    """

    collateral_left: Array
    debt_left: Array
    liquidated: Array
    price: tuple[Array, ...]
    previous: tuple[Array, ...]
    interest: Array
    liquidation: Array
    equity: Array
    bad_debt: Any = ()


class Left(NamedTuple):
    """What a liquidation leaves: shares of collateral and debt, its cost, bad debt, and the prices where it happens.

    `cost` is debt removed less collateral seized: negative by the bonus, and positive by the bad debt.
    """

    collateral_left: Array
    debt_left: Array
    cost: Array
    bad_debt: Any
    prices: tuple[Array, ...]


# Rows of `left`.
N_LEFT = 2


def assets(shape: LoanShape) -> tuple[int, ...]:
    """Assets whose prices the loan depends on: collaterals, then debts."""
    return shape.collateral_assets + shape.debt_assets


def growth(context: Context, account: Loan, t: Array) -> Array:
    """Factor by which the debt has grown after t steps."""
    hours = context.step_hours * t.astype(account.borrow_rate_per_hour.dtype)
    return jnp.exp(account.borrow_rate_per_hour * hours)


def collateral_value(account: Loan, shape: LoanShape, prices: tuple[Array, ...]) -> Array:
    """Value of all collateral; `prices` in the order of `assets`."""
    return sum(account.collateral[i] * prices[i] for i in range(len(shape.collateral_assets)))


def debt_value(account: Loan, shape: LoanShape, prices: tuple[Array, ...]) -> Array:
    """Value of all debt before interest; `prices` in the order of `assets`."""
    own = prices[len(shape.collateral_assets) :]
    return sum((account.debt[i] * price for i, price in enumerate(own)), account.debt_cash * jnp.ones_like(prices[0]))


def distance(account: Loan, shape: LoanShape, debt_growth: Array | float, prices: tuple[Array, ...]) -> Distance:
    """Log health factor when the debt has grown by `debt_growth`."""
    n = len(shape.collateral_assets)

    def from_prices(account, debt_growth, prices):
        held = [account.threshold[i] * account.collateral[i] * prices[i] for i in range(n)]
        owed = [debt_growth * account.debt[i] * price for i, price in enumerate(prices[n:])]
        up = jnp.maximum(sum(held), 1e-12)
        down = jnp.maximum(debt_growth * debt_value(account, shape, prices), 1e-12)
        return Distance(safe_log(up / down), tuple(h / up for h in held) + tuple(-d / down for d in owed))

    return materialised(from_prices)(account, debt_growth, prices)


def margin_init(account: Loan, shape: LoanShape, one: Array) -> Array:
    """Distance before the first step."""
    return distance(account, shape, 1.0, (one,) * len(assets(shape))).x


def margin_step(
    context: Context, t: Array, account: Loan, shape: LoanShape, state: Array, prices, scale, options: Options
) -> tuple[Array, Check]:
    """Distance and crossing probability of one step, as if the loan were never liquidated."""
    own = tuple(prices[i] for i in assets(shape))
    now = distance(account, shape, growth(context, account, t + 1), own)
    if options.bridge:
        variance, covariance = step_moments(now, assets(shape), context, scale)
        crossing = bridge_crossing(state, now.x, variance)
    else:
        variance, covariance = jnp.ones_like(now.x), (jnp.zeros_like(now.x),) * len(own)
        crossing = (now.x <= 0.0).astype(now.x.dtype)
    return now.x, Check(state, now.x, variance, crossing, covariance, own)


def _liquidated(
    account: Loan,
    shape: LoanShape,
    check: Check,
    collateral_left: Array,
    debt_left: Array,
    x: Array,
    debt_growth: Array,
    options: Options,
) -> Left:
    def liquidated(account, check, collateral_left, debt_left, x, debt_growth):
        prices, health = check.prices, jnp.exp(jnp.minimum(x, 0.0))
        if options.bridge:
            slopes = (c / check.variance for c in check.covariance)
            prices = tuple(price_at_barrier(p, x, s) for p, s in zip(prices, slopes, strict=True))
            health = jnp.ones_like(x)
        collateral = collateral_left * collateral_value(account, shape, prices)
        debt = debt_left * debt_growth * debt_value(account, shape, prices)
        values = [account.collateral[i] * prices[i] for i in range(len(shape.collateral_assets))]
        bonus = sum(account.bonus[i] * value for i, value in enumerate(values)) / jnp.maximum(sum(values), 1e-12)
        result = health_factor.liquidate_pro_rata(
            collateral,
            debt,
            health,
            bonus=bonus,
            close_factor=account.close_factor,
            full_close_health=account.full_close_health,
            small_position=account.small_position,
        )
        removed = result.repaid + result.bad_debt
        return Left(
            collateral_left * (1.0 - result.seized / jnp.maximum(collateral, 1e-12)),
            debt_left * (1.0 - removed / jnp.maximum(debt, 1e-12)),
            removed - result.seized,
            result.bad_debt if options.attribution else (),
            prices,
        )

    return materialised(liquidated)(account, check, collateral_left, debt_left, x, debt_growth)


def left(
    context: Context, t: Array, account: Loan, shape: LoanShape, check: Check, options: Options
) -> tuple[Array, ...]:
    """Shares of collateral and of debt that a first liquidation leaves."""
    one = jnp.ones_like(check.distance)
    result = _liquidated(account, shape, check, one, one, check.distance, growth(context, account, t + 1), options)
    return result.collateral_left, result.debt_left


def drawn_init(account: Loan, shape: LoanShape, one: Array, options: Options) -> Drawn:
    """Drawn branch before the first step."""
    prices, zero = (one,) * len(assets(shape)), 0.0 * one
    equity = collateral_value(account, shape, prices) - debt_value(account, shape, prices)
    bad_debt = zero if options.attribution else ()
    return Drawn(one, one, zero, (zero,) * len(prices), prices, zero, zero, equity, bad_debt)


def drawn_step(
    context: Context,
    t: Array,
    account: Loan,
    shape: LoanShape,
    state: Drawn,
    check: Check,
    uniform: Array,
    options: Options,
) -> Drawn:
    """Drawn branch after one step; part of the loan is closed where the uniform is below its crossing probability."""
    growth_before, growth_after = growth(context, account, t), growth(context, account, t + 1)

    def drawn(state, check, uniform):
        # Collateral and debt shrink proportionally: a liquidation moves the distance by the log of their shares' ratio.
        is_open = (state.debt_left > 1e-6) & (state.collateral_left > 1e-6)
        offset = safe_log(jnp.where(is_open, state.collateral_left / jnp.maximum(state.debt_left, 1e-12), 1.0))
        if options.bridge:
            crossing = bridge_crossing(check.start + offset, check.distance + offset, check.variance)
        else:
            crossing = (check.distance + offset <= 0.0).astype(uniform.dtype)
        return (is_open & (uniform < crossing)).astype(uniform.dtype), check.distance + offset

    hits, x = materialised(drawn)(state, check, uniform)
    rest = _liquidated(account, shape, check, state.collateral_left, state.debt_left, x, growth_after, options)
    collateral_left = state.collateral_left + hits * (rest.collateral_left - state.collateral_left)
    debt_left = state.debt_left + hits * (rest.debt_left - state.debt_left)

    # Each side earns its price move up to the liquidation on the shares before it, and the rest on those after it.
    price = []
    for i, (now, before, hit) in enumerate(zip(check.prices, state.previous, rest.prices, strict=True)):
        k = i - len(shape.collateral_assets)
        if k < 0:
            units, held, kept = account.collateral[i], state.collateral_left, collateral_left
        else:
            units, held, kept = -growth_after * account.debt[k], state.debt_left, debt_left
        turn = jnp.where(hits > 0.0, hit, now)
        price.append(state.price[i] + units * (held * (turn - before) + kept * (now - turn)))
    accrued = (growth_after - growth_before) * debt_value(account, shape, state.previous)
    equity = collateral_left * collateral_value(account, shape, check.prices)
    return Drawn(
        collateral_left=collateral_left,
        debt_left=debt_left,
        liquidated=jnp.maximum(state.liquidated, hits),
        price=tuple(price),
        previous=check.prices,
        interest=state.interest - state.debt_left * accrued,
        liquidation=state.liquidation + hits * rest.cost,
        equity=equity - debt_left * growth_after * debt_value(account, shape, check.prices),
        bad_debt=state.bad_debt + hits * rest.bad_debt if options.attribution else (),
    )


def close_survival(
    context: Context, account: Loan, shape: LoanShape, state: Array, survival: Survival, prices
) -> tuple[Array, Array]:
    """Terminal equity if never liquidated, and the F-weighted equity after a first liquidation."""
    own = tuple(prices[i] for i in assets(shape))
    collateral = collateral_value(account, shape, own)
    debt = growth(context, account, jnp.asarray(context.n_steps)) * debt_value(account, shape, own)
    return collateral - debt, survival.left[0] * collateral - survival.left[1] * debt


def profit_and_loss(account: Loan, state: Drawn) -> ProfitAndLoss:
    """P&L of the drawn branch since the start."""
    zero = 0.0 * state.interest
    return ProfitAndLoss(state.price, zero, state.interest, zero, state.liquidation)
