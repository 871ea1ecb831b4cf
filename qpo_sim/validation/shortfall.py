r"""Backtests of expected shortfall.

Losses, VaR and ES are positive numbers for money lost; `level` a is the confidence, p = 1 - a the tail's probability.
A day is an exceedance when loss > VaR.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError, check_level
from qpo_sim.types import Array
from qpo_sim.validation.inputs import monte_carlo_p, numbers, randomised_rank, same_length, unit_interval, whole

# Statistic below which Z2 rejects, for VaR and ES at 97.5 % over 250 days and normal losses. The 5 % value changes
# little with the tails (-0.82 for t3); the 0.01 % value does not hold beyond thin ones (-4.4 for t3).
# Acerbi & Szekely (2014), table 3.
Z2_CRITICAL = {0.05: -0.70, 0.0001: -1.8}

Sampler = Callable[[np.random.Generator, int], Array]


class ShortfallTest(NamedTuple):
    """Statistic (0 expected, below 0: risk underestimated), one-sided p-value and the draws under the null."""

    statistic: float
    p_value: float
    n_exceedances: int
    simulated: Array


class ResidualTest(NamedTuple):
    """Mean exceedance residual (0 expected, above 0: ES too low), its t-ratio and the bootstrap's p-value."""

    mean: float
    statistic: float
    p_value: float
    n_exceedances: int


class CumulativeViolations(NamedTuple):
    """Mean of H_t and its z-score (above 0: risk underestimated), one-sided p-value; Box-Pierce for dependence."""

    mean: float
    statistic: float
    p_value: float
    box_pierce: float
    p_box_pierce: float


def z1(loss: Float[Array, "*sets days"], value_at_risk: Array, expected_shortfall: Array) -> Float[Array, "*sets"]:
    r"""$Z_1 = 1 - \frac1N \sum_t \frac{L_t}{ES_t} 1\{L_t > VaR_t\}$ with N exceedances; NaN without any.

    Tests the size of the losses beyond VaR, given their number. Acerbi & Szekely (2014), test 1, in losses.
    """
    hit = loss > value_at_risk
    n = hit.sum(axis=-1)
    total = np.where(hit, loss / expected_shortfall, 0.0).sum(axis=-1)
    return np.where(n > 0, 1.0 - total / np.maximum(n, 1), np.nan)


def z2(
    loss: Float[Array, "*sets days"], value_at_risk: Array, expected_shortfall: Array, *, level: float
) -> Float[Array, "*sets"]:
    r"""$Z_2 = 1 - \frac{1}{T(1-a)} \sum_t \frac{L_t}{ES_t} 1\{L_t > VaR_t\}$.

    Tests number and size of the losses beyond VaR together. Acerbi & Szekely (2014), test 2, in losses.

    Raises:
      InputError: level outside (0, 1).
    """
    check_level(level)
    total = np.where(loss > value_at_risk, loss / expected_shortfall, 0.0).sum(axis=-1)
    return 1.0 - total / (loss.shape[-1] * (1.0 - level))


def z3(rank: Float[Array, "*sets days"], sample: Float[Array, "days draws"], *, level: float) -> Float[Array, "*sets"]:
    r"""$Z_3 = 1 - \frac1T \sum_t \frac{ES_T(P_t^{-1}(\vec U))}{E[ES_T(P_t^{-1}(\vec V))]}$.

    U are the probability integral transforms of the losses; on each day all T of them are mapped through that day's
    forecast law, and the mean of the T (1 - a) worst is compared with its expectation under uniform V, which is
    $\frac{T}{m}\int P(\mathrm{Bin}(T-1, 1-u) < m)\, P_t^{-1}(u)\, du$, here over the sample's own law.
    Acerbi & Szekely (2014), test 3, in losses.

    Args:
      rank: PIT values in [0, 1], large for large losses.
      sample: draws of the forecast law of each day's loss.
      level: confidence a.

    Raises:
      InputError: level outside (0, 1).
    """
    from scipy.special import betainc

    check_level(level)
    n_days, n_draws = sample.shape
    worst = max(int(n_days * (1.0 - level) + 1e-9), 1)
    ordered = np.sort(sample, axis=1)
    top = np.sort(rank, axis=-1)[..., n_days - worst :]
    # Inverse distribution function of n equal weights: the value of rank ceil(u n).
    index = np.clip(np.ceil(top * n_draws).astype(np.int64) - 1, 0, n_draws - 1)
    edges = np.arange(n_draws + 1) / n_draws
    # P(Bin(T-1, 1-u) <= m-1) = I_u(T-m, m), integrated over each draw's cell.
    weight = _cell_integrals(lambda u: betainc(n_days - worst, worst, u), edges) if n_days > worst else np.diff(edges)
    expected = ordered @ weight * n_days / worst
    seen = np.stack([ordered[t][index].mean(axis=-1) for t in range(n_days)], axis=-1)
    return 1.0 - (seen / expected).mean(axis=-1)


