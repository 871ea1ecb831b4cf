r"""Laws of the mixing variable of normal mixtures: drawn by a polynomial, with what follows from them as tables.

A mixing variable V > 0 has mean one. $\log V$ is a polynomial in a normal score, fitted to the exact quantile on the
host in float64: no rejection, no branch, monotone, and differentiable in the shape (what implicit reparameterisation
gives). The score is that of `market.shock` with the other sign: V rises with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float
from numpy.polynomial import chebyshev

from qpo_sim.market.shock import SCORE_RANGE, score_floor
from qpo_sim.numerics import Rows, each_asset, polynomial, regime_rows, select
from qpo_sim.types import Array

# Largest scale (standard deviation of one step's log-return) that the fitted log moment generating function covers.
MAX_SCALE = 1.0

# Degree of log V in the score. The relative error of sqrt(V), worst over the scores, is below 1e-6 for the t families,
# 3e-4 for NIG and 1e-3 for variance gamma at the smallest shapes allowed, in single precision too.
DEGREE = 20
MGF_DEGREE = 16
_NODES = np.cos(np.pi * (np.arange(97) + 0.5) / 97)
_MGF_NODES = np.cos(np.pi * (np.arange(65) + 0.5) / 65)
# Quadrature over the score: the normal law has mass 1e-17 beyond.
_FAR_SCORE = 8.5
_N_QUADRATURE = 256
# Exponent above which the moment generating function is left to its slope: exp(60) is no forecast of a price.
_MAX_EXPONENT = 60.0


class Law(NamedTuple):
    """Mixing law of a family.

    `quantile(shape, lower, upper)` takes both tail probabilities, so that neither loses digits to 1 - p; `limits` are
    the open lower end of the shape (where V, or its variance, stops to exist), the smallest and the largest shape
    (larger ones are the same to single precision) that the polynomial is tested for.
    """

    quantile: Callable[[Any, Any, Any], Any]
    variance: Callable[[Any], Any]
    limits: tuple[float, float, float]
    is_cut: bool
    parameter: str


def _inverse_gamma(shape: Any, lower: Any, upper: Any) -> Any:
    from scipy import special

    # V is large where the chi-square is small.
    small = special.gammaincinv(shape / 2.0, np.minimum(upper, 0.5))
    large = special.gammainccinv(shape / 2.0, np.minimum(lower, 0.5))
    return (shape - 2.0) / (2.0 * np.where(lower < 0.5, large, small))


def _inverse_gaussian(shape: Any, lower: Any, upper: Any) -> Any:
    from scipy import stats

    law: Any = stats.invgauss(1.0 / shape, scale=shape)
    return np.where(lower < 0.5, law.ppf(np.minimum(lower, 0.5)), law.isf(np.minimum(upper, 0.5)))


def _gamma(shape: Any, lower: Any, upper: Any) -> Any:
    from scipy import special

    small = special.gammaincinv(shape, np.minimum(lower, 0.5))
    return np.where(lower < 0.5, small, special.gammainccinv(shape, np.minimum(upper, 0.5))) / shape


LAWS: dict[str, Law] = {
    "student_t": Law(_inverse_gamma, lambda dof: 2.0 / (dof - 4.0), (2.0, 2.0, 1e6), True, "dof"),
    "skew_t": Law(_inverse_gamma, lambda dof: 2.0 / (dof - 4.0), (4.0, 4.0, 1e6), True, "dof"),
    "nig": Law(_inverse_gaussian, lambda shape: 1.0 / shape, (0.0, 0.05, 1e5), False, "shape"),
    "variance_gamma": Law(_gamma, lambda shape: 1.0 / shape, (0.0, 0.1, 1e6), False, "shape"),
}


class HostTable(Protocol):
    """A table that is computed on the host in float64, one column per entry of its arguments (all of one shape)."""

    @property
    def n_rows(self) -> int:
        """Rows of the table."""
        ...

    def column(self, *values: float) -> np.ndarray:
        """Column of one entry."""
        ...

    def steps(self, *arguments: np.ndarray) -> Sequence[np.ndarray | None]:
        """Steps of the central difference in each argument; None where nothing flows back."""
        ...


def _columns(table: HostTable, *arguments: np.ndarray) -> np.ndarray:
    flat = np.stack([np.asarray(x, np.float64).ravel() for x in arguments])
    # Assets that share a law share its column.
    distinct, where = np.unique(flat, axis=1, return_inverse=True)
    values = np.stack([table.column(*entry) for entry in distinct.T], axis=1)
    return values[:, where.ravel()].reshape(table.n_rows, *arguments[0].shape)


def _slopes(table: HostTable, index: int, *arguments: np.ndarray) -> np.ndarray:
    step = table.steps(*arguments)[index]
    if step is None:
        return np.zeros((table.n_rows, *arguments[0].shape))
    up, down = ([x + k * step if i == index else x for i, x in enumerate(arguments)] for k in (1.0, -1.0))
    return (_columns(table, *up) - _columns(table, *down)) / (2.0 * step)


def on_host(function: Callable[..., np.ndarray], shape: tuple[int, ...], *arguments: Array) -> Array:
    """Array of `shape` that `function` makes of the arguments in float64 on the host, in their own precision."""
    dtype = arguments[0].dtype

    def call(*values: Any) -> np.ndarray:
        return function(*(np.asarray(x, np.float64) for x in values)).astype(dtype)

    if not any(isinstance(x, Tracer) for x in arguments):
        return jax.device_put(call(*arguments))
    return jax.pure_callback(call, jax.ShapeDtypeStruct(shape, dtype), *arguments, vmap_method="sequential")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def tabulated(table: HostTable, *arguments: Array) -> Array:
    """Columns of a table for the entries of the arguments (one shape), rows first.

    Pathwise gradient: the arguments, by central differences in float64 of the table itself; first order only.
    """
    return on_host(partial(_columns, table), (table.n_rows, *arguments[0].shape), *arguments)


@tabulated.defjvp
def _tabulated_jvp(table: HostTable, primals, tangents):
    shape = (table.n_rows, *primals[0].shape)
    slopes = [on_host(partial(_slopes, table, i), shape, *primals) * tangent for i, tangent in enumerate(tangents)]
    return tabulated(table, *primals), sum(slopes[1:], slopes[0])


def _monomial(nodes: np.ndarray, values: np.ndarray, degree: int, weight: np.ndarray | None = None) -> np.ndarray:
    coefficients = chebyshev.cheb2poly(chebyshev.chebfit(nodes, values, degree, w=weight))
    return np.pad(coefficients, (0, degree + 1 - coefficients.size))


def log_mixing_coefficients(family: str, shape: float) -> np.ndarray:
    """Monomial coefficients of log V in score / SCORE_RANGE, by least squares on the exact quantile."""
    from scipy import special

    score = _NODES * SCORE_RANGE
    quantile = LAWS[family].quantile(shape, special.ndtr(score), special.ndtr(-score))
    return _monomial(_NODES, np.log(quantile), DEGREE)


@lru_cache(maxsize=256)
def mixing_law(family: str, cut: float, shape: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of the mixing variable as it is drawn, in rising order, and their weights: a quadrature of its law."""
    from scipy import special

    nodes, weights = np.polynomial.legendre.leggauss(_N_QUADRATURE)
    top = score_ceiling(cut) if cut > 0.0 else _FAR_SCORE
    half = (top + _FAR_SCORE) / 2.0
    score = np.append(top + half * (nodes - 1.0), top)
    density = np.exp(-0.5 * score[:-1] ** 2) / np.sqrt(2.0 * np.pi)
    weight = np.append(half * weights * density, special.ndtr(-top))
    y = np.clip(score / SCORE_RANGE, -1.0, 1.0)
    value = np.exp(np.polynomial.polynomial.polyval(y, log_mixing_coefficients(family, shape)))
    # Read by everyone who asks for this law again.
    value.flags.writeable = weight.flags.writeable = False
    return value, weight


