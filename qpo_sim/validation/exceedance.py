r"""Backtests of value at risk from the days on which the loss exceeded it.

Losses and VaR are positive numbers for money lost; a day is an exceedance when loss > VaR. VaR at confidence level a
is the inverse distribution function, so a correct continuous forecast is exceeded with probability p = 1 - a and
exceedances are independent over days. Each test returns its statistic and p-value; a small p-value speaks against the
forecasts. Likelihood ratios use 0 log 0 = 0, so that zero exceedances, or nothing but exceedances, are no special case.

The chi-square laws hold for long records. With 250 days at 99 % the nominal 5 % tests reject correct forecasts in 9 %
(Kupiec), less than 1 % (Christoffersen) or 9 % (dynamic quantile) of cases; `monte_carlo_p_value` gives p-values for
the record's own length.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from qpo_sim.errors import InputError, check_level
from qpo_sim.types import Array
from qpo_sim.validation.inputs import counts, flags, numbers, same_length, whole


class LikelihoodRatio(NamedTuple):
    """Statistic (0 or above, large is bad), its p-value and the chi-square's degrees of freedom; NaN if undefined."""

    statistic: float
    p_value: float
    dof: int


class Binomial(NamedTuple):
    """Exact binomial test: P(X >= x), P(X <= x) and the two-sided p-value."""

    n_exceedances: int
    expected: float
    p_value: float
    p_too_many: float
    p_too_few: float


class Christoffersen(NamedTuple):
    """The three likelihood ratios; `transitions[i, j]` counts days of kind j after days of kind i (1: exceedance)."""

    unconditional: LikelihoodRatio
    independence: LikelihoodRatio
    conditional: LikelihoodRatio
    transitions: Array


class DynamicQuantile(NamedTuple):
    """Wald statistic, p-value, rank of the regressors (degrees of freedom) and coefficients, the constant first."""

    statistic: float
    p_value: float
    dof: int
    coefficients: Array


class TrafficLight(NamedTuple):
    """Basel zone; P(X <= x), P(X >= x) for correct forecasts; the multiplier, None away from 250 days at 99 %."""

    zone: Literal["green", "yellow", "red"]
    cumulative_probability: float
    p_value: float
    multiplier: float | None


class DurationTest(NamedTuple):
    """Weibull test of no-memory: shape b (below 1: exceedances cluster) and the two likelihood ratios."""

    independence: LikelihoodRatio
    conditional: LikelihoodRatio
    shape: float
    rate: float
    n_durations: int


class Interval(NamedTuple):
    """Confidence interval between two order statistics (1-based ranks) and the coverage that it really has."""

    low: float
    high: float
    rank_low: int
    rank_high: int
    coverage: float


def exceedances(loss: Float[Array, " days"], value_at_risk: Any) -> Bool[Array, " days"]:
    """Days with loss > VaR.

    Args:
      loss: money lost per day, positive is bad.
      value_at_risk: forecast for each day, in the same unit, or one number for all days.

    Raises:
      InputError: not finite, or the lengths differ.
    """
    loss = numbers("loss", loss)
    if np.ndim(value_at_risk) == 0:
        return loss > numbers("value_at_risk", [value_at_risk])[0]
    value_at_risk = numbers("value_at_risk", value_at_risk)
    same_length(loss=loss, value_at_risk=value_at_risk)
    return loss > value_at_risk


def kupiec(n_exceedances: int, n_days: int, *, level: float) -> LikelihoodRatio:
    r"""Proportion of failures: null P(exceedance) = p.

    $LR = 2\,[x \log\frac{x}{np} + (n-x)\log\frac{n-x}{n(1-p)}]$, chi-square with 1 degree of freedom. Kupiec (1995).

    Args:
      n_exceedances: days with loss > VaR, x.
      n_days: days, n.
      level: confidence of VaR, 1 - p.

    Raises:
      InputError: level outside (0, 1) or a count outside 0 .. n_days.
    """
    check_level(level)
    counts(n_exceedances, n_days, "n_exceedances")
    p = 1.0 - level
    return _ratio(_relative_entropy(n_exceedances, n_days, p), 1)


def exact_binomial(n_exceedances: int, n_days: int, *, level: float) -> Binomial:
    """Null: exceedances are independent with probability 1 - level, so their number is binomial; exact, any length.

    The two-sided p-value adds up all counts that are no more likely than the one seen (Sterne).

    Raises:
      InputError: level outside (0, 1) or a count outside 0 .. n_days.
    """
    from scipy import stats

    check_level(level)
    counts(n_exceedances, n_days, "n_exceedances")
    p = 1.0 - level
    law = stats.binom(n_days, p)
    two_sided = stats.binomtest(int(n_exceedances), int(n_days), p).pvalue
    return Binomial(
        int(n_exceedances),
        n_days * p,
        float(two_sided),
        float(law.sf(n_exceedances - 1)),
        float(law.cdf(n_exceedances)),
    )


