r"""Interest of lending pools: utilisation that follows the market, and the kinked rate on it.

$r_b = b + s_1 U/U^*$ for $U \le U^*$, else $b + s_1 + s_2 (U - U^*)/(1 - U^*)$ with utilisation U = debt / (cash +
debt); suppliers get $r_b U (1 - RF)$. Aave v3, DefaultReserveInterestRateStrategyV2; rates are simple rates per year of
an index that compounds by the second on the debt side.

Curves (U*, b, s1, s2): USDC on Aave core since 2025-03 92 %, 0, 6.5 %, 35 % with RF 10 %; WETH 90 to 92 %, 0, 2.5 to
2.7 %, 8 to 80 %, RF 15 %; wstETH 80 %, 0, 1 %, 40 %, RF 35 %; cbBTC 80 %, 0, 4 %, 60 %, RF 50 % (Aave governance
payloads 2024-11 to 2026-02). Governance moved the stablecoins' s1 from 12.5 % over 9.5 % to 6.5 % between 2024-12 and
2025-03.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.market.side import process
from qpo_sim.market.side.view import View
from qpo_sim.numerics import Rows, each_asset, rounded
from qpo_sim.random import Address
from qpo_sim.types import Array


def kinked_rate(utilisation: Array, base: Array, slope1: Array, slope2: Array, optimal: Array) -> Array:
    """Borrow rate per year at a utilisation in [0, 1], see the module.

    Pathwise gradient: yes, almost everywhere.
    """
    below = jnp.minimum(utilisation, optimal) / optimal
    above = jnp.maximum(utilisation - optimal, 0.0) / (1.0 - optimal)
    return base + slope1 * below + slope2 * above


def supplied_rate(borrow_rate: Array, utilisation: Array, reserve_factor: Array) -> Array:
    """Rate per year that suppliers get, without unbacked supply or deficit.

    Pathwise gradient: yes.
    """
    return borrow_rate * utilisation * (1.0 - reserve_factor)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BorrowRate:
    r"""Utilisation and rates of lending pools; logit U reverts and follows the return of an asset (see `process`).

    Exact at any step. Outputs of a step, rows by pool, at its end: `utilisation` in (0, 1), `borrow_rate` and
    `supply_rate` per year.

    Attributes:
      level: logit of the utilisation reverted to, per regime.
      deviation: stationary standard deviation of logit U, of what does not follow returns.
      half_life_hours: of a deviation of logit U.
      return_response: change of logit U per unit of log-return of the pool's driver.
      initial: logit U before the first step.
      base: b per year.
      slope1: s_1 per year.
      slope2: s_2 per year.
      optimal: U*.
      reserve_factor: RF.
      drivers: number of the asset that each pool follows (static).
      name: of the component, see `view.named` (static).

    Pathwise gradient: all parameters.
    """

    level: Float[Array, "regimes pools"]
    deviation: Float[Array, "regimes pools"]
    half_life_hours: Float[Array, " pools"]
    return_response: Float[Array, " pools"]
    initial: Float[Array, " pools"]
    base: Float[Array, " pools"]
    slope1: Float[Array, " pools"]
    slope2: Float[Array, " pools"]
    optimal: Float[Array, " pools"]
    reserve_factor: Float[Array, " pools"]
    drivers: tuple[int, ...] = field(metadata={"static": True})
    name: str = field(default="borrow_rate", metadata={"static": True})

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return (len(self.drivers) + 1) // 2

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step."""
        return Prepared(self, process.reversion(self.half_life_hours, step_hours))

    def init(self, prepared: "Prepared", one: Array, address: Address) -> Rows:
        """Logit utilisation before the first step."""
        return process.constant_rows(prepared.parameters.initial, one)

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Rows]:
        """Utilisation and rates before the first step."""
        return self._outputs(prepared, process.constant_rows(prepared.parameters.initial, one))

    def _outputs(self, prepared: "Prepared", logit: Rows) -> dict[str, Rows]:
        p = prepared.parameters
        utilisation = each_asset(jax.nn.sigmoid, logit)
        rate = each_asset(kinked_rate, utilisation, p.base, p.slope1, p.slope2, p.optimal)
        supply = each_asset(supplied_rate, rate, utilisation, p.reserve_factor)
        return {"utilisation": utilisation, "borrow_rate": rate, "supply_rate": supply}

    def step(
        self, prepared: "Prepared", t: Array, state: Rows, view: View, address: Address
    ) -> tuple[Rows, dict[str, Rows]]:
        """Utilisation and rates after one step."""
        p = prepared.parameters
        logit = process.revert(
            state,
            process.by_regime(view, p.level, state),
            process.by_regime(view, p.deviation, state),
            p.return_response,
            process.pick(view.log_return, self.drivers),
            process.pick(view.volatility, self.drivers),
            process.container(process.normals(address, len(self.drivers), p.level.dtype)),
            prepared.transition,
        )
        return logit, self._outputs(prepared, logit)


