r"""Which forecast is better? Tests on scores per day (see `scores`), where lower is better.

Bootstraps are stationary (Politis & Romano 1994): blocks of geometric length with mean `mean_block`, wrapped at the
end. Their seed starts NumPy's default generator; the same seed gives the same p-value.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from qpo_sim.errors import InputError, check_level
from qpo_sim.types import Array
from qpo_sim.validation.inputs import monte_carlo_p, numbers, same_length, whole


class DieboldMariano(NamedTuple):
    """Mean of first score less second and its t-ratio (below 0: the first is better), with two p-values.

    `p_value` is two-sided; `p_first_worse` is one-sided against the second forecast being better.
    """

    mean_difference: float
    statistic: float
    p_value: float
    p_first_worse: float


class ConfidenceSet(NamedTuple):
    """p-value of each model, the models in the set, and the order of elimination (the best model last)."""

    p_value: Float[Array, " models"]
    is_included: Bool[Array, " models"]
    elimination: Int[Array, " models"]


class SuperiorAbility(NamedTuple):
    """Largest t-ratio in favour of a rival; p-values: consistent, and its lower and upper bound."""

    statistic: float
    p_value: float
    p_lower: float
    p_upper: float


def diebold_mariano(
    first: Float[Array, " days"],
    second: Float[Array, " days"],
    *,
    horizon: int = 1,
    n_lags: int | None = None,
    kernel: Literal["rectangular", "bartlett"] = "rectangular",
    is_corrected: bool = True,
) -> DieboldMariano:
    r"""Null: both forecasts have the same expected score.

    $\bar d / \sqrt{\hat V/n}$ with $\hat V = \hat\gamma_0 + 2\sum_{k=1}^{K} w_k \hat\gamma_k$ for d = first - second,
    standard normal; corrected by $\sqrt{(n+1-2h+h(h-1)/n)/n}$ and read off Student's t with n - 1 degrees of freedom.
    Diebold & Mariano (1995); Harvey, Leybourne & Newbold (1997). Not for nested models fitted on the same data. Scores
    that are equal on all days give 0 and p = 1.

    Args:
      first: score per day, lower is better.
      second: score of the same days.
      horizon: steps ahead h; forecasts of overlapping periods are correlated up to lag h - 1.
      n_lags: autocovariances K, h - 1 when omitted.
      kernel: weights w of 1, or Bartlett's 1 - k/(K+1), under which the variance cannot be negative.
      is_corrected: apply the small-sample correction.

    Raises:
      InputError: not finite, lengths differ, horizon or n_lags out of range, an unknown kernel, or a variance that is
        not positive under the rectangular kernel.
    """
    from scipy import stats

    first, second = numbers("first", first, at_least=2), numbers("second", second, at_least=2)
    n = same_length(first=first, second=second)
    whole("horizon", horizon, low=1, high=n - 1)
    n_lags = whole("n_lags", horizon - 1 if n_lags is None else n_lags, low=0, high=n - 1)
    if kernel not in ("rectangular", "bartlett"):
        raise InputError(f"kernel is {kernel!r}; choose rectangular or bartlett.")
    difference = first - second
    mean = float(difference.mean())
    if not difference.any():
        return DieboldMariano(0.0, 0.0, 1.0, 0.5)
    lags = np.arange(n_lags + 1)
    weight = np.where(lags == 0, 1.0, 2.0 if kernel == "rectangular" else 2.0 * (1.0 - lags / (n_lags + 1.0)))
    variance = float(weight @ _autocovariances(difference, n_lags))
    if variance <= 0.0:
        raise InputError(
            f"the variance of the score differences is {variance:.3g} with {n_lags} lags; it must be above 0: "
            "take kernel='bartlett' or fewer lags."
        )
    statistic = mean / (variance / n) ** 0.5
    law = stats.norm()
    if is_corrected:
        statistic *= ((n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n) ** 0.5
        law = stats.t(n - 1)
    return DieboldMariano(mean, float(statistic), float(2.0 * law.sf(abs(statistic))), float(law.sf(statistic)))


def model_confidence_set(
    scores: Float[Array, "days models"],
    *,
    size: float = 0.1,
    method: Literal["max", "range"] = "max",
    mean_block: float | None = None,
    n_draws: int = 1000,
    seed: int,
) -> ConfidenceSet:
    r"""The models that cannot be told from the best; it holds the best with probability 1 - size or more.

    Null at each step: all models left have the same expected score. "max": $T_{max} = \max_i \bar d_{i\cdot}/se$
    against the mean of those left, dropping the model with the largest; "range": $T_R = \max_{ij} |\bar d_{ij}|/se$,
    dropping the model that loses by most. Law and standard errors by bootstrap. A model's p-value is the largest of the
    steps until it was dropped, and 1 for the last. Hansen, Lunde & Nason (2011).

    Args:
      scores: score per day and model, lower is better.
      size: models with a p-value below it are out.
      method: "max" or "range".
      mean_block: mean length of blocks in days, n^(1/3) when omitted; longer for scores with longer memory.
      n_draws: bootstrap samples.
      seed: of NumPy's default generator.

    Raises:
      InputError: not finite, an unknown method, a size outside (0, 1) or a block out of range.
    """
    check_level(size)
    scores = numbers("scores", scores, axes=2, at_least=2)
    if method not in ("max", "range"):
        raise InputError(f"method is {method!r}; choose max or range.")
    n_models = scores.shape[1]
    mean = scores.mean(axis=0)
    noise = _resampled_means(scores, mean_block, n_draws, seed) - mean
    p_value, order, left, p = np.ones(n_models), [], list(range(n_models)), 0.0
    step = _worst_against_mean if method == "max" else _worst_of_pairs
    while len(left) > 1:
        p_step, worst = step(mean[left], noise[:, left])
        p = max(p, p_step)
        p_value[left[worst]] = p
        order.append(left.pop(worst))
    return ConfidenceSet(p_value, p_value >= size, np.array(order + left))


def superior_predictive_ability(
    benchmark: Float[Array, " days"],
    rivals: Float[Array, "days models"],
    *,
    mean_block: float | None = None,
    n_draws: int = 1000,
    seed: int,
) -> SuperiorAbility:
    r"""Null: no rival has a lower expected score than the benchmark.

    $\max(0, \max_k \sqrt n\,\bar d_k/\hat\omega_k)$ with d = benchmark - rival and $\hat\omega^2$ the bootstrap's own
    variance in closed form. Rivals worse by more than $\sqrt{2\log\log n}$ standard errors keep their mean under the
    null, so that they do not weaken the test (consistent p-value).
    Hansen (2005); the upper bound is White's (2000) reality check, studentised.

    Raises:
      InputError: not finite, lengths differ, fewer than 16 days, or a block out of range.
    """
    benchmark, rivals = numbers("benchmark", benchmark, at_least=16), numbers("rivals", rivals, axes=2)
    n = same_length(benchmark=benchmark, rivals=rivals)
    gain = benchmark[:, None] - rivals
    mean = gain.mean(axis=0)
    block = _mean_block(mean_block, n)
    lags = np.arange(1, n)
    keep = 1.0 - 1.0 / block
    weight = np.concatenate([[1.0], 2.0 * ((1.0 - lags / n) * keep**lags + lags / n * keep ** (n - lags))])
    variance = np.array([weight @ _autocovariances(column, n - 1) for column in gain.T])
    error = np.sqrt(np.maximum(variance, 0.0) / n)
    ratio = _ratio(mean, error)
    statistic = max(0.0, float(ratio.max()))
    noise = _resampled_means(gain, block, n_draws, seed) - mean
    is_close = ratio >= -np.sqrt(2.0 * np.log(np.log(n)))
    centres = {
        "lower": np.minimum(mean, 0.0),
        "consistent": np.where(is_close, 0.0, mean),
        "upper": np.zeros_like(mean),
    }
    p = {
        name: monte_carlo_p(statistic, np.maximum(_ratio(noise + centre, error).max(axis=1), 0.0))
        for name, centre in centres.items()
    }
    return SuperiorAbility(statistic, p["consistent"], p["lower"], p["upper"])


def stationary_bootstrap(
    generator: np.random.Generator, n_days: int, n_draws: int, *, mean_block: float
) -> Int[Array, "draws days"]:
    """Row numbers of resampled records: blocks of geometric length, wrapped at the end. Politis & Romano (1994).

    Raises:
      InputError: a mean block outside [1, n_days].
    """
    mean_block = _mean_block(mean_block, n_days)
    start = generator.integers(n_days, size=(n_draws, n_days))
    is_new = generator.random((n_draws, n_days)) < 1.0 / mean_block
    is_new[:, 0] = True
    day = np.arange(n_days)
    began = np.maximum.accumulate(np.where(is_new, day, 0), axis=1)
    return (np.take_along_axis(start, began, axis=1) + day - began) % n_days


def _worst_against_mean(mean: Array, noise: Array) -> tuple[float, int]:
    centred, spread = mean - mean.mean(), noise - noise.mean(axis=1, keepdims=True)
    error = np.sqrt(np.mean(spread**2, axis=0))
    ratio = _ratio(centred, error)
    return monte_carlo_p(float(ratio.max()), _ratio(spread, error).max(axis=1)), int(np.argmax(ratio))


def _worst_of_pairs(mean: Array, noise: Array) -> tuple[float, int]:
    n_models = mean.size
    first, second = np.triu_indices(n_models, 1)
    spread = noise[:, first] - noise[:, second]
    error = np.sqrt(np.mean(spread**2, axis=0))
    ratio = _ratio(mean[first] - mean[second], error)
    table = np.full((n_models, n_models), -np.inf)
    table[first, second], table[second, first] = ratio, -ratio
    worst = int(np.argmax(table.max(axis=1)))
    return monte_carlo_p(float(np.abs(ratio).max()), np.abs(_ratio(spread, error)).max(axis=1)), worst


def _ratio(value: Array, error: Array) -> Array:
    # Models with the same scores on all days differ by nothing, with no error.
    return np.where(error > 0.0, value / np.where(error > 0.0, error, 1.0), 0.0)


def _resampled_means(values: Array, mean_block: float | None, n_draws: int, seed: int) -> Float[Array, "draws columns"]:
    whole("n_draws", n_draws, low=1)
    n = len(values)
    index = stationary_bootstrap(np.random.default_rng(seed), n, n_draws, mean_block=_mean_block(mean_block, n))
    # How often each day was drawn, as one product with the values then gives all means.
    times = np.stack([np.bincount(row, minlength=n) for row in index])
    return times @ values / n


def _mean_block(mean_block: float | None, n_days: int) -> float:
    block = n_days ** (1.0 / 3.0) if mean_block is None else float(mean_block)
    if not 1.0 <= block <= n_days:
        raise InputError(f"mean_block is {mean_block}; it must lie in 1 .. {n_days} days.")
    return block


def _autocovariances(values: Array, n_lags: int) -> Float[Array, " lags"]:
    # By Fourier transform: the full set costs n log n. Padded, so that the ends do not wrap.
    n = values.size
    centred = values - values.mean()
    if n_lags < 16:
        return np.array([centred[k:] @ centred[: n - k] for k in range(n_lags + 1)]) / n
    spectrum = np.fft.rfft(centred, 2 * n)
    return np.fft.irfft(np.abs(spectrum) ** 2, 2 * n)[: n_lags + 1] / n
