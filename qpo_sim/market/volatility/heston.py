r"""Heston's stochastic variance for several assets, with jumps of the price (Bates) and of the variance (SVJJ).

$$dv_i=\kappa_i(\theta_i-v_i)\,dt+\sigma_i\sqrt{v_i}\,dW_i,\qquad
d\log S_i=-\tfrac12 v_i\,dt+\sqrt{v_i}\,dB_i,\qquad d\langle B_i,W_j\rangle=\ell_{ij}\,dt.$$

The drivers $W$ have the correlation matrix $\Omega$; $\ell_{ii}=\rho_i$ is the asset's own leverage. Heston (1993),
Bates (1996), Duffie, Pan & Singleton (2000). A step of length $\Delta$ uses one standard normal y per asset,
called the score of its variance: $z=Ry$ with $RR'=\Omega$. The schemes are those of `market.square_root`: "qe" is
Andersen's QE-M, "euler" the full-truncation Euler scheme, which is differentiable in the variance's parameters.

What is exact:

* the conditional mean and variance of the next variance v' (qe);
* $E[e^{shift+factor\,\varepsilon+jump}\mid v]=1$ for a Gaussian shock independent of the drivers, in both schemes, with
  jumps and with cross leverage;
* own leverage (qe): it enters the return through the coefficients K of v' itself, so it does not depend on how well a
  score stands for the path of W within the step.

What is approximate, and vanishes with the step:

* the law of v' beyond two moments, and the integral of v over the step;
* correlation between variances: $\Omega$ holds for the scores z. Where a variance is near 0 (exponential branch) v' is
  a bent function of z, and the variances are correlated a little less than their drivers;
* cross leverage. Without `cross_leverage` it is what own leverage implies, $\ell_{ij}=\rho_i\Omega_{ij}$. A matrix of
  $\ell$ adds $\sqrt{\bar v_i\Delta}\,\sum_jw_{ij}z_j$ to the return of asset i, with
  $w_i=\Omega^{-1}(\ell_{i\cdot}-\rho_i\Omega_{i\cdot})$: what the price's driver shares with the drivers of the other
  assets beyond its own, at the mean variance $\bar v_i$ of the step. It is independent of $z_i$, and its variance is
  taken out of the shock's;
* the time of a jump within the step: at its end the variance is raised by what is left of the jump on average, and the
  shock's variance by what the jump adds to the integral of v on average.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Float

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.market import variance_jumps
from qpo_sim.market.jump import poisson
from qpo_sim.market.square_root import SCHEMES, FullTruncation, QuadraticExponential, correlated, product
from qpo_sim.market.variance_jumps import VarianceJumps
from qpo_sim.market.volatility.garch import asset_vectors, first_rows, refuse, rounded
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import Rows, each_asset, materialised, rows_like, safe_sqrt
from qpo_sim.random import Address
from qpo_sim.types import HOURS_PER_YEAR, Array


class FellerWarning(UserWarning):
    """The variance can reach zero: 2 kappa theta < vol_of_vol^2."""


class Prepared(NamedTuple):
    """What a simulation step reads.

    Attributes:
      v0: variance at the start, per year.
      scheme: the variance's scheme for this length of step.
      residual: standard deviation of the price's driver that is left to the shock, times sqrt(sub_steps).
      driver_cholesky: factor of the correlation of the drivers.
      cross_loading: w, see the module.
      jumps: constants of the jumps.
      within: what a jump of 1 in the variance adds to the square of the factor.
    """

    v0: Float[Array, " assets"]
    scheme: QuadraticExponential | FullTruncation
    residual: Float[Array, " assets"]
    driver_cholesky: Float[Array, "assets assets"] | None
    cross_loading: Float[Array, "assets assets"] | None
    jumps: variance_jumps.Constants | None
    within: Float[Array, " assets"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heston:
    """Heston variances as a volatility component; build it with `heston`. All leaves per year.

    The state is the variance per year, rows by asset (with "euler" it may be below zero, and counts as zero then). The
    variances do not switch with the regime of the market, whose own volatility should be 1.

    Attributes:
      v0: variance at the start.
      kappa: speed at which the variance returns.
      theta: long-run variance.
      vol_of_vol: sigma.
      rho: correlation of an asset's price and variance drivers.
      driver_cholesky: factor of the correlation matrix of the variance drivers, None when they are independent.
      cross_loading: coefficients w of the drivers in the price's driver beyond own leverage (see the module), or None.
      jumps: jumps of price and variance, or None.
      scheme: "qe" or "euler" (static).
      is_martingale: whether exp(log-return) without the market's drift has mean 1 (static).

    Pathwise gradient, "euler": v0, kappa, theta, vol_of_vol, rho, driver_cholesky, cross_loading, and the jumps but for
    their intensity (discrete draws: exactly zero). Where Feller's condition fails its variance is large, as the root of
    the variance is steep near zero. "qe": the same leaves have a derivative on every path, but not a right one: v' is
    not continuous where psi passes 1.5, and no pathwise derivative sees that. The error is small, since both branches
    have the same mean and variance given v; use "euler" where a gradient must be right.
    """

    v0: Float[Array, " assets"]
    kappa: Float[Array, " assets"]
    theta: Float[Array, " assets"]
    vol_of_vol: Float[Array, " assets"]
    rho: Float[Array, " assets"]
    driver_cholesky: Float[Array, "assets assets"] | None = None
    cross_loading: Float[Array, "assets assets"] | None = None
    jumps: VarianceJumps | None = None
    scheme: str = field(default="qe", metadata={"static": True})
    is_martingale: bool = field(default=True, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.v0.shape[0]

    @property
    def needs_base_step(self) -> bool:
        """A step of any length will do."""
        return False

    @property
    def n_slots(self) -> int:
        """A normal per asset, two from a slot, and what the jumps draw."""
        return self._n_driver_slots + (0 if self.jumps is None else self.jumps.n_slots)

    @property
    def _n_driver_slots(self) -> int:
        return (self.n_assets + 1) // 2

    def stationary_variance(self) -> Float[np.ndarray, " assets"]:
        r"""Long-run variance of the diffusive log-return per year, $\theta+\lambda\mu_v/\kappa$.

        It is that of the whole return. Own leverage is in the shift, so the factor's share of it is $1-\rho^2$.
        """
        return np.asarray(self.theta, np.float64) + variance_jumps.mean_variance(self.jumps, self.kappa)

    def shock_correlation(self, correlation: Any) -> Float[np.ndarray, "assets assets"]:
        r"""Correlation of the shocks that gives the price drivers B a wanted correlation matrix C.

        $B_i=\rho_iW_i+\sum_jw_{ij}W_j+\sqrt{1-\rho_i^2-w_i\Omega w_i'}\,\varepsilon_i$, so the shocks get
        $(C-V\Omega V')_{ij}$ over the product of the two roots, with $V=\mathrm{diag}(\rho)+w$.

        Raises:
          InputError: the result is no correlation matrix: leverage and driver correlation leave no room for C.
        """
        n = self.n_assets
        factor = np.eye(n) if self.driver_cholesky is None else np.asarray(self.driver_cholesky, np.float64)
        loading = np.diag(np.asarray(self.rho, np.float64))
        if self.cross_loading is not None:
            loading = loading + np.asarray(self.cross_loading, np.float64)
        explained = loading @ factor @ factor.T @ loading.T
        residual = np.sqrt(1.0 - np.diag(explained))
        left = (np.asarray(correlation, np.float64) - explained) / np.outer(residual, residual)
        np.fill_diagonal(left, 1.0)
        least = np.linalg.eigvalsh(left)[0]
        if least <= 0.0:
            raise InputError(
                f"this correlation of the prices cannot be reached: what the variance drivers leave to the shocks has "
                f"the eigenvalue {least:.3g}, and it must be positive; lower |rho| or driver_correlation."
            )
        return left

    def prepare(self, *, sub_steps: int, step_hours: float) -> Prepared:
        """Constants of a simulation step of `step_hours`, `sub_steps` of which make a base step.

        The market divides its volatility per base step by the root of `sub_steps`; the factor is raised by as much.

        Raises:
          InputError: the step is too long for the parameters (looked at when they are numbers, not traced).
        """
        dt = float(step_hours) / HOURS_PER_YEAR
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)):
            _check_step(self, dt)
        scheme = SCHEMES[self.scheme].of(self.kappa, self.theta, self.vol_of_vol, self.rho, dt)
        residual = 1.0 - self.rho * self.rho
        if self.cross_loading is not None:
            loading = self.cross_loading
            if self.driver_cholesky is not None:
                loading = jnp.matmul(loading, self.driver_cholesky, precision=lax.Precision.HIGHEST)
            residual = residual - jnp.sum(loading * loading, axis=1)
        return Prepared(
            v0=self.v0,
            scheme=scheme,
            residual=safe_sqrt(residual) * sub_steps**0.5,
            driver_cholesky=self.driver_cholesky,
            cross_loading=self.cross_loading,
            jumps=None if self.jumps is None else self.jumps.prepare(dt),
            within=scheme.within * sub_steps,
        )

    def init(self, prepared: Prepared, one: Array, n_assets: int, n_steps: int, address: Address) -> Rows:
        """Variances at the start."""
        return first_rows(prepared.v0, one, n_assets)

    def open(
        self, prepared: Prepared, t: Array, state: Rows, masks: Sequence[Array], address: Address
    ) -> tuple[Rows, Local]:
        """The variances at the end of the step, and the scale and shift of its returns."""
        normals = poisson.draw_normals(address, self.n_assets)
        z = rows_like(state, [row.astype(prepared.v0.dtype) for row in normals])
        if prepared.driver_cholesky is not None:
            z = materialised(correlated)(prepared.driver_cholesky, z)
        after, integral, shift = prepared.scheme.step(state, z, is_martingale=self.is_martingale)
        if prepared.cross_loading is not None:
            shared = materialised(product)(prepared.cross_loading, z)
            shift = each_asset(lambda x, square, e: x + safe_sqrt(square) * e, shift, integral, shared)
        if prepared.jumps is None:
            factor = each_asset(lambda square, residual: safe_sqrt(square) * residual, integral, prepared.residual)
            return after, Local(factor, shift)
        jump = variance_jumps.draw(prepared.jumps, address.after(self._n_driver_slots), state)
        return self._with_jumps(prepared, after, integral, shift, jump)

    def _with_jumps(
        self, prepared: Prepared, after: Rows, integral: Rows, shift: Rows, jump: variance_jumps.Draw
    ) -> tuple[Rows, Local]:
        assert prepared.jumps is not None
        scheme, compensator, residual = prepared.scheme, prepared.jumps.compensator, prepared.residual
        if jump.variance is None:
            factor = each_asset(lambda square, left: safe_sqrt(square) * left, integral, residual)
            if self.is_martingale:
                shift = each_asset(lambda x, c: x + c, shift, compensator)
            return after, Local(factor, shift, jump.price)
        # All of what the jump adds to the variance goes to the shock, so that the mean of the price stays exact.
        factor = each_asset(
            lambda square, y, left, within: safe_sqrt(left * left * square + within * y),
            integral,
            jump.variance,
            residual,
            prepared.within,
        )
        if self.is_martingale:
            shift = each_asset(
                lambda x, y, c, within: x + c - 0.5 * within * y, shift, jump.variance, compensator, scheme.within
            )
        after = each_asset(lambda v, y, lasting: v + lasting * y, after, jump.variance, scheme.lasting)
        return after, Local(factor, shift, jump.price)

    def close(
        self, prepared: Prepared, t: Array, state: Rows, masks: Sequence[Array], local: Local, shocks: Rows
    ) -> Rows:
        """The state as it is: the variance does not depend on the shock."""
        return state


def _check_step(model: Heston, dt: float) -> None:
    kappa, sigma, rho = (np.asarray(x, np.float64) for x in (model.kappa, model.vol_of_vol, model.rho))
    step = f"simulation steps of {dt * HOURS_PER_YEAR:g} hours"
    if model.scheme == "euler":
        rule = f"with {step} it must be below 1 for scheme 'euler': take shorter steps, or scheme 'qe'"
        refuse("heston.kappa * step", kappa * dt, kappa * dt >= 1.0, rule)
    elif model.is_martingale:
        # Sufficient for E[exp(A v')] to exist whatever v: beta >= 1.2 / (sigma^2 g) in the exponential branch and
        # 1 / (2a) >= 1.5 / (sigma^2 g) in the quadratic one, g = (1 - exp(-kappa dt)) / kappa.
        tilt = rho / sigma + 0.5 * dt * (kappa * rho / sigma - 0.5) + 0.25 * dt * (1.0 - rho**2)
        is_bad = tilt * sigma**2 * -np.expm1(-kappa * dt) / kappa >= 1.2
        refuse("heston.rho", rho, is_bad, f"the mean of the price over {step} need not exist: take shorter steps")
    if model.jumps is not None:
        expected, most = np.asarray(model.jumps.intensity, np.float64) * dt, model.jumps.most_per_step
        rule = f"with {step} it may be at most {most:g}: take shorter steps"
        refuse("heston.jump_intensity * step", expected, expected > most, rule)


def heston(
    *,
    kappa: Any,
    theta: Any,
    vol_of_vol: Any,
    rho: Any = 0.0,
    v0: Any = None,
    driver_correlation: Any = None,
    cross_leverage: Any = None,
    jump_intensity: Any = 0.0,
    jump_mean: Any = 0.0,
    jump_std: Any = 0.0,
    variance_jump_mean: Any = 0.0,
    jump_leverage: Any = 0.0,
    n_assets: int | None = None,
    scheme: str = "qe",
    martingale: bool = True,
    dtype: Any = jnp.float32,
) -> Heston:
    r"""Heston, Bates or SVJJ variances from plain numbers: one for all assets, or one per asset.

    All rates and variances are per year. `jump_intensity` > 0 adds jumps of the price; `variance_jump_mean` > 0 as well
    makes the variance jump with it. Assets jump independently of each other: common jumps are a jump component's.

    Args:
      kappa: speed at which the variance returns, > 0.
      theta: long-run variance, > 0.
      vol_of_vol: volatility of the variance, > 0.
      rho: correlation of an asset's price with its own variance, inside (-1, 1).
      v0: variance at the start, >= 0; theta when omitted.
      driver_correlation: correlation matrix of the variance drivers; independent when omitted.
      cross_leverage: (assets, assets) correlations of price driver i (row) with variance driver j, with rho on the
        diagonal; what rho and the drivers' correlation imply when omitted.
      jump_intensity: jumps per year.
      jump_mean: mean log-jump of the price (without the variance's part).
      jump_std: standard deviation of the log-jump.
      variance_jump_mean: mean of the variance's exponential jump.
      jump_leverage: slope of the price's log-jump in the variance's jump.
      n_assets: number of assets, where it does not follow from the other arguments.
      scheme: "qe" or "euler" (see the module).
      martingale: put what makes E[exp(log-return)] = 1 into the shift, so that the market's drift is that of the mean
        price. False leaves out half the variance and the jumps' compensation: the drift is then that of the log-price
        before its jumps.
      dtype: precision of the paths.

    Warns:
      FellerWarning: 2 kappa theta < vol_of_vol^2, the variance reaches zero. Both schemes stand that, "qe" better.

    Raises:
      InputError: a value outside its domain, or shapes that do not fit.
    """
    numbers = {
        "kappa": kappa,
        "theta": theta,
        "vol_of_vol": vol_of_vol,
        "rho": rho,
        "v0": theta if v0 is None else v0,
        "jump_intensity": jump_intensity,
        "jump_mean": jump_mean,
        "jump_std": jump_std,
        "variance_jump_mean": variance_jump_mean,
        "jump_leverage": jump_leverage,
    }
    matrices = {"driver_correlation": driver_correlation, "cross_leverage": cross_leverage}
    p = vectors_beside("heston", numbers, matrices, n_assets, dtype)
    for name in ("kappa", "theta", "vol_of_vol"):
        refuse(f"heston.{name}", p[name], p[name] <= 0.0, "it must be positive")
    for name in ("v0", "jump_intensity", "jump_std", "variance_jump_mean"):
        refuse(f"heston.{name}", p[name], p[name] < 0.0, "it must not be negative")
    refuse("heston.rho", p["rho"], np.abs(p["rho"]) >= 1.0, "it must lie strictly between -1 and 1")
    slope = p["jump_leverage"] * p["variance_jump_mean"]
    rule = "it must be below 1 for the mean of the price to exist"
    refuse("heston.jump_leverage * variance_jump_mean", slope, slope >= 1.0, rule)
    if scheme not in SCHEMES:
        raise InputError(f"heston.scheme is {scheme!r}; {did_you_mean(scheme, SCHEMES)}.")
    factor, loading = _dependence(p["rho"], driver_correlation, cross_leverage)
    _warn_of_zero(p)
    jumps = None
    if np.any(p["jump_intensity"] > 0.0):
        names = ("jump_intensity", "jump_mean", "jump_std", "variance_jump_mean", "jump_leverage")
        jumps_variance = np.any(p["variance_jump_mean"] > 0.0)
        jumps = VarianceJumps(*(rounded(p[name], dtype) for name in (names if jumps_variance else names[:3])))
    return Heston(
        **{name: rounded(p[name], dtype) for name in ("v0", "kappa", "theta", "vol_of_vol", "rho")},
        driver_cholesky=None if factor is None else rounded(factor, dtype),
        cross_loading=None if loading is None else rounded(loading, dtype),
        jumps=jumps,
        scheme=scheme,
        is_martingale=martingale,
    )


def _warn_of_zero(p: dict[str, np.ndarray]) -> None:
    ratio = 2.0 * p["kappa"] * p["theta"] / p["vol_of_vol"] ** 2
    if np.any(ratio < 1.0):
        worst = int(np.argmin(ratio))
        warnings.warn(
            f"heston: 2 kappa theta / vol_of_vol^2 is {ratio[worst]:.3g} for asset {worst}, below 1 (Feller): its "
            f"variance reaches zero, and long steps are less accurate.",
            FellerWarning,
            stacklevel=3,
        )


def _dependence(rho: np.ndarray, driver_correlation: Any, cross_leverage: Any) -> tuple[Any, Any]:
    """Cholesky factor of the drivers' correlation, and the loading of cross leverage; None for none."""
    factor = None if driver_correlation is None else correlation_cholesky("heston", driver_correlation)
    if cross_leverage is None:
        return factor, None
    wanted = np.asarray(cross_leverage, np.float64)
    rule = "it is the leverage of each asset on its own variance and must equal rho"
    refuse("heston.cross_leverage diagonal", np.diag(wanted), ~np.isclose(np.diag(wanted), rho, atol=1e-6), rule)
    omega = np.eye(rho.size) if factor is None else factor @ factor.T
    beyond = wanted - np.diag(wanted)[:, None] * omega
    loading = np.linalg.solve(omega, beyond.T).T
    left = 1.0 - rho**2 - np.einsum("ij,ij->i", loading, beyond)
    rule = "it is the share of the price's variance that is left to its shock and must be positive: lower the entries"
    refuse("1 - what heston.cross_leverage explains", left, left <= 0.0, rule)
    return factor, loading


def correlation_cholesky(model: str, correlation: Any) -> Float[np.ndarray, "assets assets"]:
    """Lower Cholesky factor of a correlation matrix of drivers.

    Raises:
      InputError: not symmetric with a unit diagonal, or not positive definite.
    """
    matrix = np.asarray(correlation, np.float64)
    if not (np.allclose(matrix, matrix.T, atol=1e-6) and np.allclose(np.diag(matrix), 1.0, atol=1e-6)):
        raise InputError(
            f"{model}.driver_correlation is {matrix.tolist()}; it must be symmetric with ones on the diagonal."
        )
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        raise InputError(
            f"{model}.driver_correlation has the eigenvalue {np.linalg.eigvalsh(matrix)[0]:.3g}; it must be positive "
            f"definite: repair it first."
        ) from error


def vectors_beside(
    model: str, numbers: dict[str, Any], matrices: dict[str, Any], n_assets: int | None, dtype: Any
) -> dict[str, np.ndarray]:
    """The numbers, rounded to `dtype`, as float64 vectors of as many assets as the longest number or matrix has.

    Raises:
      InputError: lengths that disagree, a matrix of another shape, or a value that is no finite number.
    """
    shapes = {name: np.shape(matrix) for name, matrix in matrices.items() if matrix is not None}
    n = n_assets or max([np.size(x) for x in numbers.values()] + [shape[0] for shape in shapes.values() if shape])
    for name, shape in shapes.items():
        if shape != (n, n):
            raise InputError(f"{model}.{name} has the shape {shape}; for {n} asset(s) it must be ({n}, {n}).")
    # Rounded before they are checked: a correlation just below 1 may round to 1.
    return {name: x.astype(dtype).astype(np.float64) for name, x in asset_vectors(model, n, numbers).items()}


def example(n_assets: int, dtype: Any) -> Heston:
    """Crypto-like: volatility about 70 % a year that moves together, little leverage, ten jumps of the price a year."""
    correlation = np.full((n_assets, n_assets), 0.6) + 0.4 * np.eye(n_assets)
    return heston(
        kappa=4.0,
        theta=0.5,
        vol_of_vol=1.5,
        rho=-0.2,
        v0=0.4,
        driver_correlation=correlation,
        jump_intensity=10.0,
        jump_mean=-0.02,
        jump_std=0.08,
        n_assets=n_assets,
        dtype=dtype,
    )
