r"""Funding of perpetual futures: a premium that follows the returns, and the clamped rate that is paid on it.

$F = P + \mathrm{clamp}(I - P, -c, c)$, then $|F| \le$ cap, with the interval's average premium P, the interest I and
all rates per 8 hours; a position held over a settlement pays side * notional * F * (interval / 8 h), longs to shorts
where F > 0. The rate is exactly I wherever P is in [I - c, I + c].

Conventions of venues (I, c, cap, interval): Binance, Gate, BitMEX 0.01 %, 0.05 %, 0.30 % for BTC, 8 h (Binance support
360033525031; the cap was reached exactly on 2020-02-12 and 2020-03-13); Hyperliquid the same rate with 1/8 paid each
hour and a cap of 4 % per hour; Deribit I = 0, c = 0.025 %, cap 0.5 %, continuous (the last two from memory).

Figures: BTC on BitMEX in Q3 2025 was positive more than 92 % of the time and at exactly 0.01 % for 78.19 % (BitMEX
report): a Gaussian premium of mean 0.7 bp and standard deviation 4 bp gives 92.3 % and 78.7 %. Binance BTC 2022-11 to
2025-11: autocorrelation of F 0.80, 0.68, 0.58 after 8, 24 and 72 hours, positive 89 %. Under stress the standard
deviation is about three times as large; the mean fell to -5 to -10 bp after the crash of March 2020 and rose to 5 to
12 bp in February 2020.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.side import process
from qpo_sim.market.side.view import View
from qpo_sim.numerics import Rows, each_asset, rounded, rows_like, safe_sqrt
from qpo_sim.random import Address
from qpo_sim.types import Array

RATE_HOURS = 8.0


def premium_index(impact_bid: Array, impact_ask: Array, index: Array) -> Array:
    """Premium of a book over its index, (max(0, bid - index) - max(0, index - ask)) / index, from impact prices."""
    return (jnp.maximum(impact_bid - index, 0.0) - jnp.maximum(index - impact_ask, 0.0)) / index


def weighted_premium(premium: Float[Array, "samples ..."]) -> Float[Array, "..."]:
    """Average of an interval's premium samples with weights 1, 2, .., n, the latest the heaviest."""
    weight = jnp.arange(1, premium.shape[0] + 1).astype(premium.dtype)
    return jnp.tensordot(weight / jnp.sum(weight), premium, axes=1)


def funding_rate(premium: Array, interest: Array, clamp: Array, cap: Array) -> Array:
    """Funding rate per 8 hours, see the module; exactly `interest` where the premium is within `clamp` of it.

    Pathwise gradient: yes, almost everywhere; zero in the premium where the rate is pinned or capped.
    """
    # The median of I, P - c and P + c is P + clamp(I - P, -c, c) without its rounding.
    rate = jnp.minimum(jnp.maximum(interest, premium - clamp), premium + clamp)
    return jnp.minimum(jnp.maximum(rate, -cap), cap)


def smoothed_clip(x: Array, low: Array, high: Array, width: float) -> Array:
    """Clip whose two kinks are softplus functions of the given width; within 0.7 width of the clip."""
    return low + width * (jax.nn.softplus((x - low) / width) - jax.nn.softplus((x - high) / width))


