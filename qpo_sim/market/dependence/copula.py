r"""Copulas: the dependence of one law with the margins of others.

A score $x_i$ of a mixture (`mixture`: Gaussian, Student-t, grouped t, skew t, ...) with distribution function $G_i$
becomes the shock $\varepsilon_i = F_i^{-1}(G_i(x_i))$, whose law is the margin $F_i$ (`market.marginal`), while copula
and rank correlation stay those of the score. McNeil, Frey & Embrechts (2015) ch. 7.

The map is tabulated once per run on the host in float64: G by quadrature over the mixing variable, in each tail from
its own probability; a uniform grid in asinh x (in x for the Gaussian), where the map is nearly linear; linear between
its points. Its relative error at the 99.99 % quantile is below 1e-4 for t margins of dof 3 and more (tested).

**The cut.** The margins are held beyond their quantiles `cut` and 1 - `cut`, so that exp of a return has a mean, and
the mean is put back to zero; quantiles between move by that mean alone (less than 1e-3). The variance after it is
smaller: by 0.5 % for a t margin of dof 4, 3 % for 3, and more where it hardly existed (see `Copula.variance`). The
mixing variable of the score is not cut: that would only touch the dependence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Complex, Float

from qpo_sim.errors import InputError
from qpo_sim.market import marginal
from qpo_sim.market.dependence import mixture
from qpo_sim.market.dependence.mixture import Mixture, check_cut
from qpo_sim.market.dependence.shocks import Shocks
from qpo_sim.market.mixing_law import (
    LAWS,
    N_MGF_ROWS,
    by_regime,
    log_mgf_column,
    log_mgf_rows,
    masks_of,
    mixing_law,
    on_host,
    tabulated,
)
from qpo_sim.market.shock import SCORE_RANGE
from qpo_sim.numerics import Rows, each_asset, materialised, rounded
from qpo_sim.types import Array

BUILDERS = ("gaussian_copula", "t_copula", "skew_t_copula")

MARGIN_CUT = 1e-5
N_CELLS = 1024
# Quantile functions of the margins are kept at equidistant normal scores.
_N_NODES = 4097
_NODES = np.linspace(-SCORE_RANGE, SCORE_RANGE, _N_NODES)
_N_QUADRATURE = 2000


def tail_dependence_t(dof: Any, rho: Any) -> np.ndarray:
    r"""Coefficient of tail dependence of the t copula, $2\,t_{\nu+1}\big(-\sqrt{(\nu+1)(1-\rho)/(1+\rho)}\big)$.

    The same for both tails. McNeil, Frey & Embrechts (2015) sec. 7.3.
    """
    from scipy import special

    dof, rho = np.asarray(dof, np.float64), np.asarray(rho, np.float64)
    return 2.0 * special.stdtr(dof + 1.0, -np.sqrt((dof + 1.0) * (1.0 - rho) / (1.0 + rho)))


def _score_range(cut: float) -> float:
    # Normal score of the probability beyond which the margins are held.
    from scipy import special

    return min(-float(special.ndtri(cut)), SCORE_RANGE) if cut > 0.0 else SCORE_RANGE


@dataclass(frozen=True)
class _ScoreLaw:
    # Normal score s of asinh x for a mixture score x: Phi(s) = G(x).
    family: str
    cut: float

    def scores(self, y: np.ndarray, shape: float, skew: float) -> np.ndarray:
        from scipy import special

        value, weight = mixing_law(self.family, self.cut, shape)
        scale = np.sqrt(1.0 + skew**2 * LAWS[self.family].variance(shape)) if skew else 1.0
        z = (np.sinh(y)[:, None] * scale - skew * (value - weight @ value)) / np.sqrt(value)
        lower, upper = special.ndtr(z) @ weight, special.ndtr(-z) @ weight
        return np.where(lower < 0.5, special.ndtri(np.minimum(lower, 0.5)), -special.ndtri(np.minimum(upper, 0.5)))


@dataclass(frozen=True)
class RangeTable(_ScoreLaw):
    """Ends of the grid in asinh x, where the score has the normal score -bound and bound; no gradient."""

    bound: float
    n_rows: int = 2

    def column(self, shape: float, skew: float) -> np.ndarray:
        """Both ends for one asset."""
        from scipy import optimize

        ends = []
        for target in (-self.bound, self.bound):
            ends.append(
                optimize.brentq(
                    lambda y, s=target: self.scores(np.array([y]), shape, skew)[0] - s, -14.0, 14.0, xtol=1e-9
                )
            )
        return np.array(ends)

    def steps(self, shape: np.ndarray, skew: np.ndarray) -> Sequence[np.ndarray | None]:
        """None: where the grid ends is not differentiated."""
        return None, None


@dataclass(frozen=True)
class ScoreTable(_ScoreLaw):
    """Normal scores on the grid between two ends, by shape, skew, and the ends."""

    n_cells: int

    @property
    def n_rows(self) -> int:
        """Points of the grid."""
        return self.n_cells + 1

    def column(self, shape: float, skew: float, low: float, high: float) -> np.ndarray:
        """Scores for one asset."""
        return self.scores(np.linspace(low, high, self.n_cells + 1), shape, skew)

    def steps(
        self, shape: np.ndarray, skew: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> Sequence[np.ndarray | None]:
        """Steps in shape and skew."""
        is_skewed = self.family != "student_t"
        step = 1e-4 * (shape - LAWS[self.family].limits[0])
        return step, 1e-4 * (1.0 + np.abs(skew)) if is_skewed else None, None, None


class Prepared(NamedTuple):
    """What the kernel reads of a copula.

    Attributes:
      score: of the mixture.
      cells: value at the start of each cell of the map (real part) and its step over the cell (imaginary part); cells
        of a regime are together, regimes of an asset are together.
      low: coordinate where the grid begins.
      density: cells per unit of the coordinate.
      mgf: table of `log_mgf_rows`, None without a cut.
    """

    score: mixture.Prepared
    cells: Complex[Array, " cells"]
    low: Float[Array, "regimes assets"]
    density: Float[Array, "regimes assets"]
    mgf: Float[Array, "rows regimes assets"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Copula:
    """Margins joined by the copula of a mixture (see the module). Only for whole base steps.

    Attributes:
      score: the mixture whose copula it is.
      quantiles: quantile function of each margin at equidistant normal scores in +-5.6; leading axis of length one for
        all regimes.
      cut: probability at either end beyond which the margins are held (static).
      n_cells: cells of the tabulated map (static).

    Pathwise gradient: score (cholesky, shape, skew). None: quantiles, that is the parameters of the margins.
    """

    score: Mixture
    quantiles: Float[Array, "margin_regimes assets nodes"]
    cut: float = field(default=MARGIN_CUT, metadata={"static": True})
    n_cells: int = field(default=N_CELLS, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.score.n_assets

    @property
    def n_regimes(self) -> int:
        """Number of regimes that the parameters tell apart; one serves any number."""
        return max(self.score.n_regimes, len(self.quantiles))

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return self.score.n_slots

    @property
    def is_conditionally_gaussian(self) -> bool:
        """Only the score is."""
        return False

    @property
    def needs_base_step(self) -> bool:
        """A sum of shocks with these margins has other margins."""
        return True

    def prepare(self, *, sub_steps: int = 1) -> Prepared:
        """Constants per base step.

        Raises:
          InputError: the base step is to be cut.
        """
        if sub_steps != 1:
            raise InputError(
                f"a copula has its margins over one base step of the market and cannot be cut into {sub_steps}; "
                "simulate whole base steps."
            )
        bound = _score_range(self.cut)
        quantiles = lax.stop_gradient(self.quantiles)
        score, low, high = self._grid(bound)
        value = _interpolate(quantiles, jnp.moveaxis(score, 0, -1))
        # Held ends pull the mean of a skewed margin off zero.
        mean = jnp.einsum("kij,j->ki", quantiles, _mean_weights(bound).astype(quantiles.dtype), precision="highest")
        value = value - mean[:, :, None]
        pairs = lax.complex(value[..., :-1], jnp.diff(value, axis=-1))
        n_regimes = pairs.shape[0]
        return Prepared(
            score=self.score.prepare(),
            cells=jnp.moveaxis(pairs, 0, 1).reshape(-1),
            low=jnp.broadcast_to(low, (n_regimes, self.n_assets)),
            density=jnp.broadcast_to(self.n_cells / (high - low), (n_regimes, self.n_assets)),
            mgf=self._mgf(quantiles, bound) if self.cut > 0.0 else None,
        )

    def init(self, prepared: Prepared, one: Array, address: Any) -> Any:
        """State of the score."""
        return self.score.init(prepared.score, one, address)

    def step(self, prepared: Prepared, t: Any, state: Any, masks: Sequence[Array], address: Any) -> tuple[Any, Shocks]:
        """Shocks of base step t."""
        state, scores = self.score.step(prepared.score, t, state, masks, address)
        return state, Shocks(materialised(self.shocks_of)(prepared, masks, scores.eps))

    def shocks_of(self, prepared: Prepared, masks: Sequence[Array], score: Rows) -> Rows:
        """The map from scores to shocks; its slope is zero where the margins are held."""
        n_regimes, n_cells = prepared.low.shape[0], self.n_cells
        masks = masks_of(masks, prepared.low)
        first = np.arange(self.n_assets, dtype=np.int32) * np.int32(n_regimes * n_cells)
        is_gaussian = self.score.shape is None

        def regime_cell(like: Array) -> Array:
            number = sum((float(k + 1) * mask for k, mask in enumerate(masks)), jnp.zeros_like(like))
            return (number + 0.5).astype(jnp.int32) * np.int32(n_cells)

        def value(x: Array, low: Array, density: Array, start: Any) -> Array:
            y = x if is_gaussian else _asinh(x)
            place = jnp.clip((y - low) * density, 0.0, float(n_cells))
            # Clipped as an integer too: not a number would read anywhere.
            cell = jnp.clip(place.astype(jnp.int32), np.int32(0), np.int32(n_cells - 1))
            index = cell + start + regime_cell(x) if n_regimes > 1 else cell + start
            # One gather of pairs: two of numbers cost several times as much on a CPU.
            pair = prepared.cells.at[index].get(mode="promise_in_bounds")
            return pair.real + (place - cell.astype(x.dtype)) * pair.imag

        low, density = (by_regime(masks, x, score) for x in (prepared.low, prepared.density))
        return each_asset(value, score, low, density, first)

    def log_mgf(self, prepared: Prepared, masks: Sequence[Array], scale: Rows) -> Rows | None:
        """Log E exp(scale_i eps_i) of the cut margins; None without a cut.

        See `mixing_law.log_mgf_column` for range and error. Pathwise gradient: scale.
        """
        return None if prepared.mgf is None else log_mgf_rows(prepared.mgf, masks, scale)

    def correlation(self, prepared: Prepared, masks: Sequence[Array], i: int, j: int) -> Array:
        """Correlation of the Gaussian parts of the scores of assets i and j."""
        return self.score.correlation(prepared.score, masks, i, j)

    def variance(self) -> np.ndarray:
        """Variance of the shocks after the cut, (regimes, assets); of the score's regimes it does not depend."""
        points, weight = _margin_quadrature(_score_range(self.cut))
        rows = np.asarray(self.quantiles, np.float64).reshape(-1, _N_NODES)
        values = np.stack([np.interp(points, _NODES, row) for row in rows])
        found = values**2 @ weight - (values @ weight) ** 2
        return found.reshape(self.quantiles.shape[:-1])

    def _grid(self, bound: float) -> tuple[Array, Array, Array]:
        # Normal scores on the grid (points first), and its ends, by regime and asset.
        score = self.score
        dtype = score.cholesky.dtype
        if score.shape is None:
            ends = jnp.full((1, self.n_assets), bound, dtype)
            points = jnp.linspace(-bound, bound, self.n_cells + 1, dtype=dtype)
            return points[:, None, None] * jnp.ones_like(ends), -ends, ends
        shape = score.shape[:, list(score.groups)]
        skew = jnp.zeros_like(shape) if score.skew is None else score.skew
        shape, skew = jnp.broadcast_arrays(shape, skew)
        low, high = lax.stop_gradient(tabulated(RangeTable(score.family, score.cut, bound), shape, skew))
        return tabulated(ScoreTable(score.family, score.cut, self.n_cells), shape, skew, low, high), low, high

    def _mgf(self, quantiles: Array, bound: float) -> Array:
        points, weight = _margin_quadrature(bound)

        def columns(nodes: np.ndarray) -> np.ndarray:
            flat = nodes.reshape(-1, nodes.shape[-1])
            distinct, where = np.unique(flat, axis=0, return_inverse=True)
            found = []
            for row in distinct:
                value = np.interp(points, _NODES, row)
                found.append(log_mgf_column(value - weight @ value, weight, 1.0, 0.0, self.cut))
            return np.stack(found, axis=1)[:, where.ravel()].reshape(N_MGF_ROWS, *nodes.shape[:-1])

        return on_host(columns, (N_MGF_ROWS, *quantiles.shape[:-1]), quantiles)


