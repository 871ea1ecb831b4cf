r"""What side processes share: tables checked at the border, exact mean reversion, and arrivals of rare events.

**Mean reversion that follows the returns.** $dX = \kappa(m_k - X)\,dt + s_k\sqrt{2\kappa}\,dW + \beta\,dr$ with W
independent of the log-return r. Given the return r of a step of length h, over which $m_k$, $s_k$ and the return's
variance $v^2$ per step are constant, the end value is Gaussian, and exactly so for a Brownian r:

$$X_h = m_k + a (X_0 - m_k) + \beta g r + \sqrt{s_k^2 (1 - a^2) + \beta^2 v^2 f}\; z,$$
$$a = e^{-\kappa h},\quad g = \frac{1 - a}{\kappa h},\quad f = \frac{1 - a^2}{2 \kappa h} - g^2.$$

The term with f is what the step's return leaves open about its timing within the step; with it the joint law of (X, r)
at common times does not depend on the step. $s_k$ is the stationary standard deviation of what does not follow the
returns; the whole stationary variance is $s^2 + \beta^2\sigma^2/(2\kappa)$ for a return variance of $\sigma^2$ per unit
of time, and a return drift of mu moves the stationary mean by $\beta\mu/\kappa$.

**Tables.** A parameter per regime is a number, a vector with one entry per regime, or a matrix of (regimes or 1,
items); a parameter per item (asset, pool, coin) is a number or a vector with one entry per item.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32, UInt32

from qpo_sim import random
from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.market.side.view import View
from qpo_sim.numerics import (
    MAX_UNROLLED_ASSETS,
    Rows,
    each_asset,
    is_inside_kernel,
    materialised,
    polynomial,
    regime_rows,
    safe_sqrt,
)
from qpo_sim.random import Address
from qpo_sim.types import Array

# A parameter as users write it.
Entries = float | Sequence[Any] | np.ndarray
# Assets that items follow, by number or name.
Drivers = int | str | Sequence[int | str] | range

HOURS_PER_DAY = 24.0
# Arrivals of one process that a step can hold; what the border allows per step leaves less than 0.2 % to a fourth.
MAX_ARRIVALS = 3
MOST_EXPECTED_ARRIVALS = 0.5


def _checked(
    field: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field} is {value!r}; it must be a number or an array of numbers.") from error
    bounds = (
        (above, np.greater, "be above"),
        (at_least, np.greater_equal, "be at least"),
        (below, np.less, "be below"),
        (at_most, np.less_equal, "be at most"),
    )
    rules = [f"{words} {bound:g}" for bound, _, words in bounds if bound is not None]
    holds = np.isfinite(array).all() and all(
        bool(np.all(test(array, bound))) for bound, test, _ in bounds if bound is not None
    )
    if not holds:
        rule = " and ".join(["be finite", *rules])
        raise InputError(f"{field} is {array.tolist()}; every entry must {rule}.")
    return array


def number(field: str, value: Any, **bounds: float) -> float:
    """One number within its bounds (above, at_least, below, at_most).

    Raises:
      InputError: not a number, or out of bounds.
    """
    array = _checked(field, value, **bounds)
    if array.ndim:
        raise InputError(f"{field} has shape {array.shape}; it is one number.")
    return float(array)


def vector(field: str, value: Any, n_items: int, **bounds: float) -> np.ndarray:
    """(items,) vector from a number or one entry per item.

    Raises:
      InputError: another shape, or an entry out of bounds.
    """
    array = _checked(field, value, **bounds)
    if array.shape not in ((), (n_items,)):
        raise InputError(f"{field} has shape {array.shape}; give one number or {n_items}, one per item.")
    return np.broadcast_to(array, (n_items,))


def table(field: str, value: Any, n_items: int, **bounds: float) -> np.ndarray:
    """(regimes or 1, items) table from a number, one entry per regime, or a matrix with one column per item.

    Raises:
      InputError: another shape, or an entry out of bounds.
    """
    array = _checked(field, value, **bounds)
    if array.ndim == 0:
        array = array.reshape(1, 1)
    elif array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] not in (1, n_items):
        raise InputError(
            f"{field} has shape {np.shape(value)}; give one number, one per regime, or a matrix of regimes by "
            f"{n_items} items (1 x {n_items} for all regimes alike)."
        )
    return np.broadcast_to(array, (array.shape[0], n_items))


def check_regimes(**tables: np.ndarray) -> None:
    """Checks that tables that differ by regime agree on how many there are.

    Raises:
      InputError: two numbers of regimes.
    """
    sizes = {field: entries.shape[0] for field, entries in tables.items() if entries.shape[0] > 1}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{field} {size}" for field, size in sizes.items())
        raise InputError(f"tables disagree on the number of regimes: {shown}; give each the same, or one row.")


def check_intensity(field: str, per_day: np.ndarray, longest_step_hours: float) -> None:
    """Checks that a step holds few enough arrivals.

    Raises:
      InputError: more than `MOST_EXPECTED_ARRIVALS` expected in the longest step.
    """
    expected = float(np.max(per_day)) * longest_step_hours / HOURS_PER_DAY
    if expected > MOST_EXPECTED_ARRIVALS:
        raise InputError(
            f"{field} gives {expected:.3g} arrivals in a step of {longest_step_hours:g} hours; at most "
            f"{MOST_EXPECTED_ARRIVALS:g} are simulated faithfully: lower it, or lower longest_step_hours and use "
            "shorter steps."
        )


def check_count(field: str, value: int) -> int:
    """The count itself.

    Raises:
      InputError: not a whole number of at least 1.
    """
    if int(value) != value or value < 1:
        raise InputError(f"{field} is {value}; it must be a whole number of at least 1.")
    return int(value)


def check_drivers(field: str, value: Drivers, assets: Sequence[str] = ()) -> tuple[int, ...]:
    """Column numbers of the market's assets that items follow.

    Raises:
      InputError: none, a name that is not among `assets`, or a number that is negative or beyond them.
    """
    listed = [value] if isinstance(value, int | str | np.integer) else list(value)
    if not listed:
        raise InputError(f"{field} is empty; name at least one asset.")
    found = []
    for one in listed:
        if isinstance(one, str):
            if one not in assets:
                raise InputError(f"{field} names {one!r}, which is not among the assets; {did_you_mean(one, assets)}.")
            found.append(list(assets).index(one))
            continue
        last = len(assets) - 1 if assets else None
        if int(one) != one or one < 0 or (last is not None and one > last):
            upto = "" if last is None else f" to {last}"
            raise InputError(f"{field} has {one}; asset numbers are whole and count from 0{upto}.")
        found.append(int(one))
    return tuple(found)


def check_step(kind: str, step_hours: float, longest_step_hours: float) -> None:
    """Checks a simulation step against the longest one a component was built for.

    Raises:
      InputError: longer.
    """
    if step_hours > longest_step_hours * (1.0 + 1e-9):
        raise InputError(
            f"{kind} was built for steps of at most {longest_step_hours:g} hours and the step is {step_hours:g}; "
            "raise its longest_step_hours."
        )


def check_width(kind: str, n_items: int, rows: Rows) -> None:
    """Checks that the market has as many assets as a component with one item per asset.

    Raises:
      InputError: it has not.
    """
    if len(rows) != n_items:
        raise InputError(f"{kind} was built for {n_items} assets and the market has {len(rows)}.")


def container(rows: Sequence[Array]) -> Rows:
    """Rows of paths as `numerics.Rows`: a tuple while few, else one array."""
    return tuple(rows) if len(rows) <= MAX_UNROLLED_ASSETS else jnp.stack(list(rows))


def constant_rows(values: Float[Array, " items"], one: Array) -> Rows:
    """Rows that hold one number each."""
    return container([values[i] * one for i in range(values.shape[0])])


def pick(rows: Rows, drivers: Sequence[int]) -> Rows:
    """The rows of some assets.

    Raises:
      InputError: a number beyond the market's assets.
    """
    if max(drivers) >= len(rows):
        raise InputError(f"asset number {max(drivers)} is followed, but the market has {len(rows)} (counted from 0).")
    return container([rows[i] for i in drivers])


def by_regime(view: View, entries: Float[Array, "regimes items"], like: Rows) -> Rows:
    """Rows of a table for the regime of the step; a table of one row holds in all regimes.

    Raises:
      InputError: a table of more than one row and another number of regimes in the market.
    """
    if entries.shape[0] == 1:
        return regime_rows((), entries, like)
    if entries.shape[0] != len(view.masks) + 1:
        raise InputError(
            f"a side process has {entries.shape[0]} regimes and the market {len(view.masks) + 1}; they must agree."
        )
    return regime_rows(view.masks, entries, like)


def log_excess(volatility: Array, log_reference: Array) -> Array:
    """Log of a volatility over its reference; 0 in a step without volatility.

    Pathwise gradient: yes.
    """
    moves = volatility > 1e-30
    return jnp.where(moves, jnp.log(jnp.where(moves, volatility, 1.0)) - log_reference, 0.0)


def normals(address: Address, n: int, dtype: Any) -> list[Array]:
    """`n` rows of standard normals, those of `Address.normals`; (n + 1) // 2 slots."""
    if is_inside_kernel():
        return [row.astype(dtype) for row in address.normals(n)]
    n_pairs = (n + 1) // 2
    slots: Any = address.slot + np.arange(n_pairs)[:, None]

    def draw(key, path, step, mirror):
        # One computation of all slots instead of one for each: the same bits, and compiled once.
        every = jnp.broadcast_to(path, (n_pairs, *path.shape))
        word0, word1 = random.bits(key, every, step, slots)
        return random.normal_pair(word0, word1 if mirror is None else word1 ^ (mirror & np.uint32(0x80000000)))

    first, second = materialised(draw)(address.key, address.path, address.step, address.mirror)
    pairs = zip(first.astype(dtype), second.astype(dtype), strict=True)
    return [row for pair in pairs for row in pair][:n]


