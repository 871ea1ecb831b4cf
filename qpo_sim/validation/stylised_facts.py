r"""What the returns of financial assets have in common, measured on a record and on simulated paths alike.

Returns are log-returns per step (a day, say), shaped dates by assets, oldest first. "down" is the side of the losses.
The facts follow Cont (2001). Sample kurtosis is not among them: tails as heavy as those of digital assets leave it
without a limit. Tails are described by Hill's estimator and by ratios of quantiles.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.types import Array
from qpo_sim.validation.inputs import monte_carlo_p, numbers, whole

_NORMAL_99, _NORMAL_75, _NORMAL_975 = 2.3263478740408408, 0.6744897501960817, 1.959963984540054


class Hill(NamedTuple):
    r"""Tail of a law with $P(X > x) \sim x^{-1/\xi}$: xi, its standard error and the threshold; entries follow k."""

    n_upper: Array
    xi: Array
    std_error: Array
    threshold: Array


class Autocorrelation(NamedTuple):
    """Autocorrelations (lags from 1 by assets) and the 95 % band, half-width, of independent values."""

    value: Float[Array, "lags assets"]
    band: float


class CoExceedance(NamedTuple):
    """P(asset j beyond its quantile | asset i beyond its own), symmetric, 1 on the diagonal; 95 % Wilson intervals."""

    value: Float[Array, "assets assets"]
    low: Float[Array, "assets assets"]
    high: Float[Array, "assets assets"]
    n_days: int


class Comparison(NamedTuple):
    """Facts (rows) by assets (columns): the record's value, the paths' law, and the Monte Carlo p-value."""

    facts: tuple[str, ...]
    historical: Float[Array, "facts assets"]
    mean: Float[Array, "facts assets"]
    quantiles: Float[Array, "quantiles facts assets"]
    p_value: Float[Array, "facts assets"]
    levels: tuple[float, ...]


def hill(values: Float[Array, " n"], n_upper: int | Sequence[int]) -> Hill:
    r"""Hill's estimator $\hat\xi = \frac1k\sum_{i\le k}\log X_{(i)} - \log X_{(k+1)}$ of the upper tail.

    $X_{(1)} \ge X_{(2)} \ge \dots$; tail index 1/xi; standard error $\hat\xi/\sqrt k$ for independent values (clustered
    ones have more). Look at a range of k: the estimate means something where it is flat. Hill (1975).

    Args:
      values: a sample, of losses for the lower tail of returns.
      n_upper: how many of the largest values, k, or several such numbers.

    Raises:
      InputError: not finite, k outside 1 .. n - 1, or a threshold X_(k+1) that is not above 0.
    """
    ordered = np.sort(numbers("values", values, at_least=2))[::-1]
    k = np.atleast_1d(np.asarray(n_upper, dtype=np.int64))
    for number in k:
        whole("n_upper", int(number), low=1, high=ordered.size - 1)
    threshold = ordered[k]
    if (threshold <= 0.0).any():
        at = int(np.argmax(threshold <= 0.0))
        raise InputError(
            f"n_upper is {k[at]}, which makes the threshold {threshold[at]}; it must be above 0: take fewer values."
        )
    mean_log = np.cumsum(np.log(ordered[: k.max()]))[k - 1] / k
    xi = mean_log - np.log(threshold)
    error = xi / np.sqrt(k)
    if np.ndim(n_upper) == 0:
        return Hill(k[0], xi[0], error[0], threshold[0])
    return Hill(k, xi, error, threshold)


def tails(returns: Float[Array, "dates assets"], n_upper: int | Sequence[int]) -> dict[str, list[Hill]]:
    """Hill's estimator of both tails, per asset: {"down": [...], "up": [...]}. See `hill`."""
    returns = _returns(returns)
    return {side: [hill(sign * column, n_upper) for column in returns.T] for side, sign in _SIGN.items()}


def autocorrelation(
    returns: Float[Array, "dates assets"],
    n_lags: int,
    *,
    of: Literal["return", "absolute", "square"] = "return",
) -> Autocorrelation:
    r"""Sample autocorrelations of r, |r| or r^2 at lags 1 .. n_lags, about the full mean and over the full variance.

    The band is $1.96/\sqrt n$, for independent values of finite variance: the squares of heavy-tailed returns have
    none, so read |r| first. Bartlett (1946). An asset that never moves gives NaN.

    Raises:
      InputError: not finite, an unknown `of`, or n_lags outside 1 .. dates - 1.
    """
    returns = _returns(returns)
    whole("n_lags", n_lags, low=1, high=len(returns) - 1)
    if of not in ("return", "absolute", "square"):
        raise InputError(f"of is {of!r}; choose return, absolute or square.")
    values = {"return": returns, "absolute": np.abs(returns), "square": returns**2}[of]
    return Autocorrelation(_lagged(values, values, n_lags), _NORMAL_975 / len(returns) ** 0.5)


