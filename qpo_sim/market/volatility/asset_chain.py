"""A Markov chain of its own for every asset that scales its volatility, independent of all else."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market import regime
from qpo_sim.market.regime import check_law, check_transition, stationary_law
from qpo_sim.market.volatility.garch import finite, first_rows, refuse, rounded
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import MAX_UNROLLED_ASSETS, Pair, Rows, each_asset, materialised, select
from qpo_sim.random import Address
from qpo_sim.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """Cut points of the law of the next state given the present one, factors, and the first law without state 0."""

    cuts: Float[Array, "states states-1 assets"]
    scale: Float[Array, "states assets"]
    initial: Float[Array, "states-1 assets"]
    sub_steps: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AssetChain:
    r"""Each asset's own K-state Markov chain $A_{i,t}$ scales its volatility: factor $f_i(A_{i,t})$.

    The chain moves before each base step by one uniform per asset and is held within it, so the law of a base step does
    not depend on the number of sub-steps. The factor multiplies the market's own volatility of the regime.

    Attributes:
      scale: factor of each asset in each state.
      transition: per asset, rows sum to one.
      initial: law of the state just before the first step.

    Pathwise gradient: scale. None: transition, initial (discrete draws).
    """

    scale: Float[Array, "assets states"]
    transition: Float[Array, "assets states states"]
    initial: Float[Array, "assets states"]

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.scale.shape[0]

    @property
    def n_states(self) -> int:
        """Number of states of each chain."""
        return self.scale.shape[1]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: a word for each asset."""
        return (self.n_assets + 1) // 2

    @property
    def needs_base_step(self) -> bool:
        """The chain is held within a base step, so it may be cut."""
        return False

    def stationary_variance(self) -> Float[np.ndarray, " assets"]:
        """Mean square of the factor under the stationary law of each chain."""
        scale, transition = (np.asarray(leaf, np.float64) for leaf in (self.scale, self.transition))
        return np.einsum("ik,ik->i", stationary_law(transition), scale**2)

    def prepare(self, *, sub_steps: int, step_hours: float) -> Prepared:
        """Cut points of the transition law, states first and assets last."""
        return Prepared(
            cuts=jnp.moveaxis(regime.thresholds(self.transition), 0, -1),
            scale=self.scale.T,
            initial=self.initial[:, 1:].T,
            sub_steps=sub_steps,
        )

    def init(self, prepared: Prepared, one: Array, n_assets: int, n_steps: int, address: Any) -> tuple[Rows, ...]:
        """Masks of the state before the first step; in place of a draw, their probabilities.

        The cut points of a mixture of states are the mixture of their cut points, and `select` is linear: the first
        move out of these fractional masks has exactly the law initial times transition, without a draw of its own.
        """
        return tuple(first_rows(prepared.initial[k], one, n_assets) for k in range(self.n_states - 1))

    def open(
        self, prepared: Prepared, t: Array, state: tuple[Rows, ...], masks: Any, address: Address
    ) -> tuple[tuple[Rows, ...], Local]:
        """Moves the chains where a base step opens, and gives the factor of their states."""
        n_masks = self.n_states - 1
        scales = [prepared.scale[k] for k in range(self.n_states)]

        def move(u, *columns):
            own, cuts = columns[:n_masks], columns[n_masks:]
            entries = [[cuts[j * n_masks + k] for j in range(self.n_states)] for k in range(n_masks)]
            return regime.masks_from_uniform(u, [select(own, entry) for entry in entries])

        # One address per base step, whatever the number of sub-steps.
        at = replace(address, step=address.step - t + t // prepared.sub_steps)
        cuts = [prepared.cuts[j, k] for j in range(self.n_states) for k in range(n_masks)]
        moved = each_asset(move, self._uniforms(at, prepared.scale.dtype), *state, *cuts)
        if prepared.sub_steps > 1:
            opens = t % prepared.sub_steps == 0
            moved = jax.tree.map(lambda new, old: jnp.where(opens, new, old), moved, state)
        factor = each_asset(lambda *c: select(c[:n_masks], c[n_masks:]), *moved, *scales)
        return moved, Local(factor)

    def close(
        self, prepared: Prepared, t: Array, state: tuple[Rows, ...], masks: Any, local: Local, shocks: Rows
    ) -> tuple[Rows, ...]:
        """The state as it is: shocks do not move it."""
        return state

    def _uniforms(self, address: Address, dtype: Any) -> Rows:
        n = self.n_assets

        def draw(address):
            rows = address.uniforms(n + n % 2)
            return tuple(Pair(rows[k].astype(dtype), rows[k + 1].astype(dtype)) for k in range(0, len(rows), 2))

        # Both words of a slot come out of one cipher, and each uniform has several readers.
        pairs = materialised(draw)(address)
        rows = [row for pair in pairs for row in pair][:n]
        return tuple(rows) if n <= MAX_UNROLLED_ASSETS else jnp.stack(rows)


def asset_chain(
    scale: Any,
    transition: Any,
    *,
    initial: Any = None,
    normalised: bool = False,
    n_assets: int | None = None,
    dtype: Any = jnp.float32,
) -> AssetChain:
    """Chains of their own for all assets; probabilities per base step.

    Args:
      scale: factor of each state, (states,) for all assets or (assets, states), positive.
      transition: (states, states) for all assets or (assets, states, states), rows sum to 1.
      initial: law of the state just before the first step, (states,) or (assets, states); stationary if omitted.
      normalised: divide the scales by the root of their stationary mean square, so that the market's volatility stays
        the standard deviation over all states.
      n_assets: number of assets, when it cannot be read off the numbers.
      dtype: precision of the paths.

    Raises:
      InputError: a scale that is not positive, probabilities out of range or not summing to 1, or shapes that differ.
    """
    matrix = check_transition("asset_chain.transition", transition)
    k = matrix.shape[-1]
    if k < 2:
        raise InputError("asset_chain.transition has 1 state; a chain needs at least 2, or leave it out.")
    factor = finite("asset_chain.scale", scale)
    refuse("asset_chain.scale", factor, factor <= 0.0, "it must be positive, e.g. 1 for no change")
    parts = {"transition": (matrix, 2), "scale": (factor, 1)}
    if initial is not None:
        parts["initial"] = (check_law("asset_chain.initial", finite("asset_chain.initial", initial)), 1)
    n = n_assets or max(len(part) if part.ndim > rank else 1 for part, rank in parts.values())
    for name, (part, rank) in parts.items():
        if part.ndim not in (rank, rank + 1) or part.shape[-1] != k or (part.ndim > rank and len(part) not in (1, n)):
            one = ", ".join([str(k)] * rank)
            raise InputError(
                f"asset_chain.{name} has the shape {part.shape}; with {k} states and {n} assets it must be ({one}) for "
                f"all assets or ({n}, {one})."
            )
    matrix = np.broadcast_to(matrix, (n, k, k))
    law = stationary_law(matrix) if initial is None or normalised else None
    start = law if initial is None else np.broadcast_to(parts["initial"][0], (n, k))
    factor = np.broadcast_to(factor, (n, k))
    if normalised:
        factor = factor / np.sqrt(np.sum(law * factor**2, axis=1, keepdims=True))
    return AssetChain(scale=rounded(factor, dtype), transition=rounded(matrix, dtype), initial=rounded(start, dtype))


def example(n_assets: int, dtype: Any) -> AssetChain:
    """Bursts of twice the volatility that last ten days, once in two months for every asset."""
    return asset_chain([0.8, 1.7], [[0.98, 0.02], [0.1, 0.9]], normalised=True, n_assets=n_assets, dtype=dtype)