def _margin_quadrature(bound: float) -> tuple[np.ndarray, np.ndarray]:
    # Normal scores in rising order, both held ends included, and their weights.
    from scipy import special

    # Trapezoids: the integrand is smooth and next to nothing at both ends.
    points = np.linspace(-bound, bound, _N_QUADRATURE)
    weights = np.exp(-0.5 * points**2) / np.sqrt(2.0 * np.pi) * (points[1] - points[0])
    weights[[0, -1]] *= 0.5
    weights[[0, -1]] += special.ndtr(-bound)
    return points, weights


def _mean_weights(bound: float) -> np.ndarray:
    # The mean of a held margin is linear in its quantiles at the nodes.
    points, weight = _margin_quadrature(bound)
    place = (points + SCORE_RANGE) * ((_N_NODES - 1) / (2.0 * SCORE_RANGE))
    cell = np.clip(place.astype(int), 0, _N_NODES - 2)
    found = np.zeros(_N_NODES)
    np.add.at(found, cell, weight * (1.0 - (place - cell)))
    np.add.at(found, cell + 1, weight * (place - cell))
    return found


def _interpolate(quantiles: Array, score: Array) -> Array:
    # Linear in the normal score; (regimes, assets, points), either leading axis of length one for all regimes.
    n_regimes = max(quantiles.shape[0], score.shape[0])
    quantiles = jnp.broadcast_to(quantiles, (n_regimes, *quantiles.shape[1:]))
    score = jnp.broadcast_to(score, (n_regimes, *score.shape[1:]))
    place = jnp.clip((score + SCORE_RANGE) * ((_N_NODES - 1) / (2.0 * SCORE_RANGE)), 0.0, float(_N_NODES - 1))
    cell = jnp.minimum(place.astype(jnp.int32), np.int32(_N_NODES - 2))
    start = jnp.take_along_axis(quantiles, cell, axis=-1)
    end = jnp.take_along_axis(quantiles, cell + np.int32(1), axis=-1)
    return start + (place - cell.astype(place.dtype)) * (end - start)