def leverage_effect(returns: Float[Array, "dates assets"], n_lags: int) -> Autocorrelation:
    r"""Correlation of $r_t$ with $|r_{t+k}|$, k = 1 .. n_lags: below 0 when falls raise the volatility that follows.

    The absolute value stands for the square, whose correlation heavy tails leave to one or two days.
    Bouchaud, Matacz & Potters (2001) in that form. Same band as `autocorrelation`.

    Raises:
      InputError: not finite, or n_lags outside 1 .. dates - 1.
    """
    returns = _returns(returns)
    whole("n_lags", n_lags, low=1, high=len(returns) - 1)
    return Autocorrelation(_lagged(returns, np.abs(returns), n_lags), _NORMAL_975 / len(returns) ** 0.5)


def gain_loss_asymmetry(returns: Float[Array, "dates assets"], *, probability: float = 0.01) -> Float[Array, " assets"]:
    r"""Quantile skewness $(q_{1-u} + q_u - 2 q_{1/2})/(q_{1-u} - q_u)$ in [-1, 1]: below 0 when losses go further.

    Hinkley (1975); needs no moments. Quantiles are interpolated. NaN for an asset that never moves.

    Raises:
      InputError: not finite, or a probability outside (0, 0.5).
    """
    returns = _returns(returns)
    _tail_probability(probability)
    low, middle, high = np.quantile(returns, [probability, 0.5, 1.0 - probability], axis=0)
    return _divided(high + low - 2.0 * middle, high - low)


def scaled_quantile_ratio(
    returns: Float[Array, "dates assets"], horizons: Sequence[int] = (1, 5, 20)
) -> Float[Array, "horizons assets"]:
    r"""Weight of the tails of returns over h steps: $(q_{.99}-q_{.01})/(q_{.75}-q_{.25})$ over 3.449, its normal value.

    1 for normal returns and above it for heavy tails; aggregational normality is its fall towards 1 as h grows. Sums
    over h steps overlap, so at long horizons few of them are independent.

    Raises:
      InputError: not finite, or a horizon outside 1 .. dates - 1.
    """
    returns = _returns(returns)
    sums = np.concatenate([np.zeros((1, returns.shape[1])), np.cumsum(returns, axis=0)])
    rows = []
    for horizon in horizons:
        whole("horizons", horizon, low=1, high=len(returns) - 1)
        low, lower, upper, high = np.quantile(sums[horizon:] - sums[:-horizon], [0.01, 0.25, 0.75, 0.99], axis=0)
        rows.append(_divided(high - low, upper - lower) * _NORMAL_75 / _NORMAL_99)
    return np.stack(rows)


def co_exceedance(
    returns: Float[Array, "dates assets"], side: Literal["down", "up"], *, probability: float = 0.05
) -> CoExceedance:
    r"""How often assets are in their tails together: P(j beyond | i beyond), each beyond its own sample quantile.

    The ceil(n u) most extreme days of each asset count; u itself is the value under independence. Wilson's interval
    takes days as independent; extremes cluster, so the truth is wider.

    Raises:
      InputError: not finite, an unknown side or a probability outside (0, 0.5).
    """
    returns = _returns(returns)
    _tail_probability(probability)
    if side not in _SIGN:
        raise InputError(f"side is {side!r}; choose down or up.")
    n_days = int(np.ceil(len(returns) * probability - 1e-9))
    value = _together(_SIGN[side] * returns, n_days)
    z2 = _NORMAL_975**2
    centre = (value + z2 / (2 * n_days)) / (1 + z2 / n_days)
    half = _NORMAL_975 * np.sqrt(value * (1 - value) / n_days + z2 / (4 * n_days**2)) / (1 + z2 / n_days)
    return CoExceedance(value, np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0), n_days)


