r"""Factor shocks: a few common factors and a specific part, for any number of assets.

$\varepsilon_i = H\,(\sum_j B_{k,ij}\,G_j f_j + d_{k,i} e_i)$ in regime k, with f and e independent standard normals and
$d_{k,i}=\sqrt{1-\sum_j B_{k,ij}^2}$, so that every shock has unit variance and assets i and l the correlation
$\sum_j B_{k,ij}B_{k,lj}$. Either all assets share the mixing scale H of the step (elliptical Student-t: joint extremes
in all directions), or each factor has its own $G_j$ (extremes come with the factor), or neither (Gaussian). Scales have
unit second moment before the cut of `market.shock`.

Work and memory are O(assets x factors): no matrix of assets x assets is ever formed.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market import shock
from qpo_sim.market.dependence import common_mixing
from qpo_sim.market.dependence.common_mixing import Mixing
from qpo_sim.market.dependence.correlation import check_correlation
from qpo_sim.market.dependence.shocks import Shocks
from qpo_sim.numerics import (
    MAX_UNROLLED_ASSETS,
    Pair,
    Rows,
    each_asset,
    materialised,
    regime_rows,
    rounded,
    safe_sqrt,
    select,
)
from qpo_sim.random import MAX_SLOTS, Address
from qpo_sim.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factor:
    """Parameters of the factor shocks (see the module); build it with `factor`.

    Attributes:
      loadings: B, one set for all regimes (a first axis of 1) or one per regime.
      dof: degrees of freedom of the common mixing scale, as many as sets of loadings, or None.
      factor_dof: degrees of freedom of each factor's own scale, or None.
      mixing_cut: far quantile at which the scales are cut (static).

    Pathwise gradient: loadings, dof, factor_dof.
    """

    loadings: Float[Array, "regimes assets factors"]
    dof: Float[Array, " regimes"] | None = None
    factor_dof: Float[Array, " factors"] | None = None
    mixing_cut: float = field(default=shock.MIXING_CUT, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.loadings.shape[1]

    @property
    def n_factors(self) -> int:
        """Number of factors."""
        return self.loadings.shape[2]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: the common score, the factors' scores, the factors, the specific parts."""
        scores = (self.n_factors + 1) // 2 if self.factor_dof is not None else 0
        return (self.dof is not None) + scores + (self.n_factors + 1) // 2 + (self.n_assets + 1) // 2

    @property
    def is_conditionally_gaussian(self) -> bool:
        """Whether one scale per step makes the shocks Gaussian with fixed correlations; not with scales by factor."""
        return self.factor_dof is None

    @property
    def needs_base_step(self) -> bool:
        """The mixing scales are held within a base step, so it may be cut."""
        return False

    def prepare(self, *, sub_steps: int = 1) -> "PreparedFactor":
        """Constants per simulation step; the mixing scales are held over the `sub_steps` of a base step."""
        return PreparedFactor(
            loadings=self.loadings,
            specific=safe_sqrt(1.0 - jnp.sum(self.loadings * self.loadings, axis=-1)),
            mixing=common_mixing.prepare_mixing(self.dof, self.mixing_cut),
            factor_mixing=common_mixing.prepare_mixing(self.factor_dof, self.mixing_cut),
            sub_steps=sub_steps,
        )

    def init(self, prepared: "PreparedFactor", one: Float[Array, " paths"], address: Address) -> Any:
        """State before the first step: the mixing scales, kept only where they are held over sub-steps."""
        if prepared.sub_steps == 1:
            return ()
        return _Scales(() if self.dof is None else (one,), () if self.factor_dof is None else (one,) * self.n_factors)

    def step(
        self, prepared: "PreparedFactor", t: Array, state: Any, masks: tuple[Array, ...], address: Address
    ) -> tuple[Any, Shocks]:
        """Shocks of simulation step t."""
        dtype = self.loadings.dtype
        masks = masks if self.loadings.shape[0] > 1 else ()
        scales, factors, specific = self._draws(prepared, masks, address)
        if prepared.sub_steps > 1:
            opens = t % prepared.sub_steps == 0
            scales = jax.tree.map(lambda new, old: jnp.where(opens, new, old), scales, state)
        mixing = scales.common[0] if scales.common else None

        def scaled(factors, own):
            rows = [row.astype(dtype) for row in factors]
            return tuple(f * g for f, g in zip(rows, own, strict=True)) if own else tuple(rows)

        factors = materialised(scaled)(factors, scales.own)
        if self.n_assets <= MAX_UNROLLED_ASSETS:
            eps = materialised(_few)(prepared, masks, factors, specific, mixing)
        else:
            eps = materialised(_many)(prepared, masks, factors, specific, mixing)
        return (scales if prepared.sub_steps > 1 else ()), Shocks(eps, mixing)

    def log_mgf(self, prepared: "PreparedFactor", masks: tuple[Array, ...], scale: Rows) -> Rows:
        r"""$\log E[e^{s_i\varepsilon_i}]$ by asset, given the regime (see `common_mixing.log_mgf`)."""
        masks = masks if self.loadings.shape[0] > 1 else ()
        if prepared.mixing is not None:
            return common_mixing.log_mgf(prepared.mixing, masks, scale)
        if prepared.factor_mixing is None:
            return each_asset(lambda s: 0.5 * s * s, scale)
        # A sum of independent parts: the specific one, Gaussian, and one from each factor.
        specific = regime_rows(masks, prepared.specific, scale)
        total = each_asset(lambda s, d: 0.5 * (s * d) ** 2, scale, specific)
        for j in range(self.n_factors):
            loading = regime_rows(masks, jnp.abs(prepared.loadings[:, :, j]), scale)
            part = each_asset(lambda s, b: s * b, scale, loading)
            cumulant = common_mixing.log_mgf(common_mixing.column(prepared.factor_mixing, j), (), part)
            total = each_asset(lambda x, y: x + y, total, cumulant)
        return total

    def correlation(self, prepared: "PreparedFactor", masks: tuple[Array, ...], i: int, j: int) -> Array:
        """Correlation of the shocks of assets i and j in the regime."""
        table = jnp.sum(prepared.loadings[:, i] * prepared.loadings[:, j], axis=-1)
        masks = masks if self.loadings.shape[0] > 1 else ()
        return jnp.ones((), table.dtype) if i == j else select(masks, table)

    def _draws(
        self, prepared: "PreparedFactor", masks: tuple[Array, ...], address: Address
    ) -> tuple["_Scales", tuple[Array, ...], Any]:
        # Every draw has many readers (all assets): made and stored once.
        dtype = self.loadings.dtype
        n_pairs, n_specific = (self.n_factors + 1) // 2, (self.n_assets + 1) // 2

        def scales_and_factors(prepared, masks, at):
            common, own = (), ()
            if prepared.mixing is not None:
                common = (common_mixing.scale_of(prepared.mixing, masks, at.scores(1)[0].astype(dtype)),)
                at = at.after(1)
            if prepared.factor_mixing is not None:
                own = tuple(
                    common_mixing.scale_of(common_mixing.column(prepared.factor_mixing, j), (), score.astype(dtype))
                    for j, score in enumerate(at.scores(self.n_factors))
                )
                at = at.after(n_pairs)
            return _Scales(common, own), at.normal_pairs(n_pairs)

        def specific_normals(at):
            few = self.n_assets <= MAX_UNROLLED_ASSETS
            return at.normal_pairs(n_specific) if few else _pair_matrix(at, n_specific)

        scales, pairs = materialised(scales_and_factors)(prepared, masks, address)
        factors = tuple(row for pair in pairs for row in pair)[: self.n_factors]
        return scales, factors, materialised(specific_normals)(address.after(self.n_slots - n_specific))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedFactor:
    """Constants of `Factor`; `specific` is d, `sub_steps` static."""

    loadings: Float[Array, "regimes assets factors"]
    specific: Float[Array, "regimes assets"]
    mixing: Mixing | None
    factor_mixing: Mixing | None
    sub_steps: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Scales:
    # The common scale (one row or none) and those of the factors.
    common: tuple[Array, ...]
    own: tuple[Array, ...]


