r"""Implied-volatility surface of each asset: three SSVI factors that move with price and variance, free of arbitrage.

**Surface.** With log-moneyness $k = \ln(K/F_t)$, at-the-money total variance $\theta(T)$ and
$\varphi = \eta\,\theta^{-\gamma}(1+\theta)^{\gamma-1}$, gamma in (0, 1/2]:

$$w(k, T) = \tfrac12\theta\,(1 + \rho\varphi k + \sqrt{(\varphi k + \rho)^2 + 1 - \rho^2}),\quad
\theta(T) = T\,\big(\ell^2 + (\sigma^2 - \ell^2)\tfrac{1 - e^{-\lambda T}}{\lambda T}\big).$$

It has no butterfly arbitrage where $\eta(1 + |\rho|) \le 2$, and none of calendars as theta increases in T: its forward
variance $\ell^2 + (\sigma^2 - \ell^2)e^{-\lambda T}$ is positive (Gatheral & Jacquier 2014, theorems 4.1 and 4.2,
remark 4.4). Both hold here for all paths by construction: $\rho = 0.999\tanh y$ and $\eta = 2\,S(z)/(1 + |\rho|)$ with
a logistic S below 1.

**Moves of the smile with the price.** The ratio R of the move of at-the-money volatility to the skew times the
log-return is 0 for a smile that keeps to moneyness (sticky delta) and 1 for one that keeps to strikes; here it moves
the level, so that the surface stays an SSVI surface.

Figures: 30-day at-the-money volatility of BTC 0.40 to 0.65 in 2024-26, rho -0.3 to 0.1, eta 0.7 to 1.2 (inferred). DVOL
of BTC 2021-03 to 2025-11: its log has standard deviation 0.29, autocorrelation 0.987 after a day and 0.82 after 30
days, daily changes of 0.047 and a slope of -0.35 on the daily log-return, so -0.7 in log variance (own, from the
index's daily closes). In stress the smile keeps nearer to strikes and the level rises by half or more (from memory).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from qpo_sim.errors import InputError
from qpo_sim.market.side import process
from qpo_sim.market.side.view import View
from qpo_sim.numerics import Rows, each_asset, rounded
from qpo_sim.random import Address
from qpo_sim.types import DAYS_PER_YEAR, HOURS_PER_YEAR, Array

# The function of the module's name is what prices options; this one makes the component.
BUILDERS = ("surface",)

EXPONENT = 0.5
# The maturity at which `stickiness` is exact.
REFERENCE_YEARS = 30.0 / DAYS_PER_YEAR
_SHORTEST_YEARS = 1e-8
_RHO_LIMIT = 0.999
# Below the 2 of the condition by more than float32 rounds.
_ETA_LIMIT = 2.0 * (1.0 - 1e-6)


def of_asset(outputs: Mapping[str, Rows], i: int, *, name: str = "implied_volatility") -> dict[str, Array]:
    """The surface of one asset, from the outputs of all side components; `name` is that of the surface's component."""
    prefix = "" if name == Surface.name else f"{name}_"
    start = prefix + "iv_"
    return {key.removeprefix(prefix): rows[i] for key, rows in outputs.items() if key.startswith(start)}


def atm_total_variance(maturity_years: Array, outputs: Mapping[str, Array]) -> Array:
    """At-the-money total variance theta(T), flat in T when `outputs` has no `iv_long`.

    Pathwise gradient: yes.
    """
    maturity = jnp.maximum(maturity_years, _SHORTEST_YEARS)
    short = outputs["iv_level"] ** 2
    if "iv_long" not in outputs:
        return short * maturity
    long = outputs["iv_long"] ** 2
    return maturity * (long + (short - long) * process.averaged_decay(outputs["iv_reversion"] * maturity))


def curvature(theta: Array, eta: Array, exponent: float = EXPONENT) -> Array:
    """The power law phi(theta) of SSVI."""
    return eta * theta ** (-exponent) * (1.0 + theta) ** (exponent - 1.0)


def total_variance(log_moneyness: Array, theta: Array, rho: Array, phi: Array) -> Array:
    """SSVI total variance w.

    Pathwise gradient: yes.
    """
    x = phi * log_moneyness
    return 0.5 * theta * (1.0 + rho * x + jnp.sqrt((x + rho) ** 2 + (1.0 - rho * rho)))