def _asinh(x: Array) -> Array:
    # Through |x|, so that nothing cancels below zero.
    size = jnp.where(x < 0.0, -x, x)
    value = jnp.log(size + jnp.sqrt(size * size + 1.0))
    return jnp.where(x < 0.0, -value, value)


def copula(score: Mixture, margins: Any, *, cut: float = MARGIN_CUT, n_cells: int = N_CELLS) -> Copula:
    """Margins joined by the copula of any mixture.

    Args:
      score: the mixture; give it `cut=0`, as its own tails do not reach the shocks.
      margins: as `marginal.margins` takes them (one for all assets, or one per asset), or a sequence of such sequences,
        one per regime.
      cut: probability in [0, 0.01] at either end beyond which the margins are held; 0 leaves the shocks without
        exponential moments (and holds them at 1e-8).
      n_cells: cells of the tabulated map.

    Raises:
      InputError: margins that are not standardised, whose number differs from the assets', or that do not rise; a cut
        outside [0, 0.01].
    """
    from scipy import special

    cut = check_cut(cut)
    if n_cells < 64:
        raise InputError(f"n_cells is {n_cells}; the map needs at least 64.")
    is_by_regime = isinstance(margins, list | tuple) and len(margins) > 0 and isinstance(margins[0], list | tuple)
    by_state = [marginal.margins(row, score.n_assets) for row in (margins if is_by_regime else [margins])]
    sizes = {len(x) for x in (score.shape, score.skew, score.cholesky, by_state) if x is not None} - {1}
    if len(sizes) > 1:
        raise InputError(f"score and margins are given for {sorted(sizes)} regimes; they must agree.")
    u = np.where(_NODES < 0.0, special.ndtr(_NODES), 1.0 - special.ndtr(-_NODES))
    nodes = np.stack([np.stack([_quantiles(margin, u, i) for i, margin in enumerate(row)]) for row in by_state])
    dtype = score.cholesky.dtype
    return Copula(score, rounded(nodes, dtype), cut, int(n_cells))


