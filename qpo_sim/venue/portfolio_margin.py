r"""Portfolio margin: the worst of a scan of price moves and volatility shocks over all positions of one underlying.

**Scan.** Prices at evenly spaced moves in $\pm r$, each with volatility up, same and down: with n days to expiry and
$s = (30/n)^p$, p one power below 30 days and another beyond,

$$\sigma_{up} = \max(\sigma(1 + a_{up} s),\ \sigma_{least}),\quad \sigma_{down} = \max(\sigma(1 - a_{down} s),\ 0).$$

**Extended table.** Moves far outside the range, volatility up only, for written options far out of the money: futures
move by no more than the range there, a factor takes a fraction of the P&L, and a dampener D brings it nearer to 0 by at
most $D\,(|\text{move}|/r - 1)$.

**Margin** = worst loss + contingencies, times a factor each for initial and maintenance margin. No time passes in a
scenario, and P&L is counted in the settlement currency: in coins $q(V_1/F_1 - V_0/F_0)$ for options and
$N(1/F_0 - 1/F_1)$ for an inverse future of N USD.

Sources: support.deribit.com 25944756247837 (scan and extended table); docs.oreome.com, "risk scenario advanced"
(volatility shocks); Deribit API documentation, private/pme/simulate (parameters, margins, futures in the extended
table, contingency of the roll); deribit.com/pages/docs/portfoliomargin (older contingencies). The form of the dampener
is not confirmed by a published formula.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import rounded
from qpo_sim.types import DAYS_PER_YEAR, Array, Held, Positions, Requirements
from qpo_sim.venue.option_margin import check_closing, check_fees, fee_rate
from qpo_sim.venue.tiered_margin import LiquidationProcess, check_kinds, liquidation_process

REFERENCE_DAYS = 30.0
VOLATILITY_MOVES = ("up", "same", "down")
# The power law has no bound at expiry.
_SHORTEST_DAYS = 1e-3

# Volatility and days to expiry -> shocked volatility of every scenario.
Shock = Callable[[Array, Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scan:
    """Scenarios: first the matrix, volatility moves (up, same, down) x prices from the lowest; then the extended table.

    Attributes:
      price_move: relative move of the price.
      volatility_up: relative rise of a 30-day volatility, 0 where it does not rise.
      volatility_down: relative fall of a 30-day volatility.
      price_range: largest move of the matrix, and of futures everywhere.
      least_volatility_up: what volatility is at least where it rises.
      short_power: exponent of 30/n below 30 days.
      long_power: exponent of 30/n beyond.
      extended_factor: share of the P&L that counts in the extended table.
      n_points: prices of the matrix (static).

    Pathwise gradient: all leaves.
    """

    price_move: Float[Array, " scenarios"]
    volatility_up: Float[Array, " scenarios"]
    volatility_down: Float[Array, " scenarios"]
    price_range: Float[Array, ""]
    least_volatility_up: Float[Array, ""]
    short_power: Float[Array, ""]
    long_power: Float[Array, ""]
    extended_factor: Float[Array, ""]
    n_points: int = field(metadata={"static": True})

    @property
    def n_matrix(self) -> int:
        """Number of scenarios of the matrix; those of the extended table follow."""
        return len(VOLATILITY_MOVES) * self.n_points


class Position(NamedTuple):
    """What one line of a portfolio is worth in a scenario.

    Attributes:
      quantity: units, negative when short.
      revalue: (price_factor, shock) -> value of one unit in the settlement currency, where the underlying is multiplied
        by price_factor and volatility becomes shock(volatility, days to expiry); see `instrument.option.revaluation`,
        `inverse_future` and `linear_future`.
      is_option: else it moves by no more than the range in the extended table.
    """

    quantity: Array
    revalue: Callable[[Array, Shock], Array]
    is_option: bool = True


class Worst(NamedTuple):
    """Worst scenario: its loss (not below 0) and its number in the scan, path axis last."""

    loss: Array
    index: Array


class PortfolioRequirement(NamedTuple):
    """Initial and maintenance margin of a portfolio, path axis last, in the settlement currency."""

    initial: Array
    maintenance: Array


def maturity_scale(days: Array, *, short_power: Array, long_power: Array) -> Array:
    """Size of a volatility shock relative to that at 30 days, (30/n)^p with n not below 0.001.

    Continuous at 30 days.

    Pathwise gradient: all.
    """
    ratio = REFERENCE_DAYS / jnp.maximum(days, _SHORTEST_DAYS)
    return ratio ** jnp.where(ratio > 1.0, short_power, long_power)


def shocked_volatility(scan: Scan, volatility: Array, days: Array) -> Array:
    """Volatility of every scenario of the scan (leading axis).

    Args:
      scan: scenarios.
      volatility: a number or a row of paths.
      days: to expiry, a number or a row of paths.

    Pathwise gradient: scan and volatility, days.
    """
    volatility, days = jnp.asarray(volatility), jnp.asarray(days)
    scenarios = _all(scan, max(volatility.ndim, days.ndim), jnp.result_type(volatility, days))
    return _shock(scan, scenarios)(volatility, days)


class _Scenarios(NamedTuple):
    move: Array
    up: Array
    down: Array
    is_extended: Array


def _all(scan: Scan, n_axes: int, dtype: Any) -> _Scenarios:
    def column(x):
        return jnp.reshape(jnp.asarray(x, dtype), (-1,) + (1,) * n_axes)

    is_extended = np.arange(scan.price_move.shape[0]) >= scan.n_matrix
    return _Scenarios(
        move=column(scan.price_move),
        up=column(scan.volatility_up),
        down=column(scan.volatility_down),
        is_extended=is_extended.reshape((-1,) + (1,) * n_axes),
    )


def _shock(scan: Scan, scenarios: _Scenarios) -> Shock:
    dtype = scenarios.move.dtype
    floor = jnp.where(scenarios.up > 0.0, jnp.asarray(scan.least_volatility_up, dtype), jnp.asarray(0.0, dtype))

    def shock(volatility, days):
        scale = maturity_scale(days, short_power=scan.short_power, long_power=scan.long_power).astype(dtype)
        return jnp.maximum(volatility * (1.0 + (scenarios.up - scenarios.down) * scale), floor)

    return shock


def _unshocked(volatility: Array, days: Array) -> Array:
    return volatility


def _profit(
    scan: Scan, scenarios: _Scenarios, positions: Sequence[Position], now: Sequence[Array], dampener: Array
) -> Array:
    dtype = scenarios.move.dtype
    reach, share = jnp.asarray(scan.price_range, dtype), jnp.asarray(scan.extended_factor, dtype)
    shock = _shock(scan, scenarios)
    profit = jnp.zeros_like(scenarios.move)
    for position, value in zip(positions, now, strict=True):
        move = scenarios.move if position.is_option else jnp.clip(scenarios.move, -reach, reach)
        profit = profit + position.quantity * (position.revalue(1.0 + move, shock) - value)
    # The matrix lies inside the range: nothing is damped there.
    profit = jnp.where(scenarios.is_extended, share, 1.0) * profit
    most = dampener * jnp.where(scenarios.is_extended, jnp.maximum(jnp.abs(scenarios.move) / reach - 1.0, 0.0), 0.0)
    return jnp.where(profit < 0.0, jnp.minimum(profit + most, 0.0), jnp.maximum(profit - most, 0.0))


def _now(positions: Sequence[Position]) -> tuple[list[Array], int, Any]:
    values = [jnp.asarray(p.revalue(1.0, _unshocked)) for p in positions]
    n_axes = max(max(x.ndim, jnp.ndim(p.quantity)) for x, p in zip(values, positions, strict=True))
    return values, n_axes, jnp.result_type(*values)


def scenario_profit(scan: Scan, positions: Sequence[Position], *, dampener: Array = 0.0) -> Array:
    """P&L of the portfolio in every scenario, shape (scenarios, *paths), in the settlement currency.

    Each position is valued once, with the scenarios as a leading axis.

    Args:
      scan: scenarios.
      positions: of one underlying and one settlement currency; at least one.
      dampener: of the extended table, in the settlement currency (a venue gives it in USD: divide by the price).

    Pathwise gradient: quantities, what `revalue` depends on, scan; not the dampener where it takes all.
    """
    now, n_axes, dtype = _now(positions)
    return _profit(scan, _all(scan, n_axes, dtype), positions, now, dampener)


def worst_scenario(scan: Scan, positions: Sequence[Position], *, dampener: Array = 0.0) -> Worst:
    """Largest loss over the scenarios; arguments as in `scenario_profit`.

    As `worst` of that, but the derivative is taken in the worst scenario alone: it costs a revaluation, not a scan.

    Pathwise gradient: quantities, what `revalue` depends on, scan.
    """
    _, index = _first_least(lax.stop_gradient(scenario_profit(scan, positions, dampener=dampener)))
    now, _, dtype = _now(positions)
    scenario = _Scenarios(
        move=jnp.asarray(scan.price_move, dtype)[index],
        up=jnp.asarray(scan.volatility_up, dtype)[index],
        down=jnp.asarray(scan.volatility_down, dtype)[index],
        is_extended=index >= scan.n_matrix,
    )
    profit = _profit(scan, scenario, positions, now, dampener)
    return Worst(jnp.maximum(-profit, 0.0), index)


def matrix(scan: Scan, profit: Array) -> Array:
    """The scenarios' P&L inside the range, shape (volatility moves, prices, *paths); moves are up, same, down."""
    return profit[: scan.n_matrix].reshape((len(VOLATILITY_MOVES), scan.n_points, *profit.shape[1:]))


