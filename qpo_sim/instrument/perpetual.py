r"""Linear perpetual futures behind one margin balance, cross or isolated, with tiered maintenance margin and funding.

Liquidated when equity < maintenance margin. With the active tier (r, c) of each position this is rearranged so that
both sides are positive,

$$ M - \sum q_i E_i + \sum c_i + \sum (q_i - |q_i| r_i) P_i < 0 , $$

cash-like and price terms each on the side of their sign. For an isolated position the log ratio of the sides is the
log-price itself, shifted, so the bridge test is exact.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.instrument.first_passage import Distance, Options, ProfitAndLoss, Survival, crossing_and_prices
from qpo_sim.numerics import Pair, materialised, safe_log, stamps
from qpo_sim.types import Array, Context
from qpo_sim.venue import tiered_margin
from qpo_sim.venue.tiered_margin import TierSchedule


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


class PerpetualShape(NamedTuple):
    """Static shape of a perpetual account."""

    name: str
    assets: tuple[int, ...]
    mode: str
    venue: str
    funding_interval_hours: float


class MarginState(NamedTuple):
    """Wallet balance and distance of the account as if it were never liquidated."""

    margin: Array
    distance: Array


class Check(NamedTuple):
    """What settling needs: balance, distance, crossing probability, unrealised profit and the payoff of a liquidation.

    The rest is what attribution needs: profit and fee at the barrier, what a liquidation leaves to the insurance fund
    to pay, prices at the mark and at the barrier.
    """

    margin: Array
    distance: Array
    crossing: Array
    profit: Array
    payoff: Array
    hit_profit: Any = ()
    hit_fee: Any = ()
    shortfall: Any = ()
    prices: tuple[Array, ...] = ()
    hit_prices: tuple[Array, ...] = ()


class Drawn(NamedTuple):
    """Drawn branch: alive (1 or 0), payoff once closed, prices frozen at the close, P&L accounts, equity, bad debt.

    `bad_debt` is what the insurance fund has paid, kept under attribution.
    """

    alive: Array
    payoff: Array
    frozen: tuple[Array, ...]
    funding: Array
    fees: Array
    liquidation: Array
    equity: Array
    bad_debt: Any = ()

    @property
    def liquidated(self) -> Array:
        """1 where the account has been liquidated."""
        return 1.0 - self.alive


# Rows of `left`.
N_LEFT = 1


def assets(shape: PerpetualShape) -> tuple[int, ...]:
    """Assets whose prices the account depends on."""
    return shape.assets


def profit(account: Perpetual, prices: tuple[Array, ...]) -> Array:
    """Unrealised profit at the given relative prices."""
    return sum(account.quantity[i] * (price - account.entry[i]) for i, price in enumerate(prices))


def distance(account: Perpetual, margin: Array, prices: tuple[Array, ...], *, with_elasticity: bool = True) -> Distance:
    """Distance to liquidation with wallet balance `margin` at the given relative prices."""

    def positions(account, prices):
        # Price term of each position, positive on the side of the assets, and its tier's deduction.
        terms = []
        for i, price in enumerate(prices):
            quantity = account.quantity[i]
            schedule = TierSchedule(*(table[:, i] for table in account.schedule))
            rate, deduction = tiered_margin.active_tier(schedule, jnp.abs(quantity) * price)
            terms.append(Pair((quantity - jnp.abs(quantity) * rate) * price, deduction))
        return tuple(terms)

    def sides(account, margin, terms):
        up, down, constant = jnp.zeros_like(margin), jnp.zeros_like(margin), margin
        for i, (term, deduction) in enumerate(terms):
            constant = constant + deduction - account.quantity[i] * account.entry[i]
            up, down = up + jnp.maximum(term, 0.0), down + jnp.maximum(-term, 0.0)
        # An empty side is far away (or far gone), not infinite.
        up = jnp.maximum(up + jnp.maximum(constant, 0.0), 1e-12)
        return Pair(up, jnp.maximum(down + jnp.maximum(-constant, 0.0), 1e-12))

    def ratio(terms, sides):
        up, down = sides
        # What a unit returns is computed, used or not.
        used = terms if with_elasticity else ()
        elasticity = tuple(term.first / jnp.where(term.first > 0.0, up, down) for term in used)
        return Distance(safe_log(up / down), elasticity)

    # Without elasticities the terms have one reader, which may as well compute them.
    terms = (materialised(positions) if with_elasticity else positions)(account, prices)
    return materialised(ratio)(terms, materialised(sides)(account, margin, terms))


def margin_init(account: Perpetual, shape: PerpetualShape, one: Array) -> MarginState:
    """State before the first step."""
    margin = account.margin * one
    return MarginState(margin, distance(account, margin, (one,) * len(shape.assets), with_elasticity=False).x)


def margin_step(
    context: Context,
    t: Array,
    account: Perpetual,
    shape: PerpetualShape,
    state: MarginState,
    prices,
    scale,
    options: Options,
) -> tuple[MarginState, Check]:
    """Funding, distance and crossing probability of one step."""
    own = tuple(prices[i] for i in shape.assets)
    payment = sum(account.funding_rate[i] * account.quantity[i] * price for i, price in enumerate(own))
    margin = state.margin - stamps(context, shape.funding_interval_hours, t) * payment
    now = distance(account, margin, own, with_elasticity=options.bridge)
    if options.bridge:
        crossing, hit = crossing_and_prices(context, shape.assets, scale, state.distance, now, own)
    else:
        crossing, hit = (now.x <= 0.0).astype(margin.dtype), own
    gross = [jnp.abs(account.quantity[i]) * price for i, price in enumerate(hit)]
    hit_profit = profit(account, hit)
    hit_fee = sum(account.liquidation_fee[i] * g for i, g in enumerate(gross))
    slippage = sum(account.liquidation_slippage[i] * g for i, g in enumerate(gross))
    # What remains of the margin after fee and slippage stays with the user; a shortfall goes to the insurance fund.
    left = margin + hit_profit - hit_fee - slippage
    payoff = jnp.maximum(left, 0.0)
    check = Check(margin, now.x, crossing, profit(account, own), payoff)
    if options.attribution:
        check = check._replace(
            hit_profit=hit_profit, hit_fee=hit_fee, shortfall=payoff - left, prices=own, hit_prices=hit
        )
    return MarginState(margin, now.x), check


def left(context, t, account: Perpetual, shape: PerpetualShape, check: Check, options: Options) -> tuple[Array, ...]:
    """Equity that a liquidation leaves: what remains of the margin after fee and slippage, not below zero."""
    return (check.payoff,)


def drawn_init(account: Perpetual, shape: PerpetualShape, one: Array, options: Options) -> Drawn:
    """Drawn branch before the first step."""
    prices, zero = (one,) * len(shape.assets), 0.0 * one
    equity = account.margin * one + profit(account, prices)
    frozen, bad_debt = (prices, zero) if options.attribution else ((), ())
    return Drawn(one, zero, frozen, zero, zero, zero, equity, bad_debt)


def drawn_step(
    context: Context,
    t: Array,
    account: Perpetual,
    shape: PerpetualShape,
    state: Drawn,
    check: Check,
    uniform: Array,
    options: Options,
) -> Drawn:
    """Drawn branch after one step; the account closes where the uniform falls below the crossing probability."""
    closes = state.alive * (uniform < check.crossing).astype(uniform.dtype)
    alive = state.alive - closes
    paid = state.payoff + closes * check.payoff
    after = state._replace(alive=alive, payoff=paid, equity=jnp.where(alive > 0.0, check.margin + check.profit, paid))
    if not options.attribution:
        return after
    return after._replace(
        frozen=tuple(
            old + state.alive * (jnp.where(closes > 0.0, hit, price) - old)
            for old, price, hit in zip(state.frozen, check.prices, check.hit_prices, strict=True)
        ),
        funding=jnp.where(state.alive > 0.0, check.margin - account.margin, state.funding),
        fees=state.fees - closes * check.hit_fee,
        # Slippage paid, and what the insurance fund takes over when the account ends below zero.
        liquidation=state.liquidation + closes * (check.payoff - check.margin - check.hit_profit + check.hit_fee),
        bad_debt=state.bad_debt + closes * check.shortfall,
    )


def close_survival(
    context: Context, account: Perpetual, shape: PerpetualShape, state: MarginState, survival: Survival, prices
) -> tuple[Array, Array]:
    """Terminal equity if never liquidated, and the F-weighted equity that liquidation left."""
    return state.margin + profit(account, tuple(prices[i] for i in shape.assets)), survival.left[0]


def profit_and_loss(account: Perpetual, state: Drawn) -> ProfitAndLoss:
    """P&L of the drawn branch since the start (at the starting price, whatever the entry)."""
    price = tuple(account.quantity[i] * (frozen - 1.0) for i, frozen in enumerate(state.frozen))
    return ProfitAndLoss(price, state.funding, 0.0 * state.funding, state.fees, state.liquidation)