def christoffersen(
    is_exceedance: Bool[Array, " days"], *, level: float, condition_on_first: bool = False
) -> Christoffersen:
    r"""Independence against a first-order Markov chain, and conditional coverage.

    Independence: null P(exceedance | yesterday) does not depend on yesterday;
    $LR_{ind} = 2\,[\ell(\hat\pi_{01}, \hat\pi_{11}) - \ell(\hat\pi)]$ over the n - 1 transitions, chi-square(1).
    Conditional coverage: null both that and P = p; $LR_{cc} = LR_{pof} + LR_{ind}$, chi-square(2).
    Christoffersen (1998). Without two kinds of days the independence statistic is 0.

    Args:
      is_exceedance: one flag per day, in order of time.
      level: confidence of VaR.
      condition_on_first: leave the first day out of the unconditional part too; the sum is then the exact likelihood
        ratio given the first day. Otherwise that part counts every day, as is common.

    Raises:
      InputError: level outside (0, 1), fewer than 2 days, or flags other than 0 and 1.
    """
    check_level(level)
    hit = flags("is_exceedance", is_exceedance, at_least=2)
    table = np.zeros((2, 2), dtype=np.int64)
    np.add.at(table, (hit[:-1].astype(int), hit[1:].astype(int)), 1)
    counted = hit[1:] if condition_on_first else hit
    unconditional = kupiec(int(counted.sum()), counted.size, level=level)
    after = table.sum(axis=1)
    pooled = table[:, 1].sum() / table.sum()
    independence = _ratio(sum(_relative_entropy(int(table[i, 1]), int(after[i]), pooled) for i in (0, 1)), 1)
    both = _ratio(unconditional.statistic + independence.statistic, 2)
    return Christoffersen(unconditional, independence, both, table)


def time_until_first(is_exceedance: Bool[Array, " days"], *, level: float) -> LikelihoodRatio:
    r"""Null: the day v of the first exceedance is geometric with probability p.

    $LR = 2\,[\log\frac1v + (v-1)\log(1-\frac1v) - \log p - (v-1)\log(1-p)]$, chi-square(1). A record of n days without
    any is censored: $LR = -2 n \log(1-p)$. Kupiec (1995). Weak on its own: one number from the whole record.

    Raises:
      InputError: level outside (0, 1), no days, or flags other than 0 and 1.
    """
    check_level(level)
    hit = flags("is_exceedance", is_exceedance)
    if not hit.any():
        return _ratio(-2.0 * hit.size * np.log1p(-(1.0 - level)), 1)
    return _ratio(_relative_entropy(1, int(np.argmax(hit)) + 1, 1.0 - level), 1)


def mixed_kupiec(is_exceedance: Bool[Array, " days"], *, level: float) -> LikelihoodRatio:
    r"""Null: exceedances are independent with probability p.

    The sum of Kupiec's ratio and of one time-until-failure ratio for each exceedance, $v_i$ days after the one before:
    chi-square with x + 1 degrees of freedom. The days after the last exceedance count only in the first part.
    Haas (2001). Each spacing's ratio is only roughly chi-square and the errors add up: with 50 expected exceedances
    the nominal 5 % test rejects 20 % of correct forecasts. Take `monte_carlo_p_value`.

    Raises:
      InputError: level outside (0, 1), no days, or flags other than 0 and 1.
    """
    check_level(level)
    hit = flags("is_exceedance", is_exceedance)
    waits = np.diff(np.flatnonzero(hit), prepend=-1)
    spacing = sum(_relative_entropy(1, int(v), 1.0 - level) for v in waits)
    return _ratio(kupiec(waits.size, hit.size, level=level).statistic + spacing, waits.size + 1)