def implied_volatility(
    strike_log_moneyness: Array,
    maturity_years: Array,
    outputs: Mapping[str, Array],
    exponent: float = EXPONENT,
) -> Array:
    """Implied volatility per square root of a year.

    Args:
      strike_log_moneyness: ln(K / F_t), a number or a row.
      maturity_years: time to expiry, a number or a row; below a third of a second it counts as that.
      outputs: of the component for one asset (see `of_asset`).
      exponent: gamma.

    Pathwise gradient: all.
    """
    theta = atm_total_variance(maturity_years, outputs)
    phi = curvature(theta, outputs["iv_eta"], exponent)
    w = total_variance(strike_log_moneyness, theta, outputs["iv_rho"], phi)
    return jnp.sqrt(w / jnp.maximum(maturity_years, _SHORTEST_YEARS))


class StaticArbitrage(NamedTuple):
    """Worst values over a grid, per path: Durrleman's g, and the rise of total variance between maturities."""

    butterfly: Float[Array, " paths"]
    calendar: Float[Array, " paths"]

    def is_free(self, tolerance: float = 1e-5) -> Bool[Array, " paths"]:
        """Whether the surface of each path is free of both arbitrages on the grid, up to rounding."""
        return (self.butterfly >= -tolerance) & (self.calendar >= -tolerance)