def acerbi_szekely(
    loss: Float[Array, " days"],
    value_at_risk: Float[Array, " days"],
    expected_shortfall: Float[Array, " days"],
    *,
    level: float,
    law: Float[Array, "days draws"] | Sampler,
    test: Literal["z1", "z2", "z3"] = "z2",
    n_draws: int = 2000,
    seed: int,
) -> ShortfallTest:
    """Null: each loss was drawn, independently, from the forecast law of its day; against underestimated tail losses.

    The statistic's law under the null is simulated from the forecast laws, and the p-value is the share of simulated
    statistics at or below the one seen. Simulated records on which Z1 has no exceedance are left out.

    Args:
      loss: money lost per day, positive is bad.
      value_at_risk: forecast for each day at `level`.
      expected_shortfall: forecast for each day at `level`, above 0.
      level: confidence a.
      law: draws of each day's forecast law, or a function (generator, number of records) -> losses of shape
        (records, days). Z3 needs the draws.
      test: which statistic; see `z1`, `z2`, `z3`.
      n_draws: records simulated.
      seed: of NumPy's default generator.

    Raises:
      InputError: values that are not finite, lengths that differ, an ES at or below 0 or below VaR, an unknown test, a
        level outside (0, 1), or a sampler given for Z3.
    """
    check_level(level)
    whole("n_draws", n_draws, low=1)
    loss, value_at_risk, expected_shortfall = _forecasts(loss, value_at_risk, expected_shortfall)
    generator = np.random.default_rng(seed)
    if test == "z3":
        if callable(law):
            raise InputError("law is a function; test 'z3' needs draws of each day's forecast law, days by draws.")
        sample = numbers("law", law, axes=2)
        same_length(loss=loss, law=sample)
        # Among n draws and the loss itself each rank is equally likely when the law is right.
        observed = z3(randomised_rank(loss, sample, generator), sample, level=level)
        simulated = z3(generator.random((n_draws, loss.size)), sample, level=level)
    else:
        if test not in ("z1", "z2"):
            raise InputError(f"test is {test!r}; choose from z1, z2, z3.")
        drawn = _draw(law, generator, n_draws, loss.size)
        statistic = z1 if test == "z1" else lambda *series: z2(*series, level=level)
        observed = statistic(loss, value_at_risk, expected_shortfall)
        simulated = statistic(drawn, value_at_risk, expected_shortfall)
    p_value = monte_carlo_p(float(observed), simulated, is_low_bad=True)
    return ShortfallTest(float(observed), p_value, int((loss > value_at_risk).sum()), simulated)


def mcneil_frey(
    loss: Float[Array, " days"],
    value_at_risk: Float[Array, " days"],
    expected_shortfall: Float[Array, " days"],
    scale: Float[Array, " days"] | None = None,
    *,
    n_draws: int = 4000,
    seed: int,
) -> ResidualTest:
    r"""Null: exceedance residuals $(L_t - ES_t)/\sigma_t$, on days with $L_t > VaR_t$, have mean 0; against above 0.

    Bootstrap of the t-ratio from the residuals less their mean (Efron & Tibshirani 1993, 16.4); no law is assumed for
    them beyond independence. McNeil & Frey (2000). NaN with fewer than 2 exceedances or equal residuals.
    With few exceedances from a heavy tail the t-ratio is skewed to the left and the test rejects too seldom.

    Args:
      loss: money lost per day, positive is bad.
      value_at_risk: forecast for each day.
      expected_shortfall: forecast for each day, above 0.
      scale: volatility forecast for each day, in the loss's unit; ES itself when omitted.
      n_draws: bootstrap samples.
      seed: of NumPy's default generator.

    Raises:
      InputError: as `acerbi_szekely`, or a scale at or below 0.
    """
    whole("n_draws", n_draws, low=1)
    loss, value_at_risk, expected_shortfall = _forecasts(loss, value_at_risk, expected_shortfall)
    unit = expected_shortfall if scale is None else numbers("scale", scale)
    same_length(loss=loss, scale=unit)
    if (unit <= 0.0).any():
        raise InputError(f"scale has the value {unit.min()}; it must be above 0.")
    hit = loss > value_at_risk
    residual = ((loss - expected_shortfall) / unit)[hit]
    n, nothing = residual.size, float("nan")
    if n < 2 or np.ptp(residual) == 0.0:
        return ResidualTest(float(residual.mean()) if n else nothing, nothing, nothing, n)
    mean = float(residual.mean())
    observed = mean / (residual.std(ddof=1) / n**0.5)
    drawn = (residual - mean)[np.random.default_rng(seed).integers(n, size=(n_draws, n))]
    centre, spread = drawn.mean(axis=1), drawn.std(axis=1, ddof=1)
    # A resample of one value repeated has no spread: its ratio is infinite, with the sign of its mean.
    ratio = np.where(spread > 0.0, centre / np.where(spread > 0.0, spread / n**0.5, 1.0), np.sign(centre) * np.inf)
    return ResidualTest(mean, float(observed), monte_carlo_p(float(observed), ratio), n)