def score_ceiling(cut: float) -> float:
    """Normal score of the far quantile of V at which the score is cut."""
    return -score_floor(cut)


def _shape_step(family: str, shape: np.ndarray) -> np.ndarray:
    # Relative to the distance from the end of the range, which is never passed.
    return 1e-4 * (shape - LAWS[family].limits[0])


@dataclass(frozen=True)
class MixingTable:
    """Coefficients of log V (`DEGREE` + 1 rows) and the mean of V after the cut, by shape."""

    family: str
    cut: float
    n_rows: int = DEGREE + 2

    def column(self, shape: float) -> np.ndarray:
        """Column of one shape."""
        value, weight = mixing_law(self.family, self.cut, shape)
        return np.append(log_mixing_coefficients(self.family, shape), weight @ value)

    def steps(self, shape: np.ndarray) -> Sequence[np.ndarray | None]:
        """Step in the shape."""
        return (_shape_step(self.family, shape),)


def log_mgf_column(value: np.ndarray, weight: np.ndarray, slope: float, variance: float, cut: float) -> np.ndarray:
    r"""Fit of $g(s) = \log E\exp(s\varepsilon) / (s^2/2)$ on $0 < s \le$ `MAX_SCALE`, to be read by `log_mgf_rows`.

    $\varepsilon$ has mean zero and is, given X, normal with mean `slope` (X - EX) and variance `variance` X; X has the
    rising `value` with their `weight`. g is smooth in s at 0, where it is the variance. Where $E\exp$ comes to be
    carried by the far end of X (near $\theta(s) \max X = \log 1/$cut, $\theta = s b + s^2 c^2/2$) log E exp bends
    sharply, so two polynomials meet there. The range ends where $\theta \max X$ = 60 and g is held beyond. For the
    default cut the relative error is below 2e-4 for dof from 2.5, and near 1e-6 for dof of 6 and more.

    Returns:
      The scale where the pieces meet, the end of the range, and the coefficients of both pieces, lowest power first.
    """
    mean, far = weight @ value, value[-1]

    def scale_of(exponent: float) -> float:
        q = exponent / far
        return 2.0 * q / max(slope + np.sqrt(slope**2 + 2.0 * variance * q), 1e-12)

    top = min(MAX_SCALE, scale_of(_MAX_EXPONENT))
    middle = scale_of(4.0 - 0.65 * np.log(max(cut, 1e-12)))
    middle = middle if middle < 0.85 * top else 0.5 * top
    pieces = []
    for low, high in ((0.0, middle), (middle, top)):
        scale = low + (high - low) * (_MGF_NODES + 1.0) / 2.0
        ratio = _log_mgf_ratio(scale, value - mean, weight, slope, variance, mean)
        pieces.append(_monomial(_MGF_NODES, ratio, MGF_DEGREE, 1.0 / ratio))
    return np.concatenate([[middle, top], *pieces])


