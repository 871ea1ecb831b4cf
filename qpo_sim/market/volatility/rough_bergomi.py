r"""Rough Bergomi: log-variance driven by fractional noise, whose memory falls as a power of time.

$$v_t=\xi_t\exp(\eta\tilde W_t-\tfrac12\eta^2t^{2H}),\qquad\tilde W_t=\sqrt{2H}\int_0^t(t-s)^{H-1/2}dW_s,\qquad
d\log S_t=-\tfrac12v_t\,dt+\sqrt{v_t}\,dB_t,\quad d\langle B,W\rangle=\rho\,dt.$$

Bayer, Friz & Gatheral (2016), "Pricing under rough volatility". Time starts with the run: $\xi$ is the forward variance
curve seen then.

**Scheme.** The hybrid scheme of Bennedsen, Lunde & Pakkanen (2017) with one exact cell ($\kappa=1$), as in McCrickerd &
Pakkanen (2018). At the start of step i, with $\Delta$ the step, $a=H+\frac12$ and $y_j=\Delta W_j/\sqrt\Delta$,
$$\tilde W_{i\Delta}=\sqrt{2H}\,\Delta^H\Big(n_{i-1}+\sum_{k=2}^{i}\frac{k^a-(k-1)^a}{a}\,y_{i-k}\Big):$$
over the last step the singular integral $n_{i-1}$ is drawn jointly with $y_{i-1}$, as a bivariate normal; earlier
increments are weighted with the mean of the kernel over their step. The return of a step sees the variance at its start
and the increment of W in it (Euler).

**Cost.** The memory has no finite state. A run of n steps carries n numbers per path and asset, and every step weighs
all of them: O(n) per step and O(n^2) in all, so this is for hundreds of steps. (A Fourier transform would need the
whole path of the driver beforehand, and the loop makes one step at a time.)

What is exact: $E[v_t]=\xi_t$ on the grid (the exponent is compensated by the variance that the sum has, which is below
$t^{2H}$ by less than 0.1 %); $E[e^{shift+factor\,\varepsilon}\mid\text{past}]=1$ for a Gaussian shock independent of
the drivers; the law of $n_i$ and $\Delta W_i$ within and between assets, also where H differs. What is approximate, and
vanishes with the step: covariances over more than one step, and the variance held over the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.square_root import correlated
from qpo_sim.market.volatility.garch import first_rows, refuse, rounded
from qpo_sim.market.volatility.heston import correlation_cholesky, vectors_beside
from qpo_sim.market.volatility.local import Local
from qpo_sim.numerics import Rows, each_asset, materialised, rows_like
from qpo_sim.random import Address
from qpo_sim.types import HOURS_PER_YEAR, Array


class State(NamedTuple):
    """The past of the drivers.

    Attributes:
      past: unit increments y of the steps so far, zero beyond; (steps, paths) per asset, or (assets, steps, paths).
      now: those of the step under way.
      near: integral of the kernel over the last step, n.
    """

    past: Any
    now: Rows
    near: Rows


class Prepared(NamedTuple):
    r"""What a simulation step reads.

    Attributes:
      xi: forward variance over a step by base step, (steps, assets).
      eta: volatility of the log-variance.
      hurst: H.
      scale: $\sqrt{2H}\Delta^H$.
      rho: correlation of price and driver.
      residual: $\sqrt{1-\rho^2}$ times sqrt(sub_steps).
      near_shared: weight of y in n.
      near_own: weight of the second normal in n.
      factor: factor of the correlation of the drivers, None when they are independent.
      near_factor: factor of the correlation of the second normals.
      sub_steps: simulation steps per base step.
    """

    xi: Float[Array, "points assets"]
    eta: Float[Array, " assets"]
    hurst: Float[Array, " assets"]
    scale: Float[Array, " assets"]
    rho: Float[Array, " assets"]
    residual: Float[Array, " assets"]
    near_shared: Float[Array, " assets"]
    near_own: Float[Array, " assets"]
    factor: Float[Array, "assets assets"] | None
    near_factor: Float[Array, "assets assets"] | None
    sub_steps: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoughBergomi:
    """Rough Bergomi variances as a volatility component; build it with `rough_bergomi`. Time in years.

    The variances do not switch with the regime of the market, whose own volatility should be 1.

    Attributes:
      xi: forward variance per year, one row per base step; the last row holds from there on.
      eta: volatility of the log-variance (standard deviation of log v after one year).
      hurst: Hurst exponent H.
      rho: correlation of an asset's price and variance drivers.
      driver_correlation: correlation matrix of the drivers, None when they are independent.
      is_martingale: whether exp(log-return) without the market's drift has mean 1 (static).

    Pathwise gradient: all leaves.
    """

    xi: Float[Array, "points assets"]
    eta: Float[Array, " assets"]
    hurst: Float[Array, " assets"]
    rho: Float[Array, " assets"]
    driver_correlation: Float[Array, "assets assets"] | None = None
    is_martingale: bool = field(default=True, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.eta.shape[0]

    @property
    def n_slots(self) -> int:
        """A pair of normals per asset."""
        return self.n_assets

    @property
    def needs_base_step(self) -> bool:
        """A step of any length will do."""
        return False

    def stationary_variance(self) -> None:
        """None: the variance of log v grows with time."""
        return None

    def prepare(self, *, sub_steps: int, step_hours: float) -> Prepared:
        """Constants of a simulation step of `step_hours`, `sub_steps` of which make a base step.

        The market divides its volatility per base step by the root of `sub_steps`; the factor is raised by as much.
        """
        dt = float(step_hours) / HOURS_PER_YEAR
        h = self.hurst
        factor = near_factor = None
        if self.driver_correlation is not None:
            # The second normals of assets with different H are less correlated than the drivers.
            means = 0.5 * (h[:, None] + h)
            factor = jnp.linalg.cholesky(self.driver_correlation)
            near_factor = jnp.linalg.cholesky(self.driver_correlation * jnp.sqrt(h[:, None] * h) / means)
        return Prepared(
            xi=self.xi * dt,
            eta=self.eta,
            hurst=h,
            scale=jnp.sqrt(2.0 * h) * dt**h,
            rho=self.rho,
            residual=jnp.sqrt(1.0 - self.rho * self.rho) * sub_steps**0.5,
            near_shared=1.0 / (h + 0.5),
            near_own=(0.5 - h) / (h + 0.5) / jnp.sqrt(2.0 * h),
            factor=factor,
            near_factor=near_factor,
            sub_steps=sub_steps,
        )

    def init(self, prepared: Prepared, one: Array, n_assets: int, n_steps: int, address: Address) -> State:
        """Nothing has happened yet."""
        nothing = first_rows(jnp.zeros_like(prepared.eta), one, n_assets)
        if hasattr(nothing, "ndim"):
            past: Any = jnp.zeros((n_assets, n_steps, *one.shape), one.dtype)
        else:
            past = tuple(jnp.zeros((n_steps, *one.shape), one.dtype) for _ in range(n_assets))
        return State(past, nothing, nothing)

    def open(
        self, prepared: Prepared, t: Array, state: State, masks: Sequence[Array], address: Address
    ) -> tuple[State, Local]:
        """The variance at the start of the step, which holds in it, and the driver's part of the return."""

        def draws(prepared, key, path, step, mirror):
            own = Address(key, path, step, address.slot, mirror)
            pairs = own.normal_pairs(self.n_assets)
            dtype = prepared.eta.dtype
            first = rows_like(state.near, [pair.first.astype(dtype) for pair in pairs])
            second = rows_like(state.near, [pair.second.astype(dtype) for pair in pairs])
            return correlated(prepared.factor, first), correlated(prepared.near_factor, second)

        now, own = materialised(draws)(prepared, address.key, address.path, address.step, address.mirror)
        near = each_asset(lambda y, z, a, b: a * y + b * z, now, own, prepared.near_shared, prepared.near_own)
        variance = materialised(_variance)(prepared, t, state.past, state.near)
        root = each_asset(jnp.sqrt, variance)
        factor = each_asset(lambda s, residual: s * residual, root, prepared.residual)
        shift = each_asset(lambda s, y, rho: rho * s * y, root, now, prepared.rho)
        if self.is_martingale:
            shift = each_asset(lambda x, v: x - 0.5 * v, shift, variance)
        return State(state.past, now, near), Local(factor, shift)

    def close(
        self, prepared: Prepared, t: Array, state: State, masks: Sequence[Array], local: Local, shocks: Rows
    ) -> State:
        """The step's increments join the past."""
        put = lax.dynamic_update_index_in_dim
        if isinstance(state.past, tuple):
            past: Any = tuple(put(rows, row, t, 0) for rows, row in zip(state.past, state.now, strict=True))
        else:
            past = put(state.past, state.now, t, 1)
        return state._replace(past=past)


