r"""Scores of forecasts: the lower, the better; the expectation is lowest at the truth (strictly consistent or proper).

Each function gives one value per day, for `comparison`. Losses are positive numbers for money lost.
"""

import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError, check_level
from qpo_sim.types import Array
from qpo_sim.validation.inputs import numbers, same_length


def quantile_score(
    loss: Float[Array, " days"], value_at_risk: Float[Array, " days"], *, level: float
) -> Float[Array, " days"]:
    r"""Pinball score $(1\{L \le v\} - a)(v - L)$, consistent for VaR at level a; in the loss's unit.

    Koenker & Bassett (1978); Gneiting (2011).

    Raises:
      InputError: not finite, lengths differ, or a level outside (0, 1).
    """
    check_level(level)
    loss, value_at_risk = numbers("loss", loss), numbers("value_at_risk", value_at_risk)
    same_length(loss=loss, value_at_risk=value_at_risk)
    excess = loss - value_at_risk
    return np.maximum(level * excess, (level - 1.0) * excess)


def joint_score(
    loss: Float[Array, " days"],
    value_at_risk: Float[Array, " days"],
    expected_shortfall: Float[Array, " days"],
    *,
    level: float,
) -> Float[Array, " days"]:
    r"""Fissler-Ziegel score FZ0, $\frac{(L-v)^+}{(1-a)e} + \frac{v}{e} + \log e - 1$, consistent for (VaR, ES) jointly.

    Score differences do not depend on the unit of the losses. ES alone has no consistent score.
    Fissler & Ziegel (2016); Patton, Ziegel & Chen (2019), eq. 6 in losses.

    Raises:
      InputError: not finite, lengths differ, a level outside (0, 1), or an ES at or below 0 or below VaR.
    """
    check_level(level)
    loss, value_at_risk = numbers("loss", loss), numbers("value_at_risk", value_at_risk)
    expected_shortfall = numbers("expected_shortfall", expected_shortfall)
    same_length(loss=loss, value_at_risk=value_at_risk, expected_shortfall=expected_shortfall)
    if (wrong := (expected_shortfall <= 0.0) | (expected_shortfall < value_at_risk)).any():
        at = int(np.argmax(wrong))
        raise InputError(
            f"expected_shortfall at {at} is {expected_shortfall[at]} with VaR {value_at_risk[at]}; "
            "it must be above 0 and at least VaR."
        )
    beyond = np.maximum(loss - value_at_risk, 0.0) / (1.0 - level)
    return (beyond + value_at_risk) / expected_shortfall + np.log(expected_shortfall) - 1.0


def crps(
    outcome: Float[Array, " days"], sample: Float[Array, "days draws"], *, is_fair: bool = True
) -> Float[Array, " days"]:
    r"""Continuous ranked probability score $E|X-y| - \frac12 E|X-X'|$ of a forecast known by its draws.

    `is_fair` divides the second mean by n (n - 1), which is unbiased for the law behind the draws; otherwise by n^2,
    the score of the draws' own distribution function. In the outcome's unit. Gneiting & Raftery (2007); Ferro (2014).

    Raises:
      InputError: not finite, lengths differ, or fewer than 2 draws.
    """
    outcome, sample = numbers("outcome", outcome), numbers("sample", sample, axes=2)
    same_length(outcome=outcome, sample=sample)
    n = _enough_draws(sample.shape[1])
    near = np.abs(sample - outcome[:, None]).mean(axis=1)
    # Sum over pairs of |x_i - x_j| from the order statistics.
    spread = np.sort(sample, axis=1) @ (2.0 * np.arange(1, n + 1) - n - 1.0)
    return near - spread / (n * (n - 1) if is_fair else n * n)


