r"""Regimes: one uniform per step moves a one-hot state along the rows of a transition matrix.

Durations other than geometric come from several states that make one regime (`semi_markov`); transition probabilities
that depend on the path come from `Drivers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.numerics import Rows, select
from qpo_sim.types import Array

# What may drive transition probabilities; any output of a side process may too, by its name.
DRIVERS = ("volatility", "drawdown", "return")


def thresholds(probability: Float[Array, "... regimes"]) -> Float[Array, "... regimes-1"]:
    """Cumulative probabilities without the last (1): the cut points at which a uniform changes its regime."""
    return jnp.cumsum(probability, axis=-1)[..., :-1]


def masks_from_uniform(u: Float[Array, " paths"], cuts: Sequence[Array]) -> tuple[Array, ...]:
    """One-hot masks (floating, without regime 0) of the interval between the cut points in which u falls."""
    above = [(u > cut).astype(u.dtype) for cut in cuts]
    return tuple(a - b for a, b in zip(above, [*above[1:], jnp.zeros_like(u)], strict=True)) if above else ()


def next_masks(u: Float[Array, " paths"], masks: Sequence[Array], cuts: Float[Array, "regimes regimes-1"]):
    """Masks of the next regime given the masks of the present one.

    Pathwise gradient: none in the transition probabilities (the draw is discrete).
    """
    return masks_from_uniform(u, [select(masks, cuts[:, k]) for k in range(cuts.shape[1])])


def stationary(transition: Float[Array, "regimes regimes"]) -> Float[Array, " regimes"]:
    r"""Stationary law: the solution of $\pi' P = \pi'$, $\pi' 1 = 1$."""
    n = transition.shape[0]
    system = jnp.concatenate(
        [(jnp.eye(n, dtype=transition.dtype) - transition).T[:-1], jnp.ones((1, n), transition.dtype)]
    )
    return jnp.linalg.solve(system, jnp.zeros(n, transition.dtype).at[-1].set(1.0))