def dynamic_quantile(
    is_exceedance: Bool[Array, " days"],
    value_at_risk: Float[Array, " days"] | None = None,
    *,
    level: float,
    n_lags: int = 4,
) -> DynamicQuantile:
    r"""Null: Hit_t = 1{loss > VaR} - p has mean 0 and is orthogonal to what is known before day t.

    Regression of Hit on a constant, `n_lags` of its own lags and, when given, VaR_t;
    $DQ = \widehat{Hit}'\widehat{Hit}/(p(1-p))$ with the fitted values, which is
    $\hat\beta' X'X \hat\beta/(p(1-p))$: chi-square with rank(X) degrees of freedom. Columns that repeat others (a
    constant VaR, a record without exceedances) lower the rank and with it the degrees of freedom.
    Engle & Manganelli (2004).

    Raises:
      InputError: level outside (0, 1), lengths differ, n_lags below 0 or fewer than 2 (n_lags + 2) days.
    """
    check_level(level)
    whole("n_lags", n_lags, low=0)
    at_least = 2 * (n_lags + 2)
    hit = flags("is_exceedance", is_exceedance, at_least=at_least) - (1.0 - level)
    rows = hit.size - n_lags
    columns = [np.ones(rows)] + [hit[n_lags - k : n_lags - k + rows] for k in range(1, n_lags + 1)]
    if value_at_risk is not None:
        value_at_risk = numbers("value_at_risk", value_at_risk)
        same_length(is_exceedance=hit, value_at_risk=value_at_risk)
        columns.append(value_at_risk[n_lags:])
    design = np.stack(columns, axis=1)
    # Unit columns, so that the rank does not depend on the currency that VaR is in.
    norm = np.linalg.norm(design, axis=0)
    norm = np.where(norm > 0.0, norm, 1.0)
    left, singular, right = np.linalg.svd(design / norm, full_matrices=False)
    rank = int(np.count_nonzero(singular > 1e-9 * singular[0]))
    seen = left[:, :rank].T @ hit[n_lags:]
    coefficients = right[:rank].T @ (seen / singular[:rank]) / norm
    statistic = float(seen @ seen / (level * (1.0 - level)))
    return DynamicQuantile(statistic, _chi2_sf(statistic, rank), rank, coefficients)


def traffic_light(
    n_exceedances: int, n_days: int = 250, *, level: float = 0.99, edition: Literal["1996", "2019"] = "2019"
) -> TrafficLight:
    """Basel's zones: green where P(X <= x) < 95 %, red where P(X <= x) >= 99.99 %, yellow between.

    With 250 days at 99 %: yellow from 5, red from 10 exceedances. The multiplier on the capital charge is tabulated for
    that case only: 3 plus 0 to 1 (edition 1996), or 1.5 plus 0 to 0.5 (edition 2019, MAR32.9). `p_value` is P(X >= x),
    the probability of at least as many exceedances when VaR is right.

    Raises:
      InputError: level outside (0, 1), a count outside 0 .. n_days or an unknown edition.
    """
    if edition not in _MULTIPLIERS:
        raise InputError(f"edition is {edition!r}; choose from {', '.join(_MULTIPLIERS)}.")
    test = exact_binomial(n_exceedances, n_days, level=level)
    is_tabulated = n_days == 250 and abs(level - 0.99) < 1e-12
    zone = "green" if test.p_too_few < 0.95 else "yellow" if test.p_too_few < 0.9999 else "red"
    table = _MULTIPLIERS[edition]
    multiplier = table[min(max(n_exceedances - 4, 0), len(table) - 1)] if is_tabulated else None
    return TrafficLight(zone, test.p_too_few, test.p_too_many, multiplier)


_MULTIPLIERS = {
    "1996": (3.0, 3.4, 3.5, 3.65, 3.75, 3.85, 4.0),
    "2019": (1.5, 1.7, 1.76, 1.83, 1.88, 1.92, 2.0),
}


def weibull_duration(is_exceedance: Bool[Array, " days"], *, level: float) -> DurationTest:
    r"""Null: the days D between exceedances have no memory (independence), and mean 1/p (conditional coverage).

    $f(D) = a^b b D^{b-1} e^{-(aD)^b}$ with the exponential law b = 1 inside; the first and the last stretch enter by
    their survival probability $e^{-(aD)^b}$ unless they begin or end with an exceedance. Independence: b = 1,
    chi-square(1). Conditional coverage: b = 1 and a = p, chi-square(2). Christoffersen & Pelletier (2004).

    A day is short beside 1/p = 100 days but not beside 20: at levels below about 0.98 take `monte_carlo_p_value`, as
    whole days then look more regular than the continuous law. b is sought in [0.05, 20].
    NaN with fewer than 3 exceedances (2 whole durations), where b has no maximum.

    Raises:
      InputError: level outside (0, 1), no days, or flags other than 0 and 1.
    """
    from scipy import optimize

    check_level(level)
    hit = flags("is_exceedance", is_exceedance)
    days = np.flatnonzero(hit)
    if days.size < 3:
        nothing = float("nan")
        undefined = LikelihoodRatio(nothing, nothing, 1), LikelihoodRatio(nothing, nothing, 2)
        return DurationTest(*undefined, nothing, nothing, max(days.size - 1, 0))
    whole_days = np.diff(days).astype(np.float64)
    cut = np.array([days[0] + 1.0, hit.size - 1.0 - days[-1]])
    if hit[0]:
        cut[0] = 0.0
    log_days = np.log(np.concatenate([whole_days, cut[cut > 0.0]]))
    n, sum_log = whole_days.size, np.log(whole_days).sum()

    def profile(log_shape: float) -> float:
        # The rate is maximised out: a^b = n / sum D^b, with the largest term taken out of the sum.
        shape = np.exp(log_shape)
        log_sum = np.logaddexp.reduce(shape * log_days)
        return n * (np.log(n) - log_sum + log_shape - 1.0) + (shape - 1.0) * sum_log

    bounds = np.log([0.05, 20.0])
    search = {"bounds": bounds, "method": "bounded", "options": {"xatol": 1e-8}}
    best: Any = optimize.minimize_scalar(lambda x: -profile(x), **search)
    shape = float(np.exp(best.x))
    rate = float(np.exp((np.log(n) - np.logaddexp.reduce(shape * log_days)) / shape))
    top, p = max(-float(best.fun), profile(0.0)), 1.0 - level
    fixed = n * np.log(p) - p * np.exp(log_days).sum()
    return DurationTest(_ratio(2.0 * (top - profile(0.0)), 1), _ratio(2.0 * (top - fixed), 2), shape, rate, n)