def log_score(outcome: Float[Array, " days"], sample: Float[Array, "days draws"]) -> Float[Array, " days"]:
    r"""$-\log f(y)$ with f a Gaussian kernel density of the draws (Silverman's bandwidth).

    The kernel widens the forecast and its tail is normal: outside the draws' range the score says more about the kernel
    than about the forecast. Use the model's own density where it has one. Silverman (1986), eq. 3.31.

    Raises:
      InputError: not finite, lengths differ, fewer than 2 draws, or a day whose draws are all equal.
    """
    outcome, sample = numbers("outcome", outcome), numbers("sample", sample, axes=2)
    same_length(outcome=outcome, sample=sample)
    n = _enough_draws(sample.shape[1])
    deviation = sample.std(axis=1, ddof=1)
    lower, upper = np.quantile(sample, [0.25, 0.75], axis=1)
    middle = (upper - lower) / 1.349
    width = 0.9 * np.where(middle > 0.0, np.minimum(deviation, middle), deviation) * n**-0.2
    if (width <= 0.0).any():
        raise InputError(f"sample at row {int(np.argmin(width))} has equal draws; a density needs draws that differ.")
    distance = (outcome[:, None] - sample) / width[:, None]
    kernel = np.logaddexp.reduce(-0.5 * distance**2, axis=1)
    return np.log(n * width * np.sqrt(2.0 * np.pi)) - kernel


def energy_score(
    outcome: Float[Array, "days assets"], sample: Float[Array, "days draws assets"], *, is_fair: bool = True
) -> Float[Array, " days"]:
    r"""$E\|X-y\| - \frac12 E\|X-X'\|$ with the Euclidean norm: CRPS for several assets at once.

    Sensitive to means and scales, little to dependence: look at `variogram_score` beside it. Assets should be in like
    units. Work grows with the square of the draws. Gneiting & Raftery (2007); Pinson & Tastu (2013) on sensitivity.

    Raises:
      InputError: not finite, shapes that do not match, or fewer than 2 draws.
    """
    from scipy.spatial.distance import pdist

    outcome, sample = _multivariate(outcome, sample)
    n = _enough_draws(sample.shape[1])
    near = np.linalg.norm(sample - outcome[:, None, :], axis=2).mean(axis=1)
    spread = np.array([pdist(day).sum() for day in sample])
    return near - spread / (n * (n - 1) if is_fair else n * n)


def variogram_score(
    outcome: Float[Array, "days assets"], sample: Float[Array, "days draws assets"], *, order: float = 0.5
) -> Float[Array, " days"]:
    r"""$\sum_{i<j} (|y_i-y_j|^q - E|X_i-X_j|^q)^2$: sensitive to dependence, blind to a shift of all assets.

    Proper, not strictly. Scheuerer & Hamill (2015), order q = 0.5 as they advise for heavy tails; equal weights.

    Raises:
      InputError: not finite, shapes that do not match, fewer than 2 assets, or an order at or below 0.
    """
    outcome, sample = _multivariate(outcome, sample)
    if outcome.shape[1] < 2:
        raise InputError(f"outcome has {outcome.shape[1]} asset; the variogram score needs at least 2.")
    if not order > 0.0:
        raise InputError(f"order is {order}; it must be above 0, e.g. 0.5.")
    first, second = np.triu_indices(outcome.shape[1], 1)
    seen = np.abs(outcome[:, first] - outcome[:, second]) ** order
    expected = (np.abs(sample[:, :, first] - sample[:, :, second]) ** order).mean(axis=1)
    return ((seen - expected) ** 2).sum(axis=1)


def _enough_draws(n: int) -> int:
    if n < 2:
        raise InputError(f"sample has {n} draw per day; at least 2 are needed.")
    return n


def _multivariate(outcome: Array, sample: Array) -> tuple[np.ndarray, np.ndarray]:
    outcome, sample = numbers("outcome", outcome, axes=2), numbers("sample", sample, axes=3)
    same_length(outcome=outcome, sample=sample)
    if outcome.shape[1] != sample.shape[2]:
        raise InputError(f"outcome has {outcome.shape[1]} assets, sample {sample.shape[2]}; they must be the same.")
    return outcome, sample