def cumulative_violations(rank: Float[Array, " days"], *, level: float, n_lags: int = 5) -> CumulativeViolations:
    r"""Null: PIT values are independent and uniform above the level; against losses deeper in the tail.

    $H_t = (U_t - a)^+/(1-a)$, the share of the VaR levels beyond a that the loss exceeded, has mean (1-a)/2 and
    variance $(1-a)(\frac13 - \frac{1-a}{4})$: z-score, standard normal, one-sided. Box-Pierce over `n_lags`
    autocorrelations of H about its mean under the null, chi-square(n_lags).
    Costanzino & Curran (2015); Du & Escanciano (2017).

    Args:
      rank: PIT values in [0, 1], large for large losses.
      level: confidence a.
      n_lags: autocorrelations in the Box-Pierce statistic.

    Raises:
      InputError: a value outside [0, 1], a level outside (0, 1), or n_lags not below the number of days.
    """
    from scipy.special import chdtrc, ndtr

    check_level(level)
    rank = unit_interval("rank", rank, at_least=2)
    whole("n_lags", n_lags, low=1, high=rank.size - 1)
    p = 1.0 - level
    shares = np.maximum(rank - level, 0.0) / p
    variance = p * (1.0 / 3.0 - p / 4.0)
    z = float((shares.mean() - p / 2.0) / (variance / rank.size) ** 0.5)
    centred = shares - p / 2.0
    # The variance is known under the null; lag products are means over their own number of terms (Du & Escanciano).
    products = np.array([np.mean(centred[k:] * centred[:-k]) for k in range(1, n_lags + 1)])
    box_pierce = float(rank.size * np.sum((products / np.mean(centred**2)) ** 2)) if shares.any() else 0.0
    return CumulativeViolations(float(shares.mean()), z, float(ndtr(-z)), box_pierce, float(chdtrc(n_lags, box_pierce)))


def _forecasts(loss: Any, value_at_risk: Any, expected_shortfall: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    loss, value_at_risk = numbers("loss", loss), numbers("value_at_risk", value_at_risk)
    expected_shortfall = numbers("expected_shortfall", expected_shortfall)
    same_length(loss=loss, value_at_risk=value_at_risk, expected_shortfall=expected_shortfall)
    if (wrong := (expected_shortfall <= 0.0) | (expected_shortfall < value_at_risk)).any():
        at = int(np.argmax(wrong))
        raise InputError(
            f"expected_shortfall at {at} is {expected_shortfall[at]} with VaR {value_at_risk[at]}; "
            "it must be above 0 and at least VaR: losses are positive numbers here."
        )
    return loss, value_at_risk, expected_shortfall


def _draw(law: Any, generator: np.random.Generator, n_records: int, n_days: int) -> np.ndarray:
    if callable(law):
        drawn = numbers("law's draws", law(generator, n_records), axes=2)
    else:
        sample = numbers("law", law, axes=2)
        if len(sample) != n_days:
            raise InputError(f"law has {len(sample)} rows for {n_days} days; give draws for each day.")
        index = generator.integers(sample.shape[1], size=(n_records, n_days))
        drawn = sample[np.arange(n_days), index]
    if drawn.shape != (n_records, n_days):
        raise InputError(f"law drew the shape {drawn.shape}; it must be (records, days) = {(n_records, n_days)}.")
    return drawn


def _cell_integrals(function: Callable[[Array], Array], edges: Array) -> Array:
    # Gauss-Legendre with eight points: the integrand is smooth, and steep only near 1.
    node, weight = np.polynomial.legendre.leggauss(8)
    half = np.diff(edges) / 2.0
    points = edges[:-1, None] + half[:, None] * (1.0 + node)
    return half * (function(points) @ weight)
