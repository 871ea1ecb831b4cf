r"""Margin account: any contracts behind balances in USD and coins, under any venue's margin rule.

Equity is $\sum_c b_c P_c + \sum_i q_i m_i$ with balances b net of entry cost (see `instrument.contract`). It is
liquidated when its margin equity, what it has in each coin weighted by the venue's collateral weight, falls to the
maintenance margin. Terms are taken to the side of their sign and the distance is the log ratio of the sides, so that
one linear, inverse or quanto position makes it an exact log distance; otherwise crossing between step ends is first
order in the step (see `instrument.first_passage` and `refine`).

What a liquidation does is the venue's (see `execution.liquidation`). It happens where the distance reaches 0, and, if
the venue closes only a part, once more at the end of the step when the rest is below its margin: a venue that goes on
closing in between loses less, so that bad debt after partial liquidations is an upper bound that falls with the step.
Of an account that is closed whole, what is left stays in its first currency.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.account import refine
from qpo_sim.account.positions import held_of, label_of, position_of, start_mark, unit_delta, unit_vega, wallet_of
from qpo_sim.account.protocol import Moment, Status, booking, oracle_feeds
from qpo_sim.errors import InputError
from qpo_sim.execution import liquidation
from qpo_sim.execution.liquidation import Close
from qpo_sim.instrument import option
from qpo_sim.instrument.contract import (
    USD,
    Contract,
    DatedFuture,
    InversePerpetual,
    LinearPerpetual,
    Option,
    QuantoPerpetual,
)
from qpo_sim.instrument.first_passage import Distance, Options, crossing_and_prices
from qpo_sim.instrument.scene import TRIGGERS, Scene
from qpo_sim.numerics import materialised, rounded, safe_log, stamps
from qpo_sim.policy.orders import AccountView, Order
from qpo_sim.types import Array, Context, Held, Positions, Requirements
from qpo_sim.venue.tiered_margin import LiquidationProcess

_TINY = 1e-12
# Distance of an account that owes nothing.
_FAR = 27.0
_THINNEST = 1e-3


class Costs(NamedTuple):
    """What closing and trading cost; leaves, by position where not said otherwise.

    Attributes:
      liquidation_fee: clearance fee on the closed notional.
      liquidation_slippage: share of it lost when it is closed into a book of normal depth; one for all.
      taker_fee: on the notional of a policy's trades.
      delivery_fee: of options at expiry, on the underlying.
      fee_cap: share of an option's price that neither of the last two exceeds.
      taker_slippage: on a policy's trades, in a book of normal depth; one for all.
    """

    liquidation_fee: Float[Array, " positions"]
    liquidation_slippage: Float[Array, ""]
    taker_fee: Float[Array, " positions"]
    delivery_fee: Float[Array, " positions"]
    fee_cap: Float[Array, ""]
    taker_slippage: Float[Array, ""]


class State(NamedTuple):
    """Balances by currency, units by position, whether the account still trades, and its status."""

    balance: tuple[Array, ...]
    quantity: tuple[Array, ...]
    is_open: Array
    status: Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MarginAccount:
    """Parameters of a margin account.

    Attributes:
      balance: by currency, in units of the capital at starting prices, net of the entry cost of all but options.
      quantity: signed units by position, at starting prices in units of the capital.
      contracts: by position.
      rule: margin rule bound to the positions (see `venue`): `requirements(positions) -> Requirements`.
      weight: share of what the account has in a currency that counts as margin, by currency.
      funding_rate: per position and interval, paid by longs, where the market has no funding process.
      costs: see `Costs`.
      currencies: asset of each balance, or `USD` (static).
      name: of the account (static).
      venue: of the account (static).
      process: how it is liquidated, its amounts in units of the capital (static).
      trigger: price that margin is computed at (static).
      funding_hours: interval of a constant funding rate (static).
      n_points: parts of a step at whose ends the distance is looked at; 1 where it is a diffusion (static).
      follows_funding: take the market's funding process where there is one (static).
    """

    balance: Float[Array, " currencies"]
    quantity: Float[Array, " positions"]
    contracts: tuple[Contract, ...]
    rule: Any
    weight: Float[Array, " currencies"]
    funding_rate: Float[Array, " positions"]
    costs: Costs
    currencies: tuple[int, ...] = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    venue: str = field(metadata={"static": True})
    process: LiquidationProcess = field(default=LiquidationProcess(), metadata={"static": True})
    trigger: str = field(default="index", metadata={"static": True})
    funding_hours: float = field(default=8.0, metadata={"static": True})
    follows_funding: bool = field(default=True, metadata={"static": True})
    n_points: int = field(default=1, metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `protocol.Account`."""
        used = [c for c in self.currencies if c != USD]
        used += [asset for contract in self.contracts for asset in contract.assets]
        return tuple(dict.fromkeys(used))

    @property
    def can_be_liquidated(self) -> bool:
        """See `protocol.Account`."""
        return True

    def start_value(self) -> float:
        """Equity at the start, a fraction of the capital."""
        value = float(np.sum(np.asarray(self.balance, np.float64)))
        for contract, units in zip(self.contracts, np.asarray(self.quantity, np.float64), strict=True):
            value += float(units) * start_mark(contract)
        return value

    def components(self, assets: tuple[str, ...]) -> tuple[str, ...]:
        """See `protocol.Account`."""
        coins = [f"{assets[c]} balance" for c in self.currencies if c != USD]
        return (*(label_of(contract, assets) for contract in self.contracts), *coins)

    # ------------------------------------------------------------------------- valuation

    def prices_of(self, scene: Scene) -> tuple[Array, ...]:
        """Price of each balance's currency."""
        one = jnp.ones_like(scene.prices[0])
        return tuple(one if c == USD else scene.prices[c] for c in self.currencies)

    def marks(self, scene: Scene) -> tuple[Array, ...]:
        """Value of one unit of each position."""
        return tuple(contract.mark(scene) for contract in self.contracts)

    def equity(self, state: State, scene: Scene) -> Array:
        """Value to the holder."""
        balances = sum(b * p for b, p in zip(state.balance, self.prices_of(scene), strict=True))
        return sum((q * m for q, m in zip(state.quantity, self.marks(scene), strict=True)), balances)

    def positions(self, state: State, scene: Scene) -> tuple[Held, ...]:
        """The positions as the margin rule sees them."""
        return tuple(
            held_of(contract, quantity, scene)
            for contract, quantity in zip(self.contracts, state.quantity, strict=True)
        )

    def margin(self, state: State, scene: Scene) -> tuple[tuple[Array, ...], Array, Requirements]:
        """Terms of margin equity that move with prices, the sum of those that do not, and the requirements."""
        held = self.positions(state, scene)
        requirements = self.rule.requirements(held)
        counts_options = getattr(self.rule, "counts_option_value", True)
        values = [
            0.0 * p.quantity if isinstance(contract, Option) and not counts_options else p.quantity * p.mark
            for contract, p in zip(self.contracts, held, strict=True)
        ]
        terms, constant, counted = [], jnp.zeros_like(scene.prices[0]), {}
        for c, balance, price, weight in zip(
            self.currencies, state.balance, self.prices_of(scene), self.weight, strict=True
        ):
            own = [value for contract, value in zip(self.contracts, values, strict=True) if contract.settlement == c]
            # Profit and loss in a coin are weighted with its balance; a debt in it counts in full.
            counted[c] = 1.0 if c == USD else jnp.where(sum(own, balance * price) > 0.0, weight, 1.0)
            if c == USD:
                constant = constant + balance * price
            else:
                terms.append(counted[c] * balance * price)
        for contract, value, needed in zip(self.contracts, values, requirements.by_position, strict=True):
            net = counted[contract.settlement] * value - needed
            if isinstance(contract, InversePerpetual):
                constant = constant + net
            else:
                terms.append(net)
        return tuple(terms), constant - requirements.constant, requirements

    def distance(self, state: State, scene: Scene) -> Array:
        """Log ratio of the positive to the negative terms of margin equity less maintenance margin."""
        terms, constant, _ = self.margin(state, scene)
        up, down = jnp.maximum(constant, 0.0), jnp.maximum(-constant, 0.0)
        for term in terms:
            up, down = up + jnp.maximum(term, 0.0), down + jnp.maximum(-term, 0.0)
        # An empty side is far away (or far gone), not infinite.
        x = safe_log(jnp.maximum(up, _TINY) / jnp.maximum(down, _TINY))
        return jnp.where((up <= _TINY) & (down <= _TINY), _FAR, x)

    def distance_with_elasticity(self, state: State, scene: Scene) -> Distance:
        """The distance, and its derivative in the log-price of each of the account's assets."""
        own = tuple(scene.prices[i] for i in self.assets)

        def of_log_prices(moves):
            moved = [price * jnp.exp(move) for price, move in zip(own, moves, strict=True)]
            return self.distance(state, scene.at_prices(self.assets, moved))

        zero = tuple(jnp.zeros_like(price) for price in own)
        x, pull = jax.vjp(of_log_prices, zero)
        return Distance(x, pull(jnp.ones_like(x))[0])

    # ------------------------------------------------------------------------- the path

    def init(self, context: Context, scene: Scene, options: Options) -> State:
        """See `protocol.Account`."""
        state = self.first(scene, jnp.ones_like(scene.prices[0]))
        seen = scene.at_trigger(self.trigger, oracle_feeds(context))
        status = state.status._replace(equity=self.equity(state, scene), distance=self.distance(state, seen))
        return state._replace(status=status)

    def first(self, scene: Scene, one: Array) -> State:
        """Balances and positions before the first step, nothing booked."""
        zero = 0.0 * one
        balance = [self.balance[k] * one for k in range(len(self.currencies))]
        quantity = tuple(self.quantity[k] * one for k in range(len(self.contracts)))
        # Options are entered at the mark: before the first step only the market knows it.
        for contract, units in zip(self.contracts, quantity, strict=True):
            if isinstance(contract, Option):
                k = self.currencies.index(contract.settlement)
                balance[k] = balance[k] - units * contract.mark(scene)
        nothing = booking(len(self.components(("",) * len(scene.prices))), zero)
        return State(tuple(balance), quantity, one, Status(zero, zero, zero, zero, zero, nothing))

    def step(self, context: Context, t: Array, state: State, moment: Moment, uniform: Array, options: Options) -> State:
        """See `protocol.Account`."""
        feeds = oracle_feeds(context)

        def due(account: MarginAccount, state: State, moment: Moment):
            return account._funded(context, t, state, moment)

        funded = materialised(due)(self, state, moment)
        crossing, hit = self._crossing(context, state, funded, moment, uniform, options, feeds)

        def after(account: MarginAccount, state: State, moment: Moment, crossing, hit, uniform):
            is_hit = state.is_open * (uniform < crossing).astype(uniform.dtype)
            now = moment.after.prices
            at_hit = [jnp.where(is_hit > 0.0, price, now[i]) for i, price in zip(account.assets, hit, strict=True)]
            turn = moment.after.at_prices(account.assets, at_hit)
            status = state.status
            status = status._replace(
                # The compensator of the first liquidation: later ones of what a partial one left do not count.
                hit_probability=status.hit_probability + state.is_open * (1.0 - status.liquidated) * crossing,
                liquidated=jnp.maximum(status.liquidated, is_hit),
                booking=status.booking.moved(account._moves(state, moment.before, turn)),
            )
            state = account._liquidated(state._replace(status=status), turn, is_hit, feeds)
            moved = state.status.booking.moved(account._moves(state, turn, moment.after))
            state = state._replace(status=state.status._replace(booking=moved))
            if account.process.process == "partial":
                x = account.distance(state, moment.after.at_trigger(account.trigger, feeds))
                still = state.is_open * (x <= 0.0).astype(x.dtype)
                state = account._liquidated(state, moment.after, still, feeds, is_second=True)
            state = account._expired(state, moment.after)
            status = state.status._replace(
                equity=account.equity(state, moment.after),
                distance=account.distance(state, moment.after.at_trigger(account.trigger, feeds)),
            )
            return state._replace(status=status)

        return materialised(after)(self, funded, moment, crossing, hit, uniform)

    def _crossing(
        self,
        context: Context,
        before: State,
        funded: State,
        moment: Moment,
        uniform: Array,
        options: Options,
        feeds: tuple[int, ...],
    ) -> tuple[Array, tuple[Array, ...]]:
        # Probability of a liquidation in the step, and the assets' prices where it happens. Funding is paid evenly over
        # the step.
        own = tuple(moment.after.prices[i] for i in self.assets)
        if not options.bridge:

            def at_end(account: MarginAccount, state: State, after: Scene):
                return account.distance(state, after.at_trigger(account.trigger, feeds))

            x = materialised(at_end)(self, funded, moment.after)
            return (x <= 0.0).astype(x.dtype), own
        first = tuple(moment.before.prices[i] for i in self.assets)
        if self.n_points > 1:

            def within(account: MarginAccount, before: State, funded: State, moment: Moment, uniform: Array):
                def distance(prices: tuple[Array, ...], share: Array) -> Distance:
                    time = moment.before.years + share * (moment.after.years - moment.before.years)
                    scene = Scene(moment.after.prices, time, _between(moment, share)).at_prices(account.assets, prices)
                    paid = (a + share * (b - a) for a, b in zip(before.balance, funded.balance, strict=True))
                    state = funded._replace(balance=tuple(paid))
                    return account.distance_with_elasticity(state, scene.at_trigger(account.trigger, feeds))

                start = tuple(moment.before.prices[i] for i in account.assets)
                end = tuple(moment.after.prices[i] for i in account.assets)
                return refine.crossing(
                    context, account.assets, moment.scale, start, end, distance, uniform, moment.address, self.n_points
                )

            return materialised(within)(self, before, funded, moment, uniform)

        def ends(account: MarginAccount, before: State, funded: State, moment: Moment):
            start = account.distance(before, moment.before.at_trigger(account.trigger, feeds))
            return start, account.distance_with_elasticity(funded, moment.after.at_trigger(account.trigger, feeds))

        start, now = materialised(ends)(self, before, funded, moment)
        crossing, hit = crossing_and_prices(context, self.assets, moment.scale, start, now, own)
        # What is below its margin as the step begins is closed then.
        return crossing, tuple(jnp.where(start <= 0.0, a, b) for a, b in zip(first, hit, strict=True))

    def _moves(self, state: State, start: Scene, end: Scene) -> tuple[Array, ...]:
        # Change of value by component, at what is held.
        rows = [q * (b - a) for q, a, b in zip(state.quantity, self.marks(start), self.marks(end), strict=True)]
        at, to = self.prices_of(start), self.prices_of(end)
        rows += [b * (to[k] - at[k]) for k, b in enumerate(state.balance) if self.currencies[k] != USD]
        return tuple(rows)

    def _pay(self, state: State, currency: int, value: Array, scene: Scene) -> State:
        # Takes a value in USD out of the balance in a currency.
        k = self.currencies.index(currency)
        amount = value / self.prices_of(scene)[k]
        return state._replace(balance=(*state.balance[:k], state.balance[k] - amount, *state.balance[k + 1 :]))

    def _funded(self, context: Context, t: Array, state: State, moment: Moment) -> State:
        # On what is held at the end of the step; paid and booked at its beginning, so that the moves of a balance in
        # coin are those of what it then holds.
        total = jnp.zeros_like(moment.after.prices[0])
        accrued = moment.after.side.get("funding_accrued") if self.follows_funding else None
        due = stamps(context, self.funding_hours, t)
        begin, end = self.prices_of(moment.before), self.prices_of(moment.after)
        for k, contract in enumerate(self.contracts):
            if not isinstance(contract, LinearPerpetual | InversePerpetual | QuantoPerpetual):
                continue
            rate = self.funding_rate[k] * due if accrued is None else accrued[contract.asset]
            c = self.currencies.index(contract.settlement)
            paid = state.quantity[k] * contract.notional(moment.after) * rate * (begin[c] / end[c])
            state = self._pay(state, contract.settlement, paid, moment.before)
            total = total - paid
        return state._replace(status=state.status._replace(booking=state.status.booking.plus(funding=total)))

    def _expired(self, state: State, scene: Scene) -> State:
        # Expiry is a trade at the payoff, which is the mark when no time is left.
        for k, contract in enumerate(self.contracts):
            if not isinstance(contract, DatedFuture | Option):
                continue
            expires = (contract.time_left(scene) <= 0.0).astype(state.quantity[k].dtype)
            closed, mark = expires * state.quantity[k], contract.mark(scene)
            value = closed * mark
            if isinstance(contract, Option):
                fee = jnp.abs(closed) * self._option_fee(contract, self.costs.delivery_fee[k], mark, scene)
                value = value - fee
                booked = state.status.booking.plus(fees=-fee)
                state = state._replace(status=state.status._replace(booking=booked))
            state = self._pay(state, contract.settlement, -value, scene)
            quantity = (*state.quantity[:k], state.quantity[k] - closed, *state.quantity[k + 1 :])
            state = state._replace(quantity=quantity)
        return state

    def _option_fee(self, contract: Option, rate: Array, mark: Array, scene: Scene) -> Array:
        return option.fee(1.0, mark, underlying=contract.notional(scene), rate=rate, cap=self.costs.fee_cap)

    def gross(self, state: State, scene: Scene) -> Array:
        """Sum of the absolute notionals."""
        zero = jnp.zeros_like(scene.prices[0])
        return sum((jnp.abs(q) * c.notional(scene) for q, c in zip(state.quantity, self.contracts, strict=True)), zero)

    def closing_cost(self, quantities: tuple[Array, ...], scene: Scene, rate: Array) -> Array:
        """Slippage of trading units into the book: a rate of the notional over the depth that is left."""
        return sum(self._slippages(quantities, scene, rate), jnp.zeros_like(scene.prices[0]))

    def _slippages(self, quantities: tuple[Array, ...], scene: Scene, rate: Array) -> list[Array]:
        rows, depth = [], scene.side.get("depth")
        for quantity, contract in zip(quantities, self.contracts, strict=True):
            thinness = 1.0 if depth is None else 1.0 / jnp.maximum(depth[contract.asset], _THINNEST)
            rows.append(jnp.abs(quantity) * contract.notional(scene) * jnp.minimum(rate * thinness, 1.0))
        return rows

    def _liquidated(
        self, state: State, scene: Scene, is_hit: Array, feeds: tuple[int, ...], *, is_second: bool = False
    ) -> State:
        # `is_second`: right after a partial one, when orders are for all that is left where the venue says so.
        if not self.contracts:
            notionals, slippages = [jnp.zeros_like(is_hit)], [jnp.zeros_like(is_hit)]
            fees = slippages
        else:
            notionals = [jnp.abs(q) * c.notional(scene) for q, c in zip(state.quantity, self.contracts, strict=True)]
            fees = [self.costs.liquidation_fee[k] * row for k, row in enumerate(notionals)]
            slippages = self._slippages(state.quantity, scene, self.costs.liquidation_slippage)
        equity = self.equity(state, scene)
        shares, is_taken = self._shares(state, scene, equity, notionals, fees, slippages, feeds, is_second)
        closed = _total(shares, notionals)
        some = closed > 0.0
        rates = [jnp.where(some, _total(shares, row) / jnp.where(some, closed, 1.0), 0.0) for row in (fees, slippages)]
        close = liquidation.close_out(equity, closed, share=1.0, fee_rate=rates[0], slippage_rate=rates[1])
        gain = 0.0 * is_hit
        if is_taken is not None:
            taken = liquidation.takeover(equity, closed, slippage_rate=rates[1])
            gain = is_hit * jnp.where(is_taken, taken.fee, 0.0)
            taken = taken._replace(fee=0.0 * taken.fee)
            close = Close(*(jnp.where(is_taken, a, b) for a, b in zip(taken, close, strict=True)))
        least = shares[0]
        for share in shares[1:]:
            least = jnp.minimum(least, share)
        is_gone = is_hit * (least >= 1.0)
        bought = tuple(-is_hit * s * q for s, q in zip(shares, state.quantity, strict=False))
        state = self._pay(
            self._traded(state, scene, bought), self.currencies[0], is_hit * (equity - close.equity), scene
        )
        prices = self.prices_of(scene)
        balance = tuple(
            jnp.where(is_gone > 0.0, (close.equity / prices[k] if k == 0 else 0.0), b)
            for k, b in enumerate(state.balance)
        )
        status = state.status._replace(
            bad_debt=state.status.bad_debt + is_hit * close.shortfall,
            booking=state.status.booking.plus(
                fees=-is_hit * close.fee, liquidation=is_hit * (close.shortfall - close.slippage) - gain
            ),
        )
        return state._replace(balance=balance, is_open=state.is_open * (1.0 - is_gone), status=status)

    def _shares(
        self, state: State, scene: Scene, equity: Array, notionals, fees, slippages, feeds: tuple[int, ...], is_second
    ) -> tuple[list[Array], Array | None]:
        # Share of each position to close, and whether the fund takes the account over (None: nothing to decide).
        process, whole = self.process, jnp.ones_like(equity)
        if process.process == "takeover":
            return [whole] * len(notionals), whole > 0.0
        if process.process == "full":
            return [whole] * len(notionals), None
        seen = scene.at_trigger(self.trigger, feeds)
        terms, constant, needed = self.margin(state, seen)
        maintenance = sum(needed.by_position, needed.constant)
        margin_equity, cost = sum(terms, constant) + maintenance, sum(fees) + sum(slippages)
        tiered = [None] * len(notionals)
        if process.partial == "tiers":
            tiered = self.rule.close_shares(self.positions(state, seen), margin_equity, liquidation.tier_close_share)
        if is_second and process.partial == "share":
            process = replace(process, share=1.0)
        shares = [
            liquidation.close_share(
                process,
                equity=margin_equity,
                maintenance=maintenance,
                notional=sum(notionals),
                cost=cost,
                tier_share=share,
            )
            for share in tiered
        ]
        # Of an account that its closing would leave without equity nothing is kept, and positions of nothing are none.
        shares = [
            jnp.where((equity <= cost) | (notional <= 0.0), whole, share)
            for share, notional in zip(shares, notionals, strict=True)
        ]
        if process.backstop == 0.0:
            return shares, None
        return shares, liquidation.is_backstopped(margin_equity, maintenance, backstop=process.backstop)

    def _traded(self, state: State, scene: Scene, bought: tuple[Array, ...]) -> State:
        # At the marks: equity stays.
        for contract, units, mark in zip(self.contracts, bought, self.marks(scene), strict=True):
            state = self._pay(state, contract.settlement, units * mark, scene)
        return state._replace(quantity=tuple(q + d for q, d in zip(state.quantity, bought, strict=True)))

    # ------------------------------------------------------------------------- policies

    def view(self, state: State, scene: Scene) -> AccountView:
        """See `protocol.Account`."""
        collateral, requirement = self._collateral(state, scene)
        own = tuple(scene.prices[i] for i in self.assets)

        def equity(moves):
            moved = [price * (1.0 + move) for price, move in zip(own, moves, strict=True)]
            return self.equity(state, scene.at_prices(self.assets, moved))

        value, pull = jax.vjp(equity, tuple(jnp.zeros_like(price) for price in own))
        return AccountView(
            equity=value,
            requirement=requirement,
            ratio=requirement / jnp.maximum(collateral, _TINY),
            gross=self.gross(state, scene),
            collateral=collateral,
            delta=pull(jnp.ones_like(value))[0],
            is_open=state.is_open,
            quantity=state.quantity,
            unit_delta=tuple(unit_delta(contract, scene) for contract in self.contracts),
            unit_vega=tuple(unit_vega(contract, scene) for contract in self.contracts),
        )

    def _collateral(self, state: State, scene: Scene) -> tuple[Array, Array]:
        # Margin equity and maintenance margin; an oracle's price, which only a step knows, is the index.
        seen = scene if self.trigger == "oracle" else scene.at_trigger(self.trigger)
        terms, constant, needed = self.margin(state, seen)
        requirement = sum(needed.by_position, needed.constant) + jnp.zeros_like(scene.prices[0])
        return sum(terms, constant) + requirement, requirement

    def fill(self, state: State, scene: Scene, order: Order) -> tuple[State, Array]:
        """See `protocol.Account`. No more is moved out than margin equity exceeds the maintenance margin by."""
        bought = [jnp.zeros_like(q) for q in state.quantity]
        if order.keep is not None:
            bought = [(order.keep - 1.0) * q for q in state.quantity]
        for k, units in order.trade:
            bought[k] = bought[k] + units
        bought = tuple(state.is_open * units for units in bought)
        cost = self.closing_cost(bought, scene, self.costs.taker_slippage)
        for k, (units, contract) in enumerate(zip(bought, self.contracts, strict=True)):
            rate = self.costs.taker_fee[k]
            if isinstance(contract, Option):
                fee = self._option_fee(contract, rate, contract.mark(scene), scene)
            else:
                fee = rate * contract.notional(scene)
            cost = cost + jnp.abs(units) * fee
        state = self._pay(self._traded(state, scene, bought), self.currencies[0], cost, scene)
        moved = jnp.zeros_like(cost)
        if order.transfer is not None:
            collateral, requirement = self._collateral(state, scene)
            moved = state.is_open * jnp.maximum(order.transfer, -jnp.maximum(collateral - requirement, 0.0))
            state = self._pay(state, self.currencies[0], -moved, scene)
        status = state.status._replace(
            equity=self.equity(state, scene), booking=state.status.booking.plus(trading=-cost)
        )
        return state._replace(status=status), moved