def _quantiles(margin: marginal.Margin, u: np.ndarray, asset: int) -> np.ndarray:
    if not margin.is_standardised:
        raise InputError(f"the margin of asset {asset + 1} is not standardised; a shock needs mean 0 and variance 1.")
    values = np.asarray(margin.quantile(u), np.float64)
    if not (np.all(np.isfinite(values)) and np.all(np.diff(values) >= 0.0)):
        raise InputError(f"the quantile function of the margin of asset {asset + 1} does not rise, or is not finite.")
    return values


def gaussian_copula(
    correlation: Any, margins: Any, *, cut: float = MARGIN_CUT, n_cells: int = N_CELLS, dtype: Any = jnp.float32
) -> Copula:
    """Gaussian copula: no tail dependence.

    Args:
      correlation: of the normal scores; see `mixture.gaussian`.
      margins: see `copula`.
      cut: see `copula`.
      n_cells: see `copula`.
      dtype: precision of the paths.
    """
    return copula(mixture.gaussian(correlation, dtype=dtype), margins, cut=cut, n_cells=n_cells)


def t_copula(
    dof: Any,
    correlation: Any,
    margins: Any,
    *,
    mixing: str = "shared",
    groups: Sequence[int] | None = None,
    cut: float = MARGIN_CUT,
    n_cells: int = N_CELLS,
    dtype: Any = jnp.float32,
) -> Copula:
    """Student-t copula, or grouped t copula; with t margins of other dof the meta-t laws.

    Args:
      dof: degrees of freedom of the copula, each > 2; see `mixture.student_t`.
      correlation: of the Gaussian part; sin(pi tau / 2) for a shared dof and Kendall's tau.
      margins: see `copula`.
      mixing: see `mixture.student_t`.
      groups: see `mixture.student_t`.
      cut: see `copula`.
      n_cells: see `copula`.
      dtype: precision of the paths.
    """
    score = mixture.student_t(dof, correlation, mixing=mixing, groups=groups, cut=0.0, dtype=dtype)
    return copula(score, margins, cut=cut, n_cells=n_cells)


def skew_t_copula(
    dof: Any,
    skew: Any,
    correlation: Any,
    margins: Any,
    *,
    cut: float = MARGIN_CUT,
    n_cells: int = N_CELLS,
    dtype: Any = jnp.float32,
) -> Copula:
    """Copula of the generalised-hyperbolic skew t: with a negative skew joint falls are likelier than joint rises.

    Args:
      dof: see `mixture.skew_t`.
      skew: see `mixture.skew_t`.
      correlation: of the Gaussian part.
      margins: see `copula`.
      cut: see `copula`.
      n_cells: see `copula`.
      dtype: precision of the paths.
    """
    score = mixture.skew_t(dof, skew, correlation, cut=0.0, dtype=dtype)
    return copula(score, margins, cut=cut, n_cells=n_cells)


def example(n_assets: int, dtype: Any = jnp.float32) -> Copula:
    """Student-t copula with the dof and margins of daily crypto returns."""
    correlation = np.full((n_assets, n_assets), 0.6) + 0.4 * np.eye(n_assets)
    return t_copula(4.2, correlation, marginal.HansenSkewT(3.3, -0.05), dtype=dtype)