def static_arbitrage(
    outputs: Mapping[str, Array],
    log_moneyness: Sequence[float],
    maturity_years: Sequence[float],
    exponent: float = EXPONENT,
) -> StaticArbitrage:
    r"""Butterfly and calendar conditions of one asset's surface on a grid.

    $g = (1 - \tfrac{k w'}{2 w})^2 - \tfrac{w'^2}{4}(\tfrac1w + \tfrac14) + \tfrac{w''}{2} \ge 0$ (Durrleman), and w not
    falling in T at any k.

    Args:
      outputs: of the component for one asset (see `of_asset`).
      log_moneyness: strikes of the grid.
      maturity_years: increasing maturities of the grid, at least two.
      exponent: gamma.
    """
    rows = {name: jnp.atleast_1d(row)[None, None, :] for name, row in outputs.items() if name.startswith("iv_")}
    dtype = rows["iv_level"].dtype
    k = jnp.asarray(log_moneyness, dtype)[:, None, None]
    theta = atm_total_variance(jnp.asarray(maturity_years, dtype)[None, :, None], rows)
    rho, phi = rows["iv_rho"], curvature(theta, rows["iv_eta"], exponent)
    w = total_variance(k, theta, rho, phi)
    x = phi * k + rho
    root = jnp.sqrt(x * x + (1.0 - rho * rho))
    first = 0.5 * theta * phi * (rho + x / root)
    second = 0.5 * theta * phi * phi * (1.0 - rho * rho) / root**3
    g = (1.0 - 0.5 * k * first / w) ** 2 - 0.25 * first**2 * (1.0 / w + 0.25) + 0.5 * second
    return StaticArbitrage(jnp.min(g, axis=(0, 1)), jnp.min(jnp.diff(w, axis=1), axis=(0, 1)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Surface:
    r"""SSVI factors of each asset.

    Short-dated at-the-money variance $\sigma^2 = e^x (h_t/h_0)^p$, with $h_t$ the conditional variance of the asset's
    return and x reverting to $\ln\bar\sigma_k^2$, following returns by $\beta_k + R_k\rho\varphi$ (phi at 30 days). y
    and z, behind rho and eta, revert and follow returns too (see `process`). Exact at any step given the ratio's skew,
    which is held over the step.

    Outputs of a step, at its end: `iv_level` sigma, `iv_long` l (volatilities per square root of a year),
    `iv_reversion` lambda per year, `iv_rho`, `iv_eta`, `iv_stickiness` R.

    Attributes:
      level: log variance ln sigma_k^2 reverted to at the reference variance, per regime; a premium over realised
        variance of the regime is part of it.
      level_deviation: stationary standard deviation of x, of what does not follow returns.
      level_half_life_hours: of x.
      level_response: beta_k, log variance per unit of log-return, per regime.
      stickiness: R_k.
      variance_power: p.
      log_reference: log of the volatility per year that is h_0.
      long_volatility: l.
      reversion_per_year: lambda.
      skew: atanh(rho / 0.999) reverted to, per regime.
      skew_deviation: of y.
      skew_response: y per unit of log-return (positive: calls are bid in rallies).
      convexity: logit of eta (1 + |rho|) / 2 reverted to, per regime.
      convexity_deviation: of z.
      convexity_response: z per unit of log-return.
      shape_half_life_hours: of y and z.
      initial_level: x before the first step.
      name: of the component, see `view.named` (static).

    Pathwise gradient: all parameters.
    """

    level: Float[Array, "regimes assets"]
    level_deviation: Float[Array, "regimes assets"]
    level_half_life_hours: Float[Array, " assets"]
    level_response: Float[Array, "regimes assets"]
    stickiness: Float[Array, "regimes assets"]
    variance_power: Float[Array, " assets"]
    log_reference: Float[Array, " assets"]
    long_volatility: Float[Array, " assets"]
    reversion_per_year: Float[Array, " assets"]
    skew: Float[Array, "regimes assets"]
    skew_deviation: Float[Array, "regimes assets"]
    skew_response: Float[Array, " assets"]
    convexity: Float[Array, "regimes assets"]
    convexity_deviation: Float[Array, "regimes assets"]
    convexity_response: Float[Array, " assets"]
    shape_half_life_hours: Float[Array, " assets"]
    initial_level: Float[Array, " assets"]
    name: str = field(default="implied_volatility", metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.initial_level.shape[0]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: three normals for each asset."""
        return (3 * self.n_assets + 1) // 2

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step."""
        return Prepared(
            self,
            process.reversion(self.level_half_life_hours, step_hours),
            process.reversion(self.shape_half_life_hours, step_hours),
            self.log_reference + 0.5 * float(np.log(step_hours / HOURS_PER_YEAR)),
        )

    def init(self, prepared: "Prepared", one: Array, address: Address) -> "State":
        """Factors before the first step: the given level, the shape of regime 0."""
        p = prepared.parameters
        return State(*(process.constant_rows(x, one) for x in (p.initial_level, p.skew[0], p.convexity[0])))

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Rows]:
        """The surface before the first step: the given level, as at the reference volatility, the shape of regime 0."""
        p = prepared.parameters
        level, skew, convexity, long, speed, stickiness = (
            process.constant_rows(x, one)
            for x in (
                p.initial_level,
                p.skew[0],
                p.convexity[0],
                p.long_volatility,
                p.reversion_per_year,
                p.stickiness[0],
            )
        )
        rho = each_asset(_rho, skew)
        return {
            "iv_level": each_asset(lambda x: jnp.exp(0.5 * x), level),
            "iv_long": long,
            "iv_reversion": speed,
            "iv_rho": rho,
            "iv_eta": each_asset(_eta, convexity, rho),
            "iv_stickiness": stickiness,
        }

    def step(
        self, prepared: "Prepared", t: Array, state: "State", view: View, address: Address
    ) -> tuple["State", dict[str, Rows]]:
        """Factors after one step."""
        process.check_width("implied_volatility", self.n_assets, view.log_return)
        p, n = prepared.parameters, self.n_assets
        z = process.normals(address, 3 * n, p.level.dtype)

        def now(entries):
            return process.by_regime(view, entries, state.level)

        def move(x, mean, deviation, response, transition, part):
            rows = process.container(z[part * n : (part + 1) * n])
            return process.revert(
                x, now(mean), now(deviation), response, view.log_return, view.volatility, rows, transition
            )

        excess = each_asset(
            lambda v, power, reference: 2.0 * power * process.log_excess(v, reference),
            view.volatility,
            p.variance_power,
            prepared.log_reference,
        )
        long = process.constant_rows(p.long_volatility, jnp.ones_like(state.level[0]))
        speed = process.constant_rows(p.reversion_per_year, jnp.ones_like(state.level[0]))
        stickiness = now(p.stickiness)

        def response(x, y, c, above, own, ratio, long, speed):
            before = {"iv_level": jnp.exp(0.5 * (x + above)), "iv_long": long, "iv_reversion": speed}
            rho = _rho(y)
            theta = atm_total_variance(REFERENCE_YEARS, before)
            return own + ratio * rho * curvature(theta, _eta(c, rho))

        responses = each_asset(
            response, state.level, state.skew, state.convexity, excess, now(p.level_response), stickiness, long, speed
        )
        level = move(state.level, p.level, p.level_deviation, responses, prepared.transition, 0)
        skew = move(state.skew, p.skew, p.skew_deviation, p.skew_response, prepared.shape, 1)
        convexity = move(state.convexity, p.convexity, p.convexity_deviation, p.convexity_response, prepared.shape, 2)
        rho = each_asset(_rho, skew)
        return State(level, skew, convexity), {
            "iv_level": each_asset(lambda x, above: jnp.exp(0.5 * (x + above)), level, excess),
            "iv_long": long,
            "iv_reversion": speed,
            "iv_rho": rho,
            "iv_eta": each_asset(_eta, convexity, rho),
            "iv_stickiness": stickiness,
        }


def _rho(y: Array) -> Array:
    return _RHO_LIMIT * jnp.tanh(y)


def _eta(z: Array, rho: Array) -> Array:
    return _ETA_LIMIT * jax.nn.sigmoid(z) / (1.0 + jnp.abs(rho))


class State(NamedTuple):
    """x, y and z."""

    level: Rows
    skew: Rows
    convexity: Rows


class Prepared(NamedTuple):
    """Constants of a step; log_reference is that of the volatility of a step."""

    parameters: Surface
    transition: process.Reversion
    shape: process.Reversion
    log_reference: Array


def surface(
    n_assets: int,
    *,
    level: process.Entries = 0.55,
    level_deviation: process.Entries = 0.5,
    level_half_life_hours: process.Entries = 1500.0,
    level_response: process.Entries = -0.7,
    stickiness: process.Entries = 0.0,
    variance_power: process.Entries = 0.5,
    reference_volatility: process.Entries = 0.55,
    long_volatility: process.Entries = 0.6,
    reversion_per_year: process.Entries = 3.0,
    rho: process.Entries = -0.1,
    rho_deviation: process.Entries = 0.1,
    rho_response: process.Entries = 0.3,
    eta: process.Entries = 0.9,
    eta_deviation: process.Entries = 0.2,
    eta_response: process.Entries = 0.0,
    shape_half_life_hours: process.Entries = 240.0,
    initial_level: process.Entries | None = None,
    name: str = "implied_volatility",
    dtype: Any = jnp.float32,
) -> Surface:
    """Surface of plain numbers (see `Surface`; tables as in `process`).

    `level`, `initial_level` and `long_volatility` are volatilities per square root of a year at the money, the first
    two of short expiries; `rho_deviation` and `rho_response` are in units of atanh(rho), `eta_deviation` and
    `eta_response` in units of the logit of eta (1 + |rho|) / 2. `initial_level` is the level of regime 0 when omitted.

    Raises:
      InputError: an entry out of bounds, a wrong shape, tables that disagree on the number of regimes, or rho and eta
        that allow butterfly arbitrage.
    """
    n = process.check_count("n_assets", n_assets)
    tables = {
        "level": process.table("level", level, n, above=0.0),
        "level_deviation": process.table("level_deviation", level_deviation, n, at_least=0.0),
        "level_response": process.table("level_response", level_response, n),
        "stickiness": process.table("stickiness", stickiness, n),
        "rho": process.table("rho", rho, n, above=-_RHO_LIMIT, below=_RHO_LIMIT),
        "rho_deviation": process.table("rho_deviation", rho_deviation, n, at_least=0.0),
        "eta": process.table("eta", eta, n, above=0.0),
        "eta_deviation": process.table("eta_deviation", eta_deviation, n, at_least=0.0),
    }
    process.check_regimes(**tables)
    share = tables["eta"] * (1.0 + np.abs(tables["rho"])) / _ETA_LIMIT
    if np.any(share >= 1.0):
        raise InputError(
            f"eta is {tables['eta'].tolist()} and rho {tables['rho'].tolist()}; eta (1 + |rho|) must be below 2 for "
            "the surface to be free of butterfly arbitrage: lower eta."
        )
    start = (
        tables["level"][0] if initial_level is None else process.vector("initial_level", initial_level, n, above=0.0)
    )
    shape_half_life = process.vector("shape_half_life_hours", shape_half_life_hours, n, above=0.0)
    leaves = {
        "level": 2.0 * np.log(tables["level"]),
        "level_deviation": tables["level_deviation"],
        "level_half_life_hours": process.vector("level_half_life_hours", level_half_life_hours, n, above=0.0),
        "level_response": tables["level_response"],
        "stickiness": tables["stickiness"],
        "variance_power": process.vector("variance_power", variance_power, n),
        "log_reference": np.log(process.vector("reference_volatility", reference_volatility, n, above=0.0)),
        "long_volatility": process.vector("long_volatility", long_volatility, n, above=0.0),
        "reversion_per_year": process.vector("reversion_per_year", reversion_per_year, n, at_least=0.0),
        "skew": np.arctanh(tables["rho"] / _RHO_LIMIT),
        "skew_deviation": tables["rho_deviation"],
        "skew_response": process.vector("rho_response", rho_response, n),
        "convexity": np.log(share) - np.log1p(-share),
        "convexity_deviation": tables["eta_deviation"],
        "convexity_response": process.vector("eta_response", eta_response, n),
        "shape_half_life_hours": shape_half_life,
        "initial_level": 2.0 * np.log(start),
    }
    return Surface(**{key: rounded(value, dtype) for key, value in leaves.items()}, name=name)


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> Surface:
    """BTC-like surface; in the last regime it keeps to strikes and its level is higher by half."""
    stress = np.linspace(0.0, 1.0, n_regimes)
    return surface(
        n_assets,
        level=0.55 * (1.0 + 0.5 * stress),
        stickiness=stress,
        rho=-0.1 - 0.15 * stress,
        dtype=dtype,
    )
