r"""Share of an automated market maker's pool that arbitrageurs keep at the external prices.

The share is worth L V(p) with V concave in the prices p of its coins, and the gradient of V is what one unit of L
holds. L only changes when value is put in or taken out. The change of value over a step is booked as that of the coins
that were put in (HODL) and the rest, the impermanent loss.

The loss of a step against a portfolio that holds the share's coins and is rebalanced at each step,
$\ell = L(\nabla V(p) \cdot \Delta p - \Delta V) \ge 0$, is the step's loss versus rebalancing: for prices without drift
its mean is that of $\frac12 \sigma^2 p^2 |x'(p)|$ integrated over the step. Arbitrageurs pay the share $1 - \eta$ of it
back as fees, with $\eta$ from the fee and the time between blocks (see `instrument.pool.loss_versus_rebalancing`).
Other traders pay fees on a volume that rises with the move of the step. Milionis, Moallemi, Roughgarden & Zhang (2022).

Pathwise gradient: every leaf, almost everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.account.coin import Coin, coin_of, gas_price
from qpo_sim.account.protocol import Moment, Status, booking
from qpo_sim.errors import InputError, did_you_mean, finite
from qpo_sim.instrument.contract import USD
from qpo_sim.instrument.first_passage import Distance, Options, step_moments
from qpo_sim.instrument.pool import concentrated, fees, loss_versus_rebalancing, stableswap, weighted
from qpo_sim.instrument.scene import Scene
from qpo_sim.numerics import materialised, rounded, safe_sqrt
from qpo_sim.policy.orders import AccountView, Order
from qpo_sim.types import Array, Context

TYPES = ("constant_product", "weighted", "stableswap", "concentrated")
BLOCKS = ("poisson", "constant")

_FAR = 1e3
_TINY = 1e-12
_SECONDS_PER_HOUR = 3600.0


class Income(NamedTuple):
    """What traders pay; leaves.

    Attributes:
      fee: of a swap, a decimal of its amount.
      turnover_per_day: volume of traders other than arbitrageurs that falls to the share, over its value.
      move_share: mean share of that volume which comes with moves of the price.
      block_hours: mean time between blocks.
      arbitrage_share: share of the loss versus rebalancing that arbitrageurs keep where no volatility is known for it
        or `Pool.is_share_given`.
    """

    fee: Float[Array, ""]
    turnover_per_day: Float[Array, ""]
    move_share: Float[Array, ""]
    block_hours: Float[Array, ""]
    arbitrage_share: Float[Array, ""]


class State(NamedTuple):
    """State after a step.

    Attributes:
      liquidity: L over that at the start.
      collected: fees kept beside the share, USD.
      put_in: coins that were put in, by coin.
      price: of the coins.
      gas: price of gas over its start.
      gas_start: price of gas at the start.
      status: see `protocol.Status`.
    """

    liquidity: Array
    collected: Array
    put_in: tuple[Array, ...]
    price: tuple[Array, ...]
    gas: Array
    gas_start: Array
    status: Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """Parameters of a share.

    Attributes:
      size: value at par at the start, units of the capital; times V(p) over V at par.
      weights: of the coins of a weighted pool.
      amplification: A of the whitepaper, of a StableSwap pool.
      lower: lower end of the range of a concentrated share, over the starting price of the first coin in the second.
      upper: upper end.
      income: see `Income`.
      gas: of a policy's transaction, units of the capital at the starting price of gas.
      trading_cost: share lost of the value that a policy puts in or takes out.
      coins: the first of a concentrated share is the base coin (static).
      curve: one of `TYPES` (static).
      blocks: one of `BLOCKS` (static).
      is_share_given: take `income.arbitrage_share` as it is (static).
      compounds: fees stay in the share; else they are kept beside it (static).
      name: of the account (static).
      venue: of the account (static).
    """

    size: Float[Array, ""]
    weights: Float[Array, " coins"]
    amplification: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    income: Income
    gas: Float[Array, ""]
    trading_cost: Float[Array, ""]
    coins: tuple[Coin, ...] = field(metadata={"static": True})
    curve: str = field(metadata={"static": True})
    blocks: str = field(metadata={"static": True})
    is_share_given: bool = field(metadata={"static": True})
    compounds: bool = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    venue: str = field(default="pool", metadata={"static": True})

    @property
    def assets(self) -> tuple[int, ...]:
        """See `protocol.Account`."""
        return tuple(dict.fromkeys(coin.asset for coin in self.coins if coin.asset != USD))

    @property
    def can_be_liquidated(self) -> bool:
        """See `protocol.Account`."""
        return False

    def start_value(self) -> float:
        """Value at the start, a fraction of the capital."""
        return float(self.size)

    def components(self, assets: tuple[str, ...]) -> tuple[str, ...]:
        """See `protocol.Account`."""
        return (*(f"{coin.name} held" for coin in self.coins), "impermanent loss")

    # ------------------------------------------------------------------------- valuation

    def prices(self, context: Context, scene: Scene) -> tuple[Array, ...]:
        """Price of each coin."""
        return tuple(coin.price(context, scene) for coin in self.coins)

    def holdings(self, price: tuple[Array, ...]) -> tuple[Array, ...]:
        """Coins behind one unit of liquidity, the share of the start."""
        one = jnp.ones_like(price[0])
        if self.curve == "concentrated":
            liquidity = concentrated.liquidity_from_value(self.size, 1.0, self.lower, self.upper)
            return tuple(concentrated.holdings(liquidity * one, price[0] / price[1], self.lower, self.upper))
        if self.curve == "stableswap":
            par = (jnp.ones_like(self.size),) * len(self.coins)
            invariant = stableswap.invariant_from_value(self.size, par, self.amplification)
            return tuple(stableswap.holdings(invariant, price, self.amplification))
        par = (jnp.ones_like(self.size),) * len(self.coins)
        invariant = weighted.invariant_from_value(self.size, par, self.weights)
        return tuple(weighted.holdings(invariant, price, self.weights))

    def unit_value(self, price: tuple[Array, ...]) -> Array:
        """Value of one unit of liquidity."""
        return sum(h * p for h, p in zip(self.holdings(price), price, strict=True))

    # ------------------------------------------------------------------------- the path

    def init(self, context: Context, scene: Scene, options: Options) -> State:
        """See `protocol.Account`."""
        one = jnp.ones_like(scene.prices[0])
        zero, price = 0.0 * one, (one,) * len(self.coins)
        put_in = self.holdings(price)
        status = Status(self.size * one, _FAR * one, zero, zero, zero, booking(len(self.coins) + 1, zero))
        return State(one, zero, put_in, price, one, gas_price(scene, one) * one, status)

    def step(self, context: Context, t: Array, state: State, moment: Moment, uniform: Array, options: Options) -> State:
        """See `protocol.Account`."""

        def settled(pool: Pool, state: State, moment: Moment):
            return pool._settled(context, state, moment)

        return materialised(settled)(self, state, moment)

    def _settled(self, context: Context, state: State, moment: Moment) -> State:
        before, after = state.price, self.prices(context, moment.after)
        held = tuple(state.liquidity * h for h in self.holdings(before))
        start, end = self._value(state.liquidity, before), self._value(state.liquidity, after)
        moves = [b - a for a, b in zip(before, after, strict=True)]
        hodl = tuple(amount * move for amount, move in zip(state.put_in, moves, strict=True))
        rebalanced = sum(amount * move for amount, move in zip(held, moves, strict=True))
        income = self._income(context, moment, start, (before, after), jnp.maximum(rebalanced - (end - start), 0.0))
        booked = state.status.booking.moved((*hodl, end - start - sum(hodl))).plus(income=income)
        state = state._replace(
            price=after,
            gas=gas_price(moment.after, end) / state.gas_start,
            status=state.status._replace(booking=booked),
        )
        return self._with_equity(self._added(state, income) if self.compounds else _beside(state, income))

    def _income(
        self, context: Context, moment: Moment, value: Array, prices: tuple[tuple[Array, ...], ...], loss: Array
    ) -> Array:
        # Fees of a step on a share of the given value that lost `loss` against rebalancing.
        p = self.income
        turnover = p.turnover_per_day * (context.step_hours / 24.0) * value
        share_in_range = 1.0
        if self.curve == "concentrated":
            (base, quote), (base_after, quote_after) = prices
            share_in_range = concentrated.share_in_range(base / quote, base_after / quote_after, self.lower, self.upper)
        first = self.coins[0].asset
        last = next((coin.asset for coin in self.coins if coin.asset != first), first)
        pair = tuple(asset for asset in (first, last) if asset != USD)
        share, move_share = p.arbitrage_share, p.move_share
        log_return, deviation = jnp.zeros_like(value), jnp.ones_like(value)
        # Two coins of one asset, or two stablecoins, move by their pegs alone, whose volatility is not known.
        if first != last:
            sign = {first: 1.0, last: -1.0}
            weights = tuple(sign[asset] * jnp.ones_like(value) for asset in pair)
            variance = step_moments(Distance(value, weights), pair, context, moment.scale)[0]
            deviation = safe_sqrt(variance)
            log_return = sum(sign[i] * jnp.log(moment.after.prices[i] / moment.before.prices[i]) for i in pair)
            if not self.is_share_given:
                per_hour = deviation * float(context.step_hours**-0.5)
                share_of = (
                    loss_versus_rebalancing.arbitrage_share_poisson
                    if self.blocks == "poisson"
                    else loss_versus_rebalancing.arbitrage_share_constant
                )
                share = share_of(per_hour, -jnp.log1p(-p.fee), p.block_hours)
        else:
            move_share = 0.0 * move_share
        volume = fees.volume(
            turnover,
            log_return,
            deviation,
            base=1.0 - move_share,
            # The mean of |r|/sigma of a normal return is sqrt(2/pi).
            sensitivity=move_share * float(np.sqrt(0.5 * np.pi)),
        )
        noise = fees.fee_income(volume, p.fee, share_in_range)
        return noise + loss_versus_rebalancing.recaptured(loss, share)

    def _value(self, liquidity: Array, price: tuple[Array, ...]) -> Array:
        return liquidity * self.unit_value(price)

    def _added(self, state: State, value: Array) -> State:
        # Value put in at the pool's own ratio of coins.
        unit = self.unit_value(state.price)
        has_value = unit > _TINY
        added = jnp.where(has_value, value / jnp.where(has_value, unit, 1.0), 0.0)
        put_in = tuple(amount + added * h for amount, h in zip(state.put_in, self.holdings(state.price), strict=True))
        # Nothing can be put into a worthless share: it stays beside it.
        state = state._replace(liquidity=state.liquidity + added, put_in=put_in)
        return _beside(state, jnp.where(has_value, 0.0, value))

    def _with_equity(self, state: State) -> State:
        equity = self._value(state.liquidity, state.price) + state.collected
        return state._replace(status=state.status._replace(equity=equity))

    # ------------------------------------------------------------------------- policies

    def view(self, state: State, scene: Scene) -> AccountView:
        """See `protocol.Account`; `gross` is the value, and nothing is required."""
        equity = state.status.equity
        zero = jnp.zeros_like(equity)
        amounts = self.holdings(state.price)
        delta = {asset: zero for asset in self.assets}
        for coin, amount, price in zip(self.coins, amounts, state.price, strict=True):
            if coin.asset != USD:
                delta[coin.asset] = delta[coin.asset] + state.liquidity * amount * price
        return AccountView(
            equity=equity,
            requirement=zero,
            ratio=zero,
            gross=equity,
            collateral=equity,
            delta=tuple(delta[asset] for asset in self.assets),
            is_open=jnp.where(state.liquidity > 0.0, 1.0, zero),
        )

    def fill(self, state: State, scene: Scene, order: Order) -> tuple[State, Array]:
        """See `protocol.Account`: `keep` in [0, 1] takes the rest of the share and its fees out into cash.

        A transfer puts value in at the pool's ratio of coins, a negative one takes value out as far as there is some.
        Every transaction costs gas, at most what it moves.
        """
        moved = jnp.zeros_like(state.collected)
        if order.keep is not None:
            state, out = self._taken(state, 1.0 - jnp.clip(order.keep, 0.0, 1.0))
            moved = moved - out
        if order.transfer is not None:
            paid = jnp.maximum(order.transfer, 0.0)
            cost = self._cost(state, paid)
            state = self._added(_charged(state, cost), paid - cost)
            wanted = jnp.maximum(-order.transfer, 0.0)
            equity = self._value(state.liquidity, state.price) + state.collected
            state, out = self._taken(state, jnp.clip(wanted / jnp.maximum(equity, _TINY), 0.0, 1.0))
            moved = moved + paid - out
        return self._with_equity(state), moved

    def _taken(self, state: State, share: Array) -> tuple[State, Array]:
        # Takes a share out of everything; the cash that arrives.
        value = share * (self._value(state.liquidity, state.price) + state.collected)
        cost = self._cost(state, value)
        left = 1.0 - share
        state = state._replace(
            liquidity=state.liquidity * left,
            collected=state.collected * left,
            put_in=tuple(amount * left for amount in state.put_in),
        )
        return _charged(state, cost), value - cost

    def _cost(self, state: State, value: Array) -> Array:
        gas = jnp.where(value > 0.0, self.gas * state.gas, 0.0)
        return jnp.minimum(gas + self.trading_cost * value, value)


def _beside(state: State, value: Array) -> State:
    return state._replace(collected=state.collected + value)


def _charged(state: State, cost: Array) -> State:
    return state._replace(status=state.status._replace(booking=state.status.booking.plus(trading=-cost)))


# ----------------------------------------------------------------------------- building


def pool(
    *,
    name: str,
    type: str,  # noqa: A002
    coins: Sequence[str | Mapping[str, Any]],
    value: float,
    fee: float,
    weights: Sequence[float] | None = None,
    amplification: float | None = None,
    range: Sequence[float] | None = None,  # noqa: A002
    turnover_per_day: float = 0.0,
    move_share: float = 0.4,
    block_seconds: float = 12.0,
    blocks: str = "poisson",
    arbitrage_share: float | None = None,
    compounds: bool | None = None,
    gas_usd: float = 0.0,
    trading_cost: float = 0.0,
    venue: str = "pool",
    assets: Sequence[str],
    capital: float,
    dtype: Any = jnp.float32,
) -> Pool:
    """Pool share from a description.

    Args:
      name: of the account.
      type: constant_product, weighted, stableswap or concentrated.
      coins: of the pool, each an asset, a stablecoin or `{name, asset}` (see `coin.coin_of`). A StableSwap pool starts
        at par. The first coin of a concentrated share is the base coin of its range.
      value: of the share at the start, as a fraction of the capital.
      fee: of a swap, a decimal of its amount.
      weights: of a weighted pool, one per coin, sum 1.
      amplification: A of the StableSwap whitepaper (that of a contract over n^(n-1)).
      range: [lower, upper] of a concentrated share as multiples of the starting price.
      turnover_per_day: volume of traders other than arbitrageurs over the value of the liquidity it meets. For a
        concentrated share it counts while the price is in its range.
      move_share: mean share of that volume which comes with moves of the price, in [0, 1].
      block_seconds: mean time between blocks.
      blocks: "poisson" or "constant" spacing.
      arbitrage_share: share of the loss versus rebalancing that arbitrageurs keep, in [0, 1]; left out it follows from
        volatility, fee and blocks, and is 1 where the coins move by their pegs alone.
      compounds: fees stay in the share; left out, they do in all but concentrated shares.
      gas_usd: of a policy's transaction at the starting price of gas.
      trading_cost: share lost of the value that a policy puts in or takes out.
      venue: a name for reports.
      assets: the market's assets.
      capital: USD.
      dtype: precision of the paths.

    Raises:
      InputError: an unknown type or coin, a parameter of another type, a number out of bounds.
    """
    if type not in TYPES:
        raise InputError(f"type is {type!r}: {did_you_mean(str(type), TYPES)}")
    if blocks not in BLOCKS:
        raise InputError(f"blocks is {blocks!r}; it must be one of {', '.join(BLOCKS)}.")
    made = tuple(coin_of(coin, f"coins[{k}]", assets) for k, coin in enumerate(coins))
    two_only = type in ("constant_product", "concentrated")
    if len(made) < 2 or (two_only and len(made) > 2):
        raise InputError(f"coins is {list(coins)}; a {type} pool has {'two coins' if two_only else 'at least two'}.")
    if len({coin.name for coin in made}) < len(made):
        raise InputError(f"coins is {list(coins)}; name each coin once.")
    given = {"weights": weights, "amplification": amplification, "range": range}
    needs = {"weighted": "weights", "stableswap": "amplification", "concentrated": "range"}.get(type)
    for key, argument in given.items():
        if argument is not None and key != needs:
            raise InputError(f"{key} is given, but a {type} pool has none: leave it out.")
        if argument is None and key == needs:
            raise InputError(f"{key} is missing: a {type} pool needs it.")
    numbers = {
        key: finite(number, key)
        for key, number in {
            "value": value,
            "fee": fee,
            "turnover_per_day": turnover_per_day,
            "move_share": move_share,
            "block_seconds": block_seconds,
            "arbitrage_share": 1.0 if arbitrage_share is None else arbitrage_share,
            "gas_usd": gas_usd,
            "trading_cost": trading_cost,
            "amplification": 1.0 if amplification is None else amplification,
        }.items()
    }
    for key in ("value", "block_seconds", "amplification"):
        if not numbers[key] > 0.0:
            raise InputError(f"{key} is {numbers[key]:g}; it must be positive.")
    for key in ("turnover_per_day", "gas_usd"):
        if numbers[key] < 0.0:
            raise InputError(f"{key} is {numbers[key]:g}; it must not be negative.")
    for key in ("move_share", "arbitrage_share"):
        if not 0.0 <= numbers[key] <= 1.0:
            raise InputError(f"{key} is {numbers[key]:g}; it must lie in [0, 1].")
    for key in ("fee", "trading_cost"):
        if not 0.0 <= numbers[key] < 1.0:
            raise InputError(f"{key} is {numbers[key]:g}; it must lie in [0, 1), e.g. 0.003.")
    lower, upper = _range(range)
    return Pool(
        size=rounded(numbers["value"], dtype),
        weights=rounded(_weights(weights, len(made)), dtype),
        amplification=rounded(numbers["amplification"], dtype),
        lower=rounded(lower, dtype),
        upper=rounded(upper, dtype),
        income=Income(
            rounded(numbers["fee"], dtype),
            rounded(numbers["turnover_per_day"], dtype),
            rounded(numbers["move_share"], dtype),
            rounded(numbers["block_seconds"] / _SECONDS_PER_HOUR, dtype),
            rounded(numbers["arbitrage_share"], dtype),
        ),
        gas=rounded(numbers["gas_usd"] / capital, dtype),
        trading_cost=rounded(numbers["trading_cost"], dtype),
        coins=made,
        curve=type,
        blocks=blocks,
        is_share_given=arbitrage_share is not None,
        compounds=type != "concentrated" if compounds is None else bool(compounds),
        name=str(name),
        venue=str(venue),
    )


def _weights(weights: Sequence[float] | None, n_coins: int) -> np.ndarray:
    if weights is None:
        return np.full(n_coins, 1.0 / n_coins)
    values = np.array([finite(weight, "weights") for weight in weights])
    if values.shape != (n_coins,) or not np.all(values > 0.0) or abs(values.sum() - 1.0) > 1e-9:
        raise InputError(f"weights is {list(weights)}; give one positive weight per coin, together 1.")
    return values


def _range(ends: Sequence[float] | None) -> tuple[float, float]:
    if ends is None:
        return 0.5, 2.0
    values = [finite(end, "range") for end in ends]
    if len(values) != 2 or not 0.0 < values[0] < values[1]:
        raise InputError(f"range is {list(ends)}; give [lower, upper] with 0 < lower < upper, e.g. [0.8, 1.25].")
    return values[0], values[1]
