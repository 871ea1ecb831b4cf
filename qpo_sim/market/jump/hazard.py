r"""Failures of protocols, bridges, stablecoins and exchanges: marked jumps with a random loss.

An exposure j fails in a step with probability $1 - e^{-\lambda_j dt}$, and with every common factor it belongs to
(chain, compiler, custodian...), which strike with probability $1 - e^{-\lambda_c dt}$ (Marshall & Olkin 1967): at most
one failure per exposure and step. A failure takes the share $L \sim \mathrm{Beta}(a,b)$ of its value,
$V \leftarrow V(1-L)$: the jump $\log(1-L)$ of the log-price of the asset that stands for it.

**Losses.** The logit of L is a polynomial of degree 14 in a normal score, fitted on the host to the exact quantiles. It
is within 3e-5 of them for a, b >= 1.5, 4e-4 for a, b >= 1 and 1.1e-3 for a, b >= 0.5 (up to the 24 bits of the score),
so L is within a quarter of that; parameters for which it is worse than 1e-2 are refused.

**Intensities** are per year, by regime if given as a table or by `regime_multiplier` (custody and depeg risk rise in a
crash), and may be raised by the failures of others (contagion), fading at a rate.

**Exact or not.** Frequencies over time are those of the exponential law for any step. With repeated failures the second
one within a step is dropped (a relative $\lambda dt/2$); contagion starts with the next step and is held within one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32
from numpy.polynomial import chebyshev

from qpo_sim.errors import InputError
from qpo_sim.market.jump import poisson
from qpo_sim.market.jump.base import Jump
from qpo_sim.numerics import materialised, polynomial, rounded
from qpo_sim.random import Address, normal_score
from qpo_sim.types import HOURS_PER_YEAR, Array

DEGREE = 14

# The scores live in |score| <= 5.42 (24 random bits); the fit covers a little more.
_SCORE_RANGE = 5.6
_NODES = np.cos(np.pi * (np.arange(97) + 0.5) / 97)
_WORST_FIT = 1e-2


def logit_quantile(a: float, b: float, score: Any) -> np.ndarray:
    """log(L / (1 - L)) of the Beta(a, b) quantile L at the probability of a normal score, on the host."""
    from scipy import special

    score = np.asarray(score, np.float64)
    tail = special.ndtr(-np.abs(score))
    # Each half from its own tail, so that neither loses digits to 1 - p.
    near = np.where(score < 0.0, special.betaincinv(a, b, tail), special.betaincinv(b, a, tail))
    logit = np.log(np.maximum(near, 1e-300)) - np.log1p(-near)
    return np.where(score < 0.0, logit, -logit)


def logit_coefficients(a: float, b: float) -> np.ndarray:
    """Monomial coefficients of `logit_quantile` in score / 5.6, lowest power first.

    Raises:
      InputError: parameters so small that the polynomial misses the quantiles by more than 1e-2.
    """
    fit = chebyshev.chebfit(_NODES, logit_quantile(a, b, _NODES * _SCORE_RANGE), DEGREE)
    check = np.linspace(-5.42, 5.42, 201)
    error = np.max(np.abs(chebyshev.chebval(check / _SCORE_RANGE, fit) - logit_quantile(a, b, check)))
    if not error < _WORST_FIT:
        raise InputError(
            f"loss has the Beta parameters ({a:g}, {b:g}), too small for its quantiles to be fitted (logit off by "
            f"{error:.2g}): use parameters of 0.5 or more."
        )
    return chebyshev.cheb2poly(fit)


class HazardState(NamedTuple):
    """State of a path.

    Attributes:
      failures: number of failures so far, a row per exposure (0 or 1 unless repeated).
      heat: intensity per year added by contagion, a row per exposure; () without contagion.
    """

    failures: tuple[Array, ...]
    heat: tuple[Array, ...]


class Prepared(NamedTuple):
    """Constants of a step: failure probabilities by regime, contagion and losses."""

    years: Float[Array, ""]
    probability: Float32[Array, "regimes exposures"]
    common_probability: Float32[Array, "regimes factors"]
    hazard: Float[Array, "regimes exposures"]
    total_hazard: Float[Array, "regimes exposures"]
    contagion: Float[Array, "exposures exposures"] | None
    fade: Float[Array, ""] | None
    loss_logit: Float[Array, "exposures coefficients"]
    loss_mean: Float[Array, " exposures"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hazard:
    """Failures of exposures (see the module); intensities per year.

    Attributes:
      intensity: own intensity of each exposure.
      common_intensity: intensity of each common factor.
      loss_logit: polynomial of the logit of the loss in score / 5.6 (`logit_coefficients`).
      loss_mean: E[L].
      kept_square: E[(1 - L)^2].
      contagion: intensity added to the row's exposure by a failure of the column's, or None.
      contagion_decay: rate per year at which that fades, None without contagion.
      n_assets: number of assets (static).
      names: of the exposures (static).
      asset: index of the asset each exposure stands for (static).
      members: exposures of each common factor (static).
      is_random: whether each exposure's loss is random (static).
      repeated: an exposure may fail again; otherwise at most once (static).
      martingale: give the compensator (static).

    Pathwise gradient: loss_logit. None: intensities, contagion (failures are discrete), except in the compensator,
    which has them in the intensities and loss_mean. For an objective that is an expectation use `expected_value`.
    """

    intensity: Float[Array, "regimes exposures"]
    common_intensity: Float[Array, "regimes factors"]
    loss_logit: Float[Array, "exposures coefficients"]
    loss_mean: Float[Array, " exposures"]
    kept_square: Float[Array, " exposures"]
    contagion: Float[Array, "exposures exposures"] | None
    contagion_decay: Float[Array, ""] | None
    n_assets: int = field(metadata={"static": True})
    names: tuple[str, ...] = field(metadata={"static": True})
    asset: tuple[int, ...] = field(metadata={"static": True})
    members: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    is_random: tuple[bool, ...] = field(metadata={"static": True})
    repeated: bool = field(default=False, metadata={"static": True})
    martingale: bool = field(default=False, metadata={"static": True})

    @property
    def n_exposures(self) -> int:
        """Number of exposures."""
        return len(self.asset)

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return self._n_uniform_slots() + (sum(self.is_random) + 1) // 2

    def _n_uniform_slots(self) -> int:
        return (self.n_exposures + len(self.members) + 1) // 2

    def total_intensity(self, regime: int = 0) -> np.ndarray:
        """Intensity per year with which each exposure fails, common factors included and contagion left out."""
        total = np.array(self.intensity[regime], np.float64)
        for c, members in enumerate(self.members):
            total[list(members)] += float(self.common_intensity[regime, c])
        return total

    def failure_probability(self, years: float, *, regime: int = 0) -> np.ndarray:
        """Probability that each exposure fails within a time, without contagion."""
        return -np.expm1(-self.total_intensity(regime) * years)

    def joint_failure_probability(self, years: float, i: int, j: int, *, regime: int = 0) -> float:
        """Probability that exposures i and j both fail within a time, without contagion."""
        total = self.total_intensity(regime)
        shared = sum(float(self.common_intensity[regime, c]) for c, m in enumerate(self.members) if i in m and j in m)
        p = -np.expm1(-total * years)
        both_survive = np.exp(-(total[i] + total[j] - shared) * years)
        return float(p[i] + p[j] - 1.0 + both_survive)

    def default_correlation(self, years: float, i: int, j: int, *, regime: int = 0) -> float:
        """Correlation of the indicators that exposures i and j fail within a time, without contagion."""
        p = self.failure_probability(years, regime=regime)
        joint = self.joint_failure_probability(years, i, j, regime=regime)
        return float((joint - p[i] * p[j]) / np.sqrt(p[i] * (1.0 - p[i]) * p[j] * (1.0 - p[j])))

    def expected_value(self, years: float, *, regime: int = 0) -> np.ndarray:
        r"""Expected share of each exposure's value that is left, without contagion.

        $e^{-\lambda T E L}$ with repeated failures, $1 - (1 - e^{-\lambda T}) E L$ with one at most.
        """
        loss = np.asarray(self.loss_mean, np.float64)
        if self.repeated:
            return np.exp(-self.total_intensity(regime) * years * loss)
        return 1.0 - self.failure_probability(years, regime=regime) * loss

    def expected_square(self, years: float, *, regime: int = 0) -> np.ndarray:
        r"""Expected square of that share, e.g. $e^{-\lambda T (1 - E(1-L)^2)}$ with repeated failures."""
        lost = 1.0 - np.asarray(self.kept_square, np.float64)
        if self.repeated:
            return np.exp(-self.total_intensity(regime) * years * lost)
        return 1.0 - self.failure_probability(years, regime=regime) * lost

    def prepare(self, *, sub_steps: int, step_hours: float) -> Prepared:
        """Constants for simulation steps of `step_hours`."""
        dtype = self.intensity.dtype
        years = jnp.asarray(step_hours / HOURS_PER_YEAR, dtype)
        total = self.intensity
        for c, members in enumerate(self.members):
            joins = np.isin(np.arange(self.n_exposures), members).astype(dtype)
            total = total + self.common_intensity[:, c : c + 1] * joins

        def probability(hazard: Array) -> Array:
            return lax.stop_gradient(-jnp.expm1(-hazard * years)).astype(jnp.float32)

        fade = None if self.contagion_decay is None else jnp.exp(-lax.stop_gradient(self.contagion_decay) * years)
        return Prepared(
            years=years,
            probability=probability(self.intensity),
            common_probability=probability(self.common_intensity),
            hazard=lax.stop_gradient(self.intensity),
            total_hazard=total,
            contagion=None if self.contagion is None else lax.stop_gradient(self.contagion),
            fade=fade,
            loss_logit=self.loss_logit,
            loss_mean=self.loss_mean,
        )

    def init(self, prepared: Prepared, one: Array, n_assets: int, address: Address) -> HazardState:
        """State before the first step: nothing has failed.

        Raises:
          InputError: built for another number of assets.
        """
        poisson.check_assets(n_assets, self.n_assets)
        zero = (0.0 * one,) * self.n_exposures
        return HazardState(zero, () if self.contagion is None else zero)

    def step(self, prepared: Prepared, t: Array, state: HazardState, masks: Any, address: Address):
        """Failures of one step as jumps and, with `martingale`, their compensator."""
        dtype = prepared.loss_mean.dtype
        n = self.n_exposures
        masks = poisson.regime_masks(masks, self.intensity.shape[0])
        uniforms = poisson.draw(address, n + len(self.members), poisson.tail_uniform)
        before = lax.stop_gradient(state)
        failed = materialised(self._failures)(prepared, masks, before, uniforms)
        scores = iter(poisson.draw(address.after(self._n_uniform_slots()), sum(self.is_random), normal_score))
        kept: list[Any] = [None] * self.n_assets
        for j, i in enumerate(self.asset):
            logit = prepared.loss_logit[j, 0]
            if self.is_random[j]:
                y = next(scores).astype(dtype) * (1.0 / _SCORE_RANGE)
                logit = polynomial([prepared.loss_logit[j, k] for k in range(DEGREE + 1)], y)
            move = -failed[j] * jax.nn.softplus(logit)
            kept[i] = move if kept[i] is None else kept[i] + move
        zero = jnp.zeros_like(failed[0])
        size = poisson.in_rows([zero if row is None else row for row in kept])
        compensator = self._compensator(prepared, masks, before) if self.martingale else None
        return self._after(prepared, before, failed), Jump(size, compensator)

    def _failures(self, prepared: Prepared, masks: Any, state: HazardState, uniforms: Any) -> tuple[Array, ...]:
        dtype = prepared.loss_mean.dtype
        n = self.n_exposures
        struck = [u < poisson.choose(masks, prepared.common_probability[:, c]) for c, u in enumerate(uniforms[n:])]
        rows = []
        for j in range(n):
            p = poisson.choose(masks, prepared.probability[:, j])
            if state.heat:
                hazard = poisson.choose(masks, prepared.hazard[:, j]) + state.heat[j]
                p = -jnp.expm1(-hazard * prepared.years).astype(jnp.float32)
            fails = uniforms[j] < p
            for hit, members in zip(struck, self.members, strict=True):
                fails = fails | hit if j in members else fails
            rows.append((fails if self.repeated else fails & (state.failures[j] < 0.5)).astype(dtype))
        return tuple(rows)

    def _after(self, prepared: Prepared, state: HazardState, failed: tuple[Array, ...]) -> HazardState:
        failures = tuple(count + row for count, row in zip(state.failures, failed, strict=True))
        heat = state.heat
        if prepared.contagion is not None:
            added = [
                sum(prepared.contagion[j, i] * failed[i] for i in range(self.n_exposures))
                for j in range(self.n_exposures)
            ]
            heat = tuple(prepared.fade * old + new for old, new in zip(state.heat, added, strict=True))
        return HazardState(failures, heat)

    def _compensator(self, prepared: Prepared, masks: Any, state: HazardState) -> Any:
        # Given the state, exposures of one asset fail independently (the builder refuses others).
        rows: list[Any] = [jnp.zeros_like(state.failures[0])] * self.n_assets
        for j, i in enumerate(self.asset):
            hazard = poisson.choose(masks, prepared.total_hazard[:, j])
            if state.heat:
                hazard = hazard + state.heat[j]
            loss = -jnp.expm1(-hazard * prepared.years) * prepared.loss_mean[j]
            if not self.repeated:
                loss = jnp.where(state.failures[j] < 0.5, loss, 0.0)
            rows[i] = rows[i] - jnp.log1p(-loss)
        return poisson.in_rows(rows)


def loss_rate(losses: float, value: float) -> float:
    """Losses per year over average value, such as a year's hacks over the value locked: estimates intensity * E[L]."""
    return losses / value