def fine_uniform(word: UInt32[Array, " paths"]) -> Float32[Array, " paths"]:
    """Uniform on (0, 1) with cells of 2^-32 near 0, so that probabilities far below 2^-23 keep their size."""
    high = lax.bitcast_convert_type(word >> np.uint32(8), jnp.int32).astype(jnp.float32)
    low = lax.bitcast_convert_type(word & np.uint32(0xFF), jnp.int32).astype(jnp.float32)
    value = high * np.float32(2.0**-24) + (low + np.float32(0.5)) * np.float32(2.0**-32)
    return jnp.minimum(value, np.float32(1.0 - 2.0**-24))


def exponential(word: UInt32[Array, " paths"], dtype: Any) -> Array:
    """Standard exponential, exact in its small values, at most 16.6."""
    return -jnp.log1p(-fine_uniform(word)).astype(dtype)


class Arrival(NamedTuple):
    """One arrival of a step: whether it happens (0 or 1), the share of the step left after it, bits for its mark."""

    happens: Array
    left: Array
    word: Array


def arrivals(address: Address, expected: Array, n: int = MAX_ARRIVALS) -> list[Arrival]:
    """The first `n` arrivals of a Poisson process in a step, in order; `n` slots.

    Args:
      address: of the draws.
      expected: expected number in the step, a row.
      n: how many are kept.

    Pathwise gradient: none in `expected`, as whether an arrival happens has none.
    """
    rate = jnp.maximum(lax.stop_gradient(expected), 1e-30)
    words = address.words(2 * n)
    time, found = jnp.zeros_like(rate), []
    for k in range(n):
        time = time + exponential(words[2 * k], rate.dtype) / rate
        happens = (time <= 1.0).astype(rate.dtype)
        found.append(Arrival(happens, jnp.maximum(1.0 - time, 0.0), words[2 * k + 1]))
    return found