class Prepared(NamedTuple):
    """Constants of a step."""

    parameters: BorrowRate
    transition: process.Reversion


def borrow_rate(
    drivers: process.Drivers,
    *,
    utilisation: process.Entries = 0.8,
    deviation: process.Entries = 0.5,
    half_life_hours: process.Entries = 72.0,
    return_response: process.Entries = 0.0,
    initial: process.Entries | None = None,
    base: process.Entries = 0.0,
    slope1: process.Entries = 0.065,
    slope2: process.Entries = 0.35,
    optimal: process.Entries = 0.92,
    reserve_factor: process.Entries = 0.1,
    assets: Sequence[str] = (),
    name: str = "borrow_rate",
    dtype: Any = jnp.float32,
) -> BorrowRate:
    """Lending pools of plain numbers (see `BorrowRate`; tables as in `process`).

    Args:
      drivers: asset that each pool follows, by number or name; a single one makes one pool.
      utilisation: level reverted to, per regime, in (0, 1): the median while returns do not move it.
      deviation: in units of logit utilisation.
      half_life_hours: of a deviation.
      return_response: logit utilisation per unit of log-return.
      initial: utilisation before the first step; that of regime 0 when omitted.
      base: rate at no utilisation, per year.
      slope1: rise up to the optimal utilisation, per year.
      slope2: rise beyond it, per year.
      optimal: in (0, 1).
      reserve_factor: share of interest that suppliers do not get, in [0, 1].
      assets: names of the market's assets, where drivers are named.
      name: of the component, see `view.named`.
      dtype: precision of the paths.

    Raises:
      InputError: an entry out of bounds, a wrong shape, or tables that disagree on the number of regimes.
    """
    followed = process.check_drivers("drivers", drivers, assets)
    n = len(followed)
    levels = process.table("utilisation", utilisation, n, above=0.0, below=1.0)
    deviations = process.table("deviation", deviation, n, at_least=0.0)
    process.check_regimes(utilisation=levels, deviation=deviations)
    start = levels[0] if initial is None else process.vector("initial", initial, n, above=0.0, below=1.0)
    leaves = {
        "level": np.log(levels) - np.log1p(-levels),
        "deviation": deviations,
        "half_life_hours": process.vector("half_life_hours", half_life_hours, n, above=0.0),
        "return_response": process.vector("return_response", return_response, n),
        "initial": np.log(start) - np.log1p(-start),
        "base": process.vector("base", base, n, at_least=0.0),
        "slope1": process.vector("slope1", slope1, n, at_least=0.0),
        "slope2": process.vector("slope2", slope2, n, at_least=0.0),
        "optimal": process.vector("optimal", optimal, n, above=0.0, below=1.0),
        "reserve_factor": process.vector("reserve_factor", reserve_factor, n, at_least=0.0, at_most=1.0),
    }
    return BorrowRate(
        **{key: rounded(value, dtype) for key, value in leaves.items()},
        drivers=followed,
        name=name,
    )


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> BorrowRate:
    """One stablecoin pool per asset, borrowed against it: utilisation rises with its price and under stress."""
    return borrow_rate(range(n_assets), utilisation=np.linspace(0.8, 0.9, n_regimes), return_response=1.0, dtype=dtype)
