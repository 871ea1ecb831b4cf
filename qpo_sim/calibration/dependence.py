r"""Fits of dependence: Gaussian and Student-t copulas, Kendall's tau inverted, grouped t, and dynamic correlations.

Copulas are fitted to ranks: $u_{tj} = R_{tj}/(n_j+1)$, average ranks where values are equal, so that the margins need
no model; or to given uniforms. Rows are taken as independent: give residuals of a volatility model, or read the
standard errors as too small. A row enters with the assets it has; rows with fewer than two tell nothing and are left
out, values missing at random otherwise.

The density of a t copula with correlation R and dof $\nu$ is $c(u) = t_{R,\nu}(x)/\prod_j t_\nu(x_j)$ with
$x_j = t_\nu^{-1}(u_j)$; the Gaussian copula is its limit. Demarta & McNeil (2005); McNeil, Frey & Embrechts, QRM 7.5.
NumPy and SciPy in float64; the dynamic correlations are a JAX scan in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.calibration.covariance import EIGENVALUE_FLOOR, clip_to_positive_definite
from qpo_sim.calibration.inputs import read_returns
from qpo_sim.errors import InputError
from qpo_sim.types import Array

DOF_RANGE = (0.5, 200.0)
MARGINS = ("ranks", "uniform")
MIN_ROWS = 10
# Two assets whose Kendall tau is beyond this are one: the likelihood has no maximum inside.
_MAX_TAU = 1.0 - 1e-9
# Relative step of second differences in the dof.
_DOF_STEP = 1e-3


class CopulaFit(NamedTuple):
    r"""An elliptical copula and how well the data pin it down.

    Attributes:
      correlation: R.
      dof: degrees of freedom, infinite for the Gaussian copula.
      correlation_error: standard errors of R from the Hessian, as if the margins were known; 0 on the diagonal.
      dof_error: standard error of the dof likewise; NaN where it is not fitted or at an end of `DOF_RANGE`.
      correlation_robust_error: standard errors of R from the sandwich $H^{-1}\,V\,H^{-1}$, where V is the covariance of
        the scores including what the ranks add (Genest, Ghoudi & Rivest 1995, sec. 4).
      dof_robust_error: of the dof likewise.
      log_likelihood: sum of log c over the rows.
      aic: $2k - 2\ell$.
      bic: $k\log n - 2\ell$.
      n_parameters: k.
      n_rows: rows with two values or more.
      converged: whether the optimiser met its tolerance.
      is_at_bound: whether the dof is at an end of `DOF_RANGE`; at the upper one the copula is all but Gaussian.
    """

    correlation: Float[np.ndarray, "assets assets"]
    dof: float
    correlation_error: Float[np.ndarray, "assets assets"]
    dof_error: float
    correlation_robust_error: Float[np.ndarray, "assets assets"]
    dof_robust_error: float
    log_likelihood: float
    aic: float
    bic: float
    n_parameters: int
    n_rows: int
    converged: bool
    is_at_bound: bool

    @property
    def tail_dependence(self) -> np.ndarray:
        """Coefficient of tail dependence of each pair (see `tail_dependence`)."""
        return tail_dependence(self.correlation, self.dof)


class KendallFit(NamedTuple):
    """Correlations from rank correlations; no likelihood, so no errors here.

    Attributes:
      correlation: sin(pi tau / 2), clipped to positive definite where it was not.
      tau: Kendall's tau-b of each pair on the rows that it shares.
      n_shared: rows behind each pair.
      is_repaired: whether the correlations were clipped.
    """

    correlation: Float[np.ndarray, "assets assets"]
    tau: Float[np.ndarray, "assets assets"]
    n_shared: Any
    is_repaired: bool


class GroupedFit(NamedTuple):
    """A grouped t copula: one correlation matrix, and a dof of its own for every group of assets.

    Attributes:
      correlation: from Kendall's tau.
      groups: numbers of the assets in each group.
      dof: of each group.
      dof_error: from the Hessian, the correlations and margins as if known; NaN at an end of `DOF_RANGE`.
      dof_robust_error: from the sandwich, with what the ranks add.
      log_likelihood: of each group's own copula; they are not parts of one likelihood, so there is no AIC of the whole.
      aic: of each group's fit, with the dof as the one parameter.
      bic: likewise.
      n_rows: rows of each group with two values or more.
      converged: of each group.
    """

    correlation: Float[np.ndarray, "assets assets"]
    groups: tuple[tuple[int, ...], ...]
    dof: Float[np.ndarray, " groups"]
    dof_error: Float[np.ndarray, " groups"]
    dof_robust_error: Float[np.ndarray, " groups"]
    log_likelihood: Float[np.ndarray, " groups"]
    aic: Float[np.ndarray, " groups"]
    bic: Float[np.ndarray, " groups"]
    n_rows: Any
    converged: Any


class DccFit(NamedTuple):
    r"""Dynamic conditional correlation of order (1, 1), second step.

    Attributes:
      a: weight of the last products of residuals.
      b: weight of the last Q; a, b >= 0 and a + b < 1.
      target: correlation S of the residuals.
      a_error: standard error of a from the Hessian, S as if known.
      b_error: of b likewise.
      a_robust_error: from the sandwich, with what the estimate of S adds.
      b_robust_error: of b likewise.
      log_likelihood: of the correlations, $-\frac12\sum_t(\log|R_t| + e_t'R_t^{-1}e_t - e_t'e_t)$.
      constant_log_likelihood: the same with $R_t = S$ throughout.
      aic: $2k - 2\ell$ with k = 2 + p(p-1)/2.
      bic: $k\log n - 2\ell$.
      n_rows: rows with two values or more.
      converged: whether the optimiser met its tolerance.
      is_at_bound: whether a or b is at 0, or a + b at 1, where standard errors are NaN.
      last_correlation: R of the step after the last row.
    """

    a: float
    b: float
    target: Float[np.ndarray, "assets assets"]
    a_error: float
    b_error: float
    a_robust_error: float
    b_robust_error: float
    log_likelihood: float
    constant_log_likelihood: float
    aic: float
    bic: float
    n_rows: int
    converged: bool
    is_at_bound: bool
    last_correlation: Float[np.ndarray, "assets assets"]


def tail_dependence(correlation: Any, dof: float) -> Any:
    r"""Coefficient of tail dependence of a t copula, $2\,t_{\nu+1}\big(-\sqrt{(\nu+1)(1-\rho)/(1+\rho)}\big)$.

    Args:
      correlation: rho, any shape, in (-1, 1].
      dof: degrees of freedom; infinite gives 0, but for rho = 1.

    Source: Embrechts, McNeil & Straumann (2002).
    """
    from scipy.special import stdtr

    rho = np.asarray(correlation, np.float64)
    if np.isinf(dof):
        return np.where(rho >= 1.0, 1.0, 0.0)
    return 2.0 * stdtr(dof + 1.0, -np.sqrt((dof + 1.0) * (1.0 - rho) / (1.0 + rho)))


def pseudo_observations(values: Any) -> Float[np.ndarray, "steps assets"]:
    """Ranks over n + 1 of each column, average ranks where values are equal; NaN where missing.

    Raises:
      InputError: as `fit_t_copula` for the table.
    """
    return _uniforms(values, "ranks")[0]


def normal_scores_correlation(values: Any, *, margins: str = "ranks") -> Float[np.ndarray, "assets assets"]:
    r"""Correlation of the normal scores $\Phi^{-1}(u)$, a Gaussian copula without optimisation; whole rows only.

    As efficient as any estimate from ranks for two assets, with variance $(1-\rho^2)^2/n$: Klaassen & Wellner (1997).

    Raises:
      InputError: as `fit_t_copula`.
    """
    from scipy.special import ndtri

    u, names = _uniforms(values, margins)
    z = ndtri(u[~np.isnan(u).any(axis=1)])
    if len(z) < MIN_ROWS:
        raise InputError(f"values has {len(z)} rows without a missing value; at least {MIN_ROWS} are needed.")
    correlation = np.atleast_2d(np.corrcoef(z, rowvar=False))
    _check_full_rank(correlation, names)
    return correlation


def kendall_correlation(values: Any, *, floor: float = 1e-8) -> KendallFit:
    r"""Correlations of an elliptical copula from Kendall's tau, $\rho = \sin(\pi\tau/2)$, pair by pair.

    Args:
      values: (steps, assets), NaN where missing; each pair uses the rows that it shares.
      floor: smallest eigenvalue of the result.

    Raises:
      InputError: fewer than 2 assets or 10 shared rows of some pair, a column that never changes on them.

    Source: Lindskog, McNeil & Schmock (2003).
    """
    from scipy.stats import kendalltau

    u, names = _uniforms(values, "ranks")
    p = u.shape[1]
    seen = (~np.isnan(u)).astype(np.int64)
    n_shared, tau = seen.T @ seen, np.eye(p)
    for i in range(p):
        for j in range(i):
            rows = (seen[:, i] & seen[:, j]) == 1
            if rows.sum() < MIN_ROWS:
                raise InputError(
                    f"values of {names[j]!r} and {names[i]!r} share {rows.sum()} rows; at least {MIN_ROWS} are needed."
                )
            if np.ptp(u[rows, i]) == 0.0 or np.ptp(u[rows, j]) == 0.0:
                raise InputError(
                    f"values of {names[j]!r} or {names[i]!r} never change on the rows that they share: leave one out."
                )
            found: Any = kendalltau(u[rows, i], u[rows, j])
            tau[i, j] = tau[j, i] = found.statistic
    raw = np.sin(0.5 * np.pi * tau)
    np.fill_diagonal(raw, 1.0)
    is_repaired = bool(np.linalg.eigvalsh(raw)[0] < floor)
    return KendallFit(clip_to_positive_definite(raw, floor=floor), tau, n_shared, is_repaired)


def fit_t_copula(values: Any, *, margins: str = "ranks", tolerance: float = 1e-9) -> CopulaFit:
    """Student-t copula by maximum (pseudo-)likelihood in all correlations and the dof at once.

    Args:
      values: (steps, assets), NaN where missing; any increasing transform of a column gives the same fit.
      margins: "ranks" of the values, or "uniform" when they are uniforms in (0, 1) already (then the errors take the
        margins as known).
      tolerance: relative change of the log-likelihood at which the optimiser stops.

    Raises:
      InputError: unknown margins, fewer than 2 assets, fewer than 10 rows or as many rows as parameters, a pair that
        shares fewer than 10 rows, a column that never changes, perfectly dependent assets, an infinite value, uniforms
        outside (0, 1).

    Source: Genest, Ghoudi & Rivest (1995); Mashal & Zeevi (2002).
    """
    return _fit_copula(values, margins, tolerance, has_dof=True)


def fit_gaussian_copula(values: Any, *, margins: str = "ranks", tolerance: float = 1e-9) -> CopulaFit:
    """Gaussian copula by maximum (pseudo-)likelihood over the correlation matrix; arguments as `fit_t_copula`.

    For two assets its correlation differs from `normal_scores_correlation` by what the scores' variances miss of 1.
    """
    return _fit_copula(values, margins, tolerance, has_dof=False)


def fit_grouped_t_copula(values: Any, groups: Sequence[Sequence[int]], *, margins: str = "ranks") -> GroupedFit:
    """Grouped t copula: correlations from Kendall's tau, then each group's dof by the likelihood of its own t copula.

    Within a group the assets have a t copula; across groups Kendall's relation holds only approximately.

    Args:
      values: (steps, assets), NaN where missing.
      groups: numbers of the assets of each group, 2 or more in each, every asset once.
      margins: as `fit_t_copula`.

    Raises:
      InputError: groups that do not part the assets so, or as `fit_t_copula`.

    Source: Daul, De Giorgi, Lindskog & McNeil (2003).
    """
    from scipy.optimize import minimize_scalar

    u, names = _uniforms(values, margins)
    members = tuple(tuple(int(i) for i in group) for group in groups)
    if sorted(i for group in members for i in group) != list(range(len(names))) or min(map(len, members)) < 2:
        raise InputError(
            f"groups is {members}; every one of the assets 0 to {len(names) - 1} must be in one group, and every group "
            "needs 2 or more, or it has no dof to fit."
        )
    correlation = kendall_correlation(u).correlation
    rows = []
    for group in members:
        part, r = u[:, group], correlation[np.ix_(group, group)]
        _check_full_rank(r, [names[i] for i in group])
        data = _Blocks.of(part)
        found: Any = minimize_scalar(
            lambda x, data=data, r=r: -data.log_density(r, float(np.exp(x))).sum(),
            bounds=tuple(np.log(DOF_RANGE)),
            method="bounded",
            options={"xatol": 1e-8},
        )
        dof = float(np.exp(found.x))
        plain, robust = (np.full(1, np.nan),) * 2
        if not _is_at_bound(dof):
            plain, robust = _errors(
                lambda v, theta, r=r: _dof_score(_Blocks.of(v), r, theta[0])[:, None],
                part,
                np.array([dof]),
                np.array([_DOF_STEP * dof]),
                margins == "ranks",
            )
        n_rows = int(((~np.isnan(part)).sum(axis=1) >= 2).sum())
        rows.append(
            (dof, plain[0], robust[0], -found.fun, 2 + 2 * found.fun, np.log(n_rows) + 2 * found.fun, n_rows,
             bool(found.success))
        )  # fmt: skip
    return GroupedFit(correlation, members, *map(np.array, zip(*rows, strict=True)))


def fit_dcc(residuals: Any, *, tolerance: float = 1e-10) -> DccFit:
    r"""Second step of a DCC(1, 1) with correlation targeting, on residuals already divided by their volatilities.

    $Q_{t+1} = (1-a-b)S + a\,e_te_t' + b\,Q_t$, $Q_1 = S$, $R_t$ the correlation matrix of $Q_t$, S the correlation of
    the residuals around zero; a and b maximise the Gaussian quasi-likelihood of the correlations. Each residual series
    is scaled to a mean square of one first, as its own volatility model should have done.

    Where residuals are missing, $e_te_t'$ is replaced by its expectation given the past and the rest of the row, and
    the row enters the likelihood with what it has; S then comes from pairs, clipped to positive definite.

    The Hessian's errors take S and the residuals as known. The sandwich adds the estimate of S, by its influence
    $z_iz_j - \frac12S_{ij}(z_i^2+z_j^2)$, and Bartlett weights over $n^{1/3}$ lags as those terms are correlated in
    time; what the volatility step adds is not in it. Targeting with Engle's form is biased, as S is not exactly the
    mean of Q (Aielli 2013).

    Args:
      residuals: (steps, assets), oldest first, NaN where missing.
      tolerance: relative change of the log-likelihood at which the optimiser stops.

    Raises:
      InputError: fewer than 2 assets or 50 rows, a pair that shares fewer than 10 rows, a series that never changes,
        collinear series, an infinite value.

    Source: Engle (2002); Engle & Sheppard (2001); Aielli (2013); Newey & West (1987).
    """
    from scipy.optimize import minimize

    table = read_returns(residuals)
    e, seen = np.nan_to_num(table.values), ~np.isnan(table.values)
    _check_table(table.values, list(table.assets), 50)
    p = e.shape[1]
    e = e / np.sqrt((e * e).sum(axis=0) / seen.sum(axis=0))
    n_shared = seen.astype(float).T @ seen.astype(float)
    product = e.T @ e / n_shared
    on_shared = (e * e).T @ seen / n_shared
    target = product / np.sqrt(on_shared * on_shared.T)
    np.fill_diagonal(target, 1.0)
    if seen.all():
        _check_full_rank(target, list(table.assets))
    else:
        target = clip_to_positive_definite(target, floor=1e-6)
    mask = seen.astype(np.float64)
    lower = np.tril_indices(p, -1)
    with jax.enable_x64(True):

        def weights(x: np.ndarray) -> np.ndarray:
            top = np.exp(np.append(x, 0.0) - max(0.0, x.max()))
            return top[:2] / top.sum()

        def value(x):
            w = weights(x)
            f, g = _dcc_value_and_gradient(jnp.asarray(w), target, e, mask)
            g = np.asarray(g)
            return -float(f), -(w * (g - w @ g))

        starts = [np.log(np.array(s) / (1.0 - sum(s))) for s in ((0.02, 0.95), (0.05, 0.85), (0.1, 0.5))]
        options = {"ftol": tolerance, "gtol": 1e-6, "maxiter": 500}
        bounds = [(-18.0, 18.0)] * 2
        runs: list[Any] = [
            minimize(value, s, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for s in starts
        ]
        best = min(runs, key=lambda run: run.fun)
        w = weights(best.x)
        constant = float(_dcc_rows(jnp.zeros(2), target, e, mask)[0].sum())
        is_at_bound = bool(min(w[0], w[1], 1.0 - w.sum()) < 1e-5)
        log_likelihood, last = -float(best.fun), np.asarray(_dcc_rows(jnp.asarray(w), target, e, mask)[1])
        plain = robust = np.full(2, np.nan)
        if not is_at_bound:
            scores, hessian, cross = (np.asarray(x) for x in _dcc_derivatives(jnp.asarray(w), target, e, mask))
            inverse = np.linalg.inv(-hessian)
            influence = (
                np.where(
                    mask[:, lower[0]] * mask[:, lower[1]] > 0.0,
                    e[:, lower[0]] * e[:, lower[1]] - 0.5 * target[lower] * (e[:, lower[0]] ** 2 + e[:, lower[1]] ** 2),
                    0.0,
                )
                / n_shared[lower]
            )
            full = scores + influence @ cross.T
            plain, robust = _roots(inverse), _roots(inverse @ _long_run(full) @ inverse)
    n_rows = int((seen.sum(axis=1) >= 2).sum())
    k = 2 + p * (p - 1) // 2
    return DccFit(
        a=float(w[0]),
        b=float(w[1]),
        target=target,
        a_error=float(plain[0]),
        b_error=float(plain[1]),
        a_robust_error=float(robust[0]),
        b_robust_error=float(robust[1]),
        log_likelihood=log_likelihood,
        constant_log_likelihood=constant,
        aic=2.0 * k - 2.0 * log_likelihood,
        bic=float(np.log(n_rows)) * k - 2.0 * log_likelihood,
        n_rows=n_rows,
        converged=bool(best.success),
        is_at_bound=is_at_bound,
        last_correlation=last,
    )


# --- dynamic correlations -------------------------------------------------------------------------------------------


@jax.jit
def _dcc_rows(weights: Array, target: Array, e: Array, mask: Array) -> tuple[Array, Array]:
    """Log-likelihood of the correlations per row, and R after the last row; e is 0 where the mask is."""
    a, b = weights
    eye = jnp.eye(target.shape[0])

    def correlation(q):
        scale = 1.0 / jnp.sqrt(jnp.diagonal(q))
        return q * scale[:, None] * scale[None, :]

    def step(q, row):
        e, m = row
        r = correlation(q)
        both = m[:, None] * m[None, :]
        # Missing assets get a unit row: they add nothing to the determinant nor to the quadratic form.
        root = jnp.linalg.cholesky(both * r + (1.0 - m) * eye)
        seen_part = jax.scipy.linalg.cho_solve((root, True), e)
        log_density = -jnp.sum(jnp.log(jnp.diagonal(root))) - 0.5 * (e @ seen_part - e @ e)
        expected = r @ (m * seen_part)
        loading = jax.scipy.linalg.solve_triangular(root, m[:, None] * r, lower=True)
        # Zero where both are seen: what is missing, given what is seen.
        left = (1.0 - both) * (r - loading.T @ loading)
        innovation = expected[:, None] * expected[None, :] + left
        return (1.0 - a - b) * target + a * innovation + b * q, log_density

    last, rows = lax.scan(step, target, (e, mask))
    return rows, correlation(last)


@jax.jit
def _dcc_value_and_gradient(weights: Array, target: Array, e: Array, mask: Array) -> tuple[Array, Array]:
    return jax.value_and_grad(lambda w: _dcc_rows(w, target, e, mask)[0].sum())(weights)


@jax.jit
def _dcc_derivatives(weights: Array, target: Array, e: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Scores of (a, b) per row, the Hessian, and the derivative of the summed score in the entries of the target."""
    lower = np.tril_indices(target.shape[0], -1)

    def with_entries(entries):
        half = jnp.zeros_like(target).at[lower].set(entries)
        return half + half.T + jnp.eye(target.shape[0])

    def total(w, entries):
        return _dcc_rows(w, with_entries(entries), e, mask)[0].sum()

    scores = jax.jacfwd(lambda w: _dcc_rows(w, target, e, mask)[0])(weights)
    gradient = jax.grad(total, argnums=0)
    hessian = jax.jacfwd(gradient, argnums=0)(weights, target[lower])
    # Two reverse sweeps, one per weight, instead of one forward sweep per entry of the target.
    cross = jax.jacrev(gradient, argnums=1)(weights, target[lower])
    return scores, hessian, cross