class Reversion(NamedTuple):
    """Constants of an exact transition over one step, see the module: a, sqrt(1 - a^2), g, f."""

    decay: Array
    noise: Array
    gain: Array
    timing: Array


# Power series of g and f in -kappa h: their closed forms lose all digits as kappa h goes to 0.
_N_TERMS = 24
_FACTORIAL = np.cumprod(np.concatenate([[1.0], np.arange(1.0, _N_TERMS + 3.0)]))
_GAIN_SERIES = tuple(float((-1.0) ** n / _FACTORIAL[n + 1]) for n in range(_N_TERMS))
_TIMING_SERIES = tuple(float((-1.0) ** n * (2.0**n * (n - 2.0) + 2.0) / _FACTORIAL[n + 2]) for n in range(_N_TERMS))


def averaged_decay(x: Array) -> Array:
    """Mean of exp(-s) over s in [0, x], (1 - exp(-x)) / x, with value and gradient down to x = 0.

    Pathwise gradient: x.
    """
    far = jnp.maximum(x, 1.0)
    return jnp.where(x < 1.0, polynomial(_GAIN_SERIES, jnp.minimum(x, 1.0)), -jnp.expm1(-far) / far)


def reversion(half_life_hours: Array, step_hours: float) -> Reversion:
    """Transition of processes with these half-lives over a step.

    Pathwise gradient: half_life_hours.
    """
    x = (float(np.log(2.0)) * step_hours) / half_life_hours
    far = jnp.maximum(x, 1.0)
    timing_far = averaged_decay(2.0 * far) - averaged_decay(far) ** 2
    timing = jnp.where(x < 1.0, polynomial(_TIMING_SERIES, jnp.minimum(x, 1.0)), timing_far)
    return Reversion(jnp.exp(-x), jnp.sqrt(-jnp.expm1(-2.0 * x)), averaged_decay(x), timing)


def revert(
    state: Rows,
    mean: Rows,
    deviation: Rows,
    response: Any,
    log_return: Rows,
    volatility: Rows,
    z: Rows,
    transition: Reversion,
) -> Rows:
    """States after a step, see the module.

    Args:
      state: values before the step.
      mean: level of reversion m_k.
      deviation: s_k.
      response: beta, per unit of log-return; rows or (items,).
      log_return: of the step.
      volatility: standard deviation v of that return.
      z: standard normals.
      transition: constants of the step.

    Pathwise gradient: all (z is data).
    """

    def one(x, m, s, beta, r, v, e, decay, noise, gain, timing):
        spread = safe_sqrt((s * noise) ** 2 + (beta * v) ** 2 * timing)
        return m + decay * (x - m) + beta * gain * r + spread * e

    return each_asset(one, state, mean, deviation, response, log_return, volatility, z, *transition)