def smoothed_funding_rate(premium: Array, interest: Array, clamp: Array, cap: Array, width: float) -> Array:
    """`funding_rate` with smoothed kinks, for optimisation: its gradient is nowhere zero.

    Pathwise gradient: yes.
    """
    rate = premium + smoothed_clip(interest - premium, -clamp, clamp, width)
    return smoothed_clip(rate, -cap, cap, width)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Funding:
    r"""Premium and funding rate of each asset's perpetual; the premium reverts and follows returns (see `process`).

    At every settlement the premium is drawn from its exact law given the step's return, also where several settlements
    fall into one step, so the law of premiums and payments does not depend on the step. Per interval this is
    $P' = m_k + \varphi(P - m_k) + \beta r + s_k \varepsilon$.

    Outputs of a step: `premium` and `funding_rate` at its end, per 8 hours; `funding_accrued`, what a long position
    pays in the step per unit of notional: the sum of F * settlement_hours / 8 over the settlements in it.

    Attributes:
      mean: level of reversion m_k, per 8 h.
      deviation: stationary standard deviation of what does not follow returns, per 8 h.
      half_life_hours: of a deviation from the mean.
      return_response: beta, premium per unit of log-return (positive: the premium follows).
      initial: premium before the first step.
      interest: I per 8 h.
      clamp: c per 8 h.
      cap: largest absolute rate per 8 h.
      settlement_hours: time between payments; the first falls that long after the start (static).
      longest_step_hours: steps up to this length can be simulated (static).
      smoothed_width: 0 for the rate itself, else the width of `smoothed_funding_rate` (static).
      name: of the component, see `view.named` (static).

    Pathwise gradient: all parameters; in mean, deviation, half_life_hours and return_response the rate's is zero
    while it is pinned, unless smoothed.
    """

    mean: Float[Array, "regimes assets"]
    deviation: Float[Array, "regimes assets"]
    half_life_hours: Float[Array, " assets"]
    return_response: Float[Array, " assets"]
    initial: Float[Array, " assets"]
    interest: Float[Array, " assets"]
    clamp: Float[Array, " assets"]
    cap: Float[Array, " assets"]
    settlement_hours: float = field(default=8.0, metadata={"static": True})
    longest_step_hours: float = field(default=24.0, metadata={"static": True})
    smoothed_width: float = field(default=0.0, metadata={"static": True})
    name: str = field(default="funding", metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.initial.shape[0]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step, enough for the longest."""
        most = max(1, round(self.longest_step_hours / self.settlement_hours))
        return (self.n_assets * most + 1) // 2

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step.

        Raises:
          InputError: a step that is neither a multiple nor a divisor of the settlement interval, or is too long.
        """
        process.check_step("funding", step_hours, self.longest_step_hours)
        ratio = step_hours / self.settlement_hours
        per_step, steps_per = max(1, round(ratio)), max(1, round(1.0 / ratio))
        if abs(ratio - per_step / steps_per) > 1e-6 * ratio:
            raise InputError(
                f"funding settles every {self.settlement_hours:g} hours and the step is {step_hours:g}; one must be a "
                "whole multiple of the other: change simulation step or settlement_hours."
            )
        transition = process.reversion(self.half_life_hours, step_hours / per_step)
        return Prepared(self, transition, per_step, steps_per)

    def init(self, prepared: "Prepared", one: Array, address: Address) -> "State":
        """Premiums before the first step, just after a settlement."""
        since = () if prepared.steps_per_settlement == 1 else jnp.zeros_like(one)
        return State(process.constant_rows(prepared.parameters.initial, one), since)

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Rows]:
        """Premiums and rates before the first step, nothing accrued."""
        p = prepared.parameters
        premium = process.constant_rows(p.initial, one)
        rate = each_asset(self._rate, premium, p.interest, p.clamp, p.cap)
        return {"premium": premium, "funding_rate": rate, "funding_accrued": each_asset(jnp.zeros_like, premium)}

    def _rate(self, x: Array, interest: Array, clamp: Array, cap: Array) -> Array:
        if self.smoothed_width > 0.0:
            return smoothed_funding_rate(x, interest, clamp, cap, self.smoothed_width)
        return funding_rate(x, interest, clamp, cap)

    def step(
        self, prepared: "Prepared", t: Array, state: "State", view: View, address: Address
    ) -> tuple["State", dict[str, Rows]]:
        """Premiums, rates and payments of one step."""
        process.check_width("funding", self.n_assets, view.log_return)
        p, n = prepared.parameters, prepared.n_settlements
        z = process.normals(address, self.n_assets * n, p.mean.dtype)
        mean = process.by_regime(view, p.mean, state.premium)
        deviation = process.by_regime(view, p.deviation, state.premium)
        draws = tuple(process.container(z[j * self.n_assets : (j + 1) * self.n_assets]) for j in range(n))
        share = self.settlement_hours / RATE_HOURS
        since, settles = (), 1.0
        if prepared.steps_per_settlement > 1:
            waited = state.since + 1.0
            settles = (waited > prepared.steps_per_settlement - 0.5).astype(waited.dtype)
            since = waited * (1.0 - settles)

        def one(x, m, s, r, v, decay, noise, gain, timing, beta, interest, clamp, cap, *e):
            # Given the return of the step, the innovations of its n intervals have covariance D 1 - E 11', as their
            # return parts are n equal shares of a bridge; this is the symmetric root of that matrix.
            own, part = (s * noise) ** 2, (beta * v) ** 2 / n
            along = safe_sqrt(own + part * timing)
            across = safe_sqrt(own + part * (timing + gain * gain)) if n > 1 else along
            shift = (along - across) * (sum(e) / n)
            paid = jnp.zeros_like(x)
            rate = paid
            for k in range(n):
                x = m + decay * (x - m) + beta * gain * r / n + across * e[k] + shift
                rate = self._rate(x, interest, clamp, cap)
                paid = paid + rate * share
            return x, rate, paid * settles

        constants = (*prepared.transition, p.return_response, p.interest, p.clamp, p.cap)
        premium, rate, paid = each_asset(
            one, state.premium, mean, deviation, view.log_return, view.volatility, *constants, *draws
        )
        premium, rate, paid = (rows_like(state.premium, list(rows)) for rows in (premium, rate, paid))
        return State(premium, since), {"premium": premium, "funding_rate": rate, "funding_accrued": paid}


