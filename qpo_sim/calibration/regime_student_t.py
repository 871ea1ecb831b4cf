r"""Expectation maximisation for a hidden Markov model with multivariate Student-t emissions and missing values.

In regime k the row $x_t$ of log-returns is $t_{\nu_k}(\mu_k, S_k)$, that is $x_t = \mu_k + L_k z_t / \sqrt{u_t}$ with
$L_k L_k^\top = S_k$, $z_t$ normal and one $u_t \sim \Gamma(\nu_k/2, \nu_k/2)$ common to all assets. A NaN is integrated
out: the density of a row is the marginal t density of what was observed. What is maximised is the log-likelihood plus

$$\textstyle\sum_k \mathrm{sticky} \log P_{kk} - \tfrac12 \mathrm{floor} \sum_k \mathrm{tr}(S_k^{-1}),$$

in units in which every asset has variance 1. The second term bounds the likelihood, which is infinite without it (a
regime that shrinks onto a few rows); it adds `floor` rows' worth of pooled variance to each regime's scale matrix.

Peel & McLachlan (2000) for t mixtures; Liu & Rubin (1995) for the dof and for missing values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import digamma, gammaln
from jaxtyping import Bool, Float, Int

from qpo_sim.calibration import hidden_markov
from qpo_sim.types import Array

_DOF_STEPS = 3  # Newton steps per iteration: each iteration starts from the last one's dof, so few are enough


class Observations(NamedTuple):
    """Rows of returns grouped into blocks of equal missing pattern, so that factors are made once per pattern.

    Attributes:
      values: returns with 0 in place of NaN; rows that pad a block are 0.
      pattern: which missing pattern each block has.
      is_observed: per pattern and asset.
      time: which row of the record each row of a block is; padding points to row 0.
      is_row: 1 for rows, 0 for padding.
      place: where each row of the record stands among the rows of all blocks; rows without any value point to 0.
      has_value: 1 where a row of the record has at least one value.
    """

    values: Float[Array, "blocks size assets"]
    pattern: Int[Array, " blocks"]
    is_observed: Bool[Array, "patterns assets"]
    time: Int[Array, "blocks size"]
    is_row: Float[Array, "blocks size"]
    place: Int[Array, " steps"]
    has_value: Float[Array, " steps"]


class Params(NamedTuple):
    """A regime model; an infinite dof makes the regime Gaussian."""

    start: Float[Array, " regimes"]
    transition: Float[Array, "regimes regimes"]
    mean: Float[Array, "regimes assets"]
    scale: Float[Array, "regimes assets assets"]
    dof: Float[Array, " regimes"]


class Settings(NamedTuple):
    """Numbers that steer the fit; all may be traced."""

    sticky: Float[Array, ""]
    scale_floor: Float[Array, ""]
    dof_floor: Float[Array, ""]
    dof_cap: Float[Array, ""]
    tolerance: Float[Array, ""]
    max_iterations: Int[Array, ""]


class Fits(NamedTuple):
    """Where the restarts ended.

    Attributes:
      params: the last parameters, one more axis in front.
      regimes: likelihood without the penalty, filter and smoother at those parameters.
      rows: expected number of rows with a value in each regime.
      n_iterations: iterations done.
      has_converged: whether the last one gained less than the tolerance.
    """

    params: Params
    regimes: hidden_markov.Posterior
    rows: Float[Array, "restarts regimes"]
    n_iterations: Int[Array, " restarts"]
    has_converged: Bool[Array, " restarts"]


class _Factors(NamedTuple):
    """Inverse Cholesky factors of each pattern's scale matrix, the identity standing in for what is missing."""

    whiten: Float[Array, "patterns regimes assets assets"]
    log_det: Float[Array, "patterns regimes"]
    n_observed: Float[Array, " patterns"]


class _Distances(NamedTuple):
    """Residuals (0 where missing) and squared Mahalanobis distances of the observed parts."""

    residual: Float[Array, "blocks regimes size assets"]
    squared: Float[Array, "blocks regimes size"]


@jax.jit
def evaluate(observations: Observations, params: Params) -> hidden_markov.Posterior:
    """Likelihood, filter and smoother at fixed parameters."""
    log_density, _, _ = _emission(observations, params)
    return hidden_markov.posterior(params.start, params.transition, log_density)