def drawdowns(returns: Float[Array, "dates assets"]) -> Float[Array, "dates assets"]:
    """Fall below the highest value so far, as a share of it, in [0, 1); the value before the first step counts.

    Raises:
      InputError: not finite.
    """
    level = np.cumsum(_returns(returns), axis=0)
    peak = np.maximum(np.maximum.accumulate(level, axis=0), 0.0)
    return -np.expm1(level - peak)


def drawdown_quantiles(
    returns: Float[Array, "dates assets"], levels: Sequence[float] = (0.5, 0.9, 1.0)
) -> Float[Array, "levels assets"]:
    """Quantiles over time of the drawdown (inverse distribution function); level 1 is the maximum drawdown.

    Raises:
      InputError: not finite, or a level outside [0, 1].
    """
    return np.quantile(drawdowns(returns), _levels(levels), axis=0, method="inverted_cdf")


def volatility_quantiles(
    returns: Float[Array, "dates assets"], levels: Sequence[float] = (0.1, 0.5, 0.9), *, window: int = 20
) -> Float[Array, "levels assets"]:
    r"""Quantiles over time of the volatility per step, $\sqrt{\mathrm{mean}\,r^2}$ over a moving window.

    Raises:
      InputError: not finite, a level outside [0, 1], or a window outside 1 .. dates.
    """
    returns = _returns(returns)
    whole("window", window, low=1, high=len(returns))
    squares = np.lib.stride_tricks.sliding_window_view(returns**2, window, axis=0)
    return np.quantile(np.sqrt(squares.mean(axis=-1)), _levels(levels), axis=0)


Fact = Callable[[Float[Array, "dates assets"]], Float[Array, " assets"]]

# One number per asset each, so that a record and a path can be laid side by side. Hill uses the worst 5 % of days.
FACTS: Mapping[str, Fact] = {
    "hill_down": lambda r: _hill_share(-r),
    "hill_up": lambda r: _hill_share(r),
    "acf_return_lag_1": lambda r: _lagged(r, r, 1)[0],
    "acf_absolute_lag_1": lambda r: _lagged(np.abs(r), np.abs(r), 1)[0],
    "acf_absolute_mean_lags_1_20": lambda r: _lagged(np.abs(r), np.abs(r), 20).mean(axis=0),
    "acf_square_mean_lags_1_20": lambda r: _lagged(r**2, r**2, 20).mean(axis=0),
    "leverage_mean_lags_1_10": lambda r: _lagged(r, np.abs(r), 10).mean(axis=0),
    "gain_loss_asymmetry": gain_loss_asymmetry,
    "quantile_ratio_1": lambda r: scaled_quantile_ratio(r, (1,))[0],
    "quantile_ratio_5": lambda r: scaled_quantile_ratio(r, (5,))[0],
    "quantile_ratio_20": lambda r: scaled_quantile_ratio(r, (20,))[0],
    "co_exceedance_down": lambda r: _mean_with_others(r, "down"),
    "co_exceedance_up": lambda r: _mean_with_others(r, "up"),
    "drawdown_median": lambda r: drawdown_quantiles(r, (0.5,))[0],
    "drawdown_90": lambda r: drawdown_quantiles(r, (0.9,))[0],
    "drawdown_max": lambda r: drawdown_quantiles(r, (1.0,))[0],
    "volatility_10": lambda r: volatility_quantiles(r, (0.1,))[0],
    "volatility_50": lambda r: volatility_quantiles(r, (0.5,))[0],
    "volatility_90": lambda r: volatility_quantiles(r, (0.9,))[0],
}
MIN_DATES = 60