def semi_markov(
    initial: Any, mean_duration: Any, shape: Any, embedded: Any
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    r"""Chain whose regimes last a negative binomial number of steps, as a Markov chain of phases.

    The duration of regime k is a sum of `shape[k]` geometric times: mean d, variance $d^2/r - d$, at least r steps.
    r = 1 is the Markov chain. A regime that has lasted r phases ends; `embedded` says which one follows.

    Args:
      initial: law of the regime just before the first step; within a regime all phases are equally likely, as in the
        stationary process.
      mean_duration: mean number of steps in each regime, at least its shape.
      shape: number r of phases of each regime.
      embedded: probabilities of the next regime given that one ends; zero diagonal, rows sum to one.

    Returns:
      `Market.initial`, `Market.transition` and `Market.regime_of`.

    Raises:
      InputError: lengths, probabilities or durations that break these rules.
    """
    initial, duration = np.asarray(initial, np.float64), np.asarray(mean_duration, np.float64)
    phases, embedded = np.asarray(shape, np.int64), np.asarray(embedded, np.float64)
    n = initial.size
    if duration.shape != (n,) or phases.shape != (n,) or embedded.shape != (n, n):
        raise InputError(f"{n} regimes need {n} durations and shapes and an embedded matrix of {n} x {n}.")
    if n == 1:
        return np.ones(1), np.ones((1, 1)), (0,)
    check_rows("embedded", embedded)
    check_rows("initial", initial[None])
    if np.any(np.diag(embedded) != 0.0):
        raise InputError("embedded must have a zero diagonal: a regime that ends is followed by another one.")
    if np.any(phases < 1) or np.any(duration < phases):
        raise InputError(
            f"mean_duration is {duration.tolist()} and shape {phases.tolist()}: a regime of r phases lasts at least r "
            "steps and needs r >= 1."
        )
    first = np.concatenate([[0], np.cumsum(phases)])
    size = int(first[-1])
    transition, start = np.zeros((size, size)), np.zeros(size)
    for k in range(n):
        leave = phases[k] / duration[k]
        for state in range(first[k], first[k + 1]):
            transition[state, state] += 1.0 - leave
            if state + 1 < first[k + 1]:
                transition[state, state + 1] += leave
            else:
                transition[state, first[:-1]] += leave * embedded[k]
        start[first[k] : first[k + 1]] = initial[k] / phases[k]
    return start, transition, tuple(int(k) for k in np.repeat(np.arange(n), phases))


def check_rows(name: str, matrix: np.ndarray) -> None:
    """Checks that rows are probabilities.

    Raises:
      InputError: a negative entry, or a row that does not sum to one.
    """
    if np.any(matrix < 0.0) or not np.all(np.isfinite(matrix)):
        raise InputError(f"{name} holds probabilities, which must lie in [0, 1]; got {matrix.tolist()}.")
    sums = matrix.sum(axis=1)
    worst = int(np.argmax(np.abs(sums - 1.0)))
    if abs(sums[worst] - 1.0) > 1e-6:
        raise InputError(f"row {worst + 1} of {name} sums to {sums[worst]:.6g}; the probabilities of a row sum to 1.")


def regime_masks(masks: Sequence[Array], regime_of: tuple[int, ...] | None) -> tuple[Array, ...]:
    """Masks of the regimes, given those of the states of the chain."""
    if regime_of is None:
        return tuple(masks)
    states = (1.0 - sum(masks), *masks)
    return tuple(
        sum(mask for mask, regime in zip(states, regime_of, strict=True) if regime == k)
        for k in range(1, max(regime_of) + 1)
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drivers:
    r"""Transition probabilities moved by the path: $P_{kl} \propto P^0_{kl}\exp(\sum_c \beta_{ckl}x_c)$.

    The covariates x are those of the end of the step before. "volatility": log of the root of the exponentially
    weighted mean square of the mean log-return of all assets, over `reference`; "drawdown": fall of the equally
    weighted mean log-price from its peak, as a share; "return": its last move; another name is the output of a side
    process (mean over assets).

    Attributes:
      slopes: beta; a row of zeros leaves a regime's probabilities as they are.
      reference: standard deviation per step at which "volatility" is 0.
      names: the covariates (static).
      half_life: of the squares, in steps (static).

    Pathwise gradient: none, the draw is discrete.
    """

    slopes: Float[Array, "covariates states states"]
    reference: Float[Array, ""]
    names: tuple[str, ...] = field(metadata={"static": True})
    half_life: float = field(default=10.0, metadata={"static": True})


class DriverState(NamedTuple):
    """Mean square of the index's returns, the index, its peak, and its last return."""

    square: Array
    index: Array
    peak: Array
    last: Array


def drivers_init(drivers: Drivers, one: Array) -> DriverState:
    """State before the first step: the reference volatility and no drawdown."""
    zero = jnp.zeros_like(one)
    return DriverState(drivers.reference**2 * one, zero, zero, zero)


def drivers_update(drivers: Drivers, state: DriverState, log_return: Rows) -> DriverState:
    """State after a step."""
    last = sum(log_return[i] for i in range(len(log_return))) / len(log_return)
    keep = 0.5 ** (1.0 / drivers.half_life)
    index = state.index + last
    square = keep * state.square + (1.0 - keep) * last * last
    return DriverState(square, index, jnp.maximum(state.peak, index), last)


def driven_cuts(
    drivers: Drivers, state: DriverState, masks: Sequence[Array], transition: Array, side: dict[str, Any]
) -> list[Array]:
    """Cut points of the next state's uniform, per path."""
    log_transition = jnp.log(jnp.maximum(transition, 1e-26))
    values = []
    for name in drivers.names:
        if name == "volatility":
            values.append(0.5 * jnp.log(jnp.maximum(state.square, 1e-20)) - jnp.log(drivers.reference))
        elif name == "drawdown":
            values.append(-jnp.expm1(state.index - state.peak))
        elif name == "return":
            values.append(state.last)
        else:
            row = side[name]
            values.append(sum(row[i] for i in range(len(row))) / len(row) if isinstance(row, tuple) else row)
    logits = []
    for state_to in range(transition.shape[1]):
        logit = select(masks, log_transition[:, state_to])
        for c, value in enumerate(values):
            logit = logit + value * select(masks, drivers.slopes[c, :, state_to])
        logits.append(logit)
    highest = logits[0]
    for logit in logits[1:]:
        highest = jnp.maximum(highest, logit)
    weights = [jnp.exp(logit - highest) for logit in logits]
    total = sum(weights)
    cuts, below = [], jnp.zeros_like(total)
    for weight in weights[:-1]:
        below = below + weight
        cuts.append(below / total)
    return cuts
