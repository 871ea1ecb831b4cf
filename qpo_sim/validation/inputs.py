"""Border checks that every test and score shares."""

from typing import Any

import numpy as np

from qpo_sim.errors import InputError


def numbers(name: str, values: Any, *, axes: int = 1, at_least: int = 1) -> np.ndarray:
    """`values` as a finite float64 array.

    Args:
      name: what to call it in a message.
      values: anything array-like.
      axes: number of axes it must have.
      at_least: fewest entries along the first axis.

    Raises:
      InputError: not numbers, wrong number of axes, too short, or a value that is not finite.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} holds values that are not numbers ({error}); give an array of numbers.") from error
    if array.ndim != axes:
        raise InputError(f"{name} has shape {array.shape}; it must have {axes} axes.")
    if array.shape[0] < at_least or array.size == 0:
        raise InputError(f"{name} has shape {array.shape}; it must have at least {at_least} rows: give more data.")
    if not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{name} at {at} is {array[at]}; every value must be finite: leave such rows out.")
    return array


def flags(name: str, values: Any, *, at_least: int = 1) -> np.ndarray:
    """`values` as a boolean vector; 0 and 1 are taken as well.

    Raises:
      InputError: as `numbers`, or a value other than 0 and 1.
    """
    array = numbers(name, values, at_least=at_least)
    if (wrong := (array != 0.0) & (array != 1.0)).any():
        at = int(np.argmax(wrong))
        raise InputError(f"{name} at {at} is {array[at]}; it must be true or false (1 or 0).")
    return array == 1.0


def unit_interval(name: str, values: Any, *, is_open: bool = False, at_least: int = 1) -> np.ndarray:
    """`values` as a vector of probabilities.

    Raises:
      InputError: as `numbers`, or a value outside [0, 1] (outside (0, 1) when `is_open`).
    """
    array = numbers(name, values, at_least=at_least)
    outside = (array <= 0.0) | (array >= 1.0) if is_open else (array < 0.0) | (array > 1.0)
    if outside.any():
        at = int(np.argmax(outside))
        rule = "strictly between 0 and 1" if is_open else "between 0 and 1"
        raise InputError(f"{name} at {at} is {array[at]}; it must lie {rule}.")
    return array


def same_length(**series: np.ndarray) -> int:
    """The length that all share along the first axis.

    Raises:
      InputError: two lengths differ.
    """
    lengths = {name: len(values) for name, values in series.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"lengths differ: {lengths}; give one value per day in each.")
    return next(iter(lengths.values()))


def counts(n_events: int, n_trials: int, name: str) -> None:
    """Checks a count against the number of trials.

    Raises:
      InputError: no trials, or a count outside 0 .. n_trials.
    """
    if n_trials < 1 or not 0 <= n_events <= n_trials:
        raise InputError(f"{name} is {n_events} of {n_trials}; it must lie in 0 .. {n_trials}, with at least one day.")


def whole(name: str, value: int, *, low: int, high: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
      InputError: below `low` or above `high`.
    """
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in {low} .. {high}"
        raise InputError(f"{name} is {value}; it must be {bounds}.")
    return int(value)


def randomised_rank(outcome: np.ndarray, sample: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rank of each day's outcome among that day's draws, spread evenly over its cell and its ties; inside (0, 1)."""
    below = (sample < outcome[:, None]).sum(axis=1)
    ties = (sample == outcome[:, None]).sum(axis=1)
    # In (0, 1], as 0 would have no normal quantile.
    spread = 1.0 - generator.random(outcome.size)
    return np.minimum((below + spread * (ties + 1)) / (sample.shape[1] + 1), 1.0 - 2.0**-53)


def monte_carlo_p(observed: float, simulated: np.ndarray, *, is_low_bad: bool = False) -> float:
    """One-sided Monte Carlo p-value (1 + number at least as extreme) / (1 + number), NaN draws left out.

    Exact for exchangeable draws without ties, and conservative with ties (Davison & Hinkley 1997, eq. 4.11).
    """
    valid = simulated[~np.isnan(simulated)]
    if np.isnan(observed) or valid.size == 0:
        return float("nan")
    extreme = valid <= observed if is_low_bad else valid >= observed
    return float((1 + np.count_nonzero(extreme)) / (1 + valid.size))
