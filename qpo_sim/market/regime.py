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

# How far the sum of a law may be from 1: rounding of numbers given in single precision.
SUM_TOLERANCE = 1e-6


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


def stationary_law(transition: Any) -> Float[np.ndarray, "... states"]:
    r"""Law with $\pi' P = \pi'$ and $\pi' 1 = 1$ of each transition matrix (..., states, states), in float64.

    Raises:
      InputError: a chain has several, as it falls into parts that never reach each other.
    """
    matrix = np.asarray(transition, np.float64)
    k = matrix.shape[-1]
    system = np.swapaxes(np.eye(k) - matrix, -1, -2).copy()
    system[..., -1, :] = 1.0
    if np.any(np.linalg.cond(system) > 1e12):
        raise InputError(
            "the transition matrix has no unique stationary law; connect its states, or give the initial law."
        )
    target = np.zeros((*matrix.shape[:-2], k, 1))
    target[..., -1, 0] = 1.0
    # States that are left for ever come out as rounding, of either sign.
    law = np.maximum(np.linalg.solve(system, target)[..., 0], 0.0)
    return law / law.sum(axis=-1, keepdims=True)


def semi_markov(
    initial: Any, mean_duration: Any, shape: Any, embedded: Any
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    r"""Chain whose regimes last a negative binomial number of steps, as a Markov chain of phases.

    The duration of regime k is a sum of `shape[k]` geometric times: mean d, variance $d^2/r - d$, at least r steps.
    r = 1 is the Markov chain. A regime that has lasted r phases ends; `embedded` says which one follows.

    Args:
      initial: law of the regime just before the first step, None for the share of time spent in each in the long run;
        within a regime all phases are equally likely, as in the stationary process.
      mean_duration: mean number of steps in each regime, at least its shape.
      shape: number r of phases of each regime.
      embedded: probabilities of the next regime given that one ends; zero diagonal, rows sum to one.

    Returns:
      `Market.initial`, `Market.transition` and `Market.regime_of`.

    Raises:
      InputError: lengths, probabilities or durations that break these rules.
    """
    duration, phases = np.asarray(mean_duration, np.float64), np.asarray(shape, np.int64)
    embedded, n = np.asarray(embedded, np.float64), duration.size
    if duration.shape != (n,) or phases.shape != (n,) or embedded.shape != (n, n):
        raise InputError(f"{n} regimes need {n} durations and shapes and an embedded matrix of {n} x {n}.")
    if n == 1:
        return np.ones(1), np.ones((1, 1)), (0,)
    check_law("embedded", embedded)
    if initial is None:
        # How often a regime comes times how long it stays.
        time = stationary_law(embedded) * duration
        initial = time / time.sum()
    initial = check_law("initial", initial)
    if initial.shape != (n,):
        raise InputError(f"initial is {initial.tolist()}; it must have a probability for each of {n} regimes.")
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


def check_law(name: str, law: Any) -> Float[np.ndarray, "... states"]:
    """Probabilities, in float64, whose last axis is a law: one law, the rows of a matrix, or several of these.

    Raises:
      InputError: a probability outside [0, 1], or a row that does not sum to one.
    """
    law = np.asarray(law, np.float64)
    bad = np.argwhere(~((law >= 0.0) & (law <= 1.0)))
    if bad.size:
        raise InputError(f"{name}{bad[0].tolist()} is {law[tuple(bad[0])]:.9g}; a probability must lie in [0, 1].")
    total = law.sum(axis=-1)
    bad = np.argwhere(np.abs(total - 1.0) > SUM_TOLERANCE)
    if len(bad):
        place = bad[0].tolist() or ""
        raise InputError(
            f"the sum of {name}{place} is {total[tuple(bad[0])]:.9g}; probabilities must sum to 1, in a transition "
            "matrix along each row."
        )
    return law


def check_transition(name: str, transition: Any) -> Float[np.ndarray, "... states states"]:
    """A transition matrix, or several, in float64.

    Raises:
      InputError: not numbers, not square, a probability outside [0, 1], or a row that does not sum to one.
    """
    try:
        matrix = np.asarray(transition, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {transition!r}; it must be a matrix of numbers.") from error
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.size == 0:
        raise InputError(f"{name} has the shape {matrix.shape}; it must be square, a row for each present state.")
    return check_law(name, matrix)


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
