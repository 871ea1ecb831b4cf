"""The market: regimes, volatility, shocks, jumps and side processes, and the constants the kernel reads of them.

A market is a pytree of parameters (differentiable, sweepable leaf by leaf) with its static shape beside it. `prepare`
turns the parameters into constants per simulation step; `market.line` has the pure step functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market import regime, shock
from qpo_sim.numerics import Rows, select
from qpo_sim.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Market:
    r"""Regime-switching market, composed of a shock, a volatility model, jumps and side processes.

    Without further components, per base step in regime k: $r = \mu_k + H\, \mathrm{diag}(\sigma_k) L_k z$ with
    $L_k L_k'$ the correlation matrix, z standard normal and H the shared mixing scale (see `shock`; H = 1 when `dof` is
    None). A run may use several sub-steps per base step: regime and mixing scale are held within the base step and the
    Gaussian part is a Brownian motion, so the law of a base step does not depend on the number of sub-steps.

    In general $r_i = \mu_{k,i} + s_i + f_i \sigma_{k,i} \varepsilon_i + J_i$: the volatility model gives the factor f
    and the shift s, `shock` the standardised $\varepsilon$ (the Student-t or Gaussian above when it is None), jumps
    add J. Markets whose volatility model carries its own level have $\sigma = 1$.

    Attributes:
      initial: law of the regime just before the first step (the filtered law of the last observed day).
      transition: rows sum to one; the regime moves before each base step.
      drift: mean log-return per base step; with `compensated` the log growth of the expected price instead.
      volatility: standard deviation of the log-return per base step, before the cut of the mixing variable.
      correlation_cholesky: lower Cholesky factor of each regime's correlation matrix.
      dof: degrees of freedom per regime (> 2), or None for Gaussian shocks.
      volatility_model: component of `market.volatility`, or None for constant volatility in each regime.
      shock: component of `market.dependence`, or None for the shock above.
      jumps: components of `market.jump`.
      side: components of `market.side`, in the order in which they see each other; their names differ (see
        `side.view.named`).
      drivers: covariates that move the transition probabilities (`regime.Drivers`), or None.
      assets: names, in column order (static).
      step_hours: length of the base step in hours (static).
      mixing_cut: probability of the far quantile at which the mixing variable is cut (static).
      compensated: subtract log E[exp(f sigma epsilon)] of each step given the past, so that expected prices grow by
        `drift` whatever the volatility does (static).
      regime_of: regime of each state of the chain, when several states make one regime (`regime.semi_markov`), else
        None (static). `initial` and `transition` are then those of the states.

    Pathwise gradient: drift, volatility, correlation_cholesky, dof, and what each component says. None: initial,
    transition, drivers (discrete draws).
    """

    initial: Float[Array, " states"]
    transition: Float[Array, "states states"]
    drift: Float[Array, "regimes assets"]
    volatility: Float[Array, "regimes assets"]
    correlation_cholesky: Float[Array, "regimes assets assets"] | None
    dof: Float[Array, " regimes"] | None
    assets: tuple[str, ...] = field(metadata={"static": True})
    step_hours: float = field(default=24.0, metadata={"static": True})
    mixing_cut: float = field(default=shock.MIXING_CUT, metadata={"static": True})
    volatility_model: Any = None
    shock: Any = None
    jumps: tuple[Any, ...] = ()
    side: tuple[Any, ...] = ()
    drivers: regime.Drivers | None = None
    compensated: bool = field(default=False, metadata={"static": True})
    regime_of: tuple[int, ...] | None = field(default=None, metadata={"static": True})

    @property
    def n_assets(self) -> int:
        """Number of assets."""
        return len(self.assets)

    @property
    def n_regimes(self) -> int:
        """Number of regimes."""
        return self.drift.shape[0]

    @property
    def is_composed(self) -> bool:
        """Whether there is more than regimes with constant volatility and the elliptical shock."""
        parts = (self.volatility_model, self.shock, self.drivers)
        return bool(any(part is not None for part in parts) or self.jumps or self.side or self.compensated)

    @property
    def is_conditionally_gaussian(self) -> bool:
        """Whether returns within a step are Gaussian given its `Scale`, so that bridge crossing is exact in law."""
        return self.shock is None or self.shock.is_conditionally_gaussian


class Mixing(NamedTuple):
    """Polynomial of the log mixing scale per regime, and the score at which it is cut."""

    coefficients: Float[Array, "coefficients regimes"]
    floor: Float[Array, ""]


class Bound(NamedTuple):
    """A component and its constants per simulation step."""

    component: Any
    constants: Any


class Prepared(NamedTuple):
    """What the kernel reads of a market; everything is per simulation step.

    `factor` and `covariance` carry the regime's volatility in a market that is not composed; in a composed one they
    are the factor and matrix of the correlations and `volatility` stands beside them. `log_mgf` is the quadrature of
    the shock's cumulant function (see `shock.log_mgf`), for on-path compensation.
    """

    initial_cuts: Float[Array, " cuts"]
    transition_cuts: Float[Array, "states cuts"]
    drift: Float[Array, "regimes assets"]
    factor: Float[Array, "regimes assets assets"] | None
    covariance: Float[Array, "regimes assets assets"] | None
    mixing: Mixing | None
    volatility: Float[Array, "regimes assets"] | None = None
    volatility_model: Bound | None = None
    shock: Bound | None = None
    jumps: tuple[Bound, ...] = ()
    side: tuple[Bound, ...] = ()
    drivers: Any = None
    transition: Float[Array, "states states"] | None = None
    log_mgf: Float[Array, "two_nodes regimes"] | None = None


class Scale(NamedTuple):
    """Conditional scale of one step: given it the log-returns are Gaussian, up to `jump`, at whose end they come.

    The standard deviation of asset i is that of its regime times `mixing` (one row, or rows by asset); in a composed
    market with own volatilities it is `local` times mixing. `side` holds the outputs of the side processes.
    """

    masks: tuple[Array, ...]
    mixing: Any
    local: Rows = ()
    jump: Rows = ()
    side: Any = ()


def prepare(market: Market, *, sub_steps: int = 1) -> Prepared:
    """Constants of the kernel for a market whose base step is cut into `sub_steps` simulation steps.

    Raises:
      InputError: a component that is only defined for whole base steps, or two side components of one name.
    """
    check_side_names(market.side)
    root = jnp.sqrt(jnp.asarray(sub_steps, market.drift.dtype))
    factor, covariance, volatility = market.correlation_cholesky, None, None
    if market.is_composed:
        volatility = market.volatility / root
    else:
        factor = market.volatility[:, :, None] * factor / root
    if factor is not None:
        covariance = jnp.einsum("kij,klj->kil", factor, factor, precision=lax.Precision.HIGHEST)
    steps = {"sub_steps": sub_steps, "step_hours": market.step_hours / sub_steps}
    if sub_steps > 1:
        _check_sub_steps(market)

    def bound(component: Any, **options: Any) -> Bound | None:
        return None if component is None else Bound(component, component.prepare(**options))

    return Prepared(
        initial_cuts=regime.thresholds(market.initial),
        transition_cuts=regime.thresholds(market.transition),
        drift=market.drift / sub_steps,
        factor=factor,
        covariance=covariance,
        mixing=_mixing(market),
        volatility=volatility,
        volatility_model=bound(market.volatility_model, **steps),
        shock=bound(market.shock, sub_steps=sub_steps),
        jumps=tuple(Bound(jump, jump.prepare(**steps)) for jump in market.jumps),
        side=tuple(Bound(side, side.prepare(step_hours=steps["step_hours"])) for side in market.side),
        drivers=market.drivers,
        transition=None if market.drivers is None else market.transition,
        log_mgf=_log_mgf(market),
    )


_prepare = jax.jit(prepare, static_argnames="sub_steps")


def prepare_once(market: Market, *, sub_steps: int = 1) -> Prepared:
    """`prepare` outside any trace: a program that calls back to the host is never kept in the compilation cache."""
    if market.is_composed:
        return _prepare(market, sub_steps=sub_steps)
    return _prepare(replace(market, dof=None), sub_steps=sub_steps)._replace(mixing=_mixing(market))


def check_side_names(side: Sequence[Any]) -> None:
    """Checks that the outputs of side components can be told apart.

    Raises:
      InputError: two of one name, or a name that is no word.
    """
    seen: dict[str, int] = {}
    for k, component in enumerate(side):
        name = component.name
        if not name.isidentifier():
            raise InputError(
                f"market.side[{k}].name is {name!r}; it starts the names of outputs, so it must be a word of letters, "
                "digits and underscores that does not start with a digit."
            )
        if name in seen:
            raise InputError(
                f"market.side[{k}] and market.side[{seen[name]}] are both named {name}: give one of them a name of its "
                f"own, e.g. `name: second_{name}`; its outputs then start with that name."
            )
        seen[name] = k


def _check_sub_steps(market: Market) -> None:
    model = market.volatility_model
    refused = []
    if model is not None and model.needs_base_step:
        refused.append(f"the volatility model {type(model).__name__}")
    if market.shock is not None and market.shock.needs_base_step:
        refused.append(f"the shock {type(market.shock).__name__}")
    if refused:
        raise InputError(
            f"{refused[0]} is defined for whole steps of {market.step_hours:g} hours: set simulation.step_hours to "
            f"{market.step_hours:g}, or fit the market to shorter steps."
        )


def _mixing(market: Market) -> Mixing | None:
    if market.dof is None or market.shock is not None:
        return None
    floor = np.asarray(shock.score_floor(market.mixing_cut), market.drift.dtype)
    return Mixing(shock.mixing_coefficients(market.dof), floor)


def _log_mgf(market: Market) -> Array | None:
    if not market.compensated or market.dof is None or market.shock is not None:
        return None
    return shock.mgf_quadrature(market.dof, market.mixing_cut)


def step_covariances(
    prepared: Prepared, scale: Scale, assets: tuple[int, ...], weights: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Covariance of sum_j w_j r_j with each r_i over one simulation step given its scale, for the named assets."""

    def entry(i: int, j: int) -> Any:
        if prepared.shock is not None:
            return prepared.shock.component.correlation(prepared.shock.constants, scale.masks, i, j)
        assert prepared.covariance is not None
        return select(scale.masks, prepared.covariance[:, i, j])

    mixing = scale.mixing
    if not len(scale.local):
        square = 1.0 if prepared.mixing is None else mixing * mixing
        return tuple(square * sum(entry(i, j) * w for j, w in zip(assets, weights, strict=True)) for i in assets)
    by_asset = isinstance(mixing, tuple) or (hasattr(mixing, "ndim") and mixing.ndim == 2)
    deviation = [scale.local[i] * (mixing[i] if by_asset else mixing) for i in assets]
    terms = [w * d for w, d in zip(weights, deviation, strict=True)]
    return tuple(
        d * sum(entry(i, j) * term for j, term in zip(assets, terms, strict=True))
        for i, d in zip(assets, deviation, strict=True)
    )


def jump_move(scale: Scale, assets: tuple[int, ...], weights: tuple[Array, ...]) -> Array | float:
    """sum_j w_j J_j: how far the step's jumps moved a quantity with these elasticities, to first order; 0 without."""
    return sum(w * scale.jump[j] for j, w in zip(assets, weights, strict=True)) if len(scale.jump) else 0.0
