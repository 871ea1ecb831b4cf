r"""Gas price of a chain: a mean-reverting log level that follows the market, and spikes in congestion.

log gas = X + S. X reverts to the level of the regime, moved by volatility, and follows returns (see `process`); S is
shot noise: spikes of bounded size arrive at the regime's intensity and decay, and every large move of the driver
adds to it. The cost of a transaction is units * (gas + tip) * 1e-9 * price of the coin.

Figures: base fee on Ethereum 0.05 to 0.5 gwei after December 2025, 1 when busy, 10 in events; 20 to 100 in 2021-23 and
200 to 2000 in crashes, +3 to +5 in the log on stress days (the last two from memory). Daily mean gas price 2020 to 2026
around its centred 60-day mean: standard deviation of the log 0.33 to 0.46, autocorrelation of one day 0.55 to 0.71,
largest values +1.9 to +2.9 (own, from Etherscan's daily series).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.side import process
from qpo_sim.market.side.view import View
from qpo_sim.numerics import rounded
from qpo_sim.random import Address, uniform
from qpo_sim.types import HOURS_PER_YEAR, Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gas:
    r"""Gas price of one chain in gwei, output `gas` at the end of a step.

    X reverts to $\log\bar g_k + c\,\log(v / v_{ref})$ with the volatility v of the driver. S is raised by spikes (a
    Poisson process; sizes in the log uniform, so that gas has a mean) and by moves, $b r^2 / (1 + b r^2/\ell)$ for a
    log-return r, and decays. Exact at any step but for moves: $r^2$ of a diffusion depends on the step, its mean does
    not.

    Attributes:
      level: log of the median in gwei, per regime.
      deviation: stationary standard deviation of X, of what does not follow returns.
      half_life_hours: of a deviation of X.
      return_response: change of X per unit of log-return (negative: gas rises when prices fall).
      volatility_response: c.
      log_reference: log of the driver's volatility per year at which the level is as given.
      initial: X before the first step.
      spike_per_day: intensity of spikes, per regime.
      spike_low: smallest size in the log, per regime.
      spike_high: largest size, per regime.
      spike_half_life_hours: of spikes and moves.
      move_response: b.
      move_limit: l, what one move can add at most.
      driver: number of the asset (static).
      longest_step_hours: steps up to this length can be simulated (static).
      name: of the component, see `view.named` (static).

    Pathwise gradient: all parameters but spike_per_day.
    """

    level: Float[Array, "regimes 1"]
    deviation: Float[Array, "regimes 1"]
    half_life_hours: Float[Array, " 1"]
    return_response: Float[Array, " 1"]
    volatility_response: Float[Array, " 1"]
    log_reference: Float[Array, " 1"]
    initial: Float[Array, " 1"]
    spike_per_day: Float[Array, "regimes 1"]
    spike_low: Float[Array, "regimes 1"]
    spike_high: Float[Array, "regimes 1"]
    spike_half_life_hours: Float[Array, " 1"]
    move_response: Float[Array, " 1"]
    move_limit: Float[Array, " 1"]
    driver: int = field(default=0, metadata={"static": True})
    longest_step_hours: float = field(default=24.0, metadata={"static": True})
    name: str = field(default="gas", metadata={"static": True})

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return 1 + process.MAX_ARRIVALS

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step.

        Raises:
          InputError: a step longer than the component was built for.
        """
        process.check_step("gas", step_hours, self.longest_step_hours)
        days = step_hours / process.HOURS_PER_DAY
        return Prepared(
            self,
            process.reversion(self.half_life_hours, step_hours),
            process.reversion(self.spike_half_life_hours, step_hours),
            self.spike_per_day * days,
            self.log_reference + 0.5 * float(np.log(step_hours / HOURS_PER_YEAR)),
            float(np.log(2.0)) * step_hours / self.spike_half_life_hours,
        )

    def init(self, prepared: "Prepared", one: Array, address: Address) -> "State":
        """State before the first step: no spike."""
        return State(prepared.parameters.initial[0] * one, jnp.zeros_like(one))

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Array]:
        """Gas price before the first step."""
        return {"gas": jnp.exp(prepared.parameters.initial[0]) * one}

    def step(
        self, prepared: "Prepared", t: Array, state: "State", view: View, address: Address
    ) -> tuple["State", dict[str, Array]]:
        """Gas price after one step."""
        p = prepared.parameters

        def now(entries):
            return process.by_regime(view, entries, (state.level,))[0]

        log_return, volatility = (process.pick(rows, (self.driver,))[0] for rows in (view.log_return, view.volatility))
        excess = process.log_excess(volatility, prepared.log_reference[0])
        (level,) = process.revert(
            (state.level,),
            (now(p.level) + p.volatility_response[0] * excess,),
            (now(p.deviation),),
            p.return_response,
            (log_return,),
            (volatility,),
            tuple(process.normals(address, 1, p.level.dtype)),
            prepared.transition,
        )
        size = p.move_response[0] * log_return * log_return
        move = size / (1.0 + size / p.move_limit[0])
        spike = state.spike * prepared.fade.decay[0] + move * prepared.fade.gain[0]
        low, high = now(p.spike_low), now(p.spike_high)
        for arrival in process.arrivals(address.after(1), now(prepared.spikes)):
            height = low + (high - low) * uniform(arrival.word).astype(low.dtype)
            spike = spike + arrival.happens * height * jnp.exp(-prepared.fade_rate[0] * arrival.left)
        return State(level, spike), {"gas": jnp.exp(level + spike)}


