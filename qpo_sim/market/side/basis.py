r"""Prices of a venue over the index: the last price follows a mean-reverting basis, the mark price its moving average.

last = index (1 + b), mark = index (1 + e) with $de = (b - e)\,dt/\tau$. Venues average over 30 s (Deribit) to 150 s
(Hyperliquid; both from memory), so at hourly steps e is b but for noise. On 2025-10-10 venues that priced USDe, wBETH
and bnSOL from their own book liquidated at 0.65 while others printed about 1 (press).
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

_SECONDS_PER_HOUR = 3600.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Basis:
    r"""Mark and last price of each asset over its index.

    The pair (b, e) is drawn from its exact joint law given returns. b reverts to $m_k + w\,P$ (P the output of the
    component that `follows` names, such as the funding premium) and follows returns (see `process`); a jump J adds j J
    on top, at an unknown time of the step. Outputs of a step, at its end: `mark_ratio` and `last_ratio`, price over
    index, with deviations bounded smoothly, $1 + B\tanh(e/B)$.

    Attributes:
      mean: m_k.
      deviation: stationary standard deviation of b, of what does not follow returns.
      half_life_hours: of b.
      return_response: b per unit of log-return.
      jump_response: j, per unit of log-jump (positive: the venue overshoots).
      follow_weight: w.
      averaging_hours: tau.
      band: B.
      initial: b and e before the first step.
      follows: name of an output of a component before this one, rows by asset; None for none (static).
      name: of the component, see `view.named` (static).

    Pathwise gradient: all parameters.
    """

    mean: Float[Array, "regimes assets"]
    deviation: Float[Array, "regimes assets"]
    half_life_hours: Float[Array, " assets"]
    return_response: Float[Array, " assets"]
    jump_response: Float[Array, " assets"]
    follow_weight: Float[Array, " assets"]
    averaging_hours: Float[Array, " assets"]
    band: Float[Array, " assets"]
    initial: Float[Array, " assets"]
    follows: str | None = field(default=None, metadata={"static": True})
    name: str = field(default="basis", metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.initial.shape[0]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: two normals for each asset."""
        return self.n_assets

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step."""
        h, kappa, gamma = step_hours, float(np.log(2.0)) / self.half_life_hours, 1.0 / self.averaging_hours
        transition = process.reversion(self.half_life_hours, h)
        keep = jnp.exp(-gamma * h)
        # The kernel of e is pull * (exp(-kappa s) - exp(-gamma s)); its products with the kernel exp(-kappa s) of b and
        # with itself, integrated over the step and divided by h.
        pull = gamma / (gamma - kappa)
        slow = process.averaged_decay(2.0 * kappa * h)
        cross = process.averaged_decay((kappa + gamma) * h)
        fast = process.averaged_decay(2.0 * gamma * h)
        gain = pull * (transition.gain - process.averaged_decay(gamma * h))
        joint = pull * (slow - cross)
        own = pull * pull * (slow - 2.0 * cross + fast)
        return Prepared(
            parameters=self,
            transition=transition,
            keep=keep,
            carry=pull * (transition.decay - keep),
            gain=gain,
            own_scale=2.0 * kappa * h,
            joint=joint,
            own=own,
        )

    def init(self, prepared: "Prepared", one: Array, address: Address) -> "State":
        """Basis before the first step, the average equal to it."""
        rows = process.constant_rows(prepared.parameters.initial, one)
        return State(rows, rows)

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Rows]:
        """Ratios before the first step."""
        rows = process.constant_rows(prepared.parameters.initial, one)
        ratio = each_asset(_ratio, rows, prepared.parameters.band)
        return {"mark_ratio": ratio, "last_ratio": ratio}

    def step(
        self, prepared: "Prepared", t: Array, state: "State", view: View, address: Address
    ) -> tuple["State", dict[str, Rows]]:
        """Ratios after one step.

        Raises:
          InputError: no component before this one gives the output that it follows.
        """
        process.check_width("basis", self.n_assets, view.log_return)
        p, n = prepared.parameters, self.n_assets
        mean = process.by_regime(view, p.mean, state.basis)
        if self.follows is not None:
            if self.follows not in view.side:
                raise InputError(
                    f"basis follows {self.follows!r}, which no side process before it gives; there are "
                    f"{', '.join(view.side) or 'none'}: put the one that does before it."
                )
            mean = each_asset(lambda m, x, w: m + w * x, mean, view.side[self.follows], p.follow_weight)
        deviation = process.by_regime(view, p.deviation, state.basis)
        z = process.normals(address, 2 * n, p.mean.dtype)
        jump = each_asset(jnp.zeros_like, state.basis) if view.jump is None else view.jump

        def one(b, e, m, s, r, v, jump, z0, z1, *constants):
            c = Constants(*constants)
            push = c.response * r + c.jump_response * jump
            own, part = s * s * c.own_scale, (c.response * v) ** 2
            basis = m + c.decay * (b - m) + c.gain * push
            average = m + c.keep * (e - m) + c.carry * (b - m) + c.average_gain * push
            # Cholesky factor of the covariance of (b, e) given the return.
            variance = s * s * c.noise * c.noise + part * c.timing
            root = safe_sqrt(variance)
            covariance = own * c.joint + part * (c.joint - c.gain * c.average_gain)
            slope = covariance / jnp.maximum(root, 1e-15)
            rest = own * c.own + part * (c.own - c.average_gain * c.average_gain) - slope * slope
            return basis + root * z0, average + slope * z0 + safe_sqrt(rest) * z1

        constants = (
            *prepared.transition,
            prepared.keep,
            prepared.carry,
            prepared.gain,
            prepared.own_scale,
            prepared.joint,
            prepared.own,
            p.return_response,
            p.jump_response,
        )
        basis, average = each_asset(
            one,
            state.basis,
            state.average,
            mean,
            deviation,
            view.log_return,
            view.volatility,
            jump,
            process.container(z[:n]),
            process.container(z[n:]),
            *constants,
        )
        basis, average = rows_like(state.basis, list(basis)), rows_like(state.basis, list(average))

        return State(basis, average), {
            "mark_ratio": each_asset(_ratio, average, p.band),
            "last_ratio": each_asset(_ratio, basis, p.band),
        }


def _ratio(x: Array, band: Array) -> Array:
    return 1.0 + band * jnp.tanh(x / band)


class State(NamedTuple):
    """b and e."""

    basis: Rows
    average: Rows


class Prepared(NamedTuple):
    """Constants of a step: `keep` and `carry` take e and b to e; `gain`, `joint`, `own` are integrals of its kernel."""

    parameters: Basis
    transition: process.Reversion
    keep: Array
    carry: Array
    gain: Array
    own_scale: Array
    joint: Array
    own: Array


class Constants(NamedTuple):
    """Constants of one asset's step, in the order in which they are passed row by row."""

    decay: Array
    noise: Array
    gain: Array
    timing: Array
    keep: Array
    carry: Array
    average_gain: Array
    own_scale: Array
    joint: Array
    own: Array
    response: Array
    jump_response: Array