def _variance(prepared: Prepared, t: Array, past: Any, near: Rows) -> Rows:
    """Variance over the step that starts now, by asset."""
    n_steps = past[0].shape[0]
    weight = kernel_weights(prepared.hurst, t, n_steps)
    # Variance of the sum that follows, in units of `scale` squared.
    spread = jnp.where(t > 0, 0.5 / prepared.hurst, 0.0) + jnp.sum(weight * weight, axis=1)
    if isinstance(past, tuple):
        memory: Any = tuple(jnp.matmul(weight[i], rows, precision=lax.Precision.HIGHEST) for i, rows in enumerate(past))
    else:
        memory = jnp.einsum("an,anp->ap", weight, past, precision=lax.Precision.HIGHEST)
    point = jnp.minimum(t // prepared.sub_steps, prepared.xi.shape[0] - 1)
    xi = lax.dynamic_index_in_dim(prepared.xi, point, 0, keepdims=False)
    size = prepared.eta * prepared.scale

    def variance(far, last, xi, size, spread):
        return xi * jnp.exp(size * (last + far - 0.5 * size * spread))

    return each_asset(variance, memory, near, xi, size, spread)


def kernel_weights(hurst: Float[Array, " assets"], t: Array, n_steps: int) -> Float[Array, "assets steps"]:
    r"""Weight $(k^a-(k-1)^a)/a$, $a=H+\frac12$, of the unit increment of each step in what step t sees of it.

    The lag k is t less the step's number; from k = 1 on (the last step, whose integral is drawn) the weight is zero.
    """
    lag = t - jnp.arange(n_steps, dtype=jnp.int32)
    k = jnp.maximum(lag, 2).astype(hurst.dtype)
    a = hurst[:, None] + 0.5
    # Not as a difference of powers, which would cancel at long lags.
    weight = -(k**a) * jnp.expm1(a * jnp.log1p(-1.0 / k)) / a
    return jnp.where(lag >= 2, weight, 0.0)


def driver_covariance(hurst: float, s: Any, t: Any) -> np.ndarray:
    r"""$\mathrm{Cov}(\tilde W_s,\tilde W_t)$ of the continuous process, on the host in float64.

    $\frac{2H}{a}s^at^{H-1/2}\,{}_2F_1(1,\tfrac12-H;a+1;s/t)$ for $s\le t$, with $a=H+\frac12$.

    Args:
      hurst: H.
      s: times in years, > 0.
      t: times in years, > 0.
    """
    from scipy import special

    early, late = np.minimum(s, t), np.maximum(s, t)
    a = hurst + 0.5
    return 2.0 * hurst / a * early**a * late ** (a - 1.0) * special.hyp2f1(1.0, 1.0 - a, a + 1.0, early / late)


def rough_bergomi(
    *,
    xi: Any,
    eta: Any,
    hurst: Any,
    rho: Any = 0.0,
    driver_correlation: Any = None,
    n_assets: int | None = None,
    martingale: bool = True,
    dtype: Any = jnp.float32,
) -> RoughBergomi:
    """Rough Bergomi variances from plain numbers: one for all assets, or one per asset. Per year.

    Args:
      xi: forward variance per year, > 0: flat (one number, or one per asset), or a curve (base steps, assets) whose
        last row holds beyond its end.
      eta: volatility of the log-variance, > 0; about 1 to 2 for equity indices.
      hurst: H, inside (0, 0.5); about 0.1. H = 0.5 would be a lognormal variance without memory.
      rho: correlation of an asset's price with its own driver, inside (-1, 1). Asset i's price has the correlation
        rho_i times the drivers' with the driver of asset j.
      driver_correlation: correlation matrix of the drivers; independent when omitted.
      n_assets: number of assets, where it does not follow from the other arguments.
      martingale: put what makes E[exp(log-return)] = 1 into the shift, so that the market's drift is that of the mean
        price; False leaves out half the variance: the drift is then that of the log-price.
      dtype: precision of the paths.

    Raises:
      InputError: a value outside its domain, or shapes that do not fit.
    """
    curve = np.asarray(xi, np.float64)
    if curve.ndim > 2 or (curve.ndim == 2 and not curve.size):
        raise InputError(
            f"rough_bergomi.xi has the shape {curve.shape}; give one number, one per asset, or (base steps, assets)."
        )
    numbers = {"eta": eta, "hurst": hurst, "rho": rho} | ({} if curve.ndim == 2 else {"xi": xi})
    matrices = {"driver_correlation": driver_correlation}
    if n_assets is None and curve.ndim == 2:
        n_assets = curve.shape[1]
    p = vectors_beside("rough_bergomi", numbers, matrices, n_assets, dtype)
    n = p["eta"].size
    if curve.ndim == 2 and curve.shape[1] != n:
        raise InputError(f"rough_bergomi.xi has {curve.shape[1]} columns for {n} assets; give one column per asset.")
    curve = p["xi"][None] if curve.ndim < 2 else curve
    refuse("rough_bergomi.xi", curve, ~(np.isfinite(curve) & (curve > 0.0)), "it must be positive")
    refuse("rough_bergomi.eta", p["eta"], p["eta"] <= 0.0, "it must be positive")
    is_bad = (p["hurst"] <= 0.0) | (p["hurst"] >= 0.5)
    refuse("rough_bergomi.hurst", p["hurst"], is_bad, "it must lie strictly between 0 and 0.5")
    refuse("rough_bergomi.rho", p["rho"], np.abs(p["rho"]) >= 1.0, "it must lie strictly between -1 and 1")
    if driver_correlation is not None:
        correlation_cholesky("rough_bergomi", driver_correlation)
    return RoughBergomi(
        xi=rounded(curve, dtype),
        **{name: rounded(p[name], dtype) for name in ("eta", "hurst", "rho")},
        driver_correlation=None if driver_correlation is None else rounded(driver_correlation, dtype),
        is_martingale=martingale,
    )


def example(n_assets: int, dtype: Any) -> RoughBergomi:
    """Crypto-like: volatility about 70 % a year, rough and moving together, little leverage."""
    correlation = np.full((n_assets, n_assets), 0.7) + 0.3 * np.eye(n_assets)
    return rough_bergomi(
        xi=0.5, eta=1.5, hurst=0.1, rho=-0.2, driver_correlation=correlation, n_assets=n_assets, dtype=dtype
    )