def compare(
    history: Float[Array, "dates assets"],
    simulated: Float[Array, "paths dates assets"],
    *,
    facts: Mapping[str, Fact] | None = None,
    levels: Sequence[float] = (0.05, 0.5, 0.95),
) -> Comparison:
    r"""The facts of a record beside their law over simulated paths of the same length.

    Null: the record is one more path of the model. Two-sided Monte Carlo p-value
    $\min(1, 2\min(1+\#\{s \le h\}, 1+\#\{s \ge h\})/(S+1))$ over S paths, exact without ties; its smallest value is
    2/(S+1). With F facts and A assets, F A times as many small p-values turn up by chance as at one: compare the
    smallest with a level divided by their number. A model fitted to the same record looks better than it is.

    Args:
      history: log-returns per step.
      simulated: paths of as many steps, in the same unit.
      facts: name -> function of returns (dates, assets) giving one number per asset; `FACTS` when omitted.
      levels: quantiles of the simulated values to give.

    Returns:
      See `Comparison`. A value that does not exist (co-exceedance of one asset, Hill's estimator with a threshold at or
      below 0) is NaN; paths on which it does not exist are left out.

    Raises:
      InputError: not finite, shapes that do not match, fewer than 60 dates or fewer than 2 paths.
    """
    history, simulated = numbers("history", history, axes=2), numbers("simulated", simulated, axes=3, at_least=2)
    if simulated.shape[1:] != history.shape:
        raise InputError(
            f"simulated paths have the shape (dates, assets) = {simulated.shape[1:]}, history {history.shape}; they "
            "must be the same, as the facts of short and long records differ: cut the longer one."
        )
    if len(history) < MIN_DATES:
        raise InputError(f"history has {len(history)} dates; at least {MIN_DATES} are needed.")
    chosen = FACTS if facts is None else facts
    levels = tuple(_levels(levels))
    seen = np.stack([_fact(chosen, name, history) for name in chosen])
    drawn = np.stack([[_fact(chosen, name, path) for name in chosen] for path in simulated])
    mean, p_value = np.full(seen.shape, np.nan), np.full(seen.shape, np.nan)
    quantiles = np.full((len(levels), *seen.shape), np.nan)
    for at in np.ndindex(seen.shape):
        values = drawn[(slice(None), *at)]
        values = values[~np.isnan(values)]
        if values.size:
            mean[at] = values.mean()
            quantiles[(slice(None), *at)] = np.quantile(values, levels)
            sides = (monte_carlo_p(float(seen[at]), values, is_low_bad=is_low) for is_low in (True, False))
            p_value[at] = min(1.0, 2.0 * min(sides))
    return Comparison(tuple(chosen), seen, mean, quantiles, p_value, levels)


_SIGN = {"down": -1.0, "up": 1.0}


def _fact(facts: Mapping[str, Fact], name: str, returns: Array) -> Array:
    value = np.asarray(facts[name](returns), dtype=np.float64)
    if value.shape != returns.shape[1:]:
        raise InputError(f"fact {name!r} gave the shape {value.shape}; it must give one number per asset.")
    return value


def _returns(returns: Any) -> np.ndarray:
    return numbers("returns", returns, axes=2, at_least=2)


def _levels(levels: Sequence[float]) -> list[float]:
    for level in levels:
        if not 0.0 <= level <= 1.0:
            raise InputError(f"levels holds {level}; each must lie between 0 and 1.")
    return [float(level) for level in levels]


def _tail_probability(probability: float) -> None:
    if not 0.0 < probability < 0.5:
        raise InputError(f"probability is {probability}; it must lie strictly between 0 and 0.5, e.g. 0.05.")


def _divided(value: Array, by: Array) -> Array:
    return np.where(by > 0.0, value / np.where(by > 0.0, by, 1.0), np.nan)


def _lagged(first: Array, second: Array, n_lags: int) -> Float[Array, "lags assets"]:
    # Correlation of first at t with second at t + k.
    n = len(first)
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.sqrt(np.sum(first**2, axis=0) * np.sum(second**2, axis=0))
    products = np.stack([np.sum(first[: n - k] * second[k:], axis=0) for k in range(1, n_lags + 1)])
    return _divided(products, scale)


def _hill_share(values: Array, share: float = 0.05) -> Float[Array, " assets"]:
    k = max(int(round(len(values) * share)), 2)
    ordered = np.sort(values, axis=0)[::-1][: k + 1]
    is_positive = ordered[k] > 0.0
    logs = np.log(np.where(is_positive, ordered, 1.0))
    return np.where(is_positive, logs[:k].mean(axis=0) - logs[k], np.nan)


def _together(values: Array, n_days: int) -> Float[Array, "assets assets"]:
    # By rank, so that ties at the quantile do not change the number of days.
    beyond = np.zeros(values.shape)
    worst = np.argsort(-values, axis=0, kind="stable")[:n_days]
    np.put_along_axis(beyond, worst, 1.0, axis=0)
    return beyond.T @ beyond / n_days


def _mean_with_others(
    returns: Array, side: Literal["down", "up"], probability: float = 0.05
) -> Float[Array, " assets"]:
    n_assets = returns.shape[1]
    if n_assets < 2:
        return np.full(n_assets, np.nan)
    n_days = int(np.ceil(len(returns) * probability - 1e-9))
    return (_together(_SIGN[side] * returns, n_days).sum(axis=0) - 1.0) / (n_assets - 1)