def intensity_from_median(median_days: float) -> float:
    """Constant intensity per year of a lifetime with this median, ln 2 / median."""
    return float(np.log(2.0) * 365.0 / median_days)


def hazard(
    n_assets: int,
    *,
    intensity: Any,
    loss: Any = None,
    fixed_loss: Any = None,
    asset: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    common_intensity: Any = (),
    members: Sequence[Sequence[int]] = (),
    regime_multiplier: Any = 1.0,
    contagion: Any = None,
    contagion_decay: float = 0.0,
    repeated: bool = False,
    martingale: bool = False,
    dtype: Any = jnp.float32,
) -> Hazard:
    """Failures of exposures with a random loss.

    Args:
      n_assets: number of assets.
      intensity: failures per year: a number, one per exposure, or a table (regimes, exposures).
      loss: Beta parameters (a, b) of the share lost, one pair or one per exposure.
      fixed_loss: share lost instead, in (0, 1): a number or one per exposure.
      asset: index of the asset whose price each exposure's failure moves; each asset one exposure when omitted.
      names: of the exposures, for reports.
      common_intensity: strikes per year of each common factor, or a table (regimes, factors).
      members: for each common factor the indices of the exposures that fail when it strikes.
      regime_multiplier: factor of all intensities, one per regime.
      contagion: (target, source) intensity per year added to the target by a failure of the source.
      contagion_decay: rate per year at which that fades, 0 for never.
      repeated: exposures may fail again and again; at most once otherwise.
      martingale: give the compensator that makes expected prices independent of the failures.
      dtype: precision of the paths.

    Raises:
      InputError: a negative intensity, Beta parameters that are not positive, a loss of 1 or more, a wrong shape or
        index, repeated failures that multiply by contagion, or a compensator asked for exposures of one asset that
        share a factor.
    """
    places = tuple(range(n_assets)) if asset is None else tuple(int(i) for i in asset)
    n = len(places)
    if n == 0 or not all(0 <= i < n_assets for i in places):
        raise InputError(f"asset is {list(places)}; it must name an asset 0 .. {n_assets - 1} for each exposure.")
    labels = tuple(f"exposure {j}" for j in range(n)) if names is None else tuple(names)
    if len(labels) != n:
        raise InputError(f"names are {list(labels)}; there must be one for each of the {n} exposures.")
    groups = tuple(tuple(int(j) for j in group) for group in members)
    if any(not 0 <= j < n for group in groups for j in group):
        raise InputError(f"members are {[list(g) for g in groups]}; exposures are numbered 0 .. {n - 1}.")
    table = poisson.check_intensity(intensity, n, "intensity")
    common = poisson.check_intensity(common_intensity if groups else 0.0, max(len(groups), 1), "common_intensity")
    if np.size(common_intensity) and not groups:
        raise InputError("common_intensity needs members: the exposures that fail when each factor strikes.")
    multiplier = poisson.check_numbers(regime_multiplier, "regime_multiplier", low=0.0).reshape(-1, 1)
    table, common, multiplier = poisson.same_regimes(
        table, common, multiplier, names="intensity, common_intensity and regime_multiplier"
    )
    coefficients, mean, square, is_random = _losses(loss, fixed_loss, n)
    matrix = _check_contagion(contagion, contagion_decay, n, repeated)
    if martingale:
        for group in groups:
            if len({places[j] for j in group}) < len(set(group)):
                raise InputError(
                    "martingale is not offered where exposures of one asset share a common factor: let one exposure "
                    "stand for both, or set martingale to false."
                )
    return Hazard(
        intensity=rounded(table * multiplier, dtype),
        common_intensity=rounded((common * multiplier)[:, : len(groups)], dtype),
        loss_logit=rounded(coefficients, dtype),
        loss_mean=rounded(mean, dtype),
        kept_square=rounded(square, dtype),
        contagion=None if matrix is None else rounded(matrix, dtype),
        contagion_decay=None if matrix is None else rounded(contagion_decay, dtype),
        n_assets=n_assets,
        names=labels,
        asset=places,
        members=groups,
        is_random=is_random,
        repeated=repeated,
        martingale=martingale,
    )


