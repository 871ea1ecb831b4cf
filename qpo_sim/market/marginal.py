r"""Laws of one asset's standardised return as monotone maps: the margins of a copula.

A margin has `quantile(u)` and `cdf(x)` in float64 numpy, inverse to each other where the law has a density, with mean 0
and variance 1 unless it says otherwise. Everything here runs once, on the host, when a market is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from qpo_sim.errors import InputError, did_you_mean

# Fewest observations beyond a threshold that a tail is fitted to.
_MIN_EXCEEDANCES = 20


@runtime_checkable
class Margin(Protocol):
    """Law of one standardised return.

    `is_standardised` says that its mean is 0 and its variance 1.
    """

    @property
    def is_standardised(self) -> bool:
        """Whether mean and variance are 0 and 1."""
        ...

    def quantile(self, u: Any) -> np.ndarray:
        """Value below which the law has probability u, 0 < u < 1."""
        ...

    def cdf(self, x: Any) -> np.ndarray:
        """Probability of values up to x."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Standard normal margin."""

    is_standardised = True

    def quantile(self, u: Any) -> np.ndarray:
        """Quantile."""
        from scipy import special

        return special.ndtri(np.asarray(u, np.float64))

    def cdf(self, x: Any) -> np.ndarray:
        """Distribution function."""
        from scipy import special

        return special.ndtr(np.asarray(x, np.float64))


@dataclass(frozen=True)
class StudentT:
    """Student-t margin of unit variance with `dof` > 2 degrees of freedom."""

    dof: float
    is_standardised = True

    def __post_init__(self) -> None:
        """Checks the dof."""
        if not 2.0 < self.dof < np.inf:
            raise InputError(f"dof of a margin is {self.dof}; it must exceed 2 for the variance to exist.")

    @property
    def _scale(self) -> float:
        return float(np.sqrt((self.dof - 2.0) / self.dof))

    def quantile(self, u: Any) -> np.ndarray:
        """Quantile."""
        return self._scale * _t_quantile(self.dof, np.asarray(u, np.float64))

    def cdf(self, x: Any) -> np.ndarray:
        """Distribution function."""
        from scipy import special

        return special.stdtr(self.dof, np.asarray(x, np.float64) / self._scale)


@dataclass(frozen=True)
class HansenSkewT:
    r"""Skewed Student-t margin of Hansen (1994), "Autoregressive conditional density estimation".

    Two halves of a t density, scaled by $1-\lambda$ below and $1+\lambda$ above $-a/b$ with
    $a = 4\lambda c\frac{\nu-2}{\nu-1}$, $b^2 = 1+3\lambda^2-a^2$ and
    $c = \Gamma(\frac{\nu+1}2)/(\sqrt{\pi(\nu-2)}\,\Gamma(\frac\nu2))$. Both tails have the index $\nu$.

    Attributes:
      dof: degrees of freedom $\nu$ > 2.
      skew: $\lambda$ in (-1, 1); negative = heavier lower tail.
    """

    dof: float
    skew: float
    is_standardised = True

    def __post_init__(self) -> None:
        """Checks both parameters."""
        if not 2.0 < self.dof < np.inf:
            raise InputError(f"dof of a margin is {self.dof}; it must exceed 2 for the variance to exist.")
        if not -1.0 < self.skew < 1.0:
            raise InputError(f"skew of a margin is {self.skew}; Hansen's skewed t needs it strictly between -1 and 1.")

    @property
    def _constants(self) -> tuple[float, float, float]:
        from scipy import special

        log_c = special.gammaln((self.dof + 1.0) / 2.0) - special.gammaln(self.dof / 2.0)
        c = np.exp(log_c) / np.sqrt(np.pi * (self.dof - 2.0))
        a = 4.0 * self.skew * c * (self.dof - 2.0) / (self.dof - 1.0)
        return float(a), float(np.sqrt(1.0 + 3.0 * self.skew**2 - a**2)), float(np.sqrt((self.dof - 2.0) / self.dof))

    def quantile(self, u: Any) -> np.ndarray:
        """Quantile, in closed form."""
        u = np.asarray(u, np.float64)
        a, b, scale = self._constants
        below, above = 1.0 - self.skew, 1.0 + self.skew
        is_below = u < below / 2.0
        lower = below * _t_quantile(self.dof, np.where(is_below, u, below / 4.0) / below)
        upper = -above * _t_quantile(self.dof, np.where(is_below, above / 4.0, 1.0 - u) / above)
        return (scale * np.where(is_below, lower, upper) - a) / b

    def cdf(self, x: Any) -> np.ndarray:
        """Distribution function."""
        from scipy import special

        a, b, scale = self._constants
        y = (b * np.asarray(x, np.float64) + a) / scale
        below, above = 1.0 - self.skew, 1.0 + self.skew
        lower = below * special.stdtr(self.dof, np.minimum(y, 0.0) / below)
        upper = 1.0 - above * special.stdtr(self.dof, -np.maximum(y, 0.0) / above)
        return np.where(y < 0.0, lower, upper)


