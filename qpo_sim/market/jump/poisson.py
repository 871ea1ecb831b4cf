r"""Compound Poisson jumps: counts by inversion, and the component that all models with independent jumps share.

**Counts.** $N = \sum_{n<M} 1\{u < P(N > n)\}$ for one uniform u and a static maximum M: comparisons, no loop. M is the
smallest number with $P(N > M) < 10^{-9}$ at the largest intensity, tilted by $E[e^J]$ where that exceeds 1 so that
expected prices are as exact as frequencies. The uniform is resolved to $2^{-31}$ near 0, where rare events are decided:
an event of probability p per step has it to a relative $2.4\cdot10^{-10}/p$.

**Jumps.** Asset i has its own compound Poisson sum (idiosyncratic), and all assets share one more count (systemic)
whose jumps are $J_i = \beta_i F + e_i$: a common size F loaded by $\beta_i$ and own noise e, multivariate normal. Both
are exact in law for a step of any length. The systemic sizes of two assets have the correlation
$(\beta_i\beta_j\mathrm{Var}F + \mathrm{Cov}(e_i,e_j))/\sqrt{(\beta_i^2\mathrm{Var}F + \mathrm{Var}e_i)
(\beta_j^2\mathrm{Var}F + \mathrm{Var}e_j)}$.

Glasserman (2003) secs 3.2.2 and 3.5; Cont & Tankov (2004) ch. 6.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32, UInt32

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.market.jump.base import Jump
from qpo_sim.numerics import (
    MAX_UNROLLED_ASSETS,
    Pair,
    Rows,
    each_asset,
    materialised,
    regime_matvec,
    regime_rows,
    rounded,
)
from qpo_sim.random import SLOT_BITS, Address, normal_pair, threefry2x32
from qpo_sim.types import HOURS_PER_YEAR, Array

NEGLECTED = 1e-9
MAX_COUNT = 64

# Terms of the Poisson law beyond the maximum count that still enter its tail probabilities.
_EXTRA_TERMS = 16

# Beyond this many slots the cipher is written once for all of them: written out it takes seconds to compile.
_MAX_UNROLLED_SLOTS = 4


class Sizes(Protocol):
    """Law of independent jump sizes, one per column; a pytree whose leaves are vectors over the columns."""

    @property
    def parameters(self) -> tuple[Array, ...]:
        """The leaves, in the order `total` takes them."""
        ...

    @property
    def variance(self) -> np.ndarray:
        """Variance of one jump, by column."""
        ...

    def n_slots(self, n_columns: int, max_count: int) -> int:
        """Slots that `draws` uses."""
        ...

    def draws(self, address: Address, n_columns: int, max_count: int, dtype: Any) -> tuple[Rows, ...]:
        """Draws of a step, each a container with one row per column."""
        ...

    def total(self, count: Array, *values: Array) -> Array:
        """Sum of `count` jumps of one column from its parameters and draws, exact in law."""
        ...

    def mean_exp_minus_one(self, loading: Any = 1.0) -> Array:
        """E[exp(loading J)] - 1, by column."""
        ...


def max_count(mean: float, *, what: str = "the intensity") -> int:
    """Static maximum of a Poisson count with this mean.

    Raises:
      InputError: more than `MAX_COUNT` jumps would have to be foreseen.
    """
    from scipy import special

    n = np.arange(1, MAX_COUNT + 1)
    enough = special.pdtrc(n, mean) < NEGLECTED
    if not enough.any():
        raise InputError(
            f"{what} makes {mean:.3g} jumps per step (weighted by E[exp(jump)] where that exceeds 1); at most about 25 "
            "are foreseen: take shorter steps or a lower intensity."
        )
    return int(n[enough][0])


def tail_probabilities(mean: Float[Array, "..."], n_max: int) -> Float32[Array, "n ..."]:
    """P(N > n) for n = 0 .. n_max - 1 of a Poisson count, each to a few float32 roundings.

    Pathwise gradient: none (the count is discrete).
    """
    mean = lax.stop_gradient(mean)
    n = jnp.arange(1, n_max + _EXTRA_TERMS + 1, dtype=mean.dtype).reshape((-1,) + (1,) * mean.ndim)
    probability = jnp.exp(-mean) * jnp.cumprod(mean[None] / n, axis=0)
    # Summed from the small terms, so that far tails keep their digits.
    return jnp.cumsum(probability[::-1], axis=0)[::-1][:n_max].astype(jnp.float32)


def tail_uniform(word: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    """Uniform on (0, 1] with 31 bits and full relative precision near 0."""
    return (word >> np.uint32(1)).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-31) + np.float32(2.0**-32)


def choose(masks: Sequence[Array], table: Any) -> Array:
    """Entry of `table` for the regime whose one-hot mask is set, without the rounding of `numerics.select`.

    Probabilities of regimes can differ by orders of magnitude: a sum of differences would lose the digits of the small.
    """
    value = table[0]
    for mask, entry in zip(masks, table[1:], strict=True):
        value = jnp.where((mask if jnp.ndim(value) < 2 else mask[None]) > 0.5, entry, value)
    return value


def count(u: Array, tails: Array, masks: Sequence[Array], dtype: Any) -> Array:
    """Poisson count of the regime that the masks name.

    Args:
      u: uniforms from `tail_uniform`, one row or (columns, paths).
      tails: P(N > n) as (n, regimes) or (n, regimes, columns, 1).
      masks: one-hot masks of the regime, () for one regime.
      dtype: of the result.

    Pathwise gradient: none.
    """
    return sum((u < choose(masks, tail)).astype(dtype) for tail in tails)


def count_rows(u: Rows, tails: Float32[Array, "n regimes columns"], masks: Sequence[Array], dtype: Any) -> Rows:
    """`count` for a container with one row per column."""
    if hasattr(u, "ndim"):
        return count(u, tails[..., None], masks, dtype)
    return tuple(count(row, tails[:, :, i], masks, dtype) for i, row in enumerate(u))


def in_rows(rows: Sequence[Array]) -> Rows:
    """A list of rows as the container that their number asks for."""
    return tuple(rows) if len(rows) <= MAX_UNROLLED_ASSETS else jnp.stack(list(rows))


def spread(row: Array, vector: Float[Array, " columns"]) -> Rows:
    """Rows row * vector_i."""
    if vector.shape[0] <= MAX_UNROLLED_ASSETS:
        return tuple(row * vector[i] for i in range(vector.shape[0]))
    return row[None] * vector[:, None]


def add_rows(*terms: Rows) -> Rows:
    """Sum of containers of rows."""
    return terms[0] if len(terms) == 1 else each_asset(lambda *rows: sum(rows[1:], rows[0]), *terms)


def words_at(address: Address, slot: Array) -> tuple[Array, Array]:
    """Both words of slots whose numbers are arrays: one number, or (slots, 1) for (slots, paths) words.

    The same words as those of `Address.words`.
    """
    word = (address.step.astype(jnp.uint32) << np.uint32(SLOT_BITS)) + (slot + np.int32(address.slot)).astype(
        jnp.uint32
    )
    shape = jnp.broadcast_shapes(jnp.shape(slot), address.path.shape)
    words = threefry2x32(jnp.broadcast_to(address.path, shape), jnp.broadcast_to(word, shape), address.key)
    return words if address.mirror is None else (words[0] ^ address.mirror, words[1] ^ address.mirror)


def draw(address: Address, n: int, convert: Callable[[Array], Array]) -> list[Array]:
    """`n` rows, each `convert` of a word, two from each slot; stored, so that several readers share one cipher."""
    n_slots = (n + 1) // 2

    def pairs(at: Address):
        if n_slots > _MAX_UNROLLED_SLOTS:
            return Pair(*map(convert, words_at(at, jnp.arange(n_slots, dtype=jnp.int32)[:, None])))
        words = at.words(2 * n_slots)
        return tuple(Pair(convert(a), convert(b)) for a, b in zip(words[::2], words[1::2], strict=True))

    return _split(materialised(pairs)(address), n)


def draw_normals(address: Address, n: int) -> list[Array]:
    """`n` rows of standard normals, two from each slot, the same as `Address.normals`; stored."""
    n_slots = (n + 1) // 2

    def pairs(at: Address):
        return at.normal_pairs(n_slots) if n_slots <= _MAX_UNROLLED_SLOTS else normal_pairs_at(at, n_slots)

    return _split(materialised(pairs)(address), n)


def uniform_pairs_at(address: Address, n_slots: int) -> Pair:
    """`tail_uniform` of both words of slots, each (slots, paths)."""
    return Pair(*map(tail_uniform, words_at(address, jnp.arange(n_slots, dtype=jnp.int32)[:, None])))


def normal_pairs_at(address: Address, n_slots: int) -> Pair:
    """The normals of `Address.normal_pairs`, each of a pair as (slots, paths)."""
    radius, angle = words_at(replace(address, mirror=None), jnp.arange(n_slots, dtype=jnp.int32)[:, None])
    # The partner of an antithetic pair has the opposite direction.
    mirror = address.mirror
    return normal_pair(radius, angle if mirror is None else angle ^ (mirror & np.uint32(0x80000000)))


def _split(stored: Any, n: int) -> list[Array]:
    # Rows of pairs of rows, or of one pair of (slots, paths) arrays.
    if isinstance(stored, tuple) and not isinstance(stored, Pair):
        return [row for pair in stored for row in pair][:n]
    first, second = stored
    return [row for k in range((n + 1) // 2) for row in (first[k], second[k])][:n]


def years_of(step_hours: float, longest: float) -> float:
    """Length of a simulation step in years.

    Raises:
      InputError: a step longer than the one the static maxima were chosen for.
    """
    if step_hours > longest * (1.0 + 1e-9):
        raise InputError(
            f"step_hours is {step_hours:g}, but the jumps were built for steps of at most {longest:g} hours: "
            f"build them with step_hours={step_hours:g}."
        )
    return step_hours / HOURS_PER_YEAR


def regime_masks(masks: Sequence[Array], n_regimes: int) -> tuple[Array, ...]:
    """Masks for tables with `n_regimes` rows: none where one row serves every regime.

    Raises:
      InputError: tables for another number of regimes than the market has.
    """
    if n_regimes == 1:
        return ()
    if len(masks) != n_regimes - 1:
        raise InputError(
            f"jump intensities are given for {n_regimes} regimes, but the market has {len(masks) + 1}: "
            "give one row per regime, or one row for all."
        )
    return tuple(masks)


def check_numbers(
    value: Any, name: str, *, low: float | None = None, high: float | None = None, is_open: bool = False
) -> np.ndarray:
    """Host array of finite numbers within bounds.

    Raises:
      InputError: not numbers, not finite, or out of bounds.
    """
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; it must be a number or an array of numbers.") from error
    if not np.all(np.isfinite(array)):
        raise InputError(f"{name} is {array.tolist()}; every entry must be finite.")
    below = low is not None and np.any(array <= low if is_open else array < low)
    above = high is not None and np.any(array >= high if is_open else array > high)
    if below or above:
        equal = "" if is_open else "="
        bounds = [f"{sign}{equal} {bound:g}" for sign, bound in ((">", low), ("<", high)) if bound is not None]
        raise InputError(f"{name} is {array.tolist()}; every entry must be {' and '.join(bounds)}.")
    return array


def check_vector(value: Any, n: int, name: str, **bounds: Any) -> np.ndarray:
    """Host vector of length `n` from a number or a vector, checked as in `check_numbers`."""
    array = check_numbers(value, name, **bounds)
    if array.shape not in ((), (n,)):
        raise InputError(f"{name} has shape {array.shape}; it must be one number or one per column ({n}).")
    return np.broadcast_to(array, (n,))


def check_intensity(value: Any, n: int, name: str) -> np.ndarray:
    """(regimes, columns) intensities from a number, a vector over columns or a table with a row per regime."""
    array = check_numbers(value, name, low=0.0)
    if array.ndim > 2 or (array.ndim == 2 and array.shape[1] != n) or (array.ndim == 1 and array.shape != (n,)):
        raise InputError(
            f"{name} has shape {array.shape}; it must be one number, {n} of them, or a table (regimes, {n})."
        )
    return np.broadcast_to(array, (array.shape[0] if array.ndim == 2 else 1, n))


def same_regimes(*tables: np.ndarray | None, names: str) -> tuple[Any, ...]:
    """Tables broadcast to one number of regimes.

    Raises:
      InputError: two tables with different numbers of rows, neither one.
    """
    rows = {table.shape[0] for table in tables if table is not None} - {1}
    if len(rows) > 1:
        raise InputError(f"{names} are given for {sorted(rows)} regimes; they must agree, or have one row for all.")
    n = rows.pop() if rows else 1
    return tuple(None if table is None else np.broadcast_to(table, (n, *table.shape[1:])) for table in tables)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Systemic:
    """Jumps that all assets share: one count, a common size and own noise (see the module).

    Attributes:
      intensity: jumps per year by regime.
      sizes: law of the common size F (one column).
      loading: beta_i of each asset.
      own_mean: mean of the own noise by asset.
      own_sd: standard deviation of the own noise by asset, None for none.
      own_cholesky: lower Cholesky factor of the correlation of the own noise, None when independent.
      max_count: static maximum of the count (static).

    Pathwise gradient: sizes, loading, own_mean, own_sd, own_cholesky. None: intensity, except in the compensator.
    """

    intensity: Float[Array, " regimes"]
    sizes: Any
    loading: Float[Array, " assets"]
    own_mean: Float[Array, " assets"]
    own_sd: Float[Array, " assets"] | None
    own_cholesky: Float[Array, "assets assets"] | None
    max_count: int = field(metadata={"static": True})

    def mean_exp_minus_one(self) -> Float[Array, " assets"]:
        """E[exp(J_i)] - 1 by asset."""
        variance = 0.0 if self.own_sd is None else self.own_sd * self.own_sd
        own = jnp.expm1(self.own_mean + 0.5 * variance)
        common = self.sizes.mean_exp_minus_one(self.loading)
        return own + common + own * common

    def correlation(self) -> np.ndarray:
        """Correlation matrix of the jumps of the assets, (assets, assets)."""
        loading = np.asarray(self.loading, np.float64)
        own_sd = np.zeros_like(loading) if self.own_sd is None else np.asarray(self.own_sd, np.float64)
        factor = np.eye(loading.size) if self.own_cholesky is None else np.asarray(self.own_cholesky, np.float64)
        covariance = np.outer(loading, loading) * np.asarray(self.sizes.variance)
        covariance = covariance + own_sd[:, None] * (factor @ factor.T) * own_sd
        sd = np.sqrt(np.diag(covariance))
        return covariance / np.where(sd > 0.0, sd, 1.0)[:, None] / np.where(sd > 0.0, sd, 1.0)


class Prepared(NamedTuple):
    """Constants of a step: tail probabilities of the counts, laws of the sizes, and cumulants by regime."""

    tails: Float32[Array, "n regimes assets"] | None
    sizes: Any
    systemic_tails: Float32[Array, "n regimes"] | None
    systemic: Systemic | None
    log_mean_exp: Float[Array, "regimes assets"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompoundPoisson:
    r"""Independent jumps: idiosyncratic, systemic or both, exact in law for a step of any length.

    With `martingale` the step's compensator is $-\lambda_{k,i}\,dt\,(E[e^{J_i}] - 1)$, the sum over both kinds: exact
    given the regime of the step.

    Attributes:
      intensity: own jumps per year, None without own jumps.
      sizes: law of the own jumps, a column per asset.
      systemic: jumps that all assets share, or None.
      n_assets: number of assets (static).
      max_count: static maximum of each own count (static).
      step_hours: longest step the maxima serve (static).
      martingale: give the compensator (static).

    Pathwise gradient: sizes and what `Systemic` says. None: intensity, except in the compensator.
    """

    intensity: Float[Array, "regimes assets"] | None
    sizes: Any
    systemic: Systemic | None
    n_assets: int = field(metadata={"static": True})
    max_count: int = field(metadata={"static": True})
    step_hours: float = field(metadata={"static": True})
    martingale: bool = field(default=False, metadata={"static": True})

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return sum(n for _, n in self._layout())

    def _layout(self) -> list[tuple[str, int]]:
        n = self.n_assets
        has_own, systemic = self.intensity is not None, self.systemic
        parts = [("counts", (n * has_own + (systemic is not None) + 1) // 2)]
        if has_own:
            parts.append(("sizes", self.sizes.n_slots(n, self.max_count)))
        if systemic is not None:
            parts.append(("common", systemic.sizes.n_slots(1, systemic.max_count)))
            if systemic.own_sd is not None:
                parts.append(("noise", (n + 1) // 2))
        return parts

    @property
    def n_regimes(self) -> int:
        """Regimes of the intensities, 1 when they are the same in all."""
        if self.intensity is not None:
            return self.intensity.shape[0]
        return 1 if self.systemic is None else self.systemic.intensity.shape[0]

    def prepare(self, *, sub_steps: int, step_hours: float) -> Prepared:
        """Constants for simulation steps of `step_hours`."""
        years = years_of(step_hours, self.step_hours)
        tails, systemic_tails, cumulant = None, None, 0.0
        if self.intensity is not None:
            mean = self.intensity * years
            tails = tail_probabilities(mean, self.max_count)
            cumulant = mean * self.sizes.mean_exp_minus_one()
        if self.systemic is not None:
            mean = self.systemic.intensity * years
            systemic_tails = tail_probabilities(mean, self.systemic.max_count)
            cumulant = cumulant + mean[:, None] * self.systemic.mean_exp_minus_one()
        return Prepared(tails, self.sizes, systemic_tails, self.systemic, cumulant)

    def log_mean_exp(self, prepared: Prepared) -> Float[Array, "regimes assets"]:
        """Log E[exp(sum of the step's jumps)] by regime and asset."""
        return prepared.log_mean_exp

    def init(self, prepared: Prepared, one: Array, n_assets: int, address: Address) -> tuple[()]:
        """No state.

        Raises:
          InputError: built for another number of assets.
        """
        check_assets(n_assets, self.n_assets)
        return ()

    def step(self, prepared: Prepared, t: Array, state: tuple[()], masks: Any, address: Address):
        """Jumps of one step and, with `martingale`, their compensator."""
        dtype = prepared.log_mean_exp.dtype
        masks = regime_masks(masks, self.n_regimes)
        at = dict(zip([name for name, _ in self._layout()], self._addresses(address), strict=True))
        has_own, systemic = prepared.tails is not None, prepared.systemic
        uniforms = draw(at["counts"], self.n_assets * has_own + (systemic is not None), tail_uniform)
        terms = []
        if has_own:
            counts = count_rows(in_rows(uniforms[: self.n_assets]), prepared.tails, masks, dtype)
            draws = self.sizes.draws(at["sizes"], self.n_assets, self.max_count, dtype)
            terms.append(each_asset(self.sizes.total, counts, *prepared.sizes.parameters, *draws))
        if systemic is not None:
            common_draws = systemic.sizes.draws(at["common"], 1, systemic.max_count, dtype)

            def common(u, tails, masks, sizes, draws):
                n = count(u, tails, masks, dtype)
                return Pair(n, sizes.total(n, *sizes.parameters, *(rows[0] for rows in draws)))

            pair = materialised(common)(uniforms[-1], prepared.systemic_tails, masks, systemic.sizes, common_draws)
            terms += [spread(pair.second, systemic.loading), spread(pair.first, systemic.own_mean)]
            if systemic.own_sd is not None:
                z = in_rows([row.astype(dtype) for row in draw_normals(at["noise"], self.n_assets)])
                if systemic.own_cholesky is not None:
                    z = regime_matvec(systemic.own_cholesky[None], (), z)
                root = jnp.sqrt(pair.first)
                terms.append(each_asset(lambda z, sd: root * sd * z, z, systemic.own_sd))
        size = add_rows(*terms)
        compensator = regime_rows(masks, -prepared.log_mean_exp, size) if self.martingale else None
        return state, Jump(size, compensator)

    def _addresses(self, address: Address) -> list[Address]:
        found = []
        for _, n in self._layout():
            found.append(address)
            address = address.after(n)
        return found


def check_assets(n_assets: int, expected: int) -> None:
    """Raises `InputError` when a component meets a market with another number of assets."""
    if n_assets != expected:
        raise InputError(f"the jumps were built for {expected} assets, but the market has {n_assets}.")


def build(
    n_assets: int,
    *,
    intensity: Any,
    sizes: Any,
    systemic: Mapping[str, Any] | None,
    systemic_sizes: Callable[[Mapping[str, Any], np.ndarray], Any],
    size_names: Sequence[str],
    martingale: bool,
    step_hours: float,
    dtype: Any,
) -> CompoundPoisson:
    """The component from checked size laws and raw intensities; the models' builders call it.

    Args:
      n_assets: number of assets.
      intensity: own jumps per year: a number, one per asset, or a table (regimes, assets); None without own jumps.
      sizes: law of the own jumps, or None.
      systemic: plain numbers of the systemic jumps: intensity (a number, or one per regime), the parameters of the
        common size, loading, own_mean, own_sd and correlation (of the own noise).
      systemic_sizes: makes the law of the common size from those numbers and the loadings.
      size_names: names of the parameters of the common size.
      martingale: give the compensator.
      step_hours: longest simulation step.
      dtype: precision.
    """
    years = float(check_numbers(step_hours, "step_hours", low=0.0, is_open=True)) / HOURS_PER_YEAR
    if intensity is None and systemic is None:
        raise InputError("there are no jumps: give an intensity, systemic jumps, or both.")
    own = None if intensity is None else check_intensity(intensity, n_assets, "intensity")
    common = None
    if systemic is not None:
        allowed = ("intensity", *size_names, "loading", "own_mean", "own_sd", "correlation")
        for key in systemic:
            if key not in allowed:
                raise InputError(f"systemic jumps have no {key!r}: {did_you_mean(str(key), allowed)}")
        if "intensity" not in systemic:
            raise InputError("systemic jumps need an intensity (jumps per year).")
        common = check_numbers(systemic["intensity"], "systemic.intensity", low=0.0).reshape(-1)
    own, common = same_regimes(own, common, names="intensity and systemic.intensity")

    part = None
    if systemic is not None:
        loading = check_vector(systemic.get("loading", 1.0), n_assets, "systemic.loading")
        own_mean = check_vector(systemic.get("own_mean", 0.0), n_assets, "systemic.own_mean")
        own_sd = check_vector(systemic.get("own_sd", 0.0), n_assets, "systemic.own_sd", low=0.0)
        cholesky = _cholesky(systemic.get("correlation"), n_assets)
        part = Systemic(
            intensity=rounded(common, dtype),
            sizes=systemic_sizes(systemic, loading),
            loading=rounded(loading, dtype),
            own_mean=rounded(own_mean, dtype),
            own_sd=rounded(own_sd, dtype) if np.any(own_sd > 0.0) else None,
            own_cholesky=None if cholesky is None else rounded(cholesky, dtype),
            max_count=1,
        )
        tilt = np.asarray(part.mean_exp_minus_one(), np.float64) + 1.0
        most = max_count(float(common.max() * years * max(1.0, tilt.max())), what="systemic.intensity")
        part = replace(part, max_count=most)
    most = 1
    if own is not None:
        tilt = np.maximum(1.0, np.asarray(sizes.mean_exp_minus_one(), np.float64) + 1.0)
        most = max_count(float((own * tilt).max() * years), what="intensity")
    return CompoundPoisson(
        intensity=None if own is None else rounded(own, dtype),
        sizes=None if own is None else sizes,
        systemic=part,
        n_assets=n_assets,
        max_count=most,
        step_hours=float(step_hours),
        martingale=martingale,
    )


def _cholesky(correlation: Any, n_assets: int) -> np.ndarray | None:
    if correlation is None:
        return None
    matrix = check_numbers(correlation, "systemic.correlation", low=-1.0, high=1.0)
    if matrix.shape != (n_assets, n_assets) or not np.allclose(matrix, matrix.T) or not np.allclose(np.diag(matrix), 1):
        raise InputError(
            f"systemic.correlation must be a symmetric ({n_assets}, {n_assets}) matrix with ones on the diagonal."
        )
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        raise InputError("systemic.correlation must be positive definite; repair it first.") from error