@jax.jit
def em_step(observations: Observations, params: Params, settings: Settings) -> tuple[Params, Float[Array, ""]]:
    """One iteration: the next parameters, and the penalised log-likelihood of those passed in."""
    following, objective, _ = _em_step(observations, params, settings, is_dof_fixed=False)
    return following, objective


def fit_restarts(observations: Observations, params: Params, settings: Settings, *, is_dof_fixed: bool) -> Fits:
    """Fit from several starting points, all in one program; each stops when it has converged.

    Args:
      observations: returns in units in which every asset has mean 0 and variance 1.
      params: starting points, one more axis in front.
      settings: see `Settings`.
      is_dof_fixed: keep the dof.
    """
    arguments = (observations, params, settings, is_dof_fixed)
    try:
        return _fit_restarts_quick(*arguments)
    except jax.errors.JaxRuntimeError as error:
        # The options of the compiler are not part of JAX's interface.
        if "No such compile option" not in str(error):
            raise
        return _fit_restarts(*arguments)


class _Climb(NamedTuple):
    """A point, what is known at it, and the point EM goes to from there."""

    params: Params
    next_params: Params
    objective: Array
    gain: Array
    regimes: hidden_markov.Posterior
    n_iterations: Array


def _fit_one(observations, params, settings, is_dof_fixed):
    n_steps, n_regimes = observations.place.shape[0], params.dof.shape[0]
    nothing = jnp.zeros((n_steps, n_regimes))
    unknown = hidden_markov.Posterior(jnp.zeros(()), nothing, nothing, jnp.zeros((n_regimes, n_regimes)))
    first = _Climb(params, params, jnp.full((), -jnp.inf), jnp.full((), jnp.inf), unknown, jnp.zeros((), jnp.int32))

    def is_running(climb):
        return (climb.gain > settings.tolerance) & (climb.n_iterations < settings.max_iterations)

    def iterate(climb):
        # The point itself is kept beside the next one, so that the likelihood reported is the one at the point.
        following, objective, regimes = _em_step(observations, climb.next_params, settings, is_dof_fixed)
        return _Climb(
            climb.next_params, following, objective, objective - climb.objective, regimes, climb.n_iterations + 1
        )

    end = lax.while_loop(is_running, iterate, first)
    rows = jnp.sum(end.regimes.smoothed * observations.has_value[:, None], axis=0)
    return Fits(end.params, end.regimes, rows, end.n_iterations, end.gain <= settings.tolerance)


_fit_all = jax.vmap(_fit_one, in_axes=(None, 0, None, None))
_fit_restarts = jax.jit(_fit_all, static_argnums=3)
# XLA's newer emitters of CPU code take twice as long to compile these many small loops, which run no faster for it.
_fit_restarts_quick = jax.jit(_fit_all, static_argnums=3, compiler_options={"xla_cpu_use_fusion_emitters": False})


def _em_step(observations, params, settings, is_dof_fixed):
    log_density, factors, distances = _emission(observations, params)
    regimes = hidden_markov.posterior(params.start, params.transition, log_density)
    objective = regimes.log_likelihood + _penalty(params, settings)
    weight = _by_block(observations, regimes.smoothed)

    # Given the weights this is a weighted t fit per regime. Its dof is set first, directly on the weighted likelihood
    # at the distances at hand (Liu & Rubin's ECME), then mean and scale by one EM step: each part raises it.
    dof = params.dof if is_dof_fixed else _dof(observations, params.dof, factors, distances, weight, settings)
    mixing = _mixing(dof[None, :, None], factors.n_observed[observations.pattern][:, None, None], distances.squared)
    mean, scale = _mean_and_scale(
        observations, params, factors, distances, weight, weight * mixing, settings.scale_floor
    )

    counts = regimes.transition_counts + settings.sticky * jnp.eye(params.dof.shape[0])
    visits = jnp.sum(counts, axis=1, keepdims=True)
    transition = jnp.where(visits > 0.0, counts / jnp.where(visits > 0.0, visits, 1.0), params.transition)
    return Params(regimes.smoothed[0], transition, mean, scale, dof), objective, regimes