def _t_quantile(dof: float, u: np.ndarray) -> np.ndarray:
    from scipy import stats

    return np.asarray(stats.t.ppf(u, dof))


class GpdTail(NamedTuple):
    r"""Generalised Pareto tail: $P(|x| > t + y) = p\,(1+\xi y/\beta)^{-1/\xi}$ beyond a threshold t.

    McNeil & Frey (2000), "Estimation of tail-related risk measures for heteroscedastic financial time series".

    Attributes:
      threshold: value where the tail begins, in units of the data (for a lower tail usually negative).
      probability: p, of the tail.
      xi: shape, < 1; the tail has the index 1/xi.
      beta: scale, > 0.
    """

    threshold: float
    probability: float
    xi: float
    beta: float

    def excess(self, survival: np.ndarray) -> np.ndarray:
        """Distance beyond the threshold that is exceeded with conditional probability `survival`."""
        log = np.log(survival)
        if abs(self.xi) < 1e-9:
            return -self.beta * log
        return self.beta * np.expm1(-self.xi * log) / self.xi

    def survival(self, excess: np.ndarray) -> np.ndarray:
        """Conditional probability of exceeding the threshold by `excess` >= 0."""
        if abs(self.xi) < 1e-9:
            return np.exp(-excess / self.beta)
        # A negative xi ends the support at beta / -xi.
        inside = np.maximum(1.0 + self.xi * excess / self.beta, 0.0)
        with np.errstate(divide="ignore"):
            return np.exp(-np.log(inside) / self.xi)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and mean square of the excess; infinite for xi >= 1 and xi >= 1/2."""
        mean = self.beta / (1.0 - self.xi) if self.xi < 1.0 else np.inf
        if self.xi >= 0.5:
            return mean, np.inf
        return mean, 2.0 * self.beta**2 / ((1.0 - self.xi) * (1.0 - 2.0 * self.xi))


@dataclass(frozen=True, eq=False)
class SemiParametric:
    """Piecewise linear distribution function between two generalised Pareto tails (either may be missing).

    Build it with `semi_parametric` or `empirical`. `location` and `scale` are mean and standard deviation of the law in
    units of the data; the margin is that of (x - location) / scale.

    Attributes:
      points: rising values of the body, in units of the data.
      levels: probability up to each of them.
      lower: tail below the first point, None where the law ends there.
      upper: tail above the last point.
      location: subtracted.
      scale: divided by.
      is_standardised: whether location and scale are those of the law.
    """

    points: np.ndarray
    levels: np.ndarray
    lower: GpdTail | None
    upper: GpdTail | None
    location: float = 0.0
    scale: float = 1.0
    is_standardised: bool = False

    def quantile(self, u: Any) -> np.ndarray:
        """Quantile."""
        u = np.asarray(u, np.float64)
        x = np.interp(u, self.levels, self.points)
        if self.lower is not None:
            survival = np.minimum(u / self.lower.probability, 1.0)
            x = np.where(u < self.lower.probability, self.points[0] - self.lower.excess(survival), x)
        if self.upper is not None:
            survival = np.minimum((1.0 - u) / self.upper.probability, 1.0)
            x = np.where(1.0 - u < self.upper.probability, self.points[-1] + self.upper.excess(survival), x)
        return (x - self.location) / self.scale

    def cdf(self, x: Any) -> np.ndarray:
        """Distribution function."""
        x = self.location + self.scale * np.asarray(x, np.float64)
        # Of equal points the last one counts: all of them are up to x.
        last = np.append(np.diff(self.points) > 0.0, True)
        u = np.interp(x, self.points[last], self.levels[last])
        u = np.where(x < self.points[0], 0.0, np.where(x >= self.points[-1], 1.0, u))
        if self.lower is not None:
            survival = self.lower.survival(np.maximum(self.points[0] - x, 0.0))
            u = np.where(x < self.points[0], self.lower.probability * survival, u)
        if self.upper is not None:
            survival = self.upper.survival(np.maximum(x - self.points[-1], 0.0))
            u = np.where(x >= self.points[-1], 1.0 - self.upper.probability * survival, u)
        return u

    def raw_moments(self) -> tuple[float, float]:
        """Mean and variance in units of the data, exact for this law; the variance is inf for a tail with xi >= 1/2."""
        weight = np.diff(self.levels)
        # About the middle of the body, so that nothing cancels.
        centre = float(np.median(self.points))
        a, b = self.points[:-1] - centre, self.points[1:] - centre
        mean, square = float(weight @ (a + b)) / 2.0, float(weight @ (a * a + a * b + b * b)) / 3.0
        for sign, tail, end in ((-1.0, self.lower, self.points[0]), (1.0, self.upper, self.points[-1])):
            if tail is not None:
                first, second = tail.moments
                start = float(end) - centre
                mean += tail.probability * (start + sign * first)
                square += tail.probability * (start**2 + 2.0 * sign * start * first + second)
        return centre + mean, square - mean**2

    def standardised(self) -> "SemiParametric":
        """The law with its own mean and standard deviation as location and scale.

        Raises:
          InputError: the variance is infinite (a tail with xi >= 1/2), or zero.
        """
        for name, tail in (("lower", self.lower), ("upper", self.upper)):
            if tail is not None and tail.xi >= 0.5:
                raise InputError(
                    f"xi of the {name} tail is {tail.xi:.3g}; it must be below 1/2 for the variance to exist: take "
                    "more data into the tail, or give xi."
                )
        mean, variance = self.raw_moments()
        if not variance > 0.0:
            raise InputError("the data of a margin have no variance.")
        return SemiParametric(
            self.points, self.levels, self.lower, self.upper, float(mean), float(np.sqrt(variance)), True
        )


def empirical(data: Any, *, standardise: bool = True) -> SemiParametric:
    """Empirical margin: linear between the order statistics, the k-th of n at the level (k-1)/(n-1).

    Nothing lies beyond the sample: losses worse than the worst observed one do not happen. See `semi_parametric`.

    Args:
      data: returns, NaN are left out.
      standardise: see `semi_parametric`.
    """
    x = _sample(data)
    law = SemiParametric(x, np.linspace(0.0, 1.0, x.size), None, None)
    return law.standardised() if standardise else law


def semi_parametric(
    data: Any,
    *,
    lower: float | GpdTail | Mapping[str, float] | None = 0.1,
    upper: float | GpdTail | Mapping[str, float] | None = 0.1,
    standardise: bool = True,
) -> SemiParametric:
    """Empirical body with generalised Pareto tails.

    Args:
      data: returns, NaN are left out.
      lower: lower tail. A number is its probability: the threshold is that quantile of the data, xi and beta are fitted
        by maximum likelihood to the excesses. A `GpdTail` (or its fields by name) is taken as it is. None ends the law
        at the smallest observation.
      upper: upper tail, likewise.
      standardise: scale to mean 0 and variance 1, which needs xi < 1/2 in both tails; otherwise the law is that of the
        data, and xi < 1 (finite mean) is enough.

    Raises:
      InputError: fewer than 2 observations (20 in a fitted tail), xi >= 1, xi >= 1/2 where the variance is needed,
        tails that overlap, or a probability outside (0, 1/2).
    """
    x = _sample(data)
    low, high = _tail("lower", x, lower, -1.0), _tail("upper", x, upper, 1.0)
    below, start = (x[0], 0.0) if low is None else (low.threshold, low.probability)
    above, end = (x[-1], 1.0) if high is None else (high.threshold, 1.0 - high.probability)
    if not below < above:
        raise InputError(f"the lower tail begins at {below}, the upper one at {above}; they overlap.")
    body = np.concatenate([[below], x[(x > below) & (x < above)], [above]])
    law = SemiParametric(body, np.linspace(start, end, body.size), low, high)
    return law.standardised() if standardise else law


def _sample(data: Any) -> np.ndarray:
    x = np.asarray(data, np.float64).ravel()
    x = np.sort(x[~np.isnan(x)])
    if x.size < 2 or not np.all(np.isfinite(x)):
        raise InputError(f"a margin needs at least 2 finite observations, got {x.size}.")
    return x


def _tail(name: str, x: np.ndarray, given: Any, sign: float) -> GpdTail | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        if set(given) != set(GpdTail._fields):
            raise InputError(f"the {name} tail has {sorted(given)}; it needs {', '.join(GpdTail._fields)}.")
        given = GpdTail(**{key: float(value) for key, value in given.items()})
    probability = given.probability if isinstance(given, GpdTail) else float(given)
    if not 0.0 < probability < 0.5:
        raise InputError(
            f"the probability of the {name} tail is {probability}; it must lie strictly between 0 and 1/2."
        )
    tail = given if isinstance(given, GpdTail) else _fitted_tail(name, x, probability, sign)
    if not tail.beta > 0.0:
        raise InputError(f"beta of the {name} tail is {tail.beta}; it must be positive.")
    if not tail.xi < 1.0:
        raise InputError(f"xi of the {name} tail is {tail.xi:.3g}; it must be below 1 for the mean to exist.")
    return tail


def _fitted_tail(name: str, x: np.ndarray, probability: float, sign: float) -> GpdTail:
    from scipy import stats

    threshold = float(np.quantile(x, probability if sign < 0.0 else 1.0 - probability))
    excess = sign * (x - threshold)
    excess = excess[excess > 0.0]
    if excess.size < _MIN_EXCEEDANCES:
        raise InputError(
            f"the {name} tail has {excess.size} observations, fewer than {_MIN_EXCEEDANCES}: raise its probability, or "
            "give threshold, probability, xi and beta."
        )
    xi, _, beta = stats.genpareto.fit(excess, floc=0.0)
    return GpdTail(threshold, probability, float(xi), float(beta))


KINDS = {
    "gaussian": Gaussian,
    "student_t": StudentT,
    "hansen_skew_t": HansenSkewT,
    "empirical": empirical,
    "semi_parametric": semi_parametric,
}


def margins(described: Any, n_assets: int) -> tuple[Margin, ...]:
    """One margin per asset from margins, or from descriptions such as `{kind: hansen_skew_t, dof: 4, skew: -0.1}`.

    Args:
      described: one for all assets, or a sequence of one per asset. In one description for all, a parameter may be a
        sequence of one value per asset, and `data` a (dates, assets) array.
      n_assets: number of assets.

    Raises:
      InputError: a wrong number of margins, an unknown kind or parameter, or one the margin refuses.
    """
    if not isinstance(described, Mapping | Margin):
        given = tuple(described)
        if len(given) != n_assets:
            raise InputError(f"{len(given)} margins are given for {n_assets} assets; give one, or one per asset.")
        return tuple(_margin(one, 0, 1) for one in given)
    return tuple(_margin(described, i, n_assets) for i in range(n_assets))


def _margin(described: Any, asset: int, n_assets: int) -> Margin:
    if isinstance(described, Margin):
        return described
    if not isinstance(described, Mapping) or "kind" not in described:
        raise InputError(f"a margin is {described!r}; it must be a margin, or a table with a kind.")
    kind = described["kind"]
    if kind not in KINDS:
        raise InputError(f"kind of a margin is {kind!r}; {did_you_mean(str(kind), KINDS)}")

    def own(name: str, value: Any) -> Any:
        if isinstance(value, Mapping | GpdTail | str) or value is None or np.ndim(value) == 0:
            return value
        values = np.asarray(value, np.float64)
        if name == "data":
            if values.ndim == 2 and values.shape[1] != n_assets:
                raise InputError(f"data of a margin have {values.shape[1]} columns for {n_assets} assets.")
            return values[:, asset] if values.ndim == 2 else values
        if values.shape != (n_assets,):
            raise InputError(
                f"{name} of a margin has the shape {values.shape}; give one number, or {n_assets} of them."
            )
        return float(values[asset])

    options = {name: own(name, value) for name, value in described.items() if name != "kind"}
    try:
        return KINDS[kind](**options)
    except TypeError as error:
        raise InputError(f"a margin of kind {kind} does not go with {', '.join(options) or 'no options'}.") from error
