r"""Loans whose amounts change along a path: collateral and debt by asset under any lending rule (see `venue`).

The loan is liquidatable where the rule's log health, at index or oracle prices, is <= 0. Whoever pays its debt acts
only for more than the gas costs; then the rule says who gets what, at market prices. If nobody comes the loan stays.

**A loan is non-recourse.** Its holder can walk away, so equity is $(C - D)^+$ plus the holder's cash, with the values
of collateral C and debt D. What is missing, $(D - C)^+$, is a loss of the lenders: it counts as bad debt while it
lasts, beside what the venue has written off.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.account import refine
from qpo_sim.account.positions import CASH_NAMES
from qpo_sim.account.protocol import Moment, Status, booking, oracle_feeds
from qpo_sim.errors import InputError, did_you_mean, finite
from qpo_sim.execution import gas
from qpo_sim.instrument.contract import USD
from qpo_sim.instrument.first_passage import Distance, Options, crossing_and_prices
from qpo_sim.instrument.scene import Scene
from qpo_sim.numerics import materialised, rounded
from qpo_sim.policy.orders import AccountView, Order
from qpo_sim.types import HOURS_PER_YEAR, Array, Context

TRIGGERS = ("index", "oracle")
INTEREST = ("market", "venue")
_MOST_LIQUIDATIONS = 16
# What the rules take for no debt, in units of the capital.
_NO_DEBT = 1e-24


class State(NamedTuple):
    """Amounts of collateral and of debt, the holder's cash, what the collateral does not cover, and the status."""

    collateral: tuple[Array, ...]
    debt: tuple[Array, ...]
    cash: Array
    shortfall: Array
    status: Status