def worst(profit: Array) -> Worst:
    """Largest loss over the scenarios, the leading axis of `profit`.

    Pathwise gradient: profit, through the scenario that is worst.
    """
    least, index = _first_least(profit)
    return Worst(jnp.maximum(-least, 0.0), index)


def _first_least(profit: Array) -> tuple[Array, Array]:
    # A chain of selects: XLA's argmin takes five times as long on CPU.
    least, index = profit[0], jnp.zeros(profit.shape[1:], jnp.int32)
    for k in range(1, profit.shape[0]):
        is_less = profit[k] < least
        least, index = jnp.where(is_less, profit[k], least), jnp.where(is_less, k, index)
    return least, index


def worst_place(scan: Scan, index: Array) -> tuple[Array, Array]:
    """(volatility move, price) of a scenario of the matrix, as indices of `matrix`; move 3 is the extended table."""
    is_extended = index >= scan.n_matrix
    row = jnp.where(is_extended, len(VOLATILITY_MOVES), index // scan.n_points)
    return row, jnp.where(is_extended, index - scan.n_matrix, index % scan.n_points)


def inverse_future(price: Array) -> Callable[[Array, Shock], Array]:
    """Revaluation of an inverse perpetual or future: one unit is one USD of notional, worth -1/F coins.

    A long of N units earns N (1/F_0 - 1/F_1) coins.
    """
    return lambda price_factor, shock: -1.0 / (price * price_factor)


def linear_future(price: Array) -> Callable[[Array, Shock], Array]:
    """Revaluation of a linear perpetual or future, or of the coin itself, in USD: one unit is one coin."""
    return lambda price_factor, shock: price * price_factor


def roll_shock(delta: Sequence[Array], years: Sequence[Array], *, move_per_year: Array, least_move: Array) -> Array:
    """Contingency for expiries that move apart: sum over expiries of |net delta| x max(move per year x T, least).

    Nothing is offset between expiries. In the unit of the deltas (coins).

    Args:
      delta: net delta of each expiry.
      years: to each expiry, 0 for perpetuals.
      move_per_year: relative move per year to expiry (0.075 for BTC).
      least_move: relative move at least (0.01 for BTC).

    Pathwise gradient: all. Deribit API documentation, private/pme/simulate: the response's roll_shock; that its first
    term grows in proportion to time is not confirmed by a published formula.
    """
    terms = (jnp.abs(d) * jnp.maximum(move_per_year * t, least_move) for d, t in zip(delta, years, strict=True))
    return sum(terms, start=jnp.asarray(0.0))


def written_option_contingency(quantities: Sequence[Array], strikes: Sequence[Hashable], *, rate: Array) -> Array:
    """Contingency for written options: rate x the net number written, strike by strike, calls and puts together.

    Bought 10 calls and written 20 puts of one strike: 10 x rate. `strikes` labels the positions. Deribit, "Portfolio
    margin" (older page): rate 0.01 coin.

    Pathwise gradient: quantities, rate.
    """
    net: dict[Hashable, Array] = {}
    for quantity, strike in zip(quantities, strikes, strict=True):
        net[strike] = net.get(strike, 0.0) + quantity
    return rate * sum((jnp.maximum(-q, 0.0) for q in net.values()), start=jnp.asarray(0.0))


def offsetting_contingency(quantities: Sequence[Array], *, rate: Array) -> Array:
    """Contingency for futures that offset each other: rate x the smaller of all longs and all shorts.

    Long 100 coins and short 100 coins: 100 x rate. Deribit, "Portfolio margin" (older page): rate 0.01.

    Args:
      quantities: of each future, in coins.
      rate: share of the underlying.

    Pathwise gradient: quantities, rate.
    """
    zero = jnp.asarray(0.0)
    long = sum((jnp.maximum(q, 0.0) for q in quantities), start=zero)
    short = sum((jnp.maximum(-q, 0.0) for q in quantities), start=zero)
    return rate * jnp.minimum(long, short)


@dataclass(frozen=True)
class PortfolioMargin:
    """An option venue with portfolio margin. Tables are by underlying; `default` serves the others.

    Attributes:
      price_range: largest move of the matrix.
      n_points: prices of the matrix, odd so that one does not move.
      volatility_up: relative rise of a 30-day volatility.
      volatility_down: relative fall of a 30-day volatility.
      least_volatility_up: what volatility is at least where it rises.
      short_power: exponent of 30/n below 30 days.
      long_power: exponent of 30/n beyond.
      extended_moves: moves of the extended table; none, and the table is left out.
      extended_factor: share of the P&L that counts there.
      extended_dampener_usd: dampener of the extended table in USD.
      roll_move_per_year: see `roll_shock`.
      least_roll_move: see `roll_shock`.
      written_option_rate: see `written_option_contingency`.
      offsetting_rate: see `offsetting_contingency`.
      initial_factor: initial margin over worst loss plus contingencies.
      maintenance_factor: maintenance margin over worst loss plus contingencies.
      maker_fee_rate: fee as a share of the underlying, by settlement ("inverse", "linear").
      taker_fee_rate: the same for orders that take liquidity.
      delivery_fee_rate: the same at expiry, for options that pay.
      fee_cap: share of the option's price that no fee exceeds.
      futures_taker_fee_rate: fee on the notional of perpetuals and futures.
      liquidation_fee_rate: fee on the closed notional, one number or by asset with `default`.
      liquidation_slippage: share of the notional lost when positions are closed into the book.
      liquidation: mapping of `LiquidationProcess` fields.
      funding_rate: paid by longs of perpetuals per interval on the notional.
      funding_interval_hours: hours between funding stamps.
      name: for messages and reports.
      source: where the parameters come from.
      as_of: date of the parameters.
    """

    price_range: Mapping[str, float]
    volatility_up: Mapping[str, float]
    volatility_down: Mapping[str, float]
    n_points: int = 9
    least_volatility_up: float = 0.5
    short_power: float = 0.3
    long_power: float = 0.13
    extended_moves: Sequence[float] = ()
    extended_factor: float = 1.0
    extended_dampener_usd: Mapping[str, float] = field(default_factory=lambda: {"default": 0.0})
    roll_move_per_year: Mapping[str, float] = field(default_factory=lambda: {"default": 0.0})
    least_roll_move: Mapping[str, float] = field(default_factory=lambda: {"default": 0.0})
    written_option_rate: float = 0.0
    offsetting_rate: float = 0.0
    initial_factor: float = 1.0
    maintenance_factor: float = 0.8
    maker_fee_rate: Mapping[str, float] = field(default_factory=dict)
    taker_fee_rate: Mapping[str, float] = field(default_factory=dict)
    delivery_fee_rate: Mapping[str, float] = field(default_factory=dict)
    fee_cap: float = 0.125
    futures_taker_fee_rate: float = 0.0
    liquidation_fee_rate: Any = 0.0
    liquidation_slippage: float = 0.0
    liquidation: Mapping[str, Any] = field(default_factory=dict)
    funding_rate: float = 0.0
    funding_interval_hours: float = 8.0
    name: str = "venue"
    source: str = ""
    as_of: str = ""
    process: LiquidationProcess = field(init=False, compare=False, default=LiquidationProcess())

    def __post_init__(self) -> None:
        """Checks ranges once."""
        if not (self.n_points >= 3 and self.n_points % 2 == 1):
            raise InputError(
                f"venue {self.name}: n_points is {self.n_points}; it must be odd and at least 3, so that the matrix "
                "holds the price as it is and both ends of the range."
            )
        self._check_tables(("price_range", "volatility_down"), "lie in (0, 1)", lambda x: 0.0 < x < 1.0)
        self._check_tables(("volatility_up",), "be above 0", lambda x: x > 0.0)
        tables = ("extended_dampener_usd", "roll_move_per_year", "least_roll_move")
        self._check_tables(tables, "not be negative", lambda x: x >= 0.0)
        for key in ("least_volatility_up", "short_power", "long_power", "written_option_rate", "offsetting_rate"):
            if not getattr(self, key) >= 0.0:
                raise InputError(f"venue {self.name}: {key} is {getattr(self, key)}; it must not be negative.")
        for move in self.extended_moves:
            if not move > -1.0:
                raise InputError(
                    f"venue {self.name}: extended_moves has {move}; a relative move must be above -1, as prices are "
                    "positive."
                )
        if not 0.0 <= self.extended_factor <= 1.0:
            raise InputError(
                f"venue {self.name}: extended_factor is {self.extended_factor}; it must lie in [0, 1], a share of the "
                "P&L."
            )
        if not 0.0 < self.maintenance_factor <= self.initial_factor:
            raise InputError(
                f"venue {self.name}: maintenance_factor is {self.maintenance_factor}; it must lie in (0, "
                f"{self.initial_factor}], initial_factor at most, else a new position could be liquidated at once."
            )
        check_fees(self)
        check_closing(self)
        object.__setattr__(self, "process", liquidation_process(self.liquidation, name=self.name))

    def _check_tables(self, keys: Sequence[str], rule: str, is_right: Callable[[float], bool]) -> None:
        for key in keys:
            for asset, value in getattr(self, key).items():
                if not is_right(value):
                    raise InputError(f"venue {self.name}: {key}.{asset} is {value}; it must {rule}.")

    def value(self, key: str, asset: str) -> float:
        """Entry of the table `key` for an underlying, or its default.

        Raises:
          InputError: the venue lists neither.
        """
        table = getattr(self, key)
        if asset not in table and "default" not in table:
            raise InputError(
                f"venue {self.name}: {key} has no row for {asset} and none for default; it lists {', '.join(table)}."
            )
        return float(table[asset] if asset in table else table["default"])

    def scan(self, asset: str) -> Scan:
        """Scenarios of an underlying, in float64.

        Raises:
          InputError: see `value`.
        """
        reach = self.value("price_range", asset)
        up, down = self.value("volatility_up", asset), self.value("volatility_down", asset)
        points, extended = np.linspace(-reach, reach, self.n_points), np.asarray(self.extended_moves, np.float64)
        none = np.zeros(self.n_points)
        return Scan(
            price_move=np.concatenate([points, points, points, extended]),
            volatility_up=np.concatenate([none + up, none, none, np.full(extended.size, up)]),
            volatility_down=np.concatenate([none, none, none + down, np.zeros(extended.size)]),
            price_range=np.float64(reach),
            least_volatility_up=np.float64(self.least_volatility_up),
            short_power=np.float64(self.short_power),
            long_power=np.float64(self.long_power),
            extended_factor=np.float64(self.extended_factor),
            n_points=self.n_points,
        )

    def requirement(self, worst_loss: Array, contingency: Array = 0.0) -> PortfolioRequirement:
        """Margin from the worst loss and the sum of the contingencies, in the settlement currency.

        Pathwise gradient: both.
        """
        total = worst_loss + contingency
        return PortfolioRequirement(self.initial_factor * total, self.maintenance_factor * total)

    def fee_rate(self, which: str, *, is_coin_settled: bool) -> float:
        """Fee rate "maker", "taker" or "delivery"; 0 where the venue gives none."""
        return fee_rate(self, which, is_coin_settled=is_coin_settled)

    @property
    def looks_within_steps(self) -> bool:
        """The distance to liquidation is no log-price, whatever is held: an account looks at it within steps."""
        return True

    def bind(
        self, positions: Positions, *, capital: float, prices: Mapping[str, float], dtype: Any
    ) -> "BoundPortfolio":
        """The rule for the positions of one account; arguments as in `TieredMargin.bind`.

        Args:
          positions: the expiry of futures is not reduced as time passes: their part of the roll's contingency is at
            most too large.
          capital: USD.
          prices: not read.
          dtype: precision of the paths.

        Raises:
          InputError: an underlying without parameters, a kind of contract that the rule does not cover.
        """
        assets = positions.assets
        check_kinds(self.name, positions.kinds, ("Option", "LinearPerpetual", "InversePerpetual", "DatedFuture"))
        underlyings = tuple(dict.fromkeys(assets))

        def row(key: str, scale: float = 1.0) -> Array:
            return rounded([self.value(key, asset) / scale for asset in underlyings], dtype)

        return BoundPortfolio(
            scans=tuple(jax.tree.map(lambda x: rounded(x, dtype), self.scan(asset)) for asset in underlyings),
            dampener=row("extended_dampener_usd", capital),
            roll_move_per_year=row("roll_move_per_year"),
            least_roll_move=row("least_roll_move"),
            written_option_rate=rounded(self.written_option_rate, dtype),
            offsetting_rate=rounded(self.offsetting_rate, dtype),
            factor=PortfolioRequirement(rounded(self.initial_factor, dtype), rounded(self.maintenance_factor, dtype)),
            underlying=tuple(underlyings.index(asset) for asset in assets),
            expiry=positions.expiry,
            strike=positions.strike,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundPortfolio:
    """Portfolio margin of the positions of one account, by underlying and settlement currency.

    Attributes:
      scans: by underlying.
      dampener: of the extended table, in units of the capital, by underlying.
      roll_move_per_year: see `roll_shock`, by underlying.
      least_roll_move: see `roll_shock`, by underlying.
      written_option_rate: see `written_option_contingency`.
      offsetting_rate: see `offsetting_contingency`.
      factor: margins over worst loss plus contingencies.
      underlying: number of the underlying of each position (static).
      expiry: what tells expiries apart, by position (static).
      strike: what tells strikes apart, by position (static).
    """

    scans: tuple[Scan, ...]
    dampener: Float[Array, " underlyings"]
    roll_move_per_year: Float[Array, " underlyings"]
    least_roll_move: Float[Array, " underlyings"]
    written_option_rate: Float[Array, ""]
    offsetting_rate: Float[Array, ""]
    factor: PortfolioRequirement
    underlying: tuple[int, ...] = field(metadata={"static": True})
    expiry: tuple[Any, ...] = field(metadata={"static": True})
    strike: tuple[Any, ...] = field(metadata={"static": True})

    def requirements(self, held: tuple[Held, ...]) -> Requirements:
        """Maintenance margin in USD, all of it in the shared part. Pathwise gradient: as `worst_scenario`."""
        nothing = tuple(jnp.zeros_like(position.quantity) for position in held)
        return Requirements(nothing, self.factor.maintenance * self._total(held))

    def initial_margin(self, held: tuple[Held, ...]) -> tuple[Array, ...]:
        """Initial margin of the whole portfolio."""
        return (self.factor.initial * self._total(held),)

    def _total(self, held: tuple[Held, ...]) -> Array:
        # Worst loss and contingencies, in USD.
        total = 0.0
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, position in enumerate(held):
            groups.setdefault((self.underlying[i], _is_in_coin(position)), []).append(i)
        for (k, is_in_coin), members in groups.items():
            price = held[members[0]].price if is_in_coin else 1.0
            positions = [_scanned(held[i], is_in_coin) for i in members]
            loss = worst_scenario(self.scans[k], positions, dampener=self.dampener[k] / price).loss
            total = total + price * loss + self._contingency(k, [held[i] for i in members], members)
        return total

    def _contingency(self, k: int, held: list[Held], members: list[int]) -> Array:
        # In USD: quantities in coins times the price of one.
        price, deltas, years = held[0].price, {}, {}
        for i, position in zip(members, held, strict=True):
            deltas[self.expiry[i]] = deltas.get(self.expiry[i], 0.0) + position.quantity * _delta(position)
            left = position.option.years if position.option is not None else (self.expiry[i] or 0.0)
            years[self.expiry[i]] = jnp.asarray(left, price.dtype)
        roll = roll_shock(
            list(deltas.values()),
            list(years.values()),
            move_per_year=self.roll_move_per_year[k],
            least_move=self.least_roll_move[k],
        )
        options = [(p.quantity, self.strike[i]) for i, p in zip(members, held, strict=True) if p.option is not None]
        written = written_option_contingency([q for q, _ in options], [s for _, s in options], rate=1.0)
        futures = [position.quantity * _delta(position) for position in held if position.option is None]
        offset = offsetting_contingency(futures, rate=self.offsetting_rate)
        return roll + self.written_option_rate * price * written + offset


def _is_in_coin(position: Held) -> bool:
    return position.kind == "InversePerpetual" if position.option is None else position.option.is_coin_settled


def _scanned(position: Held, is_in_coin: bool) -> Position:
    terms = position.option

    def revalue(price_factor: Array, shock: Shock) -> Array:
        volatility = None if terms is None else shock(terms.volatility, DAYS_PER_YEAR * terms.years)
        value = position.revalue(price_factor, volatility)
        return value / (position.price * price_factor) if is_in_coin else value

    return Position(position.quantity, revalue, terms is not None)


def _delta(position: Held) -> Array:
    # Change of one unit's value per relative change of the price, of what it is worth in its settlement currency.
    if position.option is None:
        return position.notional
    volatility = position.option.volatility
    one = jnp.ones_like(position.price)
    return jax.jvp(lambda factor: position.revalue(factor, volatility), (one,), (one,))[1]