def _long_run(scores: np.ndarray) -> np.ndarray:
    """Covariance of the sum of correlated rows: Bartlett weights over n^(1/3) lags."""
    n_lags = int(round(len(scores) ** (1.0 / 3.0)))
    total = scores.T @ scores
    for lag in range(1, n_lags + 1):
        product = scores[lag:].T @ scores[:-lag]
        total = total + (1.0 - lag / (n_lags + 1.0)) * (product + product.T)
    return total


# --- copulas --------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Rows that have the same assets."""

    rows: np.ndarray
    assets: np.ndarray
    u: np.ndarray


class _Blocks(NamedTuple):
    """Uniforms sorted by which assets a row has; rows with fewer than two are left out and score 0."""

    shape: tuple[int, int]
    blocks: tuple[_Block, ...]

    @classmethod
    def of(cls, u: np.ndarray) -> "_Blocks":
        seen = ~np.isnan(u)
        patterns, at = np.unique(seen, axis=0, return_inverse=True)
        at = at.reshape(-1)
        blocks = []
        for k, pattern in enumerate(patterns):
            if pattern.sum() >= 2:
                rows, assets = np.flatnonzero(at == k), np.flatnonzero(pattern)
                blocks.append(_Block(rows, assets, u[np.ix_(rows, assets)]))
        return cls((u.shape[0], u.shape[1]), tuple(blocks))

    def log_density(self, correlation: np.ndarray, dof: float) -> np.ndarray:
        """Logarithm of the copula density of each row."""
        out = np.zeros(self.shape[0])
        for block in self.blocks:
            x = _quantile(block.u, dof)
            y = np.linalg.solve(correlation[np.ix_(block.assets, block.assets)], x.T).T
            _, log_det = np.linalg.slogdet(correlation[np.ix_(block.assets, block.assets)])
            out[block.rows] = _log_kernel((x * y).sum(axis=1), x, dof) - 0.5 * log_det
        return out

    def correlation_score(self, correlation: np.ndarray, dof: float) -> np.ndarray:
        """Derivative of log c of each row in the entries of the lower triangle of R, row by row."""
        i, j = np.tril_indices(self.shape[1], -1)
        out = np.zeros((self.shape[0], len(i)))
        for block in self.blocks:
            x = _quantile(block.u, dof)
            inverse = np.zeros((self.shape[1], self.shape[1]))
            inverse[np.ix_(block.assets, block.assets)] = np.linalg.inv(correlation[np.ix_(block.assets, block.assets)])
            y = x @ inverse[block.assets]
            form = (x * y[:, block.assets]).sum(axis=1)
            weight = np.ones(len(x)) if np.isinf(dof) else (dof + len(block.assets)) / (dof + form)
            out[block.rows] = weight[:, None] * y[:, i] * y[:, j] - inverse[i, j]
        return out