N_MGF_ROWS = 2 + 2 * (MGF_DEGREE + 1)


def _log_mgf_ratio(scale, deviation, weight, slope, variance, mean):
    from scipy import special

    half_square = 0.5 * scale**2
    x = (slope * scale + variance * half_square)[:, None] * deviation
    # exp(x) - 1 - x without cancellation; where x is large nothing cancels and only overflow is to be avoided.
    y = np.minimum(x, 1.0)
    series = 0.5 * y * y * (1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0 * (1.0 + y / 6.0))))
    excess = np.where(np.abs(y) < 1e-2, series, np.expm1(y) - y) @ weight
    is_small = x.max(axis=1) < 1.0
    log_sum: Any = special.logsumexp(x, b=weight, axis=1)
    log_mean = np.where(is_small, np.log1p(excess), log_sum)
    return variance * mean + log_mean / half_square


@dataclass(frozen=True)
class MgfTable:
    """`log_mgf_column` of a cut family, by shape and skew."""

    family: str
    cut: float
    n_rows: int = N_MGF_ROWS

    def column(self, shape: float, skew: float) -> np.ndarray:
        """Column of one asset."""
        square = 1.0 + skew**2 * LAWS[self.family].variance(shape) if skew else 1.0
        value, weight = mixing_law(self.family, self.cut, shape)
        return log_mgf_column(value, weight, skew / np.sqrt(square), 1.0 / square, self.cut)

    def steps(self, shape: np.ndarray, skew: np.ndarray) -> Sequence[np.ndarray | None]:
        """Steps in shape and skew; none in the skew of the symmetric family."""
        skew_step = 1e-4 * (1.0 + np.abs(skew)) if self.family == "skew_t" else None
        return _shape_step(self.family, shape), skew_step


def masks_of(masks: Sequence[Array], table: Array, axis: int = 0) -> Sequence[Array]:
    """The regime masks, or none for a table that is the same in all regimes."""
    return () if table.shape[axis] == 1 else masks


def by_regime(masks: Sequence[Array], table: Array, like: Rows) -> Any:
    """Entries of a (states, assets) table for `each_asset`: an (assets,) vector, or rows where they change."""
    return table[0] if table.shape[0] == 1 else regime_rows(masks, table, like)


def log_mgf_rows(table: Float[Array, "rows regimes columns"], masks: Sequence[Array], scale: Rows) -> Rows:
    """Log E exp(scale eps) from a table of `log_mgf_column`; one column serves all assets.

    Pathwise gradient: scale and the table.
    """
    masks = masks_of(masks, table, 1)
    n = MGF_DEGREE + 1

    def value(s: Array, middle: Array, top: Array, *coefficients: Array) -> Array:
        is_low = s < middle
        low = jnp.where(is_low, 0.0, middle).astype(s.dtype)
        high = jnp.where(is_low, middle, top).astype(s.dtype)
        y = 2.0 * (jnp.minimum(s, top) - low) / (high - low) - 1.0
        pieces = [jnp.where(is_low, a, b) for a, b in zip(coefficients[:n], coefficients[n:], strict=True)]
        return 0.5 * s * s * polynomial(pieces, y)

    if table.shape[2] == 1:
        shared = [select(masks, row[:, 0]) for row in table]
        return each_asset(lambda s: value(s, *shared), scale)
    return each_asset(value, scale, *(by_regime(masks, row, scale) for row in table))