def _few(prepared: PreparedFactor, masks: Any, factors: Any, pairs: Any, mixing: Any) -> tuple[Array, ...]:
    n_assets, n_factors = prepared.loadings.shape[1:]
    dtype = prepared.loadings.dtype
    specific = [row.astype(dtype) for pair in pairs for row in pair][:n_assets]
    rows = []
    for i in range(n_assets):
        row = select(masks, prepared.specific[:, i]) * specific[i]
        for j in range(n_factors):
            row = row + select(masks, prepared.loadings[:, i, j]) * factors[j]
        rows.append(row if mixing is None else row * mixing)
    return tuple(rows)


def _many(prepared: PreparedFactor, masks: Any, factors: Any, pair: Any, mixing: Any) -> Array:
    n_regimes, n_assets, _ = prepared.loadings.shape
    base = prepared.loadings[0]
    steps = jnp.concatenate([base] + [prepared.loadings[k] - base for k in range(1, n_regimes)], axis=1)
    f = jnp.stack(factors)
    columns = jnp.concatenate([f] + [mask * f for mask in masks], axis=0)
    common = lax.dot_general(steps, columns, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    e = jnp.concatenate([pair.first, pair.second])[:n_assets].astype(common.dtype)
    rows = common + regime_rows(masks, prepared.specific, e) * e
    return rows if mixing is None else rows * mixing


def _pair_matrix(address: Address, n_pairs: int) -> Pair:
    # One vectorised call: the slots are a column against the row of paths. Row i of either part is from slot i.
    path = jnp.broadcast_to(address.path, (n_pairs, *address.path.shape))
    slots: Any = address.slot + np.arange(n_pairs)[:, None]
    return replace(address, path=path, slot=slots).normal_pairs(1)[0]


def factor(
    loadings: Any,
    *,
    specific: Any = None,
    dof: Any = None,
    factor_dof: Any = None,
    mixing_cut: float = shock.MIXING_CUT,
    dtype: Any = jnp.float32,
) -> Factor:
    r"""Factor shocks of given loadings on independent factors of unit variance.

    Args:
      loadings: assets x factors, or regimes x assets x factors. Without `specific` they are those of standardised
        shocks: the squares of a row sum to less than one and the specific part makes up the rest.
      specific: standard deviations of the specific parts, one per asset (and regime). Then loadings are in the same
        unit, and each row is divided by $\sqrt{\sum_j B_{ij}^2+d_i^2}$.
      dof: degrees of freedom of one mixing scale for all assets, one number or one per regime (which needs loadings by
        regime); None for none.
      factor_dof: degrees of freedom of each factor's own scale, one number or one per factor; None for none.
      mixing_cut: far quantile at which the scales are cut (see `market.shock`).
      dtype: precision of the paths.

    Raises:
      InputError: shapes that do not fit, a row of loadings without room for a specific part, a dof not above 2, both
        `dof` and `factor_dof`, or more draws than a step has slots.
    """
    b = np.asarray(loadings, np.float64)
    b = b[None] if b.ndim == 2 else b
    if b.ndim != 3 or 0 in b.shape:
        raise InputError(
            f"loadings have shape {np.shape(loadings)}; it must be (assets, factors) or with regimes first."
        )
    if not np.all(np.isfinite(b)):
        raise InputError("loadings must be finite numbers.")
    if specific is not None:
        d = np.asarray(specific, np.float64)
        try:
            d = np.broadcast_to(d, b.shape[:2])
        except ValueError as error:
            raise InputError(f"specific has shape {d.shape}; it must be one number per asset, {b.shape[1]}.") from error
        if not (np.all(d > 0.0) and np.all(np.isfinite(d))):
            raise InputError("specific must be positive standard deviations, one per asset.")
        b = b / np.sqrt(np.sum(b * b, axis=-1) + d * d)[:, :, None]
    communality = np.sum(b * b, axis=-1)
    if communality.max() > 1.0 - 1e-6:
        regime, asset = np.unravel_index(int(np.argmax(communality)), communality.shape)
        raise InputError(
            f"the squared loadings of asset {asset + 1} sum to {communality[regime, asset]:.6g}; they must sum to less "
            "than 1 to leave a specific part: scale them down, or give `specific` to have them standardised."
        )
    if dof is not None and factor_dof is not None:
        raise InputError("dof and factor_dof are both given; choose one scale for all assets or one for each factor.")
    if dof is not None and np.ndim(dof) == 1 and b.shape[0] == 1 and np.size(dof) > 1:
        b = np.repeat(b, np.size(dof), axis=0)
    nu = None if dof is None else common_mixing.check_dof("dof", dof, b.shape[0])
    own = None if factor_dof is None else common_mixing.check_dof("factor_dof", factor_dof, b.shape[2])

    made = Factor(
        rounded(b, dtype),
        None if nu is None else rounded(nu, dtype),
        None if own is None else rounded(own, dtype),
        common_mixing.check_cut(mixing_cut),
    )
    if made.n_slots > MAX_SLOTS:
        raise InputError(
            f"{made.n_assets} assets and {made.n_factors} factors need {made.n_slots} slots of draws per step; there "
            f"are {MAX_SLOTS}, enough for {2 * (MAX_SLOTS - made.n_slots) + made.n_assets} assets."
        )
    return made


def principal_factors(correlation: Any, n_factors: int, *, n_iterations: int = 50) -> np.ndarray:
    r"""Loadings whose products are nearest to the off-diagonal correlations: iterated principal axes.

    Each round takes the leading eigenvectors of the matrix with the communalities on its diagonal. Harman (1976) ch. 8.

    Args:
      correlation: positive definite correlation matrix.
      n_factors: number of factors, fewer than assets.
      n_iterations: rounds.

    Returns:
      (assets, factors) loadings in float64, with communalities of at most 0.995; the largest factor first and its
      loadings positive on average.

    Raises:
      InputError: not a correlation matrix, or a number of factors outside 1 .. assets - 1.
    """
    matrix = check_correlation("correlation", correlation)
    n = matrix.shape[0]
    if not 1 <= n_factors < n:
        raise InputError(f"n_factors is {n_factors}; {n} assets allow 1 to {n - 1}.")
    from scipy import linalg

    # Start: the squared multiple correlation of each asset with the others.
    communality = 1.0 - 1.0 / np.diag(np.linalg.inv(matrix))
    loadings = np.zeros((n, n_factors))
    for _ in range(n_iterations):
        np.fill_diagonal(matrix, communality)
        values, vectors = linalg.eigh(matrix, subset_by_index=(n - n_factors, n - 1))
        loadings = (vectors * np.sqrt(np.maximum(values, 0.0)))[:, ::-1]
        square = np.sum(loadings * loadings, axis=1)
        loadings = loadings * np.sqrt(np.minimum(1.0, 0.995 / np.maximum(square, 1e-300)))[:, None]
        communality = np.minimum(square, 0.995)
    return loadings * np.where(loadings.sum(axis=0) < 0.0, -1.0, 1.0)


def example(n_assets: int, dtype: Any = jnp.float32) -> Factor:
    """A market factor that every coin follows and a second one that splits them, with a common mixing scale."""
    market = np.linspace(0.9, 0.7, n_assets)
    second = 0.25 * np.where(np.arange(n_assets) % 2 == 0, 1.0, -1.0)
    return factor(np.stack([market, second], axis=1), dof=4.2, dtype=dtype)