class State(NamedTuple):
    """X and S."""

    level: Array
    spike: Array


class Prepared(NamedTuple):
    """Constants of a step; spikes: expected number in it, log_reference and fade_rate: per step."""

    parameters: Gas
    transition: process.Reversion
    fade: process.Reversion
    spikes: Array
    log_reference: Array
    fade_rate: Array


def gas(
    *,
    level: process.Entries = 0.3,
    deviation: process.Entries = 0.4,
    half_life_hours: float = 36.0,
    return_response: float = 0.0,
    volatility_response: float = 0.5,
    reference_volatility: float = 0.6,
    initial: float | None = None,
    spike_per_day: process.Entries = 0.02,
    spike_low: process.Entries = 1.0,
    spike_high: process.Entries = 2.0,
    spike_half_life_hours: float = 6.0,
    move_response: float = 20.0,
    move_limit: float = 5.0,
    driver: int | str = 0,
    assets: Sequence[str] = (),
    longest_step_hours: float = 24.0,
    name: str = "gas",
    dtype: Any = jnp.float32,
) -> Gas:
    """Gas price of plain numbers (see `Gas`; tables per regime as in `process`).

    Args:
      level: median in gwei, per regime, at the reference volatility and without spikes.
      deviation: of the log, per regime.
      half_life_hours: of a deviation.
      return_response: log gas per unit of the driver's log-return.
      volatility_response: elasticity of the level in the driver's volatility.
      reference_volatility: of the driver per year.
      initial: gwei before the first step; the level of regime 0 when omitted.
      spike_per_day: arrivals per day, per regime.
      spike_low: smallest size in the log, per regime.
      spike_high: largest size in the log, per regime.
      spike_half_life_hours: of spikes and moves.
      move_response: log gas per squared log-return of the driver.
      move_limit: the most that one move adds to the log.
      driver: asset, by number or name.
      assets: names of the market's assets, where the driver is named.
      longest_step_hours: steps up to this length can be simulated.
      name: of the component, see `view.named`.
      dtype: precision of the paths.

    Raises:
      InputError: an entry out of bounds, a wrong shape, or too many spikes for a step.
    """
    levels = process.table("level", level, 1, above=0.0)
    deviations = process.table("deviation", deviation, 1, at_least=0.0)
    intensity = process.table("spike_per_day", spike_per_day, 1, at_least=0.0)
    lows = process.table("spike_low", spike_low, 1, at_least=0.0)
    highs = process.table("spike_high", spike_high, 1, at_least=0.0)
    process.check_regimes(level=levels, deviation=deviations, spike_per_day=intensity, spike_low=lows, spike_high=highs)
    if np.any(lows > highs):
        raise InputError(f"spike_low is {lows.tolist()} and spike_high {highs.tolist()}; low must not exceed high.")
    longest = process.number("longest_step_hours", longest_step_hours, above=0.0)
    process.check_intensity("spike_per_day", intensity, longest)
    start = levels[0] if initial is None else process.vector("initial", initial, 1, above=0.0)
    leaves = {
        "level": np.log(levels),
        "deviation": deviations,
        "half_life_hours": process.vector("half_life_hours", half_life_hours, 1, above=0.0),
        "return_response": process.vector("return_response", return_response, 1),
        "volatility_response": process.vector("volatility_response", volatility_response, 1),
        "log_reference": np.log(process.vector("reference_volatility", reference_volatility, 1, above=0.0)),
        "initial": np.log(start),
        "spike_per_day": intensity,
        "spike_low": lows,
        "spike_high": highs,
        "spike_half_life_hours": process.vector("spike_half_life_hours", spike_half_life_hours, 1, above=0.0),
        "move_response": process.vector("move_response", move_response, 1, at_least=0.0),
        "move_limit": process.vector("move_limit", move_limit, 1, above=0.0),
    }
    return Gas(
        **{key: rounded(value, dtype) for key, value in leaves.items()},
        driver=process.check_drivers("driver", driver, assets)[0],
        longest_step_hours=longest,
        name=name,
    )


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> Gas:
    """Ethereum after 2025, driven by the first asset; rarer and smaller spikes in the first regime than in the last."""
    stress = np.linspace(0.0, 1.0, n_regimes)
    return gas(
        level=0.3 * 3.0**stress,
        spike_per_day=0.02 + 0.2 * stress,
        spike_low=1.0 + 2.0 * stress,
        spike_high=2.0 + 3.0 * stress,
        dtype=dtype,
    )