def basis(
    n_assets: int,
    *,
    mean: process.Entries = 0.0,
    deviation: process.Entries = 5e-4,
    half_life_hours: process.Entries = 2.0,
    return_response: process.Entries = 0.0,
    jump_response: process.Entries = 0.0,
    follows: str | None = None,
    follow_weight: process.Entries = 1.0,
    averaging_seconds: process.Entries = 30.0,
    band: process.Entries = 0.5,
    initial: process.Entries | None = None,
    name: str = "basis",
    dtype: Any = jnp.float32,
) -> Basis:
    """Basis of plain numbers, fractions of the index (see `Basis`; tables as in `process`).

    The half-life must be at least four times the averaging time; `initial` is the mean of regime 0 when omitted.

    Raises:
      InputError: an entry out of bounds, a wrong shape, or a basis that the average would not follow.
    """
    n = process.check_count("n_assets", n_assets)
    means = process.table("mean", mean, n)
    deviations = process.table("deviation", deviation, n, at_least=0.0)
    process.check_regimes(mean=means, deviation=deviations)
    half_life = process.vector("half_life_hours", half_life_hours, n, above=0.0)
    averaging = process.vector("averaging_seconds", averaging_seconds, n, above=0.0) / _SECONDS_PER_HOUR
    if np.any(half_life < 4.0 * averaging):
        raise InputError(
            f"half_life_hours is {half_life.tolist()} and averaging_seconds {np.asarray(averaging_seconds).tolist()}; "
            "the basis must live at least four times as long as the average looks back."
        )
    leaves = {
        "mean": means,
        "deviation": deviations,
        "half_life_hours": half_life,
        "return_response": process.vector("return_response", return_response, n),
        "jump_response": process.vector("jump_response", jump_response, n),
        "follow_weight": process.vector("follow_weight", follow_weight, n),
        "averaging_hours": averaging,
        "band": process.vector("band", band, n, above=0.0, below=1.0),
        "initial": means[0] if initial is None else process.vector("initial", initial, n),
    }
    return Basis(**{key: rounded(value, dtype) for key, value in leaves.items()}, follows=follows, name=name)


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> Basis:
    """A liquid perpetual: basis of a few bp that overshoots with returns, wider in the last regime."""
    return basis(
        n_assets,
        deviation=np.geomspace(5e-4, 5e-3, n_regimes) if n_regimes > 1 else 5e-4,
        return_response=0.01,
        jump_response=0.05,
        dtype=dtype,
    )
