r"""Price feeds: what a contract believes the price to be, with deviation threshold, heartbeat, latency and outages.

A push feed updates when |p / last - 1| >= delta or its last update is a heartbeat old. ETH/USD on Ethereum 0.5 % and
3600 s (published feed parameters); LINK and stETH 1 % and 1 h, USDC 0.25 % and 23 to 24 h, feeds on rollups 0.05 to 0.1
% and 24 h (from memory); API3 0.25 to 1 % and 24 h. Latency is 1 to 3 blocks; congestion on 2020-03-12 made it hours,
here an outage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.side import process
from qpo_sim.market.side.view import View
from qpo_sim.numerics import Rows, each_asset, rounded, rows_like
from qpo_sim.random import Address, uniform
from qpo_sim.types import Array

MONITORINGS = ("step", "continuous")
_MOST_DELAYED_STEPS = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oracle:
    r"""Reported log-price of chosen assets, output `oracle_log_price` at the end of a step, on the scale of log_price.

    The rule is applied at the end of every step to the price that the feed sees then. The feeds of a component share
    the outage: a two-state chain in continuous time, starting at the regime's intensity and ending at a rate of one per
    mean duration, exact at any step; while it lasts nothing is reported.

    **Latency.** A latency of L = (m + f) steps, m whole, shows the price at a time between the ends of the steps m and
    m + 1 before. It is taken as $(1 - w)p_{-m} + w p_{-m-1}$ in logs with a random w, uniform on $f \pm \min(f, 1 -
    f)$, the same for all feeds: mean latency L, and never a price beyond those two. Between the ends the true price is
    a bridge whose standard deviation, up to half of the step's, this leaves out.

    **Long steps.** A feed that is watched within the step has updated many times when the step's move is large against
    delta, so its error is not 0 but that of a diffusion restarted at 0 whenever it reaches delta: symmetric triangular
    on (-delta, delta). With monitoring "continuous" an update by deviation takes such an error; with "step" it takes
    none.

    Attributes:
      threshold: delta.
      heartbeat_hours: age at which a feed updates whatever the price.
      outage_per_day: intensity at which outages start, per regime.
      outage_hours: mean duration.
      latency_hours: L (static).
      drivers: number of the asset of each feed (static).
      monitoring: "step" or "continuous" (static).
      name: of the component, see `view.named` (static).

    Pathwise gradient: prices, through the last update; threshold only in the error of continuous monitoring. None:
    heartbeat_hours, outage_per_day and outage_hours, which decide whether there is an update.
    """

    threshold: Float[Array, " feeds"]
    heartbeat_hours: Float[Array, " feeds"]
    outage_per_day: Float[Array, "regimes 1"]
    outage_hours: Float[Array, " 1"]
    latency_hours: float = field(default=0.0, metadata={"static": True})
    drivers: tuple[int, ...] = field(default=(0,), metadata={"static": True})
    monitoring: str = field(default="step", metadata={"static": True})
    name: str = field(default="oracle", metadata={"static": True})

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: one for outage and latency, one per feed for its error."""
        return 1 + (len(self.drivers) if self.monitoring == "continuous" else 0)

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step.

        Raises:
          InputError: a latency of more steps than are remembered.
        """
        lag = self.latency_hours / step_hours
        whole = int(np.floor(lag + 1e-9))
        if whole > _MOST_DELAYED_STEPS:
            raise InputError(
                f"latency_hours is {self.latency_hours:g}, which is {whole} steps of {step_hours:g} hours; at most "
                f"{_MOST_DELAYED_STEPS} are remembered: use longer steps or an outage."
            )
        end = step_hours / self.outage_hours
        start = self.outage_per_day * (step_hours / process.HOURS_PER_DAY)
        share, mixing = start / (start + end), -jnp.expm1(-(start + end))
        return Prepared(
            parameters=self,
            begins=share * mixing,
            lasts=1.0 - (1.0 - share) * mixing,
            whole_steps=whole,
            fraction=max(0.0, lag - whole) if lag - whole > 1e-9 else 0.0,
            step_hours=step_hours,
        )

    def init(self, prepared: "Prepared", one: Array, address: Address) -> "State":
        """Feeds that have just updated, without outage; the price has not moved before."""
        zeros = process.constant_rows(jnp.zeros_like(prepared.parameters.threshold), one)
        n_past = prepared.whole_steps + (1 if prepared.fraction > 0.0 else 0)
        return State(zeros, zeros, jnp.zeros_like(one), (zeros,) * n_past)

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Rows]:
        """Reports before the first step: the price."""
        return {"oracle_log_price": process.constant_rows(jnp.zeros_like(prepared.parameters.threshold), one)}

    def step(
        self, prepared: "Prepared", t: Array, state: "State", view: View, address: Address
    ) -> tuple["State", dict[str, Rows]]:
        """Reports after one step."""
        p, n = prepared.parameters, len(self.drivers)
        dtype = p.threshold.dtype
        chance_word, delay_word = address.words(2)
        price = process.pick(view.log_price, self.drivers)
        prices = (price, *state.past)
        seen = prices[prepared.whole_steps]
        if prepared.fraction > 0.0:
            spread = min(prepared.fraction, 1.0 - prepared.fraction)
            w = prepared.fraction + spread * (2.0 * uniform(delay_word).astype(dtype) - 1.0)
            seen = each_asset(lambda late, later: late + w * (later - late), seen, prices[prepared.whole_steps + 1])

        zero = (jnp.zeros_like(state.outage),)
        begins = process.by_regime(view, prepared.begins, zero)[0]
        lasts = process.by_regime(view, prepared.lasts, zero)[0]
        chance = begins + state.outage * (lasts - begins)
        outage = lax.stop_gradient((process.fine_uniform(chance_word).astype(dtype) < chance).astype(dtype))

        errors = each_asset(jnp.zeros_like, state.age)
        if self.monitoring == "continuous":
            u = [uniform(word).astype(dtype) for word in address.after(1).words(2 * n)]
            errors = process.container([p.threshold[i] * (u[2 * i] + u[2 * i + 1] - 1.0) for i in range(n)])

        def report(reported, age, seen, error, threshold, heartbeat):
            age = age + prepared.step_hours
            moved = jnp.abs(jnp.expm1(seen - reported)) >= threshold
            working = outage < 0.5
            updates = working & (moved | (age >= heartbeat * (1.0 - 1e-5)))
            fresh = jnp.where(moved, seen - jnp.log1p(error), seen)
            return jnp.where(updates, fresh, reported), jnp.where(updates, 0.0, age)

        reported, age = each_asset(report, state.reported, state.age, seen, errors, p.threshold, p.heartbeat_hours)
        reported, age = rows_like(price, list(reported)), rows_like(price, list(age))
        return State(reported, age, outage, prices[: len(state.past)]), {"oracle_log_price": reported}


class State(NamedTuple):
    """Report and its age in hours by feed, whether there is an outage, and prices of the steps before, latest first."""

    reported: Rows
    age: Rows
    outage: Array
    past: tuple[Rows, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """Constants of a step: probabilities that an outage begins and lasts, and the latency in steps."""

    parameters: Oracle
    begins: Float[Array, "regimes 1"]
    lasts: Float[Array, "regimes 1"]
    whole_steps: int = field(metadata={"static": True})
    fraction: float = field(metadata={"static": True})
    step_hours: float = field(metadata={"static": True})


def oracle(
    drivers: process.Drivers,
    *,
    threshold: process.Entries = 0.005,
    heartbeat_hours: process.Entries = 1.0,
    latency_hours: float = 0.0,
    outage_per_day: process.Entries = 0.0,
    outage_hours: float = 1.0,
    monitoring: str = "step",
    assets: Sequence[str] = (),
    name: str = "oracle",
    dtype: Any = jnp.float32,
) -> Oracle:
    """Price feeds of plain numbers (see `Oracle`; `outage_per_day` is a number or one per regime).

    Args:
      drivers: asset of each feed, by number or name; a single one makes one feed.
      threshold: relative deviation that makes a feed update, in (0, 1).
      heartbeat_hours: age that makes it update.
      latency_hours: time between a price and its report.
      outage_per_day: starts of outages per day.
      outage_hours: mean duration.
      monitoring: "step" or "continuous".
      assets: names of the market's assets, where drivers are named.
      name: of the component, see `view.named`.
      dtype: precision of the paths.

    Raises:
      InputError: an entry out of bounds, a wrong shape, or an unknown monitoring.
    """
    followed = process.check_drivers("drivers", drivers, assets)
    n = len(followed)
    if monitoring not in MONITORINGS:
        raise InputError(f"monitoring is {monitoring!r}; it must be one of {', '.join(MONITORINGS)}.")
    leaves = {
        "threshold": process.vector("threshold", threshold, n, above=0.0, below=1.0),
        "heartbeat_hours": process.vector("heartbeat_hours", heartbeat_hours, n, above=0.0),
        "outage_per_day": process.table("outage_per_day", outage_per_day, 1, at_least=0.0),
        "outage_hours": process.vector("outage_hours", outage_hours, 1, above=0.0),
    }
    return Oracle(
        **{key: rounded(value, dtype) for key, value in leaves.items()},
        latency_hours=process.number("latency_hours", latency_hours, at_least=0.0),
        drivers=followed,
        monitoring=monitoring,
        name=name,
    )


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> Oracle:
    """A feed of 0.5 % and one hour for every asset, a minute late; outages come with the last regime."""
    return oracle(
        range(n_assets),
        latency_hours=1.0 / 60.0,
        outage_per_day=np.linspace(0.0, 0.5, n_regimes),
        outage_hours=2.0,
        dtype=dtype,
    )