def _losses(loss: Any, fixed: Any, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[bool, ...]]:
    # Logit polynomial, E[L], E[(1-L)^2] and whether the loss is random, by exposure.
    if (loss is None) == (fixed is None):
        raise InputError("give either loss, the Beta parameters of the share lost, or fixed_loss.")
    coefficients = np.zeros((n, DEGREE + 1))
    if loss is None:
        share = poisson.check_vector(fixed, n, "fixed_loss", low=0.0, high=1.0, is_open=True)
        coefficients[:, 0] = np.log(share) - np.log1p(-share)
        return coefficients, share, (1.0 - share) ** 2, (False,) * n
    pairs = poisson.check_numbers(loss, "loss", low=0.0, is_open=True)
    if pairs.shape not in ((2,), (n, 2)):
        raise InputError(f"loss has shape {pairs.shape}; it must be one pair (a, b) or one per exposure, ({n}, 2).")
    a, b = np.broadcast_to(pairs, (n, 2)).T
    for j in range(n):
        coefficients[j] = logit_coefficients(a[j], b[j])
    return coefficients, a / (a + b), b * (b + 1.0) / ((a + b) * (a + b + 1.0)), (True,) * n


def _check_contagion(contagion: Any, decay: Any, n: int, repeated: bool) -> np.ndarray | None:
    rate = float(poisson.check_numbers(decay, "contagion_decay", low=0.0))
    if contagion is None:
        return None
    matrix = poisson.check_numbers(contagion, "contagion", low=0.0)
    if matrix.shape != (n, n):
        raise InputError(f"contagion has shape {matrix.shape}; it must be (target, source), ({n}, {n}).")
    if repeated and np.any(matrix > 0.0):
        radius = np.inf if rate == 0.0 else float(np.max(np.abs(np.linalg.eigvals(matrix / rate))))
        if radius >= 1.0:
            raise InputError(
                f"contagion and contagion_decay have a branching ratio of {radius:.4g}; with repeated failures it must "
                "be below 1, or they multiply without end."
            )
    return matrix


def example(n_assets: int, dtype: Any = jnp.float32) -> Hazard:
    """Mid-size protocols, one per asset, with a library that all of them share."""
    return hazard(
        n_assets,
        intensity=0.03,
        loss=(2.0, 2.0),
        common_intensity=[0.005] if n_assets > 1 else (),
        members=[list(range(n_assets))] if n_assets > 1 else (),
        dtype=dtype,
    )