def _penalty(params, settings):
    stay = jnp.sum(hidden_markov.log_probability(jnp.diagonal(params.transition)))
    root = jnp.linalg.cholesky(params.scale)
    identity = jnp.broadcast_to(jnp.eye(root.shape[-1]), root.shape)
    trace = jnp.sum(solve_triangular(root, identity, lower=True) ** 2)
    return settings.sticky * stay - 0.5 * settings.scale_floor * trace


def _emission(observations, params):
    """Log-density per row of the record and regime, with the factors and distances behind it."""
    factors = _factorise(observations.is_observed, params.scale)
    observed = observations.is_observed[observations.pattern]
    residual = observations.values[:, None] - params.mean[None, :, None]
    residual = jnp.where(observed[:, None, None], residual, 0.0)
    whitened = jnp.einsum("nkba,nkca->nkbc", residual, factors.whiten[observations.pattern])
    squared = jnp.sum(whitened**2, axis=-1)
    density = _log_density(params.dof, factors, observations.pattern, squared)
    flat = jnp.moveaxis(density, 1, 2).reshape(-1, params.dof.shape[0])
    log_density = jnp.where(observations.has_value[:, None] > 0.0, flat[observations.place], 0.0)
    return log_density, factors, _Distances(residual, squared)


def _factorise(is_observed, scale):
    n_assets = scale.shape[-1]
    identity = jnp.eye(n_assets)
    pairs = is_observed[:, :, None] & is_observed[:, None, :]
    root = jnp.linalg.cholesky(jnp.where(pairs[:, None], scale[None], identity[None, None]))
    whiten = solve_triangular(root, jnp.broadcast_to(identity, root.shape), lower=True)
    log_det = jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
    return _Factors(whiten, log_det, jnp.sum(is_observed, axis=-1).astype(scale.dtype))


def _log_density(dof, factors, pattern, squared):
    is_gaussian = jnp.isinf(dof)
    finite = jnp.where(is_gaussian, 4.0, dof)[None]
    n_observed = factors.n_observed[:, None]
    constant = (
        gammaln(0.5 * (finite + n_observed)) - gammaln(0.5 * finite) - 0.5 * n_observed * jnp.log(jnp.pi * finite)
    )
    constant = jnp.where(is_gaussian[None], -0.5 * n_observed * jnp.log(2.0 * jnp.pi), constant) - factors.log_det
    finite, n_observed = finite[..., None], n_observed[pattern][..., None]
    body = -0.5 * (finite + n_observed) * jnp.log1p(squared / finite)
    return constant[pattern][..., None] + jnp.where(is_gaussian[None, :, None], -0.5 * squared, body)


def _mixing(dof, n_observed, squared):
    """Expected precision multiplier E[u | observed part of the row, regime]; 1 in a Gaussian regime."""
    is_gaussian = jnp.isinf(dof)
    finite = jnp.where(is_gaussian, 4.0, dof)
    return jnp.where(is_gaussian, 1.0, (finite + n_observed) / (finite + squared))


def _by_block(observations, responsibility):
    """Weights (steps, regimes) as (blocks, regimes, size), 0 on padding."""
    return jnp.moveaxis(responsibility[observations.time] * observations.is_row[..., None], 2, 1)


