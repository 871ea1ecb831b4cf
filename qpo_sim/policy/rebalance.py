"""Rebalancing of outright holdings: by the calendar, back to target out of a band, or only back to its edge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.numerics import rounded
from qpo_sim.policy import clock
from qpo_sim.policy.orders import DeskView, Orders
from qpo_sim.types import Array, Context

BUILDERS = ("rebalance",)

RULES = ("calendar", "band", "edge")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rebalance:
    r"""Trades spot towards weights of the value of cash and spot.

    With the deviation d of a weight from its target and the half-width h: "calendar" trades every d to 0 at its dates;
    "band" does where some |d| exceeds h; "edge" trades each d to $\mathrm{sign}(d)\min(|d|, h)$, the optimal rule for
    proportional costs. Costs are paid out of cash: with weights of together 1 purchases fall short by them.

    Attributes:
      weights: by outright holding.
      half_width: h, by outright holding.
      every_hours: time between dates on which it acts; 0 for every step (static).
      rule: see above (static).

    Pathwise gradient: weights; half_width under "edge".
    """

    weights: Float[Array, " holdings"]
    half_width: Float[Array, " holdings"]
    every_hours: float = field(metadata={"static": True})
    rule: str = field(metadata={"static": True})

    def init(self, view: DeskView) -> tuple[()]:
        """No state."""
        return ()

    def step(self, context: Context, t: Array, state: tuple[()], view: DeskView) -> tuple[tuple[()], Orders]:
        """Orders after step t."""
        total = jnp.maximum(sum(view.spot, view.cash), 1e-9)
        deviation = [value / total - self.weights[k] for k, value in enumerate(view.spot)]
        acts = clock.is_due(context, t, self.every_hours)
        if self.rule == "band":
            outside = [jnp.abs(d) > self.half_width[k] for k, d in enumerate(deviation)]
            acts = acts * sum(outside, jnp.zeros_like(total)).astype(bool)
        kept = [0.0 * total] * len(deviation)
        if self.rule == "edge":
            kept = [jnp.clip(d, -self.half_width[k], self.half_width[k]) for k, d in enumerate(deviation)]
        return (), Orders(spot=tuple(acts * total * (k - d) for k, d in zip(kept, deviation, strict=True)))


def rebalance(
    *,
    weights: Mapping[str, float],
    rule: str = "edge",
    half_width: float | Mapping[str, float] = 0.05,
    every_hours: float = 0.0,
    spot: Sequence[str],
    dtype: Any = jnp.float32,
) -> Rebalance:
    """Rebalancing of the outright holdings.

    Args:
      weights: target by asset, of cash and spot; the rest is cash. An asset that is left out is sold.
      rule: "calendar", "band" or "edge".
      half_width: of the band around each weight, one number or by asset.
      every_hours: time between dates on which it acts; 0 for every step.
      spot: assets held outright.
      dtype: precision of the paths.

    Raises:
      InputError: an asset that is not held, a negative weight, weights above 1, an unknown rule, a negative band.
    """
    if rule not in RULES:
        raise InputError(f"rebalance: rule is {rule!r}; it must be one of {', '.join(RULES)}.")
    width = half_width if isinstance(half_width, Mapping) else dict.fromkeys(spot, float(half_width))
    for key, named in (("weights", weights), ("half_width", width)):
        for asset in named:
            if asset not in spot:
                raise InputError(
                    f"rebalance: {key} names {asset}, which is not held as spot: {did_you_mean(asset, spot)}"
                )
    for asset, weight in weights.items():
        if not 0.0 <= weight <= 1.0:
            raise InputError(f"rebalance: weights.{asset} is {weight}; it must lie in [0, 1].")
    if sum(weights.values()) > 1.0 + 1e-9:
        raise InputError(f"rebalance: the weights sum to {sum(weights.values()):.6g}; at most 1 can be spent.")
    values = np.array([float(width.get(asset, 0.0)) for asset in spot])
    if not (np.all(values >= 0.0) and np.isfinite(values).all()):
        raise InputError(f"rebalance: half_width is {half_width}; it must not be negative.")
    clock.check("rebalance", every_hours)
    return Rebalance(
        rounded([weights.get(asset, 0.0) for asset in spot], dtype), rounded(values, dtype), float(every_hours), rule
    )