def monte_carlo_p_value(
    statistic: Callable[[Any], float],
    is_exceedance: Bool[Array, " days"],
    *,
    level: float,
    n_draws: int = 999,
    seed: int,
) -> float:
    """p-value of any statistic of the flags under independent exceedances with probability 1 - level.

    Draws records of the same length, and breaks ties between the statistics (there are many, as counts are whole) at
    random, which makes the test exact when n_draws + 1 is a multiple of 1 / size. Records on which the statistic is NaN
    are left out. Dufour (2006).

    Args:
      statistic: of a boolean vector; large is bad, e.g. `lambda hit: christoffersen(hit, level=a).conditional[0]`.
      is_exceedance: the record.
      level: confidence of VaR.
      n_draws: records drawn.
      seed: of NumPy's default generator; the same seed gives the same p-value.

    Raises:
      InputError: level outside (0, 1), no draws, no days, or flags other than 0 and 1.
    """
    check_level(level)
    whole("n_draws", n_draws, low=1)
    hit = flags("is_exceedance", is_exceedance)
    observed = float(statistic(hit))
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(generator.random(hit.size) < 1.0 - level) for _ in range(n_draws)])
    tie_break = generator.random(n_draws + 1)
    if np.isnan(observed):
        return float("nan")
    # Sums of logs differ in the last digits between records that are really tied.
    slack = 1e-9 * (1.0 + abs(observed))
    is_tied = np.abs(drawn - observed) <= slack
    worse = np.where(is_tied, tie_break[:-1] >= tie_break[-1], drawn > observed)
    return float((1 + np.count_nonzero(worse)) / (1 + np.count_nonzero(~np.isnan(drawn))))


def value_at_risk_interval(loss: Float[Array, " paths"], *, level: float, coverage: float = 0.95) -> Interval:
    r"""Confidence interval of VaR between two order statistics; no density is needed.

    $P(L_{(r)} \le q < L_{(s)}) = P(r \le \mathrm{Bin}(n, a) < s)$ for a continuous law (at least that with atoms):
    the largest r and the smallest s that leave out at most (1 - coverage)/2 on each side. David & Nagaraja (2003), 7.1.

    Raises:
      InputError: level or coverage outside (0, 1), or too few losses for order statistics on both sides.
    """
    from scipy import stats

    check_level(level)
    check_level(coverage)
    ordered = np.sort(numbers("loss", loss))
    n, miss = ordered.size, (1.0 - coverage) / 2.0
    law = stats.binom(n, level)
    low = int(law.ppf(miss))
    high = int(law.ppf(1.0 - miss)) + 1
    if low < 1 or high > n:
        raise InputError(
            f"loss has {n} values; that is too few for a {coverage:g} interval of the quantile at {level:g}: "
            "give more paths or lower the coverage."
        )
    covered = float(law.cdf(high - 1) - law.cdf(low - 1))
    return Interval(float(ordered[low - 1]), float(ordered[high - 1]), low, high, covered)


def _relative_entropy(n_events: int, n_trials: int, p: float) -> float:
    # Twice the log-likelihood of a binomial at its own frequency above that at p.
    from scipy.special import xlogy

    if n_trials == 0:
        return 0.0
    rest, share = n_trials - n_events, n_events / n_trials
    ratio = xlogy(n_events, share) - xlogy(n_events, p) + xlogy(rest, 1.0 - share) - xlogy(rest, 1.0 - p)
    return 2.0 * float(ratio)


def _ratio(statistic: float, dof: int) -> LikelihoodRatio:
    # Rounding can take a likelihood ratio of equal models below zero.
    statistic = max(float(statistic), 0.0)
    return LikelihoodRatio(statistic, _chi2_sf(statistic, dof), dof)


def _chi2_sf(statistic: float, dof: int) -> float:
    from scipy.special import chdtrc

    return float(chdtrc(dof, statistic)) if dof > 0 else 1.0
