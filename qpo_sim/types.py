"""Names that every other module shares: array aliases and the Monte Carlo estimate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from jaxtyping import Float

Array = Any  # a numpy or a JAX array; shapes are written with jaxtyping where they are fixed

HOURS_PER_YEAR = 24.0 * 365.0
DAYS_PER_YEAR = 365.0


class Estimate(NamedTuple):
    """A Monte Carlo number and its standard error (same shape, same unit).

    `std_error` covers sampling error only; parameter and model error are not in it.
    """

    value: Float[Array, "..."]
    std_error: Float[Array, "..."]

    def interval(self, n_sigma: float = 1.959963984540054) -> tuple[Any, Any]:
        """Normal confidence interval, 95 % by default."""
        return self.value - n_sigma * self.std_error, self.value + n_sigma * self.std_error


class Upstream(NamedTuple):
    """What a stage sees of the stage before it, after that stage has done the same step."""

    state: Any
    output: Any


class Context(NamedTuple):
    """What every stage of a run may read: parameters, draw keys and path numbers (traced), and the clock (static).

    `market` and `book` hold prepared parameters; `path` is the row of 32-bit path numbers; `sub_steps` counts the
    simulation steps per base step of the market; `step_hours` is the length of a simulation step. `record` holds market
    paths made before, when a book is simulated on them. `mirror` marks antithetic partners (see `random.Address`).
    """

    market: Any
    book: Any
    keys: Any
    path: Any
    n_steps: int
    sub_steps: int
    step_hours: float
    record: Any = None
    mirror: Any = None


class Stage(NamedTuple):
    """One stage of the simulation line: a pure pair of functions, one simulation step at a time.

    `init(context) -> state` gives the state before step 0; `step(context, t, state, upstream) -> (state, output)` does
    step t. The next stage reads both the new state and the output.
    """

    name: str
    init: Any
    step: Any


@dataclass(frozen=True)
class Held:
    """A position as a margin rule sees it at one moment of all paths; money in the account's units.

    Attributes:
      asset: number of the underlying.
      kind: class of the contract, e.g. "LinearPerpetual" or "Option".
      quantity: units, negative for a short.
      price: price of the underlying that the venue looks at.
      mark: value of one unit.
      notional: value of the position that one unit stands for.
      revalue: function (price factor, volatility or None) -> mark after such a move of the underlying.
      option: `OptionTerms` of an option, else None.
    """

    asset: int
    kind: str
    quantity: Array
    price: Array
    mark: Array
    notional: Array
    revalue: Callable[[Array, Any], Array]
    option: "OptionTerms | None" = None


@dataclass(frozen=True)
class OptionTerms:
    """What a margin rule needs to know of an option.

    Attributes:
      forward: of its expiry.
      strike: in the units of the forward.
      years: time left.
      volatility: implied, per square root of a year.
      is_call: else a put.
      is_coin_settled: else settled in USD.
    """

    forward: Array
    strike: Array
    years: Array
    volatility: Array
    is_call: bool
    is_coin_settled: bool


@dataclass(frozen=True)
class Positions:
    """The positions of one account as a margin rule is bound to them; one entry each.

    Attributes:
      assets: name of the underlying.
      kinds: class of the contract (see `instrument.contract`).
      quantity: units at the start, negative for a short.
      entry: entry price over the starting price.
      expiry: years to the expiry, None without one.
      strike: of an option, over the starting price, else None.
    """

    assets: tuple[str, ...]
    kinds: tuple[str, ...]
    quantity: tuple[float, ...]
    entry: tuple[float, ...]
    expiry: tuple[float | None, ...]
    strike: tuple[float | None, ...]

    def only(self, kept: Sequence[int]) -> "Positions":
        """Some of the positions."""
        return Positions(*(tuple(getattr(self, f.name)[i] for i in kept) for f in fields(self)))


class Requirements(NamedTuple):
    """Maintenance margin: a part per position, and a constant for the account (tier deductions enter it negative).

    The account is liquidated when its margin equity is below their sum.
    """

    by_position: tuple[Array, ...]
    constant: Array