class State(NamedTuple):
    """Premiums, and the steps since the last settlement where a settlement takes several."""

    premium: Rows
    since: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """Constants of a step: parameters, transition over one interval (or step), and how settlements and steps nest."""

    parameters: Funding
    transition: process.Reversion
    n_settlements: int = field(metadata={"static": True})
    steps_per_settlement: int = field(metadata={"static": True})


def funding(
    n_assets: int,
    *,
    mean: process.Entries = 0.7e-4,
    deviation: process.Entries = 4e-4,
    half_life_hours: process.Entries = 48.0,
    return_response: process.Entries = 0.0,
    initial: process.Entries | None = None,
    interest: process.Entries = 1e-4,
    clamp: process.Entries = 5e-4,
    cap: process.Entries = 3e-3,
    settlement_hours: float = 8.0,
    longest_step_hours: float = 24.0,
    smoothed_width: float = 0.0,
    name: str = "funding",
    dtype: Any = jnp.float32,
) -> Funding:
    """Funding of plain numbers (see `Funding`; rates are fractions per 8 hours, tables as in `process`).

    `initial` is the mean of regime 0 when omitted.

    Raises:
      InputError: an entry out of bounds, a wrong shape, or tables that disagree on the number of regimes.
    """
    n = process.check_count("n_assets", n_assets)
    means = process.table("mean", mean, n)
    deviations = process.table("deviation", deviation, n, at_least=0.0)
    process.check_regimes(mean=means, deviation=deviations)
    leaves = {
        "mean": means,
        "deviation": deviations,
        "half_life_hours": process.vector("half_life_hours", half_life_hours, n, above=0.0),
        "return_response": process.vector("return_response", return_response, n),
        "initial": means[0] if initial is None else process.vector("initial", initial, n),
        "interest": process.vector("interest", interest, n),
        "clamp": process.vector("clamp", clamp, n, at_least=0.0),
        "cap": process.vector("cap", cap, n, above=0.0),
    }
    if np.any(np.abs(leaves["interest"]) > leaves["cap"]):
        raise InputError(f"interest is {interest} and cap {cap}; the cap must be at least the interest.")
    return Funding(
        **{key: rounded(value, dtype) for key, value in leaves.items()},
        settlement_hours=process.number("settlement_hours", settlement_hours, above=0.0),
        longest_step_hours=process.number("longest_step_hours", longest_step_hours, above=0.0),
        smoothed_width=process.number("smoothed_width", smoothed_width, at_least=0.0),
        name=name,
    )


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> Funding:
    """BTC-like funding in every regime; standard deviation up to three times as large in the last one."""
    stress = np.linspace(0.0, 1.0, n_regimes)
    return funding(
        n_assets, mean=0.7e-4 - 5e-4 * stress, deviation=4e-4 * (1.0 + 2.0 * stress), return_response=5e-3, dtype=dtype
    )