class Called(NamedTuple):
    """A loan after an attempt to liquidate it: its state, whether somebody came, and whether it would have paid."""

    state: State
    acted: Array
    pays: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LendingAccount:
    """Parameters of a loan.

    Attributes:
      collateral: amounts at starting prices in units of the capital.
      debt: the same.
      deposit: cash of the holder that the venue keeps from the start on (a gas deposit).
      params: of the rule, for these assets.
      borrow_rate: per year, continuously compounded, by debt; where the market has no rate for it.
      supply_rate: per year, continuously compounded, by collateral.
      gas_cost: of a liquidation in units of the capital, where the market has no gas process.
      gas_cost_per_gwei: the same per gwei at the starting price of the chain's coin.
      taker_slippage: share of the value lost when a policy sells collateral into a book of normal depth.
      rule: class of the rule, with `log_health` and `liquidate` (static).
      collateral_assets: asset of each collateral (static).
      debt_assets: asset of each debt, or `USD` (static).
      name: of the account (static).
      venue: of the account (static).
      trigger: price that health is computed at, index or oracle (static).
      follows_rates: take the market's borrow rates where it has them (static).
      gas_asset: the chain's coin, -1 where gas is a constant (static).
      n_points: parts of a step at whose ends the distance is looked at (static).
      max_liquidations: in one step (static).

    Pathwise gradient: every leaf, between liquidations.
    """

    collateral: Float[Array, " collaterals"]
    debt: Float[Array, " debts"]
    deposit: Float[Array, ""]
    params: Any
    borrow_rate: Float[Array, " debts"]
    supply_rate: Float[Array, " collaterals"]
    gas_cost: Float[Array, ""]
    gas_cost_per_gwei: Float[Array, ""]
    taker_slippage: Float[Array, ""]
    rule: Any = field(metadata={"static": True})
    collateral_assets: tuple[int, ...] = field(metadata={"static": True})
    debt_assets: tuple[int, ...] = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    venue: str = field(metadata={"static": True})
    trigger: str = field(default="index", metadata={"static": True})
    follows_rates: bool = field(default=True, metadata={"static": True})
    gas_asset: int = field(default=-1, metadata={"static": True})
    n_points: int = field(default=1, metadata={"static": True})
    max_liquidations: int = field(default=1, metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `protocol.Account`."""
        return tuple(dict.fromkeys(i for i in (*self.collateral_assets, *self.debt_assets) if i != USD))

    @property
    def can_be_liquidated(self) -> bool:
        """See `protocol.Account`."""
        return True

    def start_value(self) -> float:
        """Equity at the start, a fraction of the capital."""
        held, owed = (float(np.sum(np.asarray(x, np.float64))) for x in (self.collateral, self.debt))
        return held - owed + float(self.deposit)

    def components(self, assets: tuple[str, ...]) -> tuple[str, ...]:
        """See `protocol.Account`."""
        held = [f"{assets[i]} collateral" for i in self.collateral_assets]
        return tuple(held + [f"{assets[i]} debt" for i in self.debt_assets if i != USD])

    # ------------------------------------------------------------------------- valuation

    def values(self, state: State, scene: Scene) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Values of the collaterals and of the debts."""
        held = tuple(c * p for c, p in zip(state.collateral, _prices(self.collateral_assets, scene), strict=True))
        return held, tuple(d * p for d, p in zip(state.debt, _prices(self.debt_assets, scene), strict=True))

    def net(self, state: State, scene: Scene) -> Array:
        """Collateral less debt."""
        held, owed = self.values(state, scene)
        return sum(held) - sum(owed)

    def distance(self, state: State, scene: Scene) -> Array:
        """Log health by the rule."""
        return self.rule.log_health(self.params, *self.values(state, scene))

    def distance_with_elasticity(self, state: State, scene: Scene) -> Distance:
        """Log health, and its derivative in the log-price of each of the account's assets."""
        own = tuple(scene.prices[i] for i in self.assets)

        def of_log_prices(moves):
            moved = [price * jnp.exp(move) for price, move in zip(own, moves, strict=True)]
            return self.distance(state, scene.at_prices(self.assets, moved))

        x, pull = jax.vjp(of_log_prices, tuple(jnp.zeros_like(price) for price in own))
        return Distance(x, pull(jnp.ones_like(x))[0])

    def gas(self, scene: Scene) -> Array:
        """Cost of a liquidation, by the market's gas process where there is one."""
        if self.gas_asset < 0 or "gas" not in scene.side:
            return self.gas_cost * jnp.ones_like(scene.prices[0])
        return gas.cost(self.gas_cost_per_gwei / gas.GWEI, scene.side["gas"], scene.prices[self.gas_asset])

    # ------------------------------------------------------------------------- the path

    def init(self, context: Context, scene: Scene, options: Options) -> State:
        """See `protocol.Account`."""
        one = jnp.ones_like(scene.prices[0])
        zero = 0.0 * one
        nothing = booking(len(self.components(("",) * len(scene.prices))), zero)
        collateral = tuple(self.collateral[i] * one for i in range(len(self.collateral_assets)))
        debt = tuple(self.debt[j] * one for j in range(len(self.debt_assets)))
        state = State(collateral, debt, self.deposit * one, zero, Status(zero, zero, zero, zero, zero, nothing))
        return self._marked(state, scene, oracle_feeds(context))

    def step(self, context: Context, t: Array, state: State, moment: Moment, uniform: Array, options: Options) -> State:
        """See `protocol.Account`."""
        feeds, pools = oracle_feeds(context), _pools(context)

        def due(account: LendingAccount, state: State, moment: Moment):
            return account._accrued(state, moment, context.step_hours / HOURS_PER_YEAR, pools)

        owed = materialised(due)(self, state, moment)
        crossing, hit = self._crossing(context, state, owed, moment, uniform, options, feeds)

        def after(account: LendingAccount, state: State, moment: Moment, crossing, hit, uniform):
            scene = moment.after.at_prices(account.assets, hit)
            is_hit = (uniform < crossing).astype(uniform.dtype)
            seen = scene.at_trigger(account.trigger, feeds)
            called = account._liquidated(state, scene, seen, is_hit)
            turn = [
                jnp.where(called.acted > 0.0, price, moment.after.prices[i])
                for i, price in zip(account.assets, hit, strict=True)
            ]
            turn = moment.after.at_prices(account.assets, turn)
            before = state.status
            status = called.state.status._replace(
                hit_probability=before.hit_probability + (1.0 - before.liquidated) * crossing * called.pays,
                liquidated=jnp.maximum(before.liquidated, called.acted),
                booking=called.state.status.booking.moved(account._moves(state, moment.before, turn)).moved(
                    account._moves(called.state, turn, moment.after)
                ),
            )
            return account._marked(called.state._replace(status=status), moment.after, feeds)

        return materialised(after)(self, owed, moment, crossing, hit, uniform)

    def _accrued(self, state: State, moment: Moment, years: float, pools: tuple[int, ...]) -> State:
        # Interest of the step on what was held and owed in it comes before its health.
        debt, collateral, paid = [], [], jnp.zeros_like(state.cash)
        prices = _prices(self.debt_assets, moment.before)
        for j, (amount, price) in enumerate(zip(state.debt, prices, strict=True)):
            k = self._pool(j, pools)
            rate = self.borrow_rate[j]
            if k is not None:
                # Rates are known at both ends of the step.
                rate = 0.5 * (moment.before.side["borrow_rate"][k] + moment.after.side["borrow_rate"][k])
            debt.append(amount * jnp.exp(rate * years))
            paid = paid - amount * jnp.expm1(rate * years) * price
        for i, (amount, price) in enumerate(
            zip(state.collateral, _prices(self.collateral_assets, moment.before), strict=True)
        ):
            collateral.append(amount * jnp.exp(self.supply_rate[i] * years))
            paid = paid + amount * jnp.expm1(self.supply_rate[i] * years) * price
        status = state.status._replace(booking=state.status.booking.plus(interest=paid))
        return state._replace(collateral=tuple(collateral), debt=tuple(debt), status=status)

    def _pool(self, j: int, pools: tuple[int, ...]) -> int | None:
        # Pool that lends a debt: an asset's own; for USD that of the first collateral, else the first.
        if not self.follows_rates or not pools:
            return None
        asset = self.debt_assets[j] if self.debt_assets[j] != USD else self.collateral_assets[0]
        if asset in pools:
            return pools.index(asset)
        return 0 if self.debt_assets[j] == USD else None

    def _crossing(
        self,
        context: Context,
        state: State,
        owed: State,
        moment: Moment,
        uniform: Array,
        options: Options,
        feeds: tuple[int, ...],
    ) -> tuple[Array, tuple[Array, ...]]:
        # Probability that the loan becomes liquidatable in the step, and the prices where it does; `owed` is the state
        # with the step's interest.
        end = tuple(moment.after.prices[i] for i in self.assets)
        # What an oracle reports between the step ends nobody knows.
        if not options.bridge or (self.trigger == "oracle" and feeds):

            def at_end(account: LendingAccount, owed: State, after: Scene):
                return account.distance(owed, after.at_trigger(account.trigger, feeds))

            x = materialised(at_end)(self, owed, moment.after)
            return (x <= 0.0).astype(x.dtype), end

        def at_start(account: LendingAccount, state: State, before: Scene):
            return account.distance(state, before), tuple(before.prices[i] for i in account.assets)

        start, first = materialised(at_start)(self, state, moment.before)
        if self.n_points > 1:

            def within(account: LendingAccount, owed: State, moment: Moment, uniform: Array):
                def distance(prices: tuple[Array, ...], share: Array) -> Distance:
                    return account.distance_with_elasticity(owed, moment.after.at_prices(account.assets, prices))

                return refine.crossing(
                    context,
                    account.assets,
                    moment.scale,
                    tuple(moment.before.prices[i] for i in account.assets),
                    tuple(moment.after.prices[i] for i in account.assets),
                    distance,
                    uniform,
                    moment.address,
                    account.n_points,
                )

            crossing, hit = materialised(within)(self, owed, moment, uniform)
        else:

            def at(account: LendingAccount, owed: State, after: Scene):
                return account.distance_with_elasticity(owed, after)

            now = materialised(at)(self, owed, moment.after)
            crossing, hit = crossing_and_prices(context, self.assets, moment.scale, start, now, end)
        # What was left liquidatable is called first thing, at the prices of the start.
        hit = tuple(jnp.where(start <= 0.0, a, b) for a, b in zip(first, hit, strict=True))
        return jnp.where(start <= 0.0, 1.0, crossing), hit

    def _moves(self, state: State, start: Scene, end: Scene) -> tuple[Array, ...]:
        # Change of value by component, at what is held and owed.
        held = zip(
            state.collateral, _prices(self.collateral_assets, start), _prices(self.collateral_assets, end), strict=True
        )
        rows = [c * (b - a) for c, a, b in held]
        for d, i in zip(state.debt, self.debt_assets, strict=True):
            if i != USD:
                rows.append(-d * (end.prices[i] - start.prices[i]))
        return tuple(rows)

    def _liquidated(self, state: State, scene: Scene, seen: Scene, is_hit: Array) -> Called:
        first = self._called(state, scene, seen, is_hit)
        now = first
        for _ in range(1, self.max_liquidations):
            again = now.acted * (self.distance(now.state, seen) <= 0.0)
            now = self._called(now.state, scene, seen, again)
        return Called(now.state, first.acted, first.pays)

    def _called(self, state: State, scene: Scene, seen: Scene, is_due: Array) -> Called:
        # Values at the prices that the venue sees, everybody's books at those of the market.
        held, owed = self.values(state, seen)
        to_market = [
            tuple(p / q for p, q in zip(_prices(assets, scene), _prices(assets, seen), strict=True))
            for assets in (self.collateral_assets, self.debt_assets)
        ]
        done = self.rule.liquidate(self.params, held, owed, *to_market)
        cost = self.gas(scene)
        pays = (done.liquidator > cost).astype(is_due.dtype)
        acts = is_due * pays
        written_off = sum(bad * w for bad, w in zip(done.bad_debt, to_market[1], strict=True))
        collateral = tuple(
            c * (1.0 - acts * _share(s, v)) for c, s, v in zip(state.collateral, done.seized, held, strict=True)
        )
        debt = tuple(
            d * (1.0 - acts * _share(repaid + bad, v))
            for d, repaid, bad, v in zip(state.debt, done.repaid, done.bad_debt, owed, strict=True)
        )
        status = state.status._replace(
            bad_debt=state.status.bad_debt + acts * written_off,
            booking=state.status.booking.plus(
                fees=-acts * done.protocol, liquidation=acts * (written_off - done.liquidator)
            ),
        )
        return Called(
            State(collateral, debt, state.cash + acts * done.credit, state.shortfall, status),
            acts,
            pays,
        )

    def _settled(self, state: State, scene: Scene) -> State:
        # Equity, and what the lenders bear of a loan that is worth less than its debt.
        net = self.net(state, scene)
        shortfall = jnp.maximum(-net, 0.0)
        added = shortfall - state.shortfall
        status = state.status._replace(
            equity=jnp.maximum(net, 0.0) + state.cash,
            bad_debt=state.status.bad_debt + added,
            booking=state.status.booking.plus(liquidation=added),
        )
        return state._replace(shortfall=shortfall, status=status)

    def _marked(self, state: State, scene: Scene, feeds: tuple[int, ...]) -> State:
        state = self._settled(state, scene)
        distance = self.distance(state, scene.at_trigger(self.trigger, feeds))
        return state._replace(status=state.status._replace(distance=distance))

    # ------------------------------------------------------------------------- policies

    def view(self, state: State, scene: Scene) -> AccountView:
        """See `protocol.Account`; at index prices. The requirement is the debt."""
        own = tuple(scene.prices[i] for i in self.assets)

        def equity(moves):
            moved = [price * (1.0 + move) for price, move in zip(own, moves, strict=True)]
            return jnp.maximum(self.net(state, scene.at_prices(self.assets, moved)), 0.0) + state.cash

        value, pull = jax.vjp(equity, tuple(jnp.zeros_like(price) for price in own))
        debt, x = sum(self.values(state, scene)[1]), self.distance(state, scene)
        return AccountView(
            equity=value,
            requirement=debt,
            ratio=jnp.where(debt > _NO_DEBT, jnp.exp(-x), 0.0),
            gross=debt,
            collateral=jnp.maximum(debt, _NO_DEBT) * jnp.exp(x),
            delta=pull(jnp.ones_like(value))[0],
            is_open=jnp.ones_like(value) * (debt > _NO_DEBT),
        )

    def fill(self, state: State, scene: Scene, order: Order) -> tuple[State, Array]:
        """See `protocol.Account`.

        `keep` below 1 sells collateral pro rata, less slippage, and repays debt pro rata; above 1 it does nothing, as
        a policy never borrows more. `transfer` repays debt; what exceeds it stays outside, and nothing comes out.
        """
        held, owed = self.values(state, scene)
        debt, cost, moved = sum(owed), jnp.zeros_like(state.cash), jnp.zeros_like(state.cash)
        repaid = moved
        if order.keep is not None:
            lost = [self._slippage(i, scene) for i in self.collateral_assets]
            proceeds = sum(v * (1.0 - s) for v, s in zip(held, lost, strict=True))
            wanted = (1.0 - jnp.clip(order.keep, 0.0, 1.0)) * debt
            sold = jnp.minimum(wanted / jnp.where(proceeds > 0.0, proceeds, 1.0), 1.0)
            repaid = jnp.minimum(sold * proceeds, wanted)
            cost = sold * sum(held) - repaid
            state = state._replace(collateral=tuple(c * (1.0 - sold) for c in state.collateral))
        if order.transfer is not None:
            moved = jnp.clip(order.transfer, 0.0, debt - repaid)
        left = 1.0 - _share(repaid + moved, debt)
        status = state.status._replace(booking=state.status.booking.plus(trading=-cost))
        state = state._replace(debt=tuple(d * left for d in state.debt), status=status)
        return self._settled(state, scene), moved

    def _slippage(self, asset: int, scene: Scene) -> Array:
        depth = scene.side.get("depth")
        thinness = 1.0 if depth is None else 1.0 / jnp.maximum(depth[asset], 1e-3)
        return jnp.minimum(self.taker_slippage * thinness, 1.0)


def _prices(assets: tuple[int, ...], scene: Scene) -> tuple[Array, ...]:
    one = jnp.ones_like(scene.prices[0])
    return tuple(one if i == USD else scene.prices[i] for i in assets)


def _share(part: Array, whole: Array) -> Array:
    # What rounding leaves of a whole is nothing, else it could be liquidated again.
    share = part / jnp.where(whole > 0.0, whole, 1.0)
    return jnp.where(share >= 1.0 - 8.0 * jnp.finfo(share.dtype).eps, 1.0, share)


def _pools(context: Context) -> tuple[int, ...]:
    # Asset of each pool of the market's borrow rates.
    for bound in context.market.side:
        kind = type(bound.component)
        if kind.__name__ == "BorrowRate" and bound.component.name == kind.name:
            return bound.component.drivers
    return ()


# ----------------------------------------------------------------------------- building


def lending(
    *,
    name: str,
    venue: Any,
    collateral: Mapping[str, float],
    debt: Mapping[str, float],
    emode: str | None = None,
    trigger: str = "index",
    gas_units: float | None = gas.UNITS["liquidation"],
    gas_asset: str = "ETH",
    liquidation_gas_usd: float = 0.0,
    interest: str = "market",
    supply_rate: Mapping[str, float] | None = None,
    taker_slippage: float = 0.0,
    n_points: int = 1,
    max_liquidations_per_step: int = 1,
    assets: Sequence[str],
    capital: float,
    prices: Mapping[str, float],
    venue_of: Callable[[str], Any],
    dtype: Any = jnp.float32,
) -> LendingAccount:
    """Loan from a description.

    Args:
      name: of the account.
      venue: name of the venue, or its rule.
      collateral: value by asset, as fractions of the capital at the starting prices.
      debt: the same, by asset or USD (USDT, USDC and the venue's own coin are USD unless they are assets of the
        market).
      emode: category of the venue that the borrower has chosen.
      trigger: price that health is computed at: index, or oracle, which is looked at when a step ends. Everything is
        paid and sold at the index.
      gas_units: gas of a liquidation where the market has a gas process; None for the constant below.
      gas_asset: coin in which gas is paid; without its starting price in `prices` the constant below is taken.
      liquidation_gas_usd: cost of a liquidation where the market has no gas process. Nobody comes for less.
      interest: "market" follows the market's borrow rates, "venue" the venue's constant rate. A debt in an asset takes
        the pool that follows this asset; USD the pool that follows the first collateral, else the first pool.
      supply_rate: by collateral, per year, continuously compounded; 0 for those left out.
      taker_slippage: share of the value lost when a policy sells collateral into a book of normal depth.
      n_points: parts of a step at whose ends the loan is looked at. With one asset 1 is exact; with several, crossing
        is first order in such a part.
      max_liquidations_per_step: how often the loan can be liquidated in a step, at the prices of its first.
      assets: the market's assets.
      capital: USD.
      prices: starting prices in USD.
      venue_of: rule of a venue's name.
      dtype: precision of the paths.

    Raises:
      InputError: an unknown asset or e-mode, an empty side, an amount that is not positive, a collateral that the venue
        does not accept, a debt above its limit, a loan that would be liquidated at once.
    """
    rule = venue_of(venue) if isinstance(venue, str) else venue
    if not (hasattr(rule, "params") and hasattr(rule, "log_health")):
        raise InputError(f"venue {venue!r} is a {type(rule).__name__}; a loan needs a lending rule.")
    for key, value, known in (("trigger", trigger, TRIGGERS), ("interest", interest, INTEREST)):
        if value not in known:
            raise InputError(f"{key} is {value!r}; it must be one of {', '.join(known)}.")
    for key, value, most in (
        ("n_points", n_points, 32),
        ("max_liquidations_per_step", max_liquidations_per_step, _MOST_LIQUIDATIONS),
    ):
        if not 1 <= value <= most:
            raise InputError(f"{key} is {value}; it must lie in 1..{most}.")
    gas_usd = finite(liquidation_gas_usd, "liquidation_gas_usd")
    units = finite(gas_units or 0.0, "gas_units")
    slippage = finite(taker_slippage, "taker_slippage")
    for key, value, most in (("liquidation_gas_usd", gas_usd, np.inf), ("gas_units", units, np.inf),
                             ("taker_slippage", slippage, 1.0)):  # fmt: skip
        if not 0.0 <= value <= most:
            raise InputError(f"{key} is {value:g}; it must not be negative{', nor above 1' if most == 1.0 else ''}.")
    held, owed = _side("collateral", collateral, assets, ()), _side("debt", debt, assets, _cash_names(rule))
    rates = {asset: finite(rate, f"supply_rate.{asset}") for asset, rate in (supply_rate or {}).items()}
    for asset in rates:
        if asset not in collateral:
            raise InputError(f"supply_rate names {asset!r}: {did_you_mean(asset, list(collateral))}")
    options: dict[str, Any] = {"capital": capital}
    if emode is not None:
        if "emode" not in inspect.signature(rule.params).parameters:
            raise InputError(f"emode is {emode!r}; {rule.name} has no e-modes, so leave it out.")
        options["emode"] = emode
    has_gas = bool(units) and gas_asset in assets and gas_asset in prices
    account = LendingAccount(
        collateral=rounded([value for _, value in held], dtype),
        debt=rounded([value for _, value in owed], dtype),
        deposit=rounded(getattr(rule, "gas_deposit_usd", 0.0) / capital, dtype),
        params=rule.params(list(collateral), list(debt), dtype=dtype, **options),
        borrow_rate=rounded([rule.borrow_rate_per_year] * len(owed), dtype),
        supply_rate=rounded([rates.get(asset, 0.0) for asset in collateral], dtype),
        gas_cost=rounded(gas_usd / capital, dtype),
        gas_cost_per_gwei=rounded(gas.cost(units, 1.0, float(prices[gas_asset]) / capital) if has_gas else 0.0, dtype),
        taker_slippage=rounded(slippage, dtype),
        rule=type(rule),
        collateral_assets=tuple(i for i, _ in held),
        debt_assets=tuple(i for i, _ in owed),
        name=str(name),
        venue=str(rule.name),
        trigger=trigger,
        follows_rates=interest == "market",
        gas_asset=list(assets).index(gas_asset) if has_gas else -1,
        n_points=int(n_points),
        max_liquidations=int(max_liquidations_per_step),
    )
    _check_start(account, rule, list(collateral), list(debt), options, [v for _, v in held], [v for _, v in owed])
    return account


def _cash_names(rule: Any) -> tuple[str, ...]:
    own = [getattr(rule, key) for key in ("debt", "base") if isinstance(getattr(rule, key, None), str)]
    return (*CASH_NAMES, "cash", *own)


def _side(key: str, side: Mapping[str, float], assets: Sequence[str], cash: tuple[str, ...]) -> list[tuple[int, float]]:
    # (asset number or USD, value) in the order given.
    if not side:
        raise InputError(f"{key} is empty; a loan needs collateral and debt.")
    rows = []
    for asset, given in side.items():
        value = finite(given, f"{key}.{asset}")
        if not value > 0.0:
            raise InputError(f"{key}.{asset} is {value}, it must be positive.")
        if asset in assets:
            rows.append((list(assets).index(asset), value))
        elif asset in cash:
            rows.append((USD, value))
        else:
            raise InputError(f"{key} names {asset!r}: {did_you_mean(str(asset), [*cash[:1], *assets])}")
    return rows


def _check_start(account, rule, collateral, debt, options, held, owed) -> None:
    with jax.enable_x64(True):
        params = rule.params(collateral, debt, dtype=np.float64, **options)
        health = float(np.exp(rule.log_health(params, *(tuple(map(jnp.float64, side)) for side in (held, owed)))))
        limits = getattr(params, "ltv", getattr(params, "borrow_factor", None))
        limit = np.inf if limits is None else float(np.asarray(limits) @ np.asarray(held))
    if sum(owed) > limit * (1.0 + 1e-12):
        raise InputError(
            f"debt is {sum(owed):.6g}; {rule.name} lends at most {limit:.6g} on this collateral (loan-to-value limit), "
            f"so cut the debt or add collateral."
        )
    if not health > 1.0:
        raise InputError(
            f"{account.name} would be liquidated at once: its health factor is {health:.6g}, not above 1; cut the debt "
            f"or add collateral."
        )