def _quantile(u: np.ndarray, dof: float) -> np.ndarray:
    from scipy.special import ndtri, stdtrit

    return ndtri(u) if np.isinf(dof) else stdtrit(dof, u)


def _log_kernel(form: np.ndarray, x: np.ndarray, dof: float) -> np.ndarray:
    """Logarithm of the density without the determinant: `form` is x' R^-1 x."""
    from scipy.special import gammaln

    if np.isinf(dof):
        return -0.5 * (form - (x * x).sum(axis=1))
    d = x.shape[1]
    constant = gammaln(0.5 * (dof + d)) + (d - 1.0) * gammaln(0.5 * dof) - d * gammaln(0.5 * (dof + 1.0))
    margins = np.log1p(x * x / dof).sum(axis=1)
    return constant - 0.5 * (dof + d) * np.log1p(form / dof) + 0.5 * (dof + 1.0) * margins


def _dof_score(data: _Blocks, correlation: np.ndarray, dof: float) -> np.ndarray:
    """Derivative of log c of each row in the dof, by central differences: the quantile has no closed derivative."""
    step = 1e-4 * dof
    return (data.log_density(correlation, dof + step) - data.log_density(correlation, dof - step)) / (2.0 * step)


def _fit_copula(values: Any, margins: str, tolerance: float, *, has_dof: bool) -> CopulaFit:
    from scipy.optimize import minimize

    u, names = _uniforms(values, margins)
    p = len(names)
    n_rows, n_parameters = int(((~np.isnan(u)).sum(axis=1) >= 2).sum()), p * (p - 1) // 2 + has_dof
    if n_rows <= n_parameters:
        raise InputError(
            f"values has {n_rows} rows with two values or more, too few for the {n_parameters} parameters of a copula "
            f"of {p} assets: give a longer history or fewer assets."
        )
    tau = kendall_correlation(u, floor=1e-4)
    off = np.abs(tau.tau - np.eye(p))
    if off.max() > _MAX_TAU:
        i, j = np.unravel_index(int(off.argmax()), off.shape)
        raise InputError(
            f"values of {names[i]!r} and {names[j]!r} have the same order (Kendall's tau {tau.tau[i, j]:.6g}): the "
            "likelihood has no maximum; leave one of them out."
        )
    data, lower = _Blocks.of(u), np.tril_indices(p, -1)

    def unpack(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        rows = np.eye(p)
        rows[lower] = x[: len(lower[0])]
        norm = np.sqrt((rows * rows).sum(axis=1))
        root = rows / norm[:, None]
        return root @ root.T, root, norm, float(np.exp(x[-1])) if has_dof else np.inf

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        r, root, norm, dof = unpack(x)
        np.fill_diagonal(r, 1.0)
        in_r = np.zeros((p, p))
        in_r[lower] = data.correlation_score(r, dof).sum(axis=0)
        in_root = (in_r + in_r.T) @ root
        in_rows = (in_root - (in_root * root).sum(axis=1)[:, None] * root) / norm[:, None]
        gradient = in_rows[lower]
        if has_dof:
            gradient = np.append(gradient, dof * _dof_score(data, r, dof).sum())
        # Per row, so that the tolerance on the gradient means the same for every length.
        return -data.log_density(r, dof).sum() / n_rows, -gradient / n_rows

    start = np.linalg.cholesky(tau.correlation)
    x0 = (start / np.diag(start)[:, None])[lower]
    bounds: list[tuple[float | None, float | None]] = [(None, None)] * len(x0)
    if has_dof:
        x0, bounds = np.append(x0, np.log(6.0)), [*bounds, (float(np.log(DOF_RANGE[0])), float(np.log(DOF_RANGE[1])))]
    options = {"ftol": tolerance * 1e-2, "gtol": 1e-7, "maxiter": 1000}
    best: Any = minimize(value, x0, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    r, _, _, dof = unpack(best.x)
    np.fill_diagonal(r, 1.0)
    _check_full_rank(r, names)
    is_at_bound = has_dof and _is_at_bound(dof)
    fits_dof = has_dof and not is_at_bound

    def score(v: np.ndarray, theta: np.ndarray) -> np.ndarray:
        matrix = np.eye(p)
        matrix[lower] = theta[: len(lower[0])]
        matrix = matrix + matrix.T - np.eye(p)
        blocks, nu = _Blocks.of(v), float(theta[-1]) if fits_dof else dof
        in_r = blocks.correlation_score(matrix, nu)
        return np.column_stack([in_r, _dof_score(blocks, matrix, nu)]) if fits_dof else in_r

    theta = np.append(r[lower], dof) if fits_dof else r[lower]
    # A matrix that is all but singular leaves little room before a step makes it indefinite.
    steps = np.where(np.arange(len(theta)) < len(lower[0]), 1e-4 * min(1.0, np.linalg.eigvalsh(r)[0]), _DOF_STEP * dof)
    plain, robust = _errors(score, u, theta, steps, margins == "ranks")
    log_likelihood = float(data.log_density(r, dof).sum())
    return CopulaFit(
        correlation=r,
        dof=dof,
        correlation_error=_triangle(plain, p),
        dof_error=float(plain[-1]) if fits_dof else float("nan"),
        correlation_robust_error=_triangle(robust, p),
        dof_robust_error=float(robust[-1]) if fits_dof else float("nan"),
        log_likelihood=log_likelihood,
        aic=2.0 * n_parameters - 2.0 * log_likelihood,
        bic=float(np.log(n_rows)) * n_parameters - 2.0 * log_likelihood,
        n_parameters=n_parameters,
        n_rows=n_rows,
        converged=bool(best.success),
        is_at_bound=is_at_bound,
    )


def _errors(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    u: np.ndarray,
    theta: np.ndarray,
    steps: np.ndarray,
    from_ranks: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors from the Hessian and from the sandwich, with what ranks add to the scores.

    An observation t of asset j moves the ranks of all others: it adds the mean over s of (1{u_tj <= u_sj} - u_sj) times
    the derivative of the score of row s in u_sj.
    """
    at = score(u, theta)
    hessian = np.empty((len(theta), len(theta)))
    for k in range(len(theta)):
        shift = np.zeros(len(theta))
        shift[k] = steps[k]
        hessian[k] = (score(u, theta + shift).sum(axis=0) - score(u, theta - shift).sum(axis=0)) / (2.0 * steps[k])
    inverse = np.linalg.pinv(-_half(hessian))
    full = at - at.mean(axis=0)
    for j in range(u.shape[1] if from_ranks else 0):
        seen = np.flatnonzero(~np.isnan(u[:, j]))
        step = 1e-4 * u[:, j] * (1.0 - u[:, j])
        up, down = u.copy(), u.copy()
        up[:, j] += step
        down[:, j] -= step
        slope = (score(up, theta) - score(down, theta))[seen] / (2.0 * step[seen, None])
        value, n = u[seen, j], len(seen)
        order = np.argsort(value, kind="stable")
        above = np.cumsum(slope[order][::-1], axis=0)[::-1]
        # Equal values all count as at or above each other: take the sum from the first of them.
        first = np.searchsorted(value[order], value, side="left")
        full[seen] += (above[first] - (slope * value[:, None]).sum(axis=0)) / n
    return _roots(inverse), _roots(inverse @ (full.T @ full) @ inverse)


def _uniforms(values: Any, margins: str) -> tuple[np.ndarray, list[str]]:
    """Uniforms per asset and the names of the assets."""
    from scipy.stats import rankdata

    if margins not in MARGINS:
        raise InputError(f"margins is {margins!r}; it must be one of {', '.join(MARGINS)}.")
    table = read_returns(values)
    names = list(table.assets)
    _check_table(table.values, names, MIN_ROWS)
    if margins == "ranks":
        ranks = rankdata(table.values, axis=0, nan_policy="omit")
        return ranks / (1.0 + (~np.isnan(table.values)).sum(axis=0)), names
    outside = (table.values <= 0.0) | (table.values >= 1.0)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise InputError(
            f"values, row {row}, column {names[column]!r} is {table.values[row, column]:g}; uniform margins lie "
            'strictly between 0 and 1: use margins="ranks".'
        )
    return table.values, names


def _check_table(values: np.ndarray, names: list[str], least: int) -> None:
    """Two assets or more, enough rows for each pair, and something that varies in every column."""
    if len(names) < 2:
        raise InputError("values has 1 asset; dependence takes at least 2.")
    seen = ~np.isnan(values)
    n_rows = int((seen.sum(axis=1) >= 2).sum())
    if n_rows < least:
        raise InputError(f"values has {n_rows} rows with two values or more; at least {least} are needed.")
    n_shared = seen.astype(np.int64).T @ seen.astype(np.int64)
    if n_shared.min() < MIN_ROWS:
        i, j = np.unravel_index(int(n_shared.argmin()), n_shared.shape)
        raise InputError(
            f"values of {names[i]!r} and {names[j]!r} share {n_shared[i, j]} rows; at least {MIN_ROWS} are needed: "
            "give a longer history or leave one of them out."
        )
    flat = np.nanmin(values, axis=0) == np.nanmax(values, axis=0)
    if flat.any():
        column = int(np.argmax(flat))
        raise InputError(
            f"values, column {names[column]!r} is {np.nanmin(values[:, column]):g} in every row; dependence needs "
            "values that vary: leave the asset out."
        )


def _check_full_rank(correlation: np.ndarray, names: list[str]) -> None:
    smallest = float(np.linalg.eigvalsh(correlation)[0])
    if smallest < EIGENVALUE_FLOOR:
        off = np.abs(correlation - np.eye(len(correlation)))
        i, j = np.unravel_index(int(off.argmax()), off.shape)
        raise InputError(
            f"the correlations have a smallest eigenvalue of {smallest:.2g}: some assets are collinear; the closest "
            f"two are {names[i]!r} and {names[j]!r}, correlation {correlation[i, j]:.6f}. Leave one out."
        )


def _is_at_bound(dof: float) -> bool:
    return dof < 1.001 * DOF_RANGE[0] or dof > 0.999 * DOF_RANGE[1]


def _triangle(entries: np.ndarray, p: int) -> np.ndarray:
    matrix = np.zeros((p, p))
    lower = np.tril_indices(p, -1)
    matrix[lower] = entries[: len(lower[0])]
    return matrix + matrix.T


def _roots(covariance: np.ndarray) -> np.ndarray:
    diagonal = np.diag(covariance)
    return np.where(diagonal > 0.0, np.sqrt(np.maximum(diagonal, 0.0)), np.nan)


def _half(matrix: np.ndarray) -> np.ndarray:
    return 0.5 * (matrix + matrix.T)
