r"""Dynamic conditional correlation of order (1, 1): correlations that move with the products of past shocks.

$Q_{t+1} = (1-a-b)\,S + a\,p_t p_t' + b\,Q_t$ and $R_t = \mathrm{diag}(Q_t)^{-1/2}\,Q_t\,\mathrm{diag}(Q_t)^{-1/2}$,
with $p=\varepsilon$ (Engle 2002) or $p_i=\sqrt{Q_{ii}}\,\varepsilon_i$ (corrected, Aielli 2013). S is the target: the
corrected form has $E[Q]=S$ exactly, Engle's has $E[Q]$ between S and $E[R]$. In neither is $E[R]$, the unconditional
correlation of the shocks, exactly S: it is smaller by terms of the order of the variance of Q.

The shocks are $\varepsilon = H\,R^{1/2}z$ with z standard normal and H the common scale of `market.shock` (1 for
Gaussian shocks); its second moment is divided out of p p', or the cut would pull Q off its target.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market import shock
from qpo_sim.market.dependence import common_mixing
from qpo_sim.market.dependence.common_mixing import Mixing
from qpo_sim.market.dependence.correlation import (
    EIGENVALUE_FLOOR,
    check_square,
    correlation_cholesky,
    correlation_of,
)
from qpo_sim.market.dependence.shocks import Shocks
from qpo_sim.numerics import MAX_UNROLLED_ASSETS, Rows, each_asset, materialised, rounded, select
from qpo_sim.random import Address
from qpo_sim.types import Array

# Pivots below this many roundings of the variance are noise, which the next columns would divide by.
_PIVOT_ROUNDINGS = 64.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dcc:
    """Parameters of the dynamic correlations (see the module), per base step; build it with `dcc`.

    Attributes:
      target_cholesky: lower Cholesky factor of the target correlation S.
      a: weight of the last products of shocks.
      b: weight of the last Q.
      initial: Q of the first step, or None for the target.
      dof: degrees of freedom of the mixing scale, one for all regimes or one per regime, or None (Gaussian).
      corrected: Aielli's form instead of Engle's (static).
      mixing_cut: far quantile at which the scale is cut (static).

    Pathwise gradient: all but the static fields.
    """

    target_cholesky: Float[Array, "assets assets"]
    a: Float[Array, ""]
    b: Float[Array, ""]
    initial: Float[Array, "assets assets"] | None = None
    dof: Float[Array, " regimes"] | None = None
    corrected: bool = field(default=False, metadata={"static": True})
    mixing_cut: float = field(default=shock.MIXING_CUT, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return self.target_cholesky.shape[0]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step: the mixing score and the normals."""
        return (self.dof is not None) + (self.n_assets + 1) // 2

    @property
    def is_conditionally_gaussian(self) -> bool:
        """True, with the correlations of the step, which `conditional_correlation` gives."""
        return True

    @property
    def needs_base_step(self) -> bool:
        """Correlations and scale are held within a base step, so it may be cut."""
        return False

    def prepare(self, *, sub_steps: int = 1) -> "PreparedDcc":
        """Constants per simulation step; Q and the scale are held over the `sub_steps` of a base step."""
        target = correlation_of(self.target_cholesky)
        mixing = common_mixing.prepare_mixing(self.dof, self.mixing_cut)
        return PreparedDcc(
            target=target,
            pull=(1.0 - self.a - self.b) * target,
            weight=self.a[None] if mixing is None else self.a / mixing.second_moment,
            keep=self.b,
            initial=target if self.initial is None else self.initial,
            mixing=mixing,
            sub_steps=sub_steps,
        )

    def init(self, prepared: "PreparedDcc", one: Float[Array, " paths"], address: Address) -> "DccState":
        """State before the first step."""
        q = tuple(prepared.initial[j:, j, None] * one for j in range(self.n_assets))
        if prepared.sub_steps == 1:
            return DccState(q, (), ())
        return DccState(q, () if self.dof is None else (one,), (jnp.zeros_like(one),) * self.n_assets)

    def step(
        self, prepared: "PreparedDcc", t: Array, state: "DccState", masks: tuple[Array, ...], address: Address
    ) -> tuple["DccState", Shocks]:
        """Shocks of simulation step t, and the state of the next."""
        dtype, n = self.target_cholesky.dtype, self.n_assets
        masks = masks if self.dof is not None and self.dof.shape[0] > 1 else ()
        n_pairs, sub_steps = (n + 1) // 2, prepared.sub_steps

        def draws(prepared, masks, at):
            mixing = ()
            if prepared.mixing is not None:
                mixing = (common_mixing.scale_of(prepared.mixing, masks, at.scores(1)[0].astype(dtype)),)
            return mixing, at.after(len(mixing)).normal_pairs(n_pairs)

        mixing, pairs = materialised(draws)(prepared, masks, address)
        if sub_steps > 1:
            mixing = jax.tree.map(lambda new, old: jnp.where(t % sub_steps == 0, new, old), mixing, state.mixing)
        z = [row.astype(dtype) for pair in pairs for row in pair][:n]
        columns, inverse = _factorise(state.q)
        eps = _shocks(state.q, columns, inverse, z, mixing)
        after = self._close(prepared, t, state, masks, mixing, eps)
        return after, Shocks(eps, mixing[0] if mixing else None)

    def _close(
        self, prepared: "PreparedDcc", t: Array, state: "DccState", masks: Any, mixing: Any, eps: Any
    ) -> "DccState":
        # Over several sub-steps the shock of the base step is the sum of theirs over the root of their number.
        sub_steps = prepared.sub_steps
        total = eps
        if sub_steps > 1:
            opens = t % sub_steps == 0
            total = tuple(
                jnp.where(opens, 0.0, s) + e / np.sqrt(sub_steps).astype(e.dtype)
                for s, e in zip(state.total, eps, strict=True)
            )

        def update(prepared, masks, q, total):
            weight = select(masks, prepared.weight)
            p = jnp.stack(total)
            if self.corrected:
                p = p * jnp.sqrt(jnp.stack([column[0] for column in q]))
            return tuple(
                prepared.pull[j:, j, None] + weight * (p[j:] * p[j]) + prepared.keep * column
                for j, column in enumerate(q)
            )

        q = materialised(update)(prepared, masks, state.q, total)
        if sub_steps == 1:
            return DccState(q, (), ())
        closes = t % sub_steps == sub_steps - 1
        return DccState(tuple(jnp.where(closes, new, old) for new, old in zip(q, state.q, strict=True)), mixing, total)

    def log_mgf(self, prepared: "PreparedDcc", masks: tuple[Array, ...], scale: Rows) -> Rows:
        r"""$\log E[e^{s_i\varepsilon_i}]$ by asset, given the regime (see `common_mixing.log_mgf`)."""
        if prepared.mixing is None:
            return each_asset(lambda s: 0.5 * s * s, scale)
        return common_mixing.log_mgf(prepared.mixing, masks, scale)

    def correlation(self, prepared: "PreparedDcc", masks: tuple[Array, ...], i: int, j: int) -> Array:
        """Target correlation of assets i and j; that of a step is `conditional_correlation`."""
        return prepared.target[i, j]

    def conditional_correlation(self, state: "DccState", i: int, j: int) -> Float[Array, " paths"]:
        """Correlation of assets i and j in the step that starts from `state`."""
        low, high = min(i, j), max(i, j)
        return state.q[low][high - low] / jnp.sqrt(state.q[i][0] * state.q[j][0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedDcc:
    """Constants of `Dcc`: Q moves to `pull` + `weight` p p' + `keep` Q; `sub_steps` static."""

    target: Float[Array, "assets assets"]
    pull: Float[Array, "assets assets"]
    weight: Float[Array, " regimes"]
    keep: Float[Array, ""]
    initial: Float[Array, "assets assets"]
    mixing: Mixing | None
    sub_steps: int = field(metadata={"static": True})


class DccState(NamedTuple):
    """Q of the step as columns of its lower triangle; with sub-steps the scale and the sum of shocks so far."""

    q: tuple[Float[Array, "rows paths"], ...]
    mixing: tuple[Float[Array, " paths"], ...]
    total: tuple[Float[Array, " paths"], ...]


def _factorise(q: tuple[Array, ...]) -> tuple[list[Array], list[Array]]:
    # Q = W D^-1 W' column by column, D = diag(W): W_ij = Q_ij - sum_{k<j} W_ik W_jk / D_k. No root per entry, and each
    # column is stored before the next reads it. Gives the columns from the diagonal down, and 1 / D.
    columns: list[Array] = []
    inverse: list[Array] = []
    floor = _PIVOT_ROUNDINGS * float(jnp.finfo(q[0].dtype).eps)

    def column(entries, columns, inverse):
        # `columns[k]` starts at row k, what is left of this column's entries at row j.
        values, j = entries, len(columns)
        for k, (left, d) in enumerate(zip(columns, inverse, strict=True)):
            left = left[j - k :]
            values = values - left * (left[:1] * d)
        return values

    for entries in q:
        values = materialised(column)(entries, tuple(columns), tuple(inverse))
        columns.append(values)
        inverse.append(materialised(lambda w, q: 1.0 / jnp.maximum(w, floor * q))(values[0], entries[0]))
    return columns, inverse


def _shocks(q: Any, columns: Any, inverse: Any, z: Any, mixing: Any) -> tuple[Array, ...]:
    # Row i of the factor times z is sum_{j<=i} W_ij z_j / sqrt(D_j).
    def whitened(z, inverse):
        return tuple(row * jnp.sqrt(d) for row, d in zip(z, inverse, strict=True))

    y = materialised(whitened)(tuple(z), tuple(inverse))

    def combined(q, columns, y, mixing):
        rows = []
        for i in range(len(y)):
            row = sum(columns[j][i - j] * y[j] for j in range(i + 1)) / jnp.sqrt(q[i][0])
            rows.append(row * mixing[0] if mixing else row)
        return tuple(rows)

    return materialised(combined)(q, tuple(columns), y, mixing)


def dcc(
    target: Any,
    *,
    a: float,
    b: float,
    initial: Any = None,
    dof: Any = None,
    corrected: bool = False,
    mixing_cut: float = shock.MIXING_CUT,
    dtype: Any = jnp.float32,
) -> Dcc:
    """Dynamic conditional correlations for a few assets.

    Args:
      target: correlation matrix, usually that of the standardised residuals.
      a: weight of the last products, in [0, 1), per base step.
      b: weight of the last Q, in [0, 1); a + b < 1.
      initial: Q of the first step (positive definite; its diagonal need not be one), the target when omitted.
      dof: degrees of freedom of the common mixing scale, one number or one per regime; None for Gaussian shocks.
      corrected: Aielli's (2013) form instead of Engle's (2002).
      mixing_cut: far quantile at which the scale is cut (see `market.shock`).
      dtype: precision of the paths.

    Raises:
      InputError: a target or initial matrix that is not positive definite, weights outside their range, a dof not above
        2, or more than 32 assets.
    """
    cholesky = correlation_cholesky("target", target)
    n = cholesky.shape[0]
    if n > MAX_UNROLLED_ASSETS:
        raise InputError(
            f"dcc has {n} assets; its work per path and step grows with their cube and stops at {MAX_UNROLLED_ASSETS}: "
            "use `factor` for more."
        )
    a, b = float(a), float(b)
    if not (a >= 0.0 and b >= 0.0 and a + b < 1.0):
        raise InputError(
            f"a is {a} and b is {b}; both must be at least 0 and a + b below 1 for Q to return to its target."
        )
    start = None
    if initial is not None:
        start = check_square("initial", initial, n)
        smallest = float(np.linalg.eigvalsh(start)[0])
        if smallest < EIGENVALUE_FLOOR:
            raise InputError(f"initial has the eigenvalue {smallest:.3g}; it must be positive definite.")
    if dof is not None and np.ndim(dof) > 1:
        raise InputError(f"dof has shape {np.shape(dof)}; give one number, or one per regime.")
    nu = None if dof is None else common_mixing.check_dof("dof", dof, max(1, np.size(dof)))

    return Dcc(
        rounded(cholesky, dtype),
        rounded(a, dtype),
        rounded(b, dtype),
        None if start is None else rounded(start, dtype),
        None if nu is None else rounded(nu, dtype),
        bool(corrected),
        common_mixing.check_cut(mixing_cut),
    )


def example(n_assets: int, dtype: Any = jnp.float32) -> Dcc:
    """Coins of correlation 0.85 and falling, with the slow correlations of daily returns."""
    level = np.sqrt(np.linspace(0.9, 0.6, n_assets))
    target = level[:, None] * level[None, :]
    np.fill_diagonal(target, 1.0)
    return dcc(target, a=0.03, b=0.95, dof=4.2, corrected=True, dtype=dtype)
