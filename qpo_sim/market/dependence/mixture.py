r"""Normal mean-variance mixtures: Gaussian, Student-t, skew t, normal inverse Gaussian and variance gamma shocks.

Asset i has the shock $\varepsilon_i = a_i + b_i V_i + c_i \sqrt{V_i}\,(Lz)_i$ with z standard normal, $LL'$ a
correlation matrix, and $V > 0$ a mixing variable of mean one independent of z (McNeil, Frey & Embrechts 2015, sec. 6.2;
see `market.mixing_law`). The skewness parameter $\beta_i$ is that of the unscaled mixture $\beta V + \sqrt V (Lz)$:
$b = \beta/s,\ c = 1/s,\ s^2 = 1 + \beta^2\,\mathrm{Var}V$ and $a = -b\,E V$, so every real beta gives mean 0 and
variance 1.

| family | V (mean 1) | shape | Var V | tails |
| --- | --- | --- | --- | --- |
| gaussian | 1 | none | 0 | Gaussian |
| student_t | $(\nu-2)/\chi^2_\nu$ | dof > 2 | | power, index dof, both sides |
| skew_t | $(\nu-2)/\chi^2_\nu$ | dof > 4 | $2/(\nu-4)$ | power, index dof/2 on the side of the skew |
| nig | inverse Gaussian | lambda | $1/\lambda$ | semi-heavy |
| variance_gamma | gamma | k | $1/k$ | exponential |

The skew t is the generalised-hyperbolic one (Aas & Haff 2006). With one V for all assets the law has tail dependence
(t, skew t); with a negative skew the lower one exceeds the upper one.

**The cut.** exp of a Student-t or skew t return has no mean. Scores of V beyond its far quantile `cut`
(`shock.MIXING_CUT` by default) are replaced by that quantile. As in `shock` the scale is that of the law *before* the
cut, so that the body and the quantiles up to about 99.9 % are those of the uncut law; the variance after it is a little
smaller (0.7 % for dof 4 at 1e-4, far more as dof comes near its limit; see `Mixture.variance`). The mean is zero after
the cut. The other families have exponential moments and are not cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qpo_sim import numerics
from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.market.dependence.correlation import correlation_cholesky, correlation_of
from qpo_sim.market.dependence.shocks import Shocks
from qpo_sim.market.mixing_law import (
    LAWS,
    Law,
    MgfTable,
    MixingTable,
    by_regime,
    log_mgf_rows,
    masks_of,
    mixing_law,
    score_ceiling,
    tabulated,
)
from qpo_sim.market.shock import MIXING_CUT, SCORE_RANGE
from qpo_sim.numerics import Rows, each_asset, materialised, polynomial, regime_matvec, rounded, safe_sqrt, select
from qpo_sim.types import Array

MIXINGS = ("shared", "grouped", "asset")
MAX_CUT = 0.01

BUILDERS = ("gaussian", "student_t", "skew_t", "nig", "variance_gamma")


class Skewness(NamedTuple):
    """Parts of the shock that follow the mixing variable: shift + slope V, and the scale of the Gaussian part."""

    shift: Float[Array, "regimes assets"]
    slope: Float[Array, "regimes assets"]
    scale: Float[Array, "regimes assets"]


class Prepared(NamedTuple):
    """What the kernel reads of a mixture.

    Attributes:
      factor: lower factor of the Gaussian part, its scale included.
      correlation: of the Gaussian part.
      coefficients: of log V in score / SCORE_RANGE; None for the Gaussian.
      ceiling: score at which V is cut, over SCORE_RANGE.
      skewness: per simulation step; None for a symmetric law.
      mgf: table of `log_mgf_rows`, or shape, slope and squared scale by asset where there is a closed form.
      sub_steps: simulation steps per base step.
      root: its square root.
    """

    factor: Float[Array, "regimes assets assets"]
    correlation: Float[Array, "regimes assets assets"]
    coefficients: Float[Array, "coefficients regimes groups"] | None
    ceiling: Float[Array, ""]
    skewness: Skewness | None
    mgf: Any
    sub_steps: Int[Array, ""]
    root: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    r"""Shocks $\varepsilon_i = a_i + b_i V_i + c_i\sqrt{V_i}(Lz)_i$ of mean 0 and variance 1 (see the module).

    Leading axes of length one serve all regimes. With several simulation steps per base step V is held within the base
    step and the Gaussian part is a Brownian motion, so that the law of the base step does not depend on their number.

    Attributes:
      shape: parameter of the mixing law by group (dof, lambda or k), None for the Gaussian.
      skew: beta by asset, None for a symmetric law.
      cholesky: lower Cholesky factor of the correlation matrix of the Gaussian part.
      family: a name of `LAWS`, or "gaussian" (static).
      mixing: "shared" (one V: the elliptical law where skew is None), "grouped" (one score, each group its own shape: V
        are comonotone; the grouped t of Daul, De Giorgi, Lindskog & McNeil 2003) or "asset" (independent V: no tail
        dependence) (static).
      groups: column of `shape` of each asset (static).
      cut: probability of the far quantile at which V is cut, t and skew t only (static).

    Pathwise gradient: shape, skew, cholesky.
    """

    shape: Float[Array, "shape_regimes groups"] | None
    skew: Float[Array, "skew_regimes assets"] | None
    cholesky: Float[Array, "regimes assets assets"]
    family: str = field(metadata={"static": True})
    mixing: str = field(default="shared", metadata={"static": True})
    groups: tuple[int, ...] = field(default=(), metadata={"static": True})
    cut: float = field(default=0.0, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.cholesky.shape[-1]

    @property
    def n_regimes(self) -> int:
        """Number of regimes that the parameters tell apart; one serves any number."""
        return max(len(x) for x in (self.shape, self.skew, self.cholesky) if x is not None)

    @property
    def n_scores(self) -> int:
        """Mixing scores per step."""
        if self.shape is None:
            return 0
        return self.n_assets if self.mixing == "asset" else 1

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return (self.n_assets + 1) // 2 + (self.n_scores + 1) // 2

    @property
    def is_conditionally_gaussian(self) -> bool:
        """Given V the shocks are Gaussian."""
        return True

    @property
    def needs_base_step(self) -> bool:
        """Any number of simulation steps in a base step gives its law."""
        return False

    @property
    def law(self) -> Law:
        """Law of the mixing variable."""
        return LAWS[self.family]

    def prepare(self, *, sub_steps: int = 1) -> Prepared:
        """Constants per simulation step."""
        dtype = self.cholesky.dtype
        root = jnp.asarray(np.sqrt(sub_steps), dtype)
        correlation = correlation_of(self.cholesky)
        coefficients = skewness = mgf = None
        factor = self.cholesky
        if self.shape is not None:
            table = tabulated(MixingTable(self.family, self.cut), self.shape)
            coefficients = table[:-1]
            slope, scale = self._slope_and_scale()
            if self.skew is not None:
                factor = scale[:, :, None] * factor
                mean = table[-1][:, list(self.groups)]
                skewness = Skewness(-slope * mean / root, slope / root, scale)
            mgf = self._prepared_mgf(slope, scale)
        return Prepared(
            factor=factor,
            correlation=correlation,
            coefficients=coefficients,
            ceiling=jnp.asarray(min(score_ceiling(self.cut) / SCORE_RANGE, 1.0), dtype),
            skewness=skewness,
            mgf=mgf,
            sub_steps=jnp.asarray(sub_steps, jnp.int32),
            root=root,
        )

    def init(self, prepared: Prepared, one: Array, address: Any) -> tuple[()]:
        """Nothing is carried."""
        return ()

    def step(self, prepared: Prepared, t: Any, state: Any, masks: Sequence[Array], address: Any) -> tuple[Any, Shocks]:
        """Shocks of simulation step t."""
        n_pairs = (self.n_assets + 1) // 2
        pairs = materialised(lambda at: at.normal_pairs(n_pairs))(address)
        roots = None
        if prepared.coefficients is not None:
            # The base step's own draws, whatever the simulation step within it.
            start = replace(address, step=address.step - (t % prepared.sub_steps).astype(address.step.dtype))
            roots = materialised(self._roots)(start.after(n_pairs), prepared.coefficients, prepared.ceiling, masks)
        eps, mixing = materialised(self._combined)(prepared.factor, prepared.skewness, masks, pairs, roots)
        return state, Shocks(eps, mixing)

    def log_mgf(self, prepared: Prepared, masks: Sequence[Array], scale: Rows) -> Rows | None:
        r"""$\log E\exp(s_i\varepsilon_i)$ given the regime, for the scale s of a simulation step.

        Gaussian, NIG and variance gamma by their closed forms (inf where $E\exp$ is infinite), t and skew t by the fit
        of `mixing_law.log_mgf_column` to the cut law; None without a cut. With sub-steps it is the share of one in the
        base step's.

        Pathwise gradient: scale, shape, skew.
        """
        if self.shape is None:
            return each_asset(lambda s: 0.5 * s * s, scale)
        if prepared.mgf is None:
            return None
        whole = each_asset(lambda s: s * prepared.root, scale)
        if self.law.is_cut:
            value = log_mgf_rows(prepared.mgf, masks, whole)
        else:
            closed = _nig_log_mgf if self.family == "nig" else _variance_gamma_log_mgf
            value = each_asset(closed, whole, *(by_regime(masks, x, scale) for x in prepared.mgf))
        return each_asset(lambda f: f / (prepared.root * prepared.root), value)

    def correlation(self, prepared: Prepared, masks: Sequence[Array], i: int, j: int) -> Array:
        """Correlation of the Gaussian parts of assets i and j."""
        entries = prepared.correlation[:, i, j]
        return select(masks_of(masks, entries), entries)

    def variance(self) -> np.ndarray:
        """Variance of the shocks after the cut, (regimes, assets)."""
        return np.einsum("kii->ki", self._covariance(self._correlation()))

    def shock_correlation(self) -> np.ndarray:
        """Correlation of the shocks themselves after the cut, (regimes, assets, assets), in float64."""
        covariance = self._covariance(self._correlation())
        deviation = np.sqrt(np.einsum("kii->ki", covariance))
        return covariance / deviation[:, :, None] / deviation[:, None, :]

    def _slope_and_scale(self) -> tuple[Any, Any]:
        if self.skew is None or self.shape is None:
            one = jnp.ones((1, self.n_assets), self.cholesky.dtype)
            return 0.0 * one, one
        scale = 1.0 / jnp.sqrt(1.0 + self.skew**2 * self.law.variance(self.shape[:, list(self.groups)]))
        return self.skew * scale, scale

    def _prepared_mgf(self, slope: Array, scale: Array) -> Any:
        assert self.shape is not None
        shape = self.shape[:, list(self.groups)]
        if not self.law.is_cut:
            return jnp.broadcast_arrays(shape, slope, scale * scale)
        if self.cut == 0.0:
            return None
        if self.skew is None:
            columns = self.shape if self.mixing == "shared" else shape
            return tabulated(MgfTable(self.family, self.cut), columns, jnp.zeros_like(columns))
        return tabulated(MgfTable(self.family, self.cut), *jnp.broadcast_arrays(shape, self.skew))

    def _roots(self, address: Any, coefficients: Array, ceiling: Array, masks: Sequence[Array]) -> Any:
        # Square roots of V: one row for each column of `shape`, or one array of rows where there are many.
        scores = [row.astype(coefficients.dtype) for row in address.scores(self.n_scores)]
        masks = masks_of(masks, coefficients, 1)

        def root(score: Array, *entries: Array) -> Array:
            y = jnp.minimum(score * (1.0 / SCORE_RANGE), ceiling)
            return jnp.exp(0.5 * polynomial(entries, y))

        if self.mixing == "asset":
            rows = jnp.stack(scores) if self.n_assets > numerics.MAX_UNROLLED_ASSETS else tuple(scores)
            return each_asset(root, rows, *(by_regime(masks, row, rows) for row in coefficients))
        n_columns = coefficients.shape[2]
        return tuple(root(scores[0], *(select(masks, row[:, g]) for row in coefficients)) for g in range(n_columns))

    def _combined(
        self, factor: Array, skewness: Any, masks: Sequence[Array], pairs: Any, roots: Any
    ) -> tuple[Rows, Any]:
        # The shocks, and the standard deviations of their Gaussian parts.
        z = [row.astype(factor.dtype) for pair in pairs for row in pair][: self.n_assets]
        gaussian = regime_matvec(factor, masks_of(masks, factor), z)
        if roots is None:
            return gaussian, None
        own = self._by_asset(roots, gaussian)
        if skewness is None:
            return each_asset(lambda y, h: h * y, gaussian, own), roots[0] if self.mixing == "shared" else own
        shift, slope, scale = (by_regime(masks, x, gaussian) for x in skewness)
        eps = each_asset(lambda y, h, a, b: a + h * (y + b * h), gaussian, own, shift, slope)
        return eps, each_asset(lambda h, c: c * h, own, scale)

    def _by_asset(self, roots: Any, like: Rows) -> Rows:
        # As `each_asset` takes them: a tuple of rows, or an array with one row, or one per asset.
        if not hasattr(like, "ndim"):
            return roots if self.mixing == "asset" else tuple(roots[g] for g in self.groups)
        if self.mixing == "asset":
            return roots
        return roots[0][None] if len(roots) == 1 else jnp.stack(roots)[np.asarray(self.groups)]

    def _correlation(self) -> np.ndarray:
        cholesky = np.asarray(self.cholesky, np.float64)
        return cholesky @ cholesky.swapaxes(1, 2)

    def _covariance(self, correlation: np.ndarray) -> np.ndarray:
        constant, factor = self._moments()
        return constant + factor * correlation

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        # Covariance of the shocks of assets i and j = constant_ij + factor_ij correlation_ij of the Gaussian part.
        n = self.n_assets
        if self.shape is None:
            return np.zeros((1, n, n)), np.ones((1, n, n))
        slope, scale = (np.asarray(x, np.float64) for x in self._slope_and_scale())
        constant, factor = [], []
        for shapes in np.asarray(self.shape, np.float64):
            laws = [mixing_law(self.family, self.cut, shape) for shape in shapes]
            value, weight = np.stack([v for v, _ in laws]), laws[0][1]
            covariance, root = (value * weight) @ value.T, (np.sqrt(value) * weight) @ np.sqrt(value).T
            mean, mean_root = value @ weight, np.sqrt(value) @ weight
            covariance = covariance - np.outer(mean, mean)
            own = np.ix_(self.groups, self.groups)
            covariance, root = covariance[own], root[own]
            if self.mixing == "asset":
                covariance = np.diag(np.diag(covariance))
                mean_root = mean_root[list(self.groups)]
                root = np.where(np.eye(n, dtype=bool), root, np.outer(mean_root, mean_root))
            constant.append(covariance)
            factor.append(root)
        return (
            slope[:, :, None] * slope[:, None, :] * np.stack(constant),
            scale[:, :, None] * scale[:, None, :] * np.stack(factor),
        )


def _nig_log_mgf(s: Array, shape: Array, slope: Array, square: Array) -> Array:
    # lambda (1 - sqrt(1 - x)) - s b with x = 2 theta / lambda, without cancellation.
    theta = s * slope + 0.5 * s * s * square
    rest = 1.0 - 2.0 * theta / shape
    value = 2.0 * theta / (1.0 + safe_sqrt(rest)) - s * slope
    return jnp.where(rest >= 0.0, value, jnp.inf)


def _variance_gamma_log_mgf(s: Array, shape: Array, slope: Array, square: Array) -> Array:
    theta = s * slope + 0.5 * s * s * square
    exists = theta < shape
    return jnp.where(exists, -shape * jnp.log1p(-jnp.where(exists, theta / shape, 0.0)) - s * slope, jnp.inf)


def gaussian(correlation: Any, *, dtype: Any = jnp.float32) -> Mixture:
    """Gaussian shocks.

    Args:
      correlation: (assets, assets), or (regimes, assets, assets); numpy.eye(n) for independent assets.
      dtype: precision of the paths.
    """
    return _build("gaussian", None, None, correlation, dtype=dtype)


def student_t(
    dof: Any,
    correlation: Any,
    *,
    mixing: str = "shared",
    groups: Sequence[int] | None = None,
    cut: float = MIXING_CUT,
    dtype: Any = jnp.float32,
) -> Mixture:
    """Student-t shocks: the multivariate t, the grouped t, or independent mixing.

    Args:
      dof: degrees of freedom, each > 2. One number; for shared mixing one per regime; else one per asset (or group), or
        (regimes, groups).
      correlation: of the Gaussian part, which is that of the shocks for shared mixing; see `gaussian`.
      mixing: shared, grouped or asset, see `Mixture`.
      groups: for grouped mixing the group (0, 1, ...) of each asset; each asset its own when omitted.
      cut: probability in [0, 0.01] of the far quantile of V at which it is cut; 0 leaves the shocks without exponential
        moments.
      dtype: precision of the paths.

    Raises:
      InputError: dof <= 2, cut outside [0, 0.01], lengths that differ, or a matrix that is not a correlation matrix.
    """
    return _build("student_t", dof, None, correlation, mixing=mixing, groups=groups, cut=cut, dtype=dtype)


def skew_t(
    dof: Any,
    skew: Any,
    correlation: Any,
    *,
    mixing: str = "shared",
    groups: Sequence[int] | None = None,
    correlation_of: str = "gaussian",
    cut: float = MIXING_CUT,
    dtype: Any = jnp.float32,
) -> Mixture:
    r"""Generalised-hyperbolic skew t shocks. Aas & Haff (2006).

    The heavy side has the tail index dof/2: for the usual 3 to 4 of crypto returns take a dof of 6 to 8.

    Args:
      dof: degrees of freedom, each > 4 (the variance of a skewed law must exist); see `student_t`.
      skew: beta, one number, one per asset, or (regimes, assets); negative = heavier lower tail.
      correlation: see `correlation_of`.
      mixing: see `student_t`.
      groups: see `student_t`.
      correlation_of: "gaussian": `correlation` is that of the Gaussian part; "shock": that of the shocks themselves.
      cut: see `student_t`.
      dtype: precision of the paths.

    Raises:
      InputError: as `student_t`; or no Gaussian part gives the correlation of the shocks.
    """
    return _build(
        "skew_t", dof, skew, correlation, mixing=mixing, groups=groups, of=correlation_of, cut=cut, dtype=dtype
    )


def nig(
    shape: Any,
    skew: Any,
    correlation: Any,
    *,
    mixing: str = "shared",
    groups: Sequence[int] | None = None,
    correlation_of: str = "gaussian",
    dtype: Any = jnp.float32,
) -> Mixture:
    r"""Normal inverse Gaussian shocks. Barndorff-Nielsen (1997).

    Args:
      shape: $\lambda$ of the inverse Gaussian law of mean 1 and variance $1/\lambda$, each >= 0.05. The excess kurtosis
        of the symmetric law is $3/\lambda$. Lengths as `dof` in `student_t`.
      skew: see `skew_t`.
      correlation: see `skew_t`.
      mixing: see `student_t`.
      groups: see `student_t`.
      correlation_of: see `skew_t`.
      dtype: precision of the paths.
    """
    return _build("nig", shape, skew, correlation, mixing=mixing, groups=groups, of=correlation_of, dtype=dtype)


def variance_gamma(
    shape: Any,
    skew: Any,
    correlation: Any,
    *,
    mixing: str = "shared",
    groups: Sequence[int] | None = None,
    correlation_of: str = "gaussian",
    dtype: Any = jnp.float32,
) -> Mixture:
    """Variance gamma shocks. Madan, Carr & Chang (1998).

    Args:
      shape: k of the gamma law of mean 1 and variance 1/k, each >= 0.1. The excess kurtosis of the symmetric law is
        3/k. Lengths as `dof` in `student_t`.
      skew: see `skew_t`.
      correlation: see `skew_t`.
      mixing: see `student_t`.
      groups: see `student_t`.
      correlation_of: see `skew_t`.
      dtype: precision of the paths.
    """
    return _build(
        "variance_gamma", shape, skew, correlation, mixing=mixing, groups=groups, of=correlation_of, dtype=dtype
    )


def check_cut(cut: float) -> float:
    """The cut itself.

    Raises:
      InputError: outside [0, 0.01].
    """
    if not 0.0 <= cut <= MAX_CUT:
        raise InputError(f"cut is {cut}; it must lie in [0, {MAX_CUT}], 0 for none.")
    return float(cut)


def _build(
    family: str,
    shape: Any,
    skew: Any,
    correlation: Any,
    *,
    mixing: str = "shared",
    groups: Sequence[int] | None = None,
    of: str = "gaussian",
    cut: float = 0.0,
    dtype: Any,
) -> Mixture:
    cholesky = _cholesky(correlation)
    n = cholesky.shape[1]
    groups = _groups(mixing, groups, n)
    law = LAWS.get(family)
    if law is not None:
        shape = _table(law.parameter, shape, max(groups) + 1, per_regime=mixing == "shared")
        _check_shape(family, law, shape)
        shape = np.minimum(shape, law.limits[2])
    if skew is not None:
        skew = _table("skew", skew, n)
        if not np.all(np.isfinite(skew)):
            raise InputError(f"skew is {skew.tolist()}; it must be finite.")
    sizes = {len(x) for x in (shape, skew, cholesky) if x is not None} - {1}
    if len(sizes) > 1:
        raise InputError(
            f"the parameters are given for {sorted(sizes)} regimes; they must agree (or serve all regimes)."
        )
    if of not in ("gaussian", "shock"):
        raise InputError(f"correlation_of is {of!r}; it must be 'gaussian' or 'shock'.")
    made = Mixture(shape, skew, cholesky, family, mixing, groups, check_cut(cut))
    if of == "shock":
        made = replace(made, cholesky=_cholesky_of_shocks(made))

    return jax.tree.map(lambda leaf: rounded(leaf, dtype), made)


def _cholesky(correlation: Any) -> np.ndarray:
    matrices = np.asarray(correlation, np.float64)
    matrices = matrices[None] if matrices.ndim == 2 else matrices
    if matrices.ndim != 3 or len(matrices) == 0:
        shape = np.shape(correlation)
        raise InputError(
            f"correlation has the shape {shape}; it must be (assets, assets), or (regimes, assets, assets)."
        )
    return np.stack([correlation_cholesky("correlation", matrix) for matrix in matrices])


def _cholesky_of_shocks(mixture: Mixture) -> np.ndarray:
    constant, factor = mixture._moments()
    deviation = np.sqrt(np.einsum("kii->ki", constant + factor))
    wanted = mixture._correlation() * deviation[:, :, None] * deviation[:, None, :]
    gaussian_part = (wanted - constant) / factor
    try:
        return np.linalg.cholesky(gaussian_part)
    except np.linalg.LinAlgError as error:
        raise InputError(
            "no Gaussian part gives the shocks this correlation with this skew and mixing; lower the skew, or give "
            "correlation_of='gaussian'."
        ) from error


def _groups(mixing: str, groups: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if mixing not in MIXINGS:
        raise InputError(f"mixing is {mixing!r}; {did_you_mean(mixing, MIXINGS)}")
    if mixing != "grouped" and groups is not None:
        raise InputError(f"groups are for mixing='grouped'; mixing is {mixing!r}.")
    if mixing == "shared":
        return (0,) * n
    if groups is None:
        return tuple(range(n))
    groups = tuple(int(g) for g in groups)
    if len(groups) != n or set(groups) != set(range(max(groups, default=0) + 1)):
        raise InputError(
            f"groups is {list(groups)}; it must name a group 0, 1, ... without gaps for each of {n} assets."
        )
    return groups


def _table(name: str, value: Any, n_columns: int, *, per_regime: bool = False) -> np.ndarray:
    table = np.asarray(value, np.float64)
    if table.ndim == 0:
        return np.full((1, n_columns), float(table))
    if table.ndim == 1:
        table = table[:, None] if per_regime else table[None]
    if table.ndim != 2 or table.shape[1] != n_columns or table.shape[0] == 0:
        wanted = "one per regime" if per_regime else f"{n_columns}, or (regimes, {n_columns})"
        raise InputError(f"{name} has the shape {np.shape(value)}; it must be one number, {wanted}.")
    return table


def _check_shape(family: str, law: Law, shape: np.ndarray) -> None:
    end, smallest, _ = law.limits
    if not (np.all(shape > end) and np.all(shape >= smallest)):
        rule = f"at least {smallest}" if smallest > end else f"above {end} for the variance of {family} to exist"
        raise InputError(f"{law.parameter} is {shape.tolist()}; it must be {rule}.")


def example(n_assets: int, dtype: Any = jnp.float32) -> Mixture:
    """A skew t with the tails of daily crypto returns and joint crashes."""
    correlation = np.full((n_assets, n_assets), 0.6) + 0.4 * np.eye(n_assets)
    return skew_t(6.5, -0.1, correlation, dtype=dtype)