def _mean_and_scale(observations, params, factors, distances, weight, mixed_weight, scale_floor):
    """Weighted mean and scale of the completed rows.

    A missing part is completed by its conditional mean, linear in the observed residual, and adds its conditional
    scale matrix. Both are the same for all rows of a pattern, so weighted moments are summed per pattern first.
    """
    n_patterns, n_assets = observations.is_observed.shape
    residual = distances.residual
    per_block = (
        jnp.sum(weight, axis=-1),
        jnp.sum(mixed_weight, axis=-1),
        jnp.einsum("nkb,nkba->nka", mixed_weight, residual),
        jnp.einsum("nkba,nkbc->nkac", mixed_weight[..., None] * residual, residual),
    )
    rows, mass, first, second = (jax.ops.segment_sum(x, observations.pattern, n_patterns) for x in per_block)

    observed = observations.is_observed[:, None, None, :]
    missing = ~observations.is_observed[:, None, :, None]
    precision = jnp.einsum("pkca,pkcb->pkab", factors.whiten, factors.whiten)
    known = jnp.where(observed, params.scale[None], 0.0)
    complete = jnp.where(missing, known @ precision, jnp.eye(n_assets)[None, None])
    left = params.scale[None] - complete @ jnp.swapaxes(known, -1, -2)
    left = jnp.where(missing & ~observed, left, 0.0)

    total = jnp.maximum(jnp.sum(mass, axis=0), 1e-30)
    shift = jnp.einsum("pkab,pkb->ka", complete, first)
    spread = jnp.einsum("pkab,pkbc,pkdc->kad", complete, second, complete) + jnp.einsum("pk,pkab->kab", rows, left)
    spread = spread - shift[:, :, None] * shift[:, None, :] / total[:, None, None]
    scale = spread + scale_floor * jnp.eye(n_assets)[None]
    scale = scale / jnp.maximum(jnp.sum(rows, axis=0), 1e-30)[:, None, None]
    return params.mean + shift / total[:, None], 0.5 * (scale + jnp.swapaxes(scale, -1, -2))


def _dof(observations, dof, factors, distances, weight, settings):
    r"""Dof that solves, per regime and with $d_t$ observed assets at distance $\delta_t$, the likelihood equation.

    $$\sum_t \gamma_t \left[\psi\left(\tfrac{\nu+d_t}{2}\right) - \psi\left(\tfrac{\nu}{2}\right)
      - \log\left(1+\tfrac{\delta_t}{\nu}\right) + \tfrac{\delta_t-d_t}{\nu+\delta_t}\right] = 0$$

    Newton steps on $\log\nu$ within a shrinking bracket; the old dof is kept where the new one is no better.
    """
    n_rows = jax.ops.segment_sum(jnp.sum(weight, axis=-1), observations.pattern, observations.is_observed.shape[0])
    n_observed = factors.n_observed[:, None]
    per_row = factors.n_observed[observations.pattern][:, None, None]
    squared = distances.squared

    def slope_and_curvature(log_dof):
        nu = jnp.exp(log_dof)
        upper, lower = 0.5 * (nu[None] + n_observed), 0.5 * nu[None]
        far = nu[None, :, None] + squared
        slope = jnp.sum(n_rows * (digamma(upper) - digamma(lower)), axis=0)
        slope += jnp.sum(weight * ((squared - per_row) / far - jnp.log1p(squared / nu[None, :, None])), axis=(0, 2))
        curvature = 0.5 * jnp.sum(n_rows * (_trigamma(upper) - _trigamma(lower)), axis=0)
        turn = squared / (nu[None, :, None] * far) - (squared - per_row) / far**2
        return slope, nu * (curvature + jnp.sum(weight * turn, axis=(0, 2)))

    def newton(_, carry):
        log_dof, low, high = carry
        slope, curvature = slope_and_curvature(log_dof)
        low, high = jnp.where(slope > 0.0, log_dof, low), jnp.where(slope > 0.0, high, log_dof)
        proposal = log_dof - slope / jnp.where(curvature < 0.0, curvature, -jnp.inf)
        is_inside = (curvature < 0.0) & (proposal >= low) & (proposal <= high)
        return jnp.where(is_inside, proposal, 0.5 * (low + high)), low, high

    def weighted_likelihood(nu):
        return jnp.sum(weight * _log_density(nu, factors, observations.pattern, squared), axis=(0, 2))

    low, high = (jnp.broadcast_to(jnp.log(x), dof.shape) for x in (settings.dof_floor, settings.dof_cap))
    log_dof, _, _ = lax.fori_loop(0, _DOF_STEPS, newton, (jnp.log(dof), low, high))
    proposal = jnp.clip(jnp.exp(log_dof), settings.dof_floor, settings.dof_cap)
    old, new = jax.vmap(weighted_likelihood)(jnp.stack([dof, proposal]))
    return jnp.where(new >= old, proposal, dof)


def _trigamma(x):
    # Asymptotic series, within 1 % for x >= 1: it only sets the length of a Newton step, and compiles in no time.
    return (1.0 + (0.5 + (1.0 / 6.0 - 1.0 / (30.0 * x**2)) / x) / x) / x
