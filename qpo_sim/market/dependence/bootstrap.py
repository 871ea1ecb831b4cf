r"""Shocks resampled from data: whole dates of a table, the same date for all assets, in blocks of dates.

The dates form a ring and a path walks along it. Each step it goes on to the next date, or starts a new block at a date
drawn uniformly: with probability 1/L (`stationary`, Politis & Romano 1994: blocks of geometric length, mean L), after L
dates (`circular`, Politis & Romano 1992) or always (`iid`). Steps along a ring and uniform starts both keep the uniform
law of the date, so at *every* step $\varepsilon$ has exactly the table's mean, variance, correlations and tails, and
with circular autocovariances c(k) of any function of the rows $\mathrm{Cov}(X_0, X_k)$ is $(1 - 1/L)^k\, c(k)$
(stationary) or $\max(0, 1 - k/L)\, c(k)$ (circular, with random phase).

**Regimes.** With a label per date each regime has a ring of its own: its spells, joined end to end as the two ends of
the sample are. A start is drawn from the ring of the path's present regime and a change of regime starts a block. So
given the regime every date of it, and no other, is equally likely; and a block that reaches the end of a spell runs on
into the next one instead of being cut, which would make the first dates of spells rarer than the last.

**Missing data.** `complete` walks over the dates on which every asset has a value and joins over the others: every
correlation is that of the data, but whatever happened on the other dates is lost. `own_dates` walks over all dates; an
asset without a value on a date gets one of its own dates instead, from a second walk along these, which starts where
blocks start; assets with the same gaps share it. Each asset then has the law of all of its own dates, but on borrowed
dates it is independent of the others: with the share q of common dates a correlation shrinks to about q times itself
(`correlation` reports the shrunk one), and a portfolio looks safer than it is. Hence `complete` is the default.

**Smoothing.** $\varepsilon' = m + (\varepsilon - m + h A z)/\sqrt{1+h^2}$ with A the Cholesky factor of the
covariance and z fresh normals keeps mean and covariance and fills the gaps between the data (Silverman 1986, sec.
6.4.1). Third and fourth cumulants shrink by $(1+h^2)^{-3/2}$ and $(1+h^2)^{-2}$, autocovariances by $1/(1+h^2)$. The
rules for h are those of a Gaussian law; with many assets they give h near 1, half of the variance Gaussian: then give a
number.

**What it cannot do.** No one-step shock is beyond the largest of the table (unless smoothed): quantiles further out
than about 1/dates per step are those of the sample. With blocks the next step is partly known: a drift that makes the
one-step mean of the price right on average over dates does not make a product of several steps a martingale; only `iid`
does. A row is the return of a whole base step, so sub-steps are refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float64, Int32, UInt32

from qpo_sim.errors import InputError
from qpo_sim.market.dependence import resampled_rows
from qpo_sim.market.dependence.shocks import Shocks
from qpo_sim.numerics import (
    MAX_UNROLLED_ASSETS,
    Rows,
    each_asset,
    materialised,
    regime_matvec,
    regime_rows,
    rounded,
    select,
)
from qpo_sim.random import Address, uniform
from qpo_sim.types import Array

BUILDERS = ("bootstrap", "filtered_historical")

METHODS = ("stationary", "circular", "iid")

# Rows are standardised, so no value comes near it. A number and not NaN, which debugging switches would stumble over.
_MISSING = 1e30


class Resampling(NamedTuple):
    """A bootstrap and what was taken out of the rows: row = mean + std * epsilon, per regime and asset.

    `mean` and `std` (population standard deviation, ddof 0) are what `Market.drift` and `Market.volatility` take.
    """

    shock: "Bootstrap"
    mean: Float64[np.ndarray, "regimes assets"]
    std: Float64[np.ndarray, "regimes assets"]


class Position(NamedTuple):
    """Where each path is: row of the table (-1: none yet), dates left in its block, row of each second walk."""

    row: Int32[Array, " paths"]
    left: Int32[Array, " paths"] | None
    own: tuple[Int32[Array, " paths"], ...]


class Prepared(NamedTuple):
    """What the steps read; see the attributes of `Bootstrap`. `shrink` is 1/sqrt(1 + h^2), None without smoothing."""

    table: Array
    own: tuple[Array, ...]
    renewal: Array | None
    correlation: Array
    mean: Array
    variance: Array
    cumulant: Array
    cumulant_slope: Array
    shrink: Array | None
    spread: Array | None
    noise: Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bootstrap:
    """Rows of a table, resampled in blocks jointly for all assets. Made by `bootstrap` or `filtered_historical`.

    Attributes:
      table: standardised rows, sorted by regime and then by date; a large number stands for a missing value.
      own: for each group of assets with the same gaps, their rows without the gaps, in the same order.
      renewal: probability 1/L that a step starts a new block (stationary), else None.
      covariance: of the resampled shocks, per regime.
      factor: Cholesky factors of `covariance` (smoothed only).
      bandwidth: h of the smoothing per regime, or None.
      mean: of the shocks; 0 up to rounding when they are standardised.
      cumulant: Chebyshev coefficients in 2 s / scale_limit - 1 of (log E exp(s (eps - m))) / s^2, without smoothing.
      cumulant_slope: derivative of log E exp(s (eps - m)) at s = scale_limit.
      counts: dates per regime (static).
      own_assets: assets of each group with gaps (static).
      own_counts: dates of each group, per regime (static).
      method: stationary, circular or iid (static).
      block_length: dates per block of the circular method, else 0 (static).
      random_phase: whether the first circular block of a path is a uniformly drawn part of one, which makes the series
        stationary, instead of a whole one (static).
      scale_limit: largest scale for which `log_mgf` is a fit; beyond, its tangent there (static).
      mgf_error: largest error of `log_mgf` up to `scale_limit` in double precision; at a smaller scale s it is at most
        (s / scale_limit)^2 times that (static).

    Pathwise gradient: bandwidth. None: table, own, covariance, factor, mean, cumulant and its slope, which are data:
    their gradient is stopped, so that differentiating a market does not accumulate into the table; renewal (discrete
    draws).
    """

    table: Float[Array, "dates assets"]
    own: tuple[Float[Array, "_ _"], ...]
    renewal: Float[Array, ""] | None
    covariance: Float[Array, "regimes assets assets"]
    factor: Float[Array, "regimes assets assets"] | None
    bandwidth: Float[Array, " regimes"] | None
    mean: Float[Array, "regimes assets"]
    cumulant: Float[Array, "coefficients regimes assets"]
    cumulant_slope: Float[Array, "regimes assets"]
    counts: tuple[int, ...] = field(metadata={"static": True})
    own_assets: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    own_counts: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    method: str = field(metadata={"static": True})
    block_length: int = field(metadata={"static": True})
    random_phase: bool = field(metadata={"static": True})
    scale_limit: float = field(metadata={"static": True})
    mgf_error: float = field(metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.table.shape[1]

    @property
    def n_regimes(self) -> int:
        """Number of regimes that the dates are told apart by; 1: the same for whatever regimes a market has."""
        return len(self.counts)

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: renewal and start, starts of the second walks, normals of the smoothing."""
        return self._normals_at + (0 if self.bandwidth is None else (self.n_assets + 1) // 2)

    @property
    def _normals_at(self) -> int:
        return 1 + (len(self.own_assets) + 1) // 2

    @property
    def is_conditionally_gaussian(self) -> bool:
        """No: a row is a row."""
        return False

    @property
    def needs_base_step(self) -> bool:
        """Whether base steps cannot be cut: a row is the return of a whole one."""
        return True

    def prepare(self, *, sub_steps: int) -> Prepared:
        """Constants of the steps.

        Raises:
          InputError: more than one sub-step.
        """
        if sub_steps != 1:
            raise InputError(
                f"sub_steps is {sub_steps}; a bootstrap resamples returns of whole base steps: use 1, or data at the "
                f"step you want."
            )
        data = lax.stop_gradient(
            (self.table, self.own, self.covariance, self.mean, self.cumulant, self.cumulant_slope, self.factor)
        )
        table, own, covariance, mean, cumulant, slope, factor = data
        variance = jnp.diagonal(covariance, axis1=1, axis2=2)
        deviation = jnp.sqrt(variance)
        correlation = covariance / (deviation[:, :, None] * deviation[:, None, :])
        shrink, spread, noise = None, None, None
        if self.bandwidth is not None:
            shrink = lax.rsqrt(1.0 + self.bandwidth**2)
            spread = self.bandwidth * shrink
            noise = spread[:, None, None] * factor
        renewal = None if self.renewal is None else lax.stop_gradient(self.renewal)
        return Prepared(table, own, renewal, correlation, mean, variance, cumulant, slope, shrink, spread, noise)

    def init(self, prepared: Prepared, one: Float[Array, " paths"], address: Address) -> Position:
        """No row yet: the first step starts a block. Draws nothing."""
        zero = one.astype(jnp.int32) - 1
        left = zero if self.method == "circular" else None
        return Position(zero - 1, left, (zero,) * len(self.own_assets))

    def step(
        self, prepared: Prepared, t: Array, state: Position, masks: Sequence[Array], address: Address
    ) -> tuple[Position, Shocks]:
        """The next row of each path.

        Raises:
          InputError: the dates are told apart by another number of regimes than the market has.
        """
        masks = self._own_masks(masks)
        state = self._move(prepared, state, masks, address)
        eps = materialised(_rows_of)(prepared.table, state.row)
        if self.own_assets:
            own = [materialised(_columns_of)(table, row) for table, row in zip(prepared.own, state.own, strict=True)]
            eps = materialised(self._filled)(eps, own)
        if prepared.shrink is not None:
            n_pairs = (self.n_assets + 1) // 2
            pairs = _unit(lambda at: at.normal_pairs(n_pairs), address.after(self._normals_at))
            eps = materialised(self._smoothed)(prepared, prepared.shrink, masks, eps, pairs)
        return state, Shocks(eps)

    def log_mgf(self, prepared: Prepared, masks: Sequence[Array], scale: Rows) -> Rows:
        r"""$\log E[e^{s_i \varepsilon_i}]$ given the regime, averaged over all dates, for scales $s_i \ge 0$.

        A fit of the exact sum up to `scale_limit` (error: `mgf_error`), its tangent beyond, which is too low.

        Pathwise gradient: scale, bandwidth.
        """
        masks = self._own_masks(masks)
        return materialised(self._cumulants)(prepared, masks, scale)

    def correlation(self, prepared: Prepared, masks: Sequence[Array], i: int, j: int) -> Array:
        """Correlation of assets i and j given the regime, smoothed or not: that of the resampled rows."""
        return select(self._own_masks(masks), prepared.correlation[:, i, j])

    def _own_masks(self, masks: Sequence[Array]) -> tuple[Array, ...]:
        if self.n_regimes == 1:
            return ()
        if len(masks) != self.n_regimes - 1:
            raise InputError(
                f"the bootstrap's dates have {self.n_regimes} regimes and the market has {len(masks) + 1}; label the "
                f"dates with the market's regimes, or give no labels."
            )
        return tuple(masks)

    def _move(self, prepared: Prepared, state: Position, masks: tuple[Array, ...], address: Address) -> Position:
        def walk(at: Address, renewal, state: Position, masks):
            ring = _ring(self.counts, masks)
            word0, word1 = at.words(2)
            # A row outside the ring of the present regime: the regime has changed, or there is no row yet.
            opens = (state.row < ring.start) | (state.row >= ring.start + ring.count)
            left = None
            if self.method == "stationary":
                opens = opens | (uniform(word0).astype(renewal.dtype) < renewal)
            elif state.left is not None:
                opens = opens | (state.left == 0)
                whole = np.int32(self.block_length - 1)
                if self.random_phase:
                    whole = jnp.where(state.row < 0, _below(word0, self.block_length), whole)
                left = jnp.where(opens, whole, state.left - 1)
            else:
                opens = jnp.ones_like(opens)
            return opens, Position(_walked(ring, state.row, opens, word1), left, ())

        opens, after = _unit(walk, address, prepared.renewal, state, masks)
        if not self.own_assets:
            return after

        def walk_own(at: Address, opens, own, masks):
            words = at.words(len(own))
            rings = [_ring(counts, masks) for counts in self.own_counts]
            return tuple(_walked(ring, row, opens, w) for ring, row, w in zip(rings, own, words, strict=True))

        return after._replace(own=_unit(walk_own, address.after(1), opens, state.own, masks))

    def _filled(self, eps: Rows, own: list[tuple[Array, ...]]) -> Rows:
        borrowed = {
            asset: row
            for assets, rows in zip(self.own_assets, own, strict=True)
            for asset, row in zip(assets, rows, strict=True)
        }
        if not hasattr(eps, "ndim"):
            return tuple(
                jnp.where(e < 0.5 * _MISSING, e, borrowed[i]) if i in borrowed else e for i, e in enumerate(eps)
            )
        # Assets without gaps read row 0 and do not use it.
        place = {asset: k for k, asset in enumerate(borrowed)}
        rows = jnp.stack(list(borrowed.values()))
        return jnp.where(
            eps < 0.5 * _MISSING, eps, rows[np.array([place.get(i, 0) for i in range(self.n_assets)], np.int32)]
        )

    def _smoothed(self, prepared: Prepared, shrinks: Array, masks: tuple[Array, ...], eps: Rows, pairs: Any) -> Rows:
        dtype = prepared.table.dtype
        z = [row.astype(dtype) for pair in pairs for row in pair][: self.n_assets]
        noise = materialised(lambda factor, masks, z: regime_matvec(factor, masks, z))(prepared.noise, masks, z)
        shrink = select(masks, shrinks)
        centre = regime_rows(masks, prepared.mean * (1.0 - shrinks[:, None]), eps)
        return each_asset(lambda e, n, c: e * shrink + n + c, eps, noise, centre)

    def _cumulants(self, prepared: Prepared, masks: tuple[Array, ...], scale: Rows) -> Rows:
        limit = self.scale_limit
        n_terms = prepared.cumulant.shape[0]
        shrink = None if prepared.shrink is None else select(masks, prepared.shrink)
        spread = 0.0 if prepared.spread is None else select(masks, prepared.spread)

        def one_asset(s: Array, *numbers: Array) -> Array:
            per_number = [numbers[k :: n_terms + 3] for k in range(n_terms + 3)]
            mean, variance, slope, *coefficients = (select(masks, number) for number in per_number)
            shrunk = s if shrink is None else s * shrink
            inside = jnp.minimum(shrunk, limit)
            value = inside * inside * _clenshaw(coefficients, inside * (2.0 / limit) - 1.0)
            value = value + (shrunk - inside) * slope + s * mean
            return value if shrink is None else value + 0.5 * variance * (s * spread) ** 2

        tables = [prepared.mean, prepared.variance, prepared.cumulant_slope, *prepared.cumulant]
        columns = [table[k] for k in range(self.n_regimes) for table in tables]
        return each_asset(one_asset, scale, *columns)


class _Ring(NamedTuple):
    # First row and number of rows of the ring that a path is on: numbers, or rows of paths.
    start: Any
    count: Any


def _ring(counts: tuple[int, ...], masks: tuple[Array, ...]) -> _Ring:
    starts = np.cumsum((0, *counts[:-1]))
    if len(counts) == 1:
        return _Ring(np.int32(0), np.int32(counts[0]))
    # Whole numbers below 2^24 are exact in single precision, and so are their differences.
    table = np.stack([starts, counts]).astype(masks[0].dtype)
    start, count = (select(masks, row).astype(jnp.int32) for row in table)
    return _Ring(start, count)


def _walked(ring: _Ring, row: Array, opens: Array, word: Array) -> Array:
    following = row + 1
    following = jnp.where(following == ring.start + ring.count, ring.start, following)
    return jnp.where(opens, ring.start + _below(word, ring.count), following)


def _below(word: UInt32[Array, " paths"], count: Any) -> Int32[Array, " paths"]:
    """Uniform whole number below `count`: the upper half of the 64-bit product of word and count, in 16-bit limbs."""
    low, shift = np.uint32(0xFFFF), np.uint32(16)
    n = jnp.asarray(count).astype(jnp.uint32)
    word_high, word_low, n_high, n_low = word >> shift, word & low, n >> shift, n & low
    middle = word_high * n_low + (word_low * n_low >> shift)
    carried = (middle & low) + word_low * n_high
    return (word_high * n_high + (middle >> shift) + (carried >> shift)).astype(jnp.int32)


def _unit(function: Callable[..., Any], address: Address, *arguments: Any) -> Any:
    """`function(address, *arguments)` as a stored unit; the slot stays a Python number."""
    slot = address.slot

    def inside(key, path, step, mirror, *arguments):
        return function(Address(key, path, step, slot, mirror), *arguments)

    return materialised(inside)(address.key, address.path, address.step, address.mirror, *arguments)


def _rows_of(table: Array, row: Array) -> Rows:
    # One gather of whole rows. Measured on CPU at 1, 10 and 100 assets against a gather per asset: alike with few
    # assets (1.9 ns per path and asset at 10), and with 100 assets of hourly dates, a table that no cache holds,
    # 1.3 ns against 5.
    values = table.at[row].get(mode="promise_in_bounds")
    return values.T if table.shape[1] > MAX_UNROLLED_ASSETS else tuple(values[:, i] for i in range(table.shape[1]))


def _columns_of(table: Array, row: Array) -> tuple[Array, ...]:
    values = table.at[row].get(mode="promise_in_bounds")
    return tuple(values[:, i] for i in range(table.shape[1]))


def _clenshaw(coefficients: Sequence[Array], y: Array) -> Array:
    """Chebyshev series; monomials of this degree would lose digits in single precision."""
    before, value = jnp.zeros_like(y), jnp.zeros_like(y)
    for coefficient in coefficients[:0:-1]:
        before, value = value, 2.0 * y * value - before + coefficient
    return y * value - before + coefficients[0]


def bootstrap(
    returns: Float[Array, "dates assets"],
    *,
    method: str = "stationary",
    block_length: float | str = "squares",
    regimes: Sequence[int] | None = None,
    n_regimes: int | None = None,
    missing: str = "complete",
    smoothing: float | str | None = None,
    random_phase: bool = True,
    scale_limit: float = 0.5,
    dtype: Any = jnp.float32,
) -> Resampling:
    """Bootstrap of log-returns (or of any rows of numbers, one per base step), standardised per regime and asset.

    Args:
      returns: one row per date in order of time, one column per asset; NaN where there is none.
      method: stationary, circular or iid.
      block_length: expected (stationary) or exact (circular) number of dates per block, at least 1; or "squares" or
        "returns": chosen by `optimal_block_length` from the (squared) standardised rows, the mean over assets. Not used
        by iid.
      regimes: regime of each date, 0 .. n_regimes - 1, those of the market; None: the same dates in every regime.
      n_regimes: number of regimes, by default the largest label plus one.
      missing: complete or own_dates, see the top of the file.
      smoothing: bandwidth h >= 0 of the smoothed bootstrap, or silverman, (4/((d+2) n))^(1/(d+4)), or scott,
        n^(-1/(d+4)), with n dates of the regime and d assets; None: off.
      random_phase: see `Bootstrap`.
      scale_limit: largest standard deviation of a step for which `log_mgf` shall be exact.
      dtype: precision of the paths.

    Raises:
      InputError: a field breaks one of these rules, a column has no or too few values or is constant, a regime has too
        few dates, or the covariance is singular where smoothing needs it.
    """
    rows = resampled_rows.checked_rows(returns, "returns")
    return _resampling(
        rows, method, block_length, regimes, n_regimes, missing, smoothing, random_phase, scale_limit, True, dtype
    )


def filtered_historical(
    returns: Float[Array, "dates assets"],
    conditional_volatility: Float[Array, "dates assets"] | Float[Array, " dates"],
    *,
    mean: float | Float[Array, " assets"] = 0.0,
    restandardised: bool = True,
    method: str = "iid",
    block_length: float | str = 1.0,
    regimes: Sequence[int] | None = None,
    n_regimes: int | None = None,
    missing: str = "complete",
    smoothing: float | str | None = None,
    random_phase: bool = True,
    scale_limit: float = 0.5,
    dtype: Any = jnp.float32,
) -> Resampling:
    r"""Filtered historical simulation: rows of standardised residuals $(r_t - \mu)/\sigma_t$ of a volatility model.

    Barone-Adesi, Giannopoulos & Vosper (1999). Use it with the same model as `Market.volatility_model`, started from
    the last filtered variance. Other arguments are those of `bootstrap`.

    Args:
      returns: one row per date, in the unit of the volatility.
      conditional_volatility: standard deviation of each return given the dates before it, from the fitted model.
      mean: conditional mean, a number or one per asset.
      restandardised: take the residuals' own mean and standard deviation out, so that epsilon has mean 0 and variance
        1 as the volatility model assumes; they are returned. False: epsilon are the residuals themselves, and the
        returned mean and std 0 and 1.
      method: see `bootstrap`.
      block_length: see `bootstrap`.
      regimes: see `bootstrap`.
      n_regimes: see `bootstrap`.
      missing: see `bootstrap`.
      smoothing: see `bootstrap`.
      random_phase: see `bootstrap`.
      scale_limit: see `bootstrap`.
      dtype: see `bootstrap`.

    Raises:
      InputError: as `bootstrap`; or a volatility that is not positive on a date with a return, or of another shape.
    """
    rows = resampled_rows.checked_rows(returns, "returns")
    volatility = np.asarray(conditional_volatility, np.float64)
    volatility = volatility[:, None] if volatility.ndim == 1 else volatility
    if volatility.shape not in (rows.shape, (rows.shape[0], 1)):
        raise InputError(
            f"conditional_volatility has the shape {volatility.shape} and returns {rows.shape}; give one row per date "
            f"and one column per asset (or one for all)."
        )
    volatility = np.broadcast_to(volatility, rows.shape)
    bad = np.argwhere(~np.isnan(rows) & ~((volatility > 0.0) & np.isfinite(volatility)))
    if bad.size:
        date, asset = bad[0]
        raise InputError(
            f"conditional_volatility is {volatility[date, asset]} in row {date}, column {asset}, where there is a "
            f"return; it must be positive and finite."
        )
    centre = np.asarray(mean, np.float64)
    if centre.shape not in ((), (rows.shape[1],)) or not np.all(np.isfinite(centre)):
        raise InputError(f"mean is {mean}; it must be a finite number, or one per asset ({rows.shape[1]}).")
    residuals = (rows - centre) / np.where(np.isnan(rows), 1.0, volatility)
    return _resampling(
        residuals, method, block_length, regimes, n_regimes, missing, smoothing, random_phase, scale_limit,
        restandardised, dtype,
    )  # fmt: skip


def example(n_assets: int, dtype: Any) -> Bootstrap:
    """Three years of daily heavy-tailed returns with a common factor and clustered volatility, in blocks of 10 days."""
    generator = np.random.default_rng(11)
    n_dates, burn_in = 1096, 100
    log_variance = np.zeros(n_dates + burn_in)
    for t in range(1, log_variance.size):
        log_variance[t] = 0.95 * log_variance[t - 1] + 0.25 * generator.standard_normal()
    level = np.exp(0.5 * log_variance[burn_in:, None])
    common, own = generator.standard_t(5.0, (n_dates, 1)), generator.standard_t(5.0, (n_dates, n_assets))
    return bootstrap(0.03 * level * (0.8 * common + 0.6 * own), block_length=10.0, dtype=dtype).shock


def _resampling(
    rows, method, block_length, regimes, n_regimes, missing, smoothing, random_phase, scale_limit, standardised, dtype
) -> Resampling:
    if method not in METHODS:
        raise InputError(f"bootstrap method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if not (scale_limit > 0.0 and np.isfinite(scale_limit)):
        raise InputError(f"bootstrap scale_limit is {scale_limit}; it must be a positive standard deviation per step.")
    table = resampled_rows.by_regime(rows, regimes, n_regimes, missing, standardised)
    length = resampled_rows.dates_per_block(block_length, method, table.in_time)
    covariance = np.stack([resampled_rows.covariance(part, table.groups) for part in table.parts])
    counts = tuple(len(part) for part in table.parts)
    bandwidth = resampled_rows.bandwidths(smoothing, counts, rows.shape[1])
    cumulant, slope, error = resampled_rows.cumulant_fit(table.parts, scale_limit)
    # The dates of each group with gaps, regime after regime.
    own = [[part[~np.isnan(part[:, g[0]])][:, list(g)] for part in table.parts] for g in table.groups]
    shock = Bootstrap(
        table=rounded(np.nan_to_num(np.concatenate(table.parts), nan=_MISSING), dtype),
        own=tuple(rounded(np.concatenate(parts), dtype) for parts in own),
        renewal=rounded(1.0 / length, dtype) if method == "stationary" else None,
        covariance=rounded(covariance, dtype),
        factor=None if bandwidth is None else rounded(resampled_rows.cholesky(covariance), dtype),
        bandwidth=None if bandwidth is None else rounded(bandwidth, dtype),
        mean=rounded(np.stack([np.nanmean(part, axis=0) for part in table.parts]), dtype),
        cumulant=rounded(cumulant, dtype),
        cumulant_slope=rounded(slope, dtype),
        counts=counts,
        own_assets=table.groups,
        own_counts=tuple(tuple(len(part) for part in parts) for parts in own),
        method=method,
        block_length=int(length) if method == "circular" else 0,
        random_phase=bool(random_phase),
        scale_limit=float(scale_limit),
        mgf_error=error,
    )
    return Resampling(shock, table.mean, table.std)