def _total(shares: Sequence[Array], rows: Sequence[Array]) -> Array:
    return sum((share * row for share, row in zip(shares[1:], rows[1:], strict=True)), shares[0] * rows[0])


def _between(moment: Moment, share: Array) -> dict[str, Any]:
    # Side processes within a step: on the way from one end to the other.
    return jax.tree.map(lambda a, b: a + share * (b - a), moment.before.side, moment.after.side)


# ----------------------------------------------------------------------------- building

PROCEDURES = ("full", "partial", "takeover")


def margin(
    *,
    name: str,
    venue: Any,
    balance: Mapping[str, float],
    positions: Sequence[Mapping[str, Any]],
    trigger: str | None = None,
    procedure: str | None = None,
    funding: str = "market",
    taker_slippage: float = 0.0,
    n_points: int | None = None,
    assets: Sequence[str],
    capital: float,
    prices: Mapping[str, float],
    venue_of: Callable[[str], Any],
    dtype: Any = jnp.float32,
) -> MarginAccount:
    """Margin account from a description.

    Args:
      name: of the account.
      venue: name of the venue, or its rule.
      balance: wallet by USD or coin, as fractions of the capital at the starting prices. Fees are paid from the first.
      positions: `{kind, asset, notional | contracts, ...}`; kinds are linear, inverse, quanto, future and option.
        `notional` is a signed fraction of the capital at the starting price, `contracts` a signed number of coins (of
        USD for inverse contracts) and needs `prices`. All but options take `entry`, the price in USD at which they were
        opened (the starting price when left out); quanto takes `settlement`; future and option take `days` to expiry
        and `carry_per_year`; option takes `type` (call or put), `strike` in USD or `moneyness` (strike over the
        starting price), `settlement` (USD or coin) and `volatility` per year, used where the market has no surface.
      trigger: price that margin is computed at: index, mark, last or oracle; that of the venue when left out. Without a
        process for it in the market it is the index.
      procedure: full, partial or takeover; that of the venue when left out. The rest of its liquidation process stays.
      funding: "market" follows the market's funding process where there is one, "venue" the venue's constant rate.
      taker_slippage: share of the notional lost by a policy's trades in a book of normal depth.
      n_points: parts of a step at whose ends the account is looked at; left out, 8 where it has options and 1
        otherwise. With positions in several assets, or options, crossing is first order in such a part.
      assets: the market's assets.
      capital: USD.
      prices: starting prices in USD.
      venue_of: rule of a venue's name.
      dtype: precision of the paths.

    Raises:
      InputError: an unknown asset, kind or option of a position, a negative balance, an expired contract, leverage
        above what the venue allows, an account that would be liquidated at once.
    """
    rule = venue_of(venue) if isinstance(venue, str) else venue
    if not hasattr(rule, "bind"):
        raise InputError(f"venue {venue!r} is a {type(rule).__name__}; a margin account needs a margin rule.")
    process = getattr(rule, "process", LiquidationProcess())
    trigger = process.liquidate_on if trigger is None else trigger
    if trigger not in TRIGGERS:
        raise InputError(f"trigger is {trigger!r}; it must be one of {', '.join(TRIGGERS)}.")
    if funding not in ("market", "venue"):
        raise InputError(f"funding is {funding!r}; it must be market or venue.")
    if procedure is not None and procedure not in PROCEDURES:
        raise InputError(f"procedure is {procedure!r}; it must be one of {', '.join(PROCEDURES)}.")
    process = replace(
        process,
        process=procedure or process.process,
        share_above_usd=process.share_above_usd / capital,
        insurance_fund_usd=process.insurance_fund_usd / capital,
    )
    if n_points is not None and not 1 <= n_points <= 32:
        raise InputError(f"n_points is {n_points}; it must lie in 1..32.")
    wallet = wallet_of(balance, assets)
    made = [position_of(position, f"positions[{k}]", assets, capital, prices) for k, position in enumerate(positions)]
    contracts: tuple[Contract, ...] = tuple(
        jax.tree.map(lambda x: rounded(x, dtype), contract) for contract, _, _ in made
    )
    underlyings = [assets[contract.asset] for contract in contracts]
    quantity = np.array([units for _, units, _ in made], np.float64)
    for contract in contracts:
        wallet.setdefault(contract.settlement, 0.0)
    currencies = tuple(wallet)
    net = np.array([wallet[c] for c in currencies], np.float64)
    for (contract, units, cost), k in zip(made, (currencies.index(c.settlement) for c in contracts), strict=True):
        net[k] -= units * cost if not isinstance(contract, Option) else 0.0
    weights = [1.0 if c == USD else rule_weight(rule, assets[c]) for c in currencies]
    described = Positions(
        assets=tuple(underlyings),
        kinds=tuple(type(contract).__name__ for contract in contracts),
        quantity=tuple(map(float, quantity)),
        entry=tuple(_entry(contract, cost) for contract, _, cost in made),
        expiry=tuple(None if c.expiry_years is None else float(c.expiry_years) for c, _, _ in made),
        strike=tuple(float(c.strike) if isinstance(c, Option) else None for c, _, _ in made),
    )
    bound = rule.bind(described, capital=capital, prices=prices, dtype=dtype)
    if process.process == "partial" and process.partial == "tiers" and not getattr(rule, "is_by_size", False):
        raise InputError(
            f"venue {getattr(rule, 'name', venue)}: liquidation.partial is `tiers`, which needs tiers by size of the "
            "position; take another partial process or venue."
        )
    looks_within = getattr(rule, "looks_within_steps", False) or any(isinstance(c, Option) for c in contracts)
    points = n_points or (8 if looks_within else 1)
    account = MarginAccount(
        balance=rounded(net, dtype),
        quantity=rounded(quantity, dtype),
        contracts=contracts,
        rule=bound,
        weight=rounded(weights, dtype),
        funding_rate=rounded(np.full(len(contracts), getattr(rule, "funding_rate", 0.0)), dtype),
        costs=Costs(
            liquidation_fee=rounded([_liquidation_fee(rule, asset) for asset in underlyings], dtype),
            liquidation_slippage=rounded(getattr(rule, "liquidation_slippage", 0.0), dtype),
            taker_fee=rounded([_trading_fee(rule, c, "taker") for c in contracts], dtype),
            delivery_fee=rounded([_trading_fee(rule, c, "delivery") for c in contracts], dtype),
            fee_cap=rounded(getattr(rule, "fee_cap", 1.0), dtype),
            taker_slippage=rounded(taker_slippage, dtype),
        ),
        currencies=currencies,
        name=str(name),
        venue=str(getattr(rule, "name", venue)),
        process=process,
        trigger=trigger,
        funding_hours=float(getattr(rule, "funding_interval_hours", 8.0)),
        follows_funding=funding == "market",
        n_points=points,
    )
    n_slots = points * ((len(account.assets) + 1) // 2)
    if points > 1 and n_slots > refine.MAX_SLOTS:
        raise InputError(f"n_points is {points} with {len(account.assets)} assets; lower it.")
    _check_start(account, rule, assets, capital)
    return account


def _entry(contract: Contract, cost: float) -> float:
    # Entry price over the starting price; options have none.
    return 1.0 if isinstance(contract, Option) else -1.0 / cost if isinstance(contract, InversePerpetual) else cost


def _liquidation_fee(rule: Any, asset: str) -> float:
    fees = getattr(rule, "liquidation_fee_rate", 0.0)
    return float(rule_entry(rule, fees, asset, "liquidation fee")) if isinstance(fees, Mapping) else float(fees)


def _trading_fee(rule: Any, contract: Contract, which: str) -> float:
    # Option venues have tables by settlement for options, and one rate for the rest.
    fees = getattr(rule, f"{which}_fee_rate", 0.0)
    if isinstance(contract, Option):
        settlement = "inverse" if contract.is_coin_settled else "linear"
        return float(fees.get(settlement, 0.0)) if isinstance(fees, Mapping) else float(fees)
    if which == "delivery":
        return 0.0
    return float(getattr(rule, f"futures_{which}_fee_rate", 0.0)) if isinstance(fees, Mapping) else float(fees)


def rule_entry(rule: Any, table: Mapping[str, float], asset: str, what: str) -> float:
    """Entry of an asset in a venue's table, or its default.

    Raises:
      InputError: it lists neither.
    """
    if asset not in table and "default" not in table:
        raise InputError(f"venue {rule.name} has no {what} for {asset} and no default; it lists {', '.join(table)}.")
    return float(table[asset] if asset in table else table["default"])


def rule_weight(rule: Any, asset: str) -> float:
    """Share of a coin's value that counts as margin at a venue; 1 where it says nothing.

    Raises:
      InputError: the venue lists collateral, but not this coin.
    """
    table = getattr(rule, "collateral_weight", None)
    return rule_entry(rule, table, asset, "collateral weight") if table else 1.0


def _check_start(account: MarginAccount, rule: Any, assets: Sequence[str], capital: float) -> None:
    # The account as it is at the start, in float64 on one path.
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), account)
        one = jnp.ones(1)
        scene = Scene((one,) * len(assets), 0.0 * one, {})
        state = wide.first(scene, one)
        margin_equity, maintenance = (float(x[0]) for x in wide._collateral(state, scene))
        gross = float(wide.gross(state, scene)[0])
        initial = getattr(wide.rule, "initial_margin", None)
        required = sum(float(np.sum(x)) for x in initial(wide.positions(state, scene))) if initial is not None else 0.0
    if required > margin_equity * (1.0 + 1e-9) > 0.0:
        raise InputError(
            f"{account.name}: positions of {gross:.6g} on a margin equity of {margin_equity:.6g} are a leverage of "
            f"{gross / margin_equity:.4g}, which must not exceed {gross / required:.4g}: {rule.name} asks for an "
            f"initial margin of {required:.6g}, so raise the balance or cut the positions."
        )
    if margin_equity <= maintenance and (gross > 0.0 or margin_equity < 0.0):
        raise InputError(
            f"{account.name} would be liquidated at once: its margin equity {margin_equity:.6g} is not above its "
            f"maintenance margin {maintenance:.6g}; raise the balance or cut the positions."
        )
