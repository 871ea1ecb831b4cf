r"""Depth of order books as a multiple of normal: falls with the regime, with moves and with jumps, and recovers.

Impact laws take it as a factor of volume: $I = Y\sigma_D\sqrt{Q/(V\,\mathrm{depth})}$, and spreads grow at least with
depth^(-1/2). Figures: one book fell from 89 to 2 million USD within minutes on 2025-10-10 (press); depth 1 in calm, 0.3
in turbulent and 0.01 to 0.05 in crash regimes (inferred).
"""

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Depth:
    r"""Order-book depth of each asset, output `depth` > 0 at the end of a step (1 is normal).

    Log depth reverts to the regime's level and follows returns (see `process`). Each step takes off
    $b r^2/(1 + b r^2/\ell)$ for its log-return r, a response to |r| whose mean does not depend on the step (r^2 of a
    diffusion is its variance, |r| is not), and j |J| for its log-jump J. Exact at any step but for the spread of $r^2$.

    Attributes:
      level: log of the multiple reverted to, per regime.
      deviation: stationary standard deviation of the log, of what does not follow returns.
      half_life_hours: of a deviation: how fast depth recovers.
      return_response: log depth per unit of log-return (positive: falls with the price).
      move_response: b.
      move_limit: l, what one step's move takes off at most.
      jump_response: j.
      initial: log depth before the first step.
      name: of the component, see `view.named` (static).

    Pathwise gradient: all parameters.
    """

    level: Float[Array, "regimes assets"]
    deviation: Float[Array, "regimes assets"]
    half_life_hours: Float[Array, " assets"]
    return_response: Float[Array, " assets"]
    move_response: Float[Array, " assets"]
    move_limit: Float[Array, " assets"]
    jump_response: Float[Array, " assets"]
    initial: Float[Array, " assets"]
    name: str = field(default="depth", metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.initial.shape[0]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return (self.n_assets + 1) // 2

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step."""
        return Prepared(self, process.reversion(self.half_life_hours, step_hours))

    def init(self, prepared: "Prepared", one: Array, address: Address) -> Rows:
        """Log depth before the first step."""
        return process.constant_rows(prepared.parameters.initial, one)

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Rows]:
        """Depth before the first step."""
        return {"depth": each_asset(jnp.exp, process.constant_rows(prepared.parameters.initial, one))}

    def step(
        self, prepared: "Prepared", t: Array, state: Rows, view: View, address: Address
    ) -> tuple[Rows, dict[str, Rows]]:
        """Depth after one step."""
        process.check_width("depth", self.n_assets, view.log_return)
        p, gain = prepared.parameters, prepared.transition.gain
        log_depth = process.revert(
            state,
            process.by_regime(view, p.level, state),
            process.by_regime(view, p.deviation, state),
            p.return_response,
            view.log_return,
            view.volatility,
            process.container(process.normals(address, self.n_assets, p.level.dtype)),
            prepared.transition,
        )

        def after_move(x, r, response, limit, gain):
            size = response * r * r
            return x - gain * size / (1.0 + size / limit)

        log_depth = each_asset(after_move, log_depth, view.log_return, p.move_response, p.move_limit, gain)
        if view.jump is not None:
            log_depth = each_asset(
                lambda x, j, b, g: x - b * g * jnp.abs(j), log_depth, view.jump, p.jump_response, gain
            )
        return log_depth, {"depth": each_asset(jnp.exp, log_depth)}


class Prepared(NamedTuple):
    """Constants of a step."""

    parameters: Depth
    transition: process.Reversion


def depth(
    n_assets: int,
    *,
    level: process.Entries = 1.0,
    deviation: process.Entries = 0.3,
    half_life_hours: process.Entries = 6.0,
    return_response: process.Entries = 0.0,
    move_response: process.Entries = 50.0,
    move_limit: process.Entries = 4.0,
    jump_response: process.Entries = 5.0,
    initial: process.Entries | None = None,
    name: str = "depth",
    dtype: Any = jnp.float32,
) -> Depth:
    """Depth of plain numbers (see `Depth`; tables as in `process`).

    `level` and `initial` are multiples of normal depth, above 0; `initial` is the level of regime 0 when omitted.

    Raises:
      InputError: an entry out of bounds, a wrong shape, or tables that disagree on the number of regimes.
    """
    n = process.check_count("n_assets", n_assets)
    levels = process.table("level", level, n, above=0.0)
    deviations = process.table("deviation", deviation, n, at_least=0.0)
    process.check_regimes(level=levels, deviation=deviations)
    start = levels[0] if initial is None else process.vector("initial", initial, n, above=0.0)
    leaves = {
        "level": np.log(levels),
        "deviation": deviations,
        "half_life_hours": process.vector("half_life_hours", half_life_hours, n, above=0.0),
        "return_response": process.vector("return_response", return_response, n),
        "move_response": process.vector("move_response", move_response, n, at_least=0.0),
        "move_limit": process.vector("move_limit", move_limit, n, above=0.0),
        "jump_response": process.vector("jump_response", jump_response, n, at_least=0.0),
        "initial": np.log(start),
    }
    return Depth(**{key: rounded(value, dtype) for key, value in leaves.items()}, name=name)


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> Depth:
    """Normal depth in the first regime, 3 % of it in the last one."""
    return depth(n_assets, level=np.geomspace(1.0, 0.03, n_regimes) if n_regimes > 1 else 1.0, dtype=dtype)
